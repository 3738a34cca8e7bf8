"""The search: what it tries, when it gives a trial up, and what a kill costs it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest

from ml.errors import InputError
from ml.learning import hyperparameter_search, search_space, training
from ml.learning.search_space import SPACES, STAGE_OF, Choice, Range, space_of
from ml.learning.training_data import read_labelled
from ml.progress import Progress
from ml.runner import StageContext, run_stage
from ml.stages import STAGES, StudentParameters, TeacherParameters
from tests.ml.tiny_models import TINY_TEACHER, distillation_inputs, stage_spec, tiny_encoder, tiny_inputs

LABELS = ["atlases", "kettles", "novels", "toasters"]


class FakeModel:
    """Right on a share of the offers that lies in its folder."""

    labels = LABELS

    def __init__(self, folder: Path, truth: list[str]) -> None:
        self._quality = json.loads((folder / "quality.json").read_text())
        self._truth = truth

    def predict_logits(self, texts: list[str]) -> np.ndarray:
        logits = np.zeros((len(texts), len(LABELS)), dtype=np.float32)
        right = [LABELS.index(category) for category in self._truth]
        for row, column in enumerate(right):
            wrong = row >= self._quality * len(right)
            logits[row, (column + 1) % len(LABELS) if wrong else column] = 1
        return logits


def fake_teacher(context: StageContext, parameters: TeacherParameters) -> dict[str, Any]:
    """Learns the better the nearer its rate is to 1e-4; says so after each epoch."""
    quality = max(0.0, 1 - abs(np.log10(parameters.learning_rate) + 4))
    for epoch in range(1, parameters.epochs + 1):
        context.progress.figures({"step": epoch * 10 - 5, "epoch": epoch, "loss": 1.0})
        point = {
            "step": epoch * 10,
            "epoch": epoch,
            "validation_weighted_f1": quality * epoch / parameters.epochs,
        }
        (context.checkpoints / f"epoch-{epoch}").touch()
        context.progress.figures(point)
    (context.output / "quality.json").write_text(json.dumps(quality))
    return {}


class Bench:
    """Tiny inputs, and a training that takes no time."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.inputs = tiny_inputs(folder)
        self.said: list[str] = []
        self.trained: list[float] = []
        self.killed_at: int | None = None
        truth = read_labelled(self.inputs["training_sample"], "validation").categories
        stage = replace(STAGES["teacher_checkpoint"], entry_point=f"{__name__}:fake_teacher")
        monkeypatch.setitem(STAGES, "teacher_checkpoint", stage)
        monkeypatch.setattr(hyperparameter_search, "_loaded", lambda _, folder: FakeModel(folder, truth))
        train = hyperparameter_search.train_inside

        def watched(*given: Any) -> Any:
            self.trained.append(given[2].learning_rate)
            if self.killed_at == len(self.trained):
                train(*given)
                raise KeyboardInterrupt
            return train(*given)

        monkeypatch.setattr(hyperparameter_search, "train_inside", watched)

    def search(self, name: str = "search", **parameters: Any) -> list[dict[str, Any]]:
        given = {"model": "teacher", "fixed": {"epochs": 2}, "searched": ["learning_rate"], "trials": 8}
        spec = stage_spec("hyperparameter_search", self.inputs, given | parameters, self.folder / name)
        self.reference = run_stage(spec, Progress("search", self.said.append))
        return json.loads((self.folder / name / "trials.json").read_text())

    def journal(self, name: str = "search") -> Path:
        return self.folder / f"{name}.work" / "checkpoints" / "optuna.journal"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def without_times(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [trial | {"seconds": None} for trial in trials]


def test_it_begins_with_what_is_set_and_finds_something_better(bench):
    trials = bench.search(fixed={"epochs": 2, "learning_rate": 4e-4}, trials=12)
    assert trials[0]["parameters"] == {"learning_rate": 4e-4}
    values = [trial["mean_weighted_f1"] for trial in trials if trial["state"] == "finished"]
    metrics = bench.reference.metrics
    assert metrics["set_mean_weighted_f1"] == values[0] < max(values) == metrics["best_mean_weighted_f1"]
    best = json.loads((bench.folder / "search" / "best_parameters.json").read_text())
    assert best["stage"] == "teacher_checkpoint"
    assert best["parameters"]["epochs"] == 2
    assert best["parameters"]["learning_rate"] == best["searched"]["learning_rate"]
    assert metrics["best/learning_rate"] == pytest.approx(best["searched"]["learning_rate"], rel=1e-3)
    assert "points more than with what is set" in metrics["sentence"]


def test_the_artifact_has_a_row_per_trial_and_plots(bench):
    trials = bench.search(searched=["learning_rate", "ancestor_loss"])
    folder = bench.folder / "search"
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["mean_weighted_f1"] for row in rows] == [trial["mean_weighted_f1"] for trial in trials]
    assert [row["parameter/learning_rate"] for row in rows] == [
        trial["parameters"]["learning_rate"] for trial in trials
    ]
    for plot in ("history", "parameters"):
        assert (folder / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_with_enough_trials_it_is_said_which_parameters_mattered(bench):
    bench.search(searched=["learning_rate", "ancestor_loss"], trials=16, startup_trials=16)
    best = json.loads((bench.folder / "search" / "best_parameters.json").read_text())
    assert best["importances"]["learning_rate"] > 0.8
    assert (bench.folder / "search" / "importances.png").exists()


def test_the_same_seed_tries_the_same_and_another_one_something_else(bench):
    first, again = bench.search("first", trials=7), bench.search("again", trials=7)
    other = bench.search("other", trials=7, seed=4)
    assert without_times(first) == without_times(again)
    assert without_times(first) != without_times(other)


@pytest.mark.parametrize("killed_at", [1, 2, 7])
def test_a_kill_costs_the_interrupted_trial_and_nothing_else(bench, killed_at):
    whole = bench.search("whole")
    rates = list(bench.trained)
    bench.trained.clear()
    bench.killed_at = killed_at
    with pytest.raises(KeyboardInterrupt):
        bench.search()
    with bench.journal().open("ab") as journal:
        journal.write(b'{"op_code":8,"wor')  # what was being written then
    assert without_times(bench.search()) == without_times(whole)
    assert bench.trained == [*rates[:killed_at], *rates[killed_at - 1 :]]
    assert "a trial was interrupted, its parameters are tried again" in bench.said


def test_the_interrupted_trial_is_marked_as_failed_and_its_training_goes_on(bench, monkeypatch):
    bench.killed_at = 3
    with pytest.raises(KeyboardInterrupt):
        bench.search()
    (training,) = bench.journal().parent.glob("training-*")
    assert (training / "epoch-2").exists()
    found, train = [], hyperparameter_search.train_inside

    def looked(context: StageContext, *given: Any) -> Any:
        found.append(sorted(context.checkpoints.glob("training-*/epoch-*")))
        return train(context, *given)

    def at_the_end(study: optuna.Study) -> list[str]:
        return [trial.state.name for trial in study.get_trials()]

    monkeypatch.setattr(hyperparameter_search, "train_inside", looked)
    states = []
    write = hyperparameter_search._write
    monkeypatch.setattr(
        hyperparameter_search,
        "_write",
        lambda folder, search, *rest: (
            states.extend(at_the_end(search._study)) or write(folder, search, *rest)
        ),
    )
    bench.search(trials=8)
    assert states[2] == "FAIL"
    assert states.count("FAIL") == 1
    assert len(states) == 9
    assert [path.name for path in found[0]] == ["epoch-1", "epoch-2"]
    assert found[1] == []


def test_a_trial_that_is_worse_than_half_of_those_before_is_given_up(bench):
    trials = bench.search(trials=14, startup_trials=4, fixed={"epochs": 4})
    pruned = [trial for trial in trials if trial["state"] == "pruned"]
    assert pruned
    assert bench.reference.metrics["pruned"] == len(pruned)
    for trial in pruned:
        assert trial["number"] >= 4
        assert trial["mean_weighted_f1"] is None
        percent, value = trial["curve"][-1]
        assert percent in (25, 50, 75)
        before = [
            max(f1 for step, f1 in other["curve"] if step <= percent)
            for other in trials[: trial["number"]]
            if other["state"] == "finished"
        ]
        assert value < np.median(before)
    assert not list(bench.folder.glob("search.work/checkpoints/training-*"))


def test_trainings_of_different_length_are_compared_at_the_same_share_of_their_way(bench):
    trials = bench.search(searched=["epochs"], trials=8, startup_trials=8)
    curves = {trial["parameters"]["epochs"]: [step for step, _ in trial["curve"]] for trial in trials}
    assert curves[2] == [50, 100]
    assert curves == {epochs: [round(100 * n / epochs) for n in range(1, epochs + 1)] for epochs in curves}
    assert len(curves) > 1


def test_no_trial_begins_once_the_budget_is_used_up(bench):
    trials = bench.search(budget_seconds=1e-9)
    assert len(trials) == 1
    assert "budget is used up" in bench.reference.metrics["ended_by"]
    assert "nothing better than what is set" in bench.reference.metrics["sentence"]


def test_parameters_that_a_training_refuses_are_a_trial_with_its_reason(bench, monkeypatch):
    train = hyperparameter_search.train_inside

    def refuses(context: StageContext, stage: Any, parameters: TeacherParameters, *rest: Any) -> Any:
        if parameters.learning_rate != 1e-4:
            raise InputError("too deep")
        return train(context, stage, parameters, *rest)

    monkeypatch.setattr(hyperparameter_search, "train_inside", refuses)
    trials = bench.search(trials=3)
    assert [trial["state"] for trial in trials] == ["finished", "refused", "refused"]
    assert trials[1]["reason"] == "too deep"


def test_what_is_set_and_refused_ends_the_search_every_time(bench, monkeypatch):
    def refuses(*_: Any) -> Any:
        raise InputError("no such encoder")

    monkeypatch.setattr(hyperparameter_search, "train_inside", refuses)
    for _ in range(2):
        with pytest.raises(InputError, match="no such encoder"):
            bench.search()


def test_what_is_set_wrongly_is_named(bench):
    with pytest.raises(InputError, match=r"parameters of teacher_checkpoint: .*epochs"):
        bench.search(fixed={"epochs": "two"})


def test_a_search_of_the_student_without_labels_says_what_is_missing(bench):
    with pytest.raises(InputError, match="a search of the student needs teacher_labels, teacher_checkpoint"):
        bench.search(model="student", searched=[])


def test_a_teacher_is_searched_for_real_and_a_curve_is_kept(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    parameters = {
        "model": "teacher",
        "encoder": str(tiny_encoder(tmp_path / "encoder")),
        "fixed": TINY_TEACHER | {"epochs": 2},
        "searched": ["learning_rate", "batch_size"],
        "trials": 2,
    }
    run_stage(stage_spec("hyperparameter_search", inputs, parameters, tmp_path / "search"))
    first, second = json.loads((tmp_path / "search" / "trials.json").read_text())
    assert first["parameters"] == {"learning_rate": 1e-3, "batch_size": 8}
    assert [step for step, _ in first["curve"]] == [50, 100]
    for trial in (first, second):
        assert 0 < trial["mean_weighted_f1"] <= 1


def test_a_real_training_that_was_killed_between_epochs_goes_on_with_its_whole_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(tmp_path)
    parameters = {
        "model": "teacher",
        "encoder": str(tiny_encoder(tmp_path / "encoder")),
        "fixed": TINY_TEACHER | {"epochs": 3},
        "trials": 1,
    }
    save, said = training.save_checkpoint, list[str]()

    def killed_after_the_first(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    def search(name: str) -> Any:
        spec = stage_spec("hyperparameter_search", inputs, parameters, tmp_path / name)
        run_stage(spec, Progress(name, said.append))
        return without_times(json.loads((tmp_path / name / "trials.json").read_text()))

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", killed_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            search("killed")
    resumed = search("killed")
    assert any("resumed from the checkpoint at step" in line for line in said)
    assert resumed == search("whole")
    assert [step for step, _ in resumed[0]["curve"]] == [33, 67, 100]


def test_student_and_fast_model_are_searched_for_real(tmp_path: Path) -> None:
    inputs = distillation_inputs(tmp_path)
    for model, fixed in (
        ("student", {"max_tokens": 16, "layers": 1, "epochs": 1}),
        ("fast", {"max_features": 500}),
    ):
        encoder = {"encoder": "teacher"} if model == "student" else {}
        parameters = {"model": model, "fixed": fixed, "trials": 2, **encoder}
        run_stage(stage_spec("hyperparameter_search", inputs, parameters, tmp_path / model))
        trials = json.loads((tmp_path / model / "trials.json").read_text())
        assert [trial["state"] for trial in trials] == ["finished"] * 2
        proposed = {name for name, candidate in SPACES[model].items() if candidate.proposed}
        assert trials[0]["parameters"].keys() == proposed


def test_every_range_is_of_a_parameter_that_its_stage_has_and_takes():
    assert SPACES.keys() == STAGE_OF.keys()
    for model, space in SPACES.items():
        fields = {field.name for field in msgspec.structs.fields(STAGES[STAGE_OF[model]].parameters)}
        assert space.keys() <= fields


@pytest.mark.parametrize(
    "space", [{"rate_of_learning": Range(low=0.1, high=1.0)}, {"batch_size": Choice(values=(0, 8))}]
)
def test_a_renamed_parameter_or_a_range_too_wide_is_an_error_when_the_space_is_loaded(space):
    with pytest.raises(TypeError, match="search space of teacher: "):
        search_space._check({"teacher": space})


def test_the_space_has_room_for_what_is_set_and_names_are_checked():
    space = space_of(
        "teacher", ["learning_rate", "batch_size"], TeacherParameters(learning_rate=1e-3, batch_size=8)
    )
    assert space["learning_rate"].high == 1e-3
    assert space["batch_size"].values == (8, 16, 32, 64)
    assert "layers" not in space_of("student", [], StudentParameters())
    with pytest.raises(
        InputError, match="teacher has no 'learning_rates' to search, did you mean 'learning_rate'"
    ):
        space_of("teacher", ["learning_rates"], TeacherParameters())

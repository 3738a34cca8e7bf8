from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional

from ml.errors import InputError
from ml.learning import devices, training
from ml.learning.calibration import fit_temperature, targets_of, validation_figures
from ml.learning.devices import trains_in_bfloat16
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.training import TrainingArguments, TrainingState, epoch_batches, train
from ml.learning.training_data import read_labelled
from ml.offers import TEXT_VERSION
from ml.progress import Progress
from ml.stages import Precision
from tests.ml.tiny_models import WORDS_OF, offer_rows, tiny_encoder, tiny_inputs, write_labelled

LABELS = sorted(WORDS_OF)
ROWS = offer_rows(40, 1, "t")
PLAN = TrainingArguments(
    epochs=2,
    batch_size=8,
    learning_rate=1e-3,
    head_learning_rate=1e-2,
    token_dropout=0.2,
    precision="float32",
    checkpoint_seconds=1e-9,
    seed=3,
)


class Killed(BaseException):
    pass


class Run:
    """One process that trains: a fresh model, and what it said."""

    def __init__(self, encoder: Path, checkpoints: Path) -> None:
        settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t", max_tokens=16)
        self.model = Classifier.from_encoder(str(encoder), LABELS, settings)
        self.lines: list[str] = []
        self.initialised = False
        self.checkpoints = checkpoints

    def train(self, *, killed_at_step: int | None = None, plan: TrainingArguments = PLAN) -> TrainingState:
        targets = torch.from_numpy(targets_of(LABELS, [row["category_id"] for row in ROWS]))
        steps_run = 0

        def loss(logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
            nonlocal steps_run
            if steps_run == killed_at_step:
                raise Killed
            steps_run += 1
            return functional.cross_entropy(logits, targets[torch.from_numpy(rows)])

        def initialise() -> None:
            self.initialised = True
            self.model.initialise_head(
                [row["text"] for row in ROWS], [row["category_id"] for row in ROWS], LABELS
            )

        return train(
            self.model,
            self.model.tokenize([row["text"] for row in ROWS]),
            loss,
            lambda: {"accuracy": 0.5},
            initialise,
            plan,
            self.checkpoints,
            Progress("test", self.lines.append),
        )

    def weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict()


@pytest.fixture
def start_run(tmp_path: Path) -> Callable[[str], Run]:
    encoder = tiny_encoder(tmp_path / "encoder", layers=2)
    torch.set_num_threads(1)

    def start(name: str) -> Run:
        torch.manual_seed(hash(name) % 1000)  # processes do not share a random state
        checkpoints = tmp_path / name
        checkpoints.mkdir(exist_ok=True)
        return Run(encoder, checkpoints)

    return start


def assert_same_end(run: Run, state: TrainingState, other: Run, other_state: TrainingState) -> None:
    assert state.curve == other_state.curve
    for name, tensor in other.weights().items():
        assert torch.equal(run.weights()[name], tensor), name


def test_a_training_inside_autocast_is_refused(start_run: Callable[[str], Run]) -> None:
    """It keeps the first low-precision copy of every weight, so that no step would see the one before."""
    run = start_run("inside")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="training inside autocast"),
    ):
        run.train()
    assert not run.initialised


@pytest.mark.parametrize("killed_at_step", [3, 5, 7])
def test_a_killed_and_resumed_run_ends_like_one_that_was_not(
    start_run: Callable[[str], Run], killed_at_step: int
) -> None:
    whole = start_run("whole")
    expected = whole.train()
    with pytest.raises(Killed):
        start_run("killed").train(killed_at_step=killed_at_step)
    resumed = start_run("killed")
    state = resumed.train()
    assert f"resumed from the checkpoint at step {killed_at_step}" in resumed.lines
    assert not resumed.initialised
    assert_same_end(resumed, state, whole, expected)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_discarded_for_the_one_before(
    start_run: Callable[[str], Run], file: str
) -> None:
    whole = start_run("whole")
    expected = whole.train()
    killed = start_run("killed")
    with pytest.raises(Killed):
        killed.train(killed_at_step=6)
    newest = killed.checkpoints / "step-000000006" / file
    newest.write_bytes(newest.read_bytes()[:-20])
    resumed = start_run("killed")
    state = resumed.train()
    assert any(re.match("checkpoint step-000000006 is damaged .*, discarded", line) for line in resumed.lines)
    assert "resumed from the checkpoint at step 5" in resumed.lines
    assert_same_end(resumed, state, whole, expected)


def test_with_no_sound_checkpoint_left_training_starts_anew(start_run: Callable[[str], Run]) -> None:
    whole = start_run("whole")
    expected = whole.train()
    killed = start_run("killed")
    with pytest.raises(Killed):
        killed.train(killed_at_step=2)
    for path in killed.checkpoints.iterdir():
        (path / "tensors.safetensors").write_bytes(b"")
    again = start_run("killed")
    state = again.train()
    assert again.initialised
    assert_same_end(again, state, whole, expected)


def test_only_the_newest_checkpoints_are_kept_and_none_half_written(start_run: Callable[[str], Run]) -> None:
    run = start_run("run")
    (run.checkpoints / "step-000000004.partial").mkdir()  # left by a kill while writing
    run.train()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-000000009", "step-000000010"]


def test_a_finished_training_is_not_repeated(start_run: Callable[[str], Run]) -> None:
    first = start_run("run")
    expected = first.train()
    second = start_run("run")
    assert_same_end(second, second.train(killed_at_step=0), first, expected)


def test_the_curve_counts_steps_and_validates_at_epoch_ends(start_run: Callable[[str], Run]) -> None:
    curve = start_run("run").train().curve
    assert [point["step"] for point in curve] == list(range(1, 11))
    assert [point["step"] for point in curve if "validation_accuracy" in point] == [5, 10]
    assert {point["epoch"] for point in curve if point["step"] <= 5} == {1}
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_folder_that_is_gone_while_training_is_an_error_not_a_silent_loss(
    start_run: Callable[[str], Run],
) -> None:
    run = start_run("run")
    shutil.rmtree(run.checkpoints)
    run.checkpoints.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="step-"):
        run.train()


def test_in_bfloat16_other_weights_are_learned_and_all_stay_in_full_precision(
    start_run: Callable[[str], Run],
) -> None:
    exact, mixed = start_run("exact"), start_run("mixed")
    exact.train()
    state = mixed.train(plan=msgspec.structs.replace(PLAN, precision="bfloat16"))
    assert state.curve[-1]["loss"] < state.curve[0]["loss"]
    assert {tensor.dtype for tensor in mixed.weights().values() if tensor.is_floating_point()} == {
        torch.float32
    }
    differences = [
        (tensor - mixed.weights()[name]).abs().max().item() for name, tensor in exact.weights().items()
    ]
    assert 0 < max(differences) < 0.1


@pytest.mark.parametrize(
    ("features", "precision", "expected"),
    [
        (["avx2", "avx512_bf16"], "auto", True),
        (["amx_bf16"], "auto", True),
        (["avx2"], "auto", False),
        (["avx2"], "bfloat16", True),
        (["avx512_bf16"], "float32", False),
    ],
)
def test_bfloat16_is_taken_where_the_cpu_multiplies_it_or_by_setting(
    monkeypatch: pytest.MonkeyPatch, features: list[str], precision: Precision, expected: bool
) -> None:
    monkeypatch.setattr(devices, "cpu_features", lambda: features)
    assert trains_in_bfloat16(torch.device("cpu"), precision) is expected


def test_a_gpu_that_cannot_is_not_asked_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not trains_in_bfloat16(torch.device("cuda"), "auto")
    with pytest.raises(InputError, match="take auto or float32"):
        trains_in_bfloat16(torch.device("cuda"), "bfloat16")


def test_each_step_hides_other_tokens_but_never_the_first_nor_padding(
    start_run: Callable[[str], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hide = training._with_hidden_tokens

    def watched(mask: torch.Tensor, share: float) -> torch.Tensor:
        seen.append((mask, hide(mask, share)))
        return seen[-1][1]

    monkeypatch.setattr(training, "_with_hidden_tokens", watched)
    start_run("hiding").train()
    assert all(torch.equal(after[:, 0], before[:, 0]) for before, after in seen)
    assert not any((after & (1 - before)).any() for before, after in seen)
    tokens = sum(int(before[:, 1:].sum()) for before, _ in seen)
    assert sum(int(after[:, 1:].sum()) for _, after in seen) / tokens == pytest.approx(0.8, abs=0.05)
    texts = [after.shape for _, after in seen]
    equal = [torch.equal(seen[0][1], after) for _, after in seen if after.shape == texts[0]]
    assert not all(equal)
    mask = torch.ones((2, 4), dtype=torch.int64)
    assert torch.equal(hide(mask, 0.0), mask)


def test_batches_hold_every_row_once_in_an_order_set_by_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 1000)
    batches = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    assert {len(batch) for batch in batches} == {8}
    again = epoch_batches(lengths, 8, seed=1, epoch=0)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))
    for seed, epoch in ((1, 1), (2, 0)):
        other = epoch_batches(lengths, 8, seed=seed, epoch=epoch)
        assert not np.array_equal(np.concatenate(other), np.concatenate(batches))
    spread = np.mean([lengths[batch].max() - lengths[batch].min() for batch in batches])
    assert spread < 5  # 40 if lengths were mixed


def test_a_sample_without_offers_of_a_split_is_refused(tmp_path: Path) -> None:
    sample = tiny_inputs(tmp_path)["training_sample"]
    assert len(read_labelled(sample, "validation").texts) == 16
    write_labelled(sample, [row | {"split": "train"} for row in ROWS])
    with pytest.raises(InputError, match="no offers in split 'validation'"):
        read_labelled(sample, "validation")


def test_temperature_undoes_what_made_the_model_overconfident() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 5))
    targets = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    assert fit_temperature(logits * 3, targets) == pytest.approx(3, rel=0.1)
    assert fit_temperature(logits, np.full(4000, -1)) == 1.0


def test_a_category_that_the_model_does_not_know_counts_as_an_error() -> None:
    logits = np.array([[9.0, 0.0], [9.0, 0.0]])
    figures = validation_figures(logits, ["a", "b"], ["a", "unknown"])
    assert figures["accuracy"] == 0.5
    assert figures["weighted_f1"] == pytest.approx(1 / 3)
    assert figures["loss"] == pytest.approx(np.log1p(np.exp(-9.0)), rel=1e-3)

"""Categories per cent: this project's models and what a user would pick instead, on the same offers.

    python -m benchmarks.quality gpc --offers FEED --taxonomy TAXONOMY.csv --split-by shop --work DIR

Our stages train as ``benchmarks.our_models.THOROUGH`` says, unless --set says otherwise.
Reads labelled offers (all rows, whatever columns they have), holds out a share of the shops (or products,
or offers; or takes an official test part as --held-out FILE), runs this project's stages and trains the
peers on the rest, and has all answer the held-out offers: weighted F1 at every level, their mean, macro-F1
at the leaf, F1 by the number of training rows of a category, training time, size, offers per second with
one thread and with all cores, peak memory. What is finished lies in --work: a killed run goes on where it
was, and ``benchmarks.throughput --models DIR`` takes the models from there.

``--ablations`` measures instead what each ingredient of teacher and student gains, and how quality falls as
the student gets faster. ``--training-shares`` learns from fewer offers, too: how many a goal would take.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import one_model, report
from benchmarks.labelled_offers import (
    SPLITS,
    divide,
    duplicate_share,
    only_languages,
    read_labelled_offers,
    without_languages,
)
from benchmarks.learning_curve import curve_rows, draw_learning_curves, learning_curves
from benchmarks.one_model import Outcome, Task
from benchmarks.our_models import MODELS, STAGES, OurModel, Workshop, changes_of
from benchmarks.peers import Peer
from benchmarks.plots import quality_over_throughput
from ml.artifacts import MANIFEST, artifact_key, read_manifest, write_manifest
from ml.cores import available_cores
from ml.errors import InputError
from ml.evaluation.metrics import scores, scores_by_level, scores_by_size
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.runner import code_revision
from ml.stages import StudentParameters, TeacherParameters, stage_named
from ml.taxonomy import Taxonomy

BANDS: tuple[tuple[str, int, float], ...] = (
    ("0", 0, 0),
    ("1-4", 1, 4),
    ("5-19", 5, 19),
    ("20-99", 20, 99),
    ("100+", 100, float("inf")),
)
"""Training rows of a category."""

MODELS_FILE = "models.json"
"""In the work folder: where each model lies, and what it was measured on."""

_QUICK_OFFERS = {"train": 400, "test": 80}
_MEASURED_SECONDS = 6.0
_OVERHEAD_SECONDS = 30.0
"""Of starting three processes for a model and measuring in them."""

_progress = Progress("quality")


@dataclass(frozen=True)
class Ablation:
    """One variant of the parameters, held against what the stages do by default."""

    name: str
    stage: str
    """Whose model is measured: ``teacher_checkpoint`` or ``student_checkpoint``."""
    changes: Mapping[str, Mapping[str, Any]]
    """Changed parameters, by stage."""


def _teacher(name: str, **changes: Any) -> Ablation:
    return Ablation(f"teacher {name}", "teacher_checkpoint", {"teacher_checkpoint": changes})


def _student(name: str, **changes: Any) -> Ablation:
    return Ablation(f"student {name}", "student_checkpoint", {"student_checkpoint": changes})


ABLATIONS: tuple[Ablation, ...] = (
    _teacher("without the loss at the levels above", ancestor_loss=0.0),
    _teacher("without category names as texts", category_names=False),
    _teacher("without logit adjustment", logit_adjustment=0.0),
    _teacher("without the linear model", ensemble=False),
    _teacher("without hidden tokens", token_dropout=0.0),
    _teacher("with an epoch of further pretraining", pretraining_epochs=1),
    _teacher("with a second pass over confident guesses", pseudo_label_epochs=1),
    _teacher("with adapters of rank 16 only", lora_rank=16),
    _student("without distillation", distillation_weight=0.0, label_weight=1.0),
    _student("distilled from the whole teacher", distilled_from="teacher"),
    _student("without labels beside the teacher", label_weight=0.0),
    _student("without hidden tokens", token_dropout=0.0),
    _student("with the whole vocabulary", trim_vocabulary=False),
    _student("whose last layer computes every token", pooling="mean"),
    *(
        _student(f"of {layers} layers, {tokens} tokens", layers=layers, max_tokens=tokens)
        for layers, tokens in ((1, 16), (1, 32), (1, 48), (1, 64), (2, 16), (2, 48), (3, 32))
    ),
)
"""What is tried. A new ingredient of a stage is one more entry that switches it off."""

_ABLATED = {"teacher_checkpoint": ("teacher",), "student_checkpoint": ("student", "served", "cascade")}
"""By the stage that a variant changes: the models that show what it does."""


@dataclass(frozen=True)
class Trial:
    """One training set and what is held out for it."""

    name: str
    """Empty: the main one, on which speed is measured too."""
    train: pa.Table
    test: pa.Table
    unlabelled: pa.Table | None = None
    """Offers that our models may read without their labels; peers learn from labels alone."""


@dataclass
class Bench:
    """What a run needs wherever it goes."""

    work: Path
    workshop: Workshop
    taxonomy: Path
    options: argparse.Namespace

    @property
    def tree(self) -> Taxonomy:
        """The taxonomy, read."""
        return Taxonomy.load(self.taxonomy)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = _parser().parse_args(arguments)
    if options.ablations == []:
        options.ablations = ["teacher", "student"]
    names = [ablation.name for ablation in ABLATIONS if _is_of(ablation, options.ablations or [])]
    for text in options.variants or []:
        if not any(text in name for name in names):
            there = "; ".join(names) or "none without --ablations"
            raise SystemExit(f"error: --variants {text}: there are {there}")
    with report.refused_plainly():
        figures = run(options)
    kind = "ablations" if options.ablations else "quality"
    print()
    report.show(_columns(figures))
    for note in figures["notes"]:
        print(f"note: {note}")
    report.save(f"{kind}_{options.name}", figures)
    if "learning_curves" in figures:
        print()
        report.show(curve_rows(figures["learning_curves"]))
        path = report.RESULTS / f"{kind}_{options.name}_offers.png"
        draw_learning_curves(figures["learning_curves"], path)
        print(f"drawn in {path}")
    if not options.ablations:
        _draw(options.name, figures)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the options ask for; returns the content of the result file.

    Raises:
        InputError: files or options are wrong.
    """
    trials, notes = _trials(options)
    work = options.work or Path(".benchmarks") / options.name
    work.mkdir(parents=True, exist_ok=True)
    changes = changes_of(options.quick, options.set)
    workshop = Workshop(work, changes)
    bench = Bench(work, workshop, workshop.taxonomy(options.taxonomy), options)
    for trial in trials:
        _check_labels(bench.tree, trial)
    figures: dict[str, Any] = {
        "feed": options.offers.name,
        "held_out": options.held_out.name
        if options.held_out
        else f"{options.share:.0%} by {options.split_by}",
        "quick": options.quick,
        "changed_parameters": {stage: dict(values) for stage, values in changes.items()},
        "duplicate_share_of_held_out": duplicate_share(trials[0].test),
    }
    measure = _ablated if options.ablations else _compared
    for trial in trials:
        found = measure(bench, trial)
        rows = found.pop("models")
        if trial.name:
            figures.setdefault("further", []).append({"trial": trial.name, **found, "models": rows})
        else:
            figures |= {**found, "models": rows}
    if options.training_shares:
        figures["learning_curves"] = learning_curves(figures, options.reach)
    return figures | {"notes": notes}


def _trials(options: argparse.Namespace) -> tuple[list[Trial], list[str]]:
    """What is learned from and held out, and notes about it."""
    given = read_labelled_offers(options.offers)
    notes = list(given.notes)
    if options.held_out:
        official = read_labelled_offers(options.held_out)
        train, test = given.table, official.table
        notes += [f"held out: {note}" for note in official.notes]
        notes.append("the held-out file is taken as it is: products and shops may be on both sides")
    else:
        divided = divide(given.table, options.split_by, options.share, options.seed)
        train, test = divided.train, divided.test
        notes += divided.notes
    if options.quick:
        train, test = (
            table.take(np.linspace(0, table.num_rows - 1, min(count, table.num_rows)).astype(np.int64))
            for table, count in ((train, _QUICK_OFFERS["train"]), (test, _QUICK_OFFERS["test"]))
        )
    if not train.num_rows or not test.num_rows:
        raise InputError(
            f"{train.num_rows:,} offers to learn from and {test.num_rows:,} held out: change --share"
        )
    train, unlabelled = _labelled_part(train, options)
    trials = [Trial("", train, test, unlabelled)]
    for language in options.languages_held_out:
        only = only_languages(test, [language])
        if not only.num_rows:
            raise InputError(f"--languages-held-out {language}: no held-out offer is in that language")
        trials.append(Trial(f"{language}, trained with it", train, only))
        trials.append(Trial(f"{language}, trained without it", without_languages(train, [language]), only))
    trials += [_smaller(trials[0], share, options) for share in options.training_shares]
    return trials, notes


def _smaller(trial: Trial, share: float, options: argparse.Namespace) -> Trial:
    """The same with a share of what is learned from: of the shops where these are held out, and so on.

    Raises:
        InputError: nothing would be left to learn from.
    """
    part = divide(trial.train, options.split_by, share, options.seed + 2).test
    if not part.num_rows:
        raise InputError(f"--training-shares {share:g}: no offer would be left to learn from; raise it")
    return Trial(f"{share:.3g} of what is learned from", part, trial.test, trial.unlabelled)


def _labelled_part(train: pa.Table, options: argparse.Namespace) -> tuple[pa.Table, pa.Table | None]:
    """Those of ``train`` that keep their labels, drawn by product, and the others, if there are to be any.

    Raises:
        InputError: no offer would keep its label.
    """
    if options.labelled_share >= 1:
        return train, None
    by = "offer" if options.split_by == "offer" else "product"
    drawn = divide(train, by, options.labelled_share, options.seed + 1)
    if not drawn.test.num_rows:
        raise InputError(f"--labelled-share {options.labelled_share}: no offer keeps its label; raise it")
    return drawn.test, drawn.train


def _compared(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Every model's row."""
    options = bench.options
    sample, evaluation = _datasets(bench, trial)
    inputs = _stage_inputs(bench, sample)
    counts = Counter(trial.train["category_id"].to_pylist())
    wanted = [name for name in one_model.ALL if _is_wanted(name, options)]
    plan = _Plan(wanted, trial, len(counts), options)
    folders: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    not_run: dict[str, str] = {}
    ours = [model for model in MODELS if model.name in wanted]
    if ours:
        last = max((model.stage for model in ours), key=STAGES.index)
        with plan.step("our stages"):
            for stage, folder in bench.workshop.train(inputs, last):
                seconds[stage] = read_manifest(folder).seconds
                folders |= {model.name: folder for model in ours if model.stage == stage}
    train_file = sample / "labelled.parquet"
    rows = []
    for name in wanted:
        model = one_model.ALL[name]
        with plan.step(name):
            if isinstance(model, Peer):
                outcome = _trained_peer(bench, model, train_file, sample, folders)
                if isinstance(outcome, str):
                    not_run[name] = outcome
            row: dict[str, Any] = {"model": model.title, "name": name, "is_ours": isinstance(model, OurModel)}
            if name in not_run or name not in folders:
                rows.append({**row, "not_run": not_run.get(name, "its stage did not run")})
                continue
            rows.append({**row, **_row(bench, trial, model, folders[name], evaluation, counts, seconds)})
    if not trial.name:
        _write_models(bench, folders, sample, evaluation)
    return {
        "training_offers": trial.train.num_rows,
        "unlabelled_offers": 0 if trial.unlabelled is None else trial.unlabelled.num_rows,
        "held_out_offers": trial.test.num_rows,
        "categories_to_learn": len(counts),
        "models": rows,
    }


def _row(
    bench: Bench,
    trial: Trial,
    model: OurModel | Peer,
    folder: Path,
    evaluation: Path,
    counts: Mapping[str, int],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    offers = evaluation / "offers.parquet"
    answered = _outcome(bench, model, folder, evaluation, "answer", available_cores())
    if answered.not_run:
        return {"not_run": answered.not_run}
    manifest = read_manifest(folder)
    return {
        **scored(bench.tree, pq.read_table(offers, columns=["category_id"]), answered.answers, counts),
        "training_seconds": sum(seconds[stage] for stage in _stages_behind(model))
        if isinstance(model, OurModel)
        else manifest.seconds,
        "size_bytes": size_of(folder),
        **({} if trial.name else _speeds(bench, model, folder, evaluation)),
    }


def _speeds(bench: Bench, model: OurModel | Peer, folder: Path, evaluation: Path) -> dict[str, Any]:
    """Offers a second with one thread and with all cores."""
    found = {}
    for name, number in (("one_thread", 1), ("all_cores", available_cores())):
        outcome = _outcome(bench, model, folder, evaluation, "measure", number)
        found[name] = msgspec.to_builtins(outcome.speed) if outcome.speed else {"not_run": outcome.not_run}
    return found


def _outcome(
    bench: Bench,
    model: OurModel | Peer,
    folder: Path,
    evaluation: Path,
    kind: Literal["answer", "measure"],
    cores: int,
) -> Outcome:
    """What comes of one task, in a process of its own."""
    measures = 0.5 if bench.options.quick else _MEASURED_SECONDS
    name = f"{model.name}-{read_manifest(folder).digest[:12]}-{evaluation.name}-{kind}-{cores}-{measures:g}"
    task = Task(
        kind=kind,
        model=model.name,
        folder=str(folder),
        result=str(bench.work / "outcomes" / f"{name}.json"),
        offers=str(evaluation / "offers.parquet"),
        cores=cores,
        seconds=measures,
    )
    return _once(task, _packages(bench.options, model))


def _stages_behind(model: OurModel) -> Sequence[str]:
    """The stages that a model needs, those of its teacher included."""
    needed = [model.stage]
    for name in needed:
        needed += [of for of in stage_named(name).inputs if of in STAGES and of not in needed]
    return needed


def scored(
    taxonomy: Taxonomy, truth_table: pa.Table, answers: Sequence[str], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Figures of merit of ``answers`` to the offers in ``truth_table``.

    Args:
        taxonomy: The tree of the labels.
        truth_table: With column ``category_id``.
        answers: Category of each row.
        counts: Training rows of each category.
    """
    truth = np.array(truth_table["category_id"].to_pylist(), dtype=str)
    given = np.array([answer if answer in taxonomy else taxonomy.roots[0] for answer in answers], dtype=str)
    levels = [
        level.weighted_f1 for level in scores_by_level(truth, given, taxonomy.ancestor_at, taxonomy.levels)
    ]
    overall = scores(truth, given)
    return {
        **{f"level_{number}": value for number, value in enumerate(levels, 1)},
        "mean": float(np.mean(levels)),
        "macro": overall.macro_f1,
        "accuracy": overall.accuracy,
        "bands": {
            band.band: {
                "categories": band.categories,
                "offers": band.offers,
                "weighted_f1": band.weighted_f1,
                "macro_f1": band.macro_f1,
            }
            for band in scores_by_size(truth, given, counts, BANDS)
        },
    }


# Ablations


def _ablated(bench: Bench, trial: Trial) -> dict[str, Any]:
    """What each variant of the parameters gives, beside what the parameters give as they are."""
    sample, evaluation = _datasets(bench, trial)
    inputs = _stage_inputs(bench, sample)
    counts = Counter(trial.train["category_id"].to_pylist())
    as_they_are = [
        Ablation("teacher", "teacher_checkpoint", {}),
        Ablation("student", "student_checkpoint", {}),
    ]
    wanted = [
        ablation
        for ablation in (*as_they_are, *ABLATIONS)
        if _is_of(ablation, bench.options.ablations)
        and (ablation in as_they_are or any(text in ablation.name for text in bench.options.variants or [""]))
    ]
    rows: list[dict[str, Any]] = []
    base: dict[str, float] = {}
    for number, ablation in enumerate(wanted, 1):
        _progress.say(f"{ablation.name} ({number} of {len(wanted)})")
        try:
            found = _variant(bench, trial, ablation, inputs, evaluation, counts)
        except InputError as error:
            rows.append({"model": ablation.name, "not_run": str(error)})
            continue
        for model, row in found.items():
            if "mean" in row and ablation in as_they_are:
                base[model] = row["mean"]
            of = "" if model == ablation.stage.removesuffix("_checkpoint") else f": {model}"
            compared = {"mean_minus_default": row["mean"] - base[model]} if "mean" in row else {}
            rows.append({"model": f"{ablation.name}{of}", **row, **compared})
    return {
        "training_offers": trial.train.num_rows,
        "unlabelled_offers": 0 if trial.unlabelled is None else trial.unlabelled.num_rows,
        "held_out_offers": trial.test.num_rows,
        "models": rows,
    }


def _is_of(ablation: Ablation, models: Sequence[str]) -> bool:
    return ablation.stage.removesuffix("_checkpoint") in models


def _variant(
    bench: Bench,
    trial: Trial,
    ablation: Ablation,
    inputs: Mapping[str, Path],
    evaluation: Path,
    counts: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """The row of each model that shows what a variant does."""
    changes: dict[str, dict[str, Any]] = {
        stage: dict(values) for stage, values in bench.workshop.changes.items()
    }
    for stage, values in ablation.changes.items():
        changes[stage] = {**changes.get(stage, {}), **values}
    models = [_OURS_BY_NAME[name] for name in _ABLATED[ablation.stage]]
    folders = dict(Workshop(bench.work, changes).train(inputs, models[-1].stage))
    seconds = {stage: read_manifest(folder).seconds for stage, folder in folders.items()}
    return {
        model.name: _row(bench, trial, model, folders[model.stage], evaluation, counts, seconds)
        for model in models
    }


# Datasets, peers, outcomes


def _datasets(bench: Bench, trial: Trial) -> tuple[Path, Path]:
    options = bench.options
    by = options.split_by
    return (
        bench.workshop.training_sample(
            trial.train, by, options.validation_share, options.seed, trial.unlabelled
        ),
        bench.workshop.evaluation_set(trial.test, by, options.share, options.seed),
    )


def _stage_inputs(bench: Bench, sample: Path) -> dict[str, Path]:
    """What the stages get: no held-out offer; for an evaluation set those that they validate on."""
    labelled = pq.read_table(sample / "labelled.parquet", filters=[("split", "==", "validation")])
    options = bench.options
    validation = labelled.select(CLEAN_SCHEMA.names)
    return {
        "catalog_taxonomy": bench.taxonomy,
        "training_sample": sample,
        "evaluation_set": bench.workshop.evaluation_set(
            validation, options.split_by, options.validation_share, options.seed
        ),
    }


def _trained_peer(
    bench: Bench, peer: Peer, train_file: Path, sample: Path, folders: dict[str, Path]
) -> str | None:
    """Put the peer's folder into ``folders``, trained if it is not there yet; else why it cannot be."""
    if missing := [part for part in peer.parts if part not in folders]:
        return f"needs {', '.join(missing)}"
    inputs = {"training_sample": read_manifest(sample).digest} | {
        part: read_manifest(folders[part]).digest for part in peer.parts
    }
    parameters = {"quick": bench.options.quick}
    key = artifact_key(peer.name, peer.version, parameters, inputs)
    folder = bench.work / "peers" / peer.name / key[:16]
    if not (folder / MANIFEST).exists():
        unfinished = bench.work / "unfinished" / "peers" / f"{peer.name}-{key[:16]}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        outcome = one_model.run(
            Task(
                kind="train",
                model=peer.name,
                folder=str(unfinished),
                result=str(unfinished.with_suffix(".json")),
                offers=str(train_file),
                parts={part: str(folders[part]) for part in peer.parts},
                quick=bench.options.quick,
            ),
            _packages(bench.options, peer),
        )
        if outcome.not_run:
            return outcome.not_run
        write_manifest(
            unfinished,
            kind=peer.name,
            key=key,
            inputs=inputs,
            code_version=peer.version,
            code_revision=code_revision(),
            parameters=parameters,
            metrics={"peak_memory_bytes": outcome.peak_memory_bytes},
            seconds=outcome.seconds + sum(read_manifest(folders[part]).seconds for part in peer.parts),
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
    folders[peer.name] = folder
    return None


def _once(task: Task, packages: Path | None) -> Outcome:
    """The outcome of a task, from its file if it was done before; failures are tried again."""
    path = Path(task.result)
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    partial = path.with_suffix(".partial")
    outcome = one_model.run(msgspec.structs.replace(task, result=str(partial)), packages)
    if outcome.not_run:
        partial.unlink(missing_ok=True)
    else:
        partial.rename(path)
    return outcome


def _packages(options: argparse.Namespace, model: OurModel | Peer) -> Path | None:
    return options.onnx_packages if isinstance(model, Peer) and model.own_packages else None


def size_of(folder: Path) -> int:
    """Bytes of a model's files, its manifest aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sum(path.stat().st_size for path in files)


def _write_models(bench: Bench, folders: Mapping[str, Path], sample: Path, evaluation: Path) -> None:
    places = {"training_sample": sample, "evaluation_set": evaluation, "catalog_taxonomy": bench.taxonomy}
    content = {
        "models": {name: str(folder.resolve()) for name, folder in folders.items()},
        **{name: str(folder.resolve()) for name, folder in places.items()},
    }
    (bench.work / MODELS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))


def _check_labels(taxonomy: Taxonomy, trial: Trial) -> None:
    labels = {*trial.train["category_id"].to_pylist(), *trial.test["category_id"].to_pylist()}
    if unknown := sorted(label for label in labels if label not in taxonomy):
        raise InputError(
            f"{len(unknown):,} labels are no category of the taxonomy, {unknown[0]!r} for one; "
            "give the taxonomy that the offers were labelled with"
        )


# Progress, table, picture


class _Plan:
    """Says what comes next, about how long it takes, and how long all the rest."""

    def __init__(
        self, names: Sequence[str], trial: Trial, categories: int, options: argparse.Namespace
    ) -> None:
        rows = trial.train.num_rows
        self._steps = {"our stages": 0.0} if any(name in _OURS_BY_NAME for name in names) else {}
        if self._steps:
            self._steps["our stages"] = our_seconds(rows, options)
        for name in names:
            model = one_model.ALL[name]
            training = (
                model.seconds(rows, categories) if isinstance(model, Peer) and not options.quick else 0.0
            )
            self._steps[name] = training + (5.0 if options.quick else _OVERHEAD_SECONDS)
        self._trial = f"{trial.name}: " if trial.name else ""
        minutes = sum(self._steps.values()) / 60
        _progress.say(
            f"{self._trial}{rows:,} offers to learn from, {trial.test.num_rows:,} held out; about "
            f"{minutes:.0f} min: "
            + ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in self._steps.items())
        )

    def step(self, name: str) -> AbstractContextManager[None]:
        """A context in which one step is done."""

        @contextmanager
        def doing() -> Iterator[None]:
            left = sum(self._steps.values()) / 60
            _progress.say(
                f"{self._trial}{name}, about {self._steps[name] / 60:.1f} min; {left:.0f} min to go"
            )
            started_at = time.perf_counter()
            yield
            del self._steps[name]
            _progress.say(f"{self._trial}{name} took {time.perf_counter() - started_at:.0f} s")

        return doing()


_OURS_BY_NAME = {model.name: model for model in MODELS}


def our_seconds(rows: int, options: argparse.Namespace) -> float:
    """About how long this project's stages take on two cores."""
    changes = changes_of(options.quick, options.set)
    teacher, student = (
        changes.get(stage, {}).get("epochs", usual)
        for stage, usual in (
            ("teacher_checkpoint", TeacherParameters().epochs),
            ("student_checkpoint", StudentParameters().epochs),
        )
    )
    return rows * (teacher / 50 + 1 / 150 + student / 100) + 60


def _columns(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that people see."""
    shown = []
    further = [(row, part["trial"]) for part in figures.get("further", []) for row in part["models"]]
    for row, trial in [*((row, "") for row in figures["models"]), *further]:
        name = f"{row['model']} ({trial})" if trial else row["model"]
        levels = {f"level {key.removeprefix('level_')}": row[key] for key in row if key.startswith("level_")}
        one, all_cores = row.get("one_thread", {}), row.get("all_cores", {})
        peak = all_cores.get("peak_memory_bytes")
        shown.append(
            {
                "model": name,
                **levels,
                "mean": row.get("mean"),
                **({"- default": row["mean_minus_default"]} if "mean_minus_default" in row else {}),
                "macro": row.get("macro"),
                "train s": None if "training_seconds" not in row else round(row["training_seconds"]),
                "MB": None if "size_bytes" not in row else round(row["size_bytes"] / 1e6, 1),
                "1 thread/s": _rounded(one.get("offers_per_second")),
                "all cores/s": _rounded(all_cores.get("offers_per_second")),
                "peak MB": None if peak is None else round(peak / 1e6),
                "not run": row.get("not_run") or one.get("not_run") or all_cores.get("not_run"),
            }
        )
    names = list(dict.fromkeys(name for row in shown for name in row))
    names.append(names.pop(names.index("not run")))
    return [{name: row.get(name) for name in names} for row in shown]


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def _draw(name: str, figures: Mapping[str, Any]) -> None:
    rows = [
        {
            "model": row["model"],
            "is_ours": row["is_ours"],
            "quality": row.get("mean"),
            "offers_per_second": row.get("all_cores", {}).get("offers_per_second"),
        }
        for row in figures["models"]
    ]
    path = report.RESULTS / f"quality_{name}.png"
    title = f"{name}: {figures['held_out_offers']:,} held-out offers ({figures['held_out']})"
    quality_over_throughput(rows, title, "mean weighted F1 over the levels", path)
    print(f"drawn in {path}")


# Options


def _parser() -> argparse.ArgumentParser:
    names = list(one_model.ALL)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the result: benchmarks/results/quality_NAME.json")
    parser.add_argument("--offers", required=True, type=Path, help="labelled feed, Parquet or CSV")
    parser.add_argument("--taxonomy", required=True, type=Path, help="its catalog taxonomy")
    parser.add_argument(
        "--held-out", type=Path, help="official test part, as the feed; nothing is split then"
    )
    parser.add_argument("--split-by", default="shop", choices=SPLITS)
    parser.add_argument("--share", default=0.2, type=float, help="share of shops (products, offers) held out")
    parser.add_argument("--validation-share", default=0.1, type=float, help="of the rest, for our models")
    parser.add_argument(
        "--labelled-share",
        default=1.0,
        type=float,
        help="share of the training offers that keep their label; our models read the others without it",
    )
    parser.add_argument("--seed", default=17, type=int)
    parser.add_argument("--languages-held-out", nargs="*", default=[], help="train without each, too")
    parser.add_argument(
        "--training-shares",
        nargs="*",
        default=[],
        type=_between_0_and_1,
        metavar="SHARE",
        help="learn from this share of the training shops (products, offers), too: the learning curve",
    )
    parser.add_argument(
        "--reach",
        nargs="*",
        default=[],
        type=_between_0_and_1,
        metavar="F1",
        help="with --training-shares: say how many offers this would take",
    )
    parser.add_argument("--work", type=Path, help="folder of what is finished; .benchmarks/NAME")
    parser.add_argument("--only", nargs="*", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--without", nargs="*", default=[], choices=names)
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="STAGE.PARAMETER=VALUE",
        help="change a stage's parameter (JSON value)",
    )
    parser.add_argument(
        "--onnx-packages",
        type=Path,
        help="folder made by pip install --no-deps --target FOLDER -r benchmarks/onnx_packages.txt",
    )
    parser.add_argument(
        "--ablations",
        nargs="*",
        choices=("teacher", "student"),
        help="variants of these instead; none: of both",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="TEXT",
        help="only ablations with one of these in their name, e.g. distillation",
    )
    parser.add_argument("--quick", action="store_true", help="few offers and steps: does everything run?")
    return parser


def _between_0_and_1(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _is_wanted(name: str, options: argparse.Namespace) -> bool:
    chosen: Callable[[str], bool] = (lambda _: True) if options.only is None else options.only.__contains__
    return chosen(name) and name not in options.without


if __name__ == "__main__":
    main()

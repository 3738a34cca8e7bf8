"""Stage ``encoder_comparison``: several encoders, trained alike, held against each other.

Each is trained as the teacher is, and answers alone: a linear model beside it would hide a part of the
differences. Quality is that on the training sample's validation offers: the
evaluation set decides about releases, and would no longer be fresh if encoders were chosen by it.
Throughput is that of one thread in full precision: what a compiled model makes of it differs, but the
order of the encoders hardly does. A finished encoder is kept if the stage is killed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn import functional

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.learning.choice_plots import comparison_plot
from ml.learning.devices import best_device, use_available_cores
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.held_out import held_out_scores
from ml.learning.inner_training import train_inside
from ml.learning.pareto import pareto_front
from ml.learning.training_data import LabelledTexts, read_labelled
from ml.offers import TEXT_VERSION
from ml.runner import StageContext, parameters_of
from ml.serving.machine import this_machine
from ml.stages import STAGES, ComparedEncoder, EncoderComparisonParameters, TeacherParameters
from ml.taxonomy import Taxonomy

_TEACHER = STAGES["teacher_checkpoint"]
_OWN = {"encoder", "encoder_digest", "ensemble"}
"""Parameters of the teacher that a comparison sets itself."""
_TIMED_STEPS = 3
_PASSES = 3
_TIMED_BATCH = 32


class EncoderRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one encoder; all figures are None for one that could not be trained."""

    name: str
    """``encoder``, or ``encoder:layers``."""
    mean_weighted_f1: float | None = None
    """On validation offers, mean over the levels of the taxonomy."""
    macro_f1: float | None = None
    accuracy: float | None = None
    texts_per_second: float | None = None
    """From text to logits, one thread, full precision."""
    parameters: int | None = None
    """Weights, those of the output layer counted."""
    size_bytes: int | None = None
    training_seconds: float | None = None
    on_front: bool = False
    """Whether no other is at least as good and as fast, and better in one of both."""
    reason: str = ""
    """Why there are no figures."""


class _Task(msgspec.Struct, frozen=True):
    """What all encoders are trained and measured on."""

    taxonomy: Taxonomy
    training: LabelledTexts
    validation: LabelledTexts
    parameters: TeacherParameters
    """Of the training; the encoder is still to be named."""
    settings: ClassifierSettings
    timed_offers: int


def compare_encoders(context: StageContext, parameters: EncoderComparisonParameters) -> dict[str, Any]:
    """Train and measure one encoder after the other, write table and plot; returns the metrics.

    Raises:
        InputError: the sample has no training or validation offers, the parameters of the training are
            wrong, this is another machine than was asked for, or not one encoder could be trained.
    """
    machine = this_machine().description
    if parameters.machine not in ("", machine):
        raise InputError(
            f"machine {parameters.machine!r} was asked for, this is {machine!r}: compare encoders there"
        )
    use_available_cores()
    task = _task(context, parameters)
    rows: dict[str, EncoderRow] = {}
    ready: dict[str, str] = {}
    for candidate in parameters.encoders:
        name = candidate.name
        if (kept := _kept_row(context, candidate)) is not None:
            context.progress.say(f"{name}: measured before, kept")
            rows[name] = kept
    for candidate in parameters.encoders:
        if candidate.name not in rows:
            try:
                ready[candidate.name] = _prepared(context, candidate, task)
            except InputError as error:
                rows[candidate.name] = _refused(context, candidate, error)
    seconds = {name: _seconds_of_training(name, ready[name], task) for name in ready}
    if ready:
        context.progress.say(_estimate(seconds, task))
    for candidate in parameters.encoders:
        if candidate.name not in rows:
            try:
                rows[candidate.name] = _measured(context, candidate, ready[candidate.name], task)
            except InputError as error:
                rows[candidate.name] = _refused(context, candidate, error)
    ordered = with_front([rows[name] for name in dict.fromkeys(c.name for c in parameters.encoders)])
    measured = [row for row in ordered if not row.reason]
    if not measured:
        raise InputError(
            f"no encoder could be compared: {'; '.join(f'{r.name}: {r.reason}' for r in ordered)}"
        )
    _write(context.output, ordered)
    return _metrics(ordered, task, machine)


def with_front(rows: Sequence[EncoderRow]) -> list[EncoderRow]:
    """The rows, those on the front of quality against throughput marked."""
    measured = [row for row in rows if not row.reason]
    front = pareto_front([(row.mean_weighted_f1 or 0.0, row.texts_per_second or 0.0) for row in measured])
    on_front = {row.name for row, is_on in zip(measured, front, strict=True) if is_on}
    return [msgspec.structs.replace(row, on_front=row.name in on_front) for row in rows]


def _task(context: StageContext, parameters: EncoderComparisonParameters) -> _Task:
    if reserved := _OWN & parameters.training.keys():
        raise InputError(
            f"training names {', '.join(sorted(reserved))}: name encoders in encoders; they answer alone"
        )
    taxonomy_folder, sample = context.input("catalog_taxonomy"), context.input("training_sample")
    teacher = parameters_of(_TEACHER, parameters.training | {"ensemble": False})
    assert isinstance(teacher, TeacherParameters)
    return _Task(
        taxonomy=Taxonomy.load(taxonomy_folder),
        training=read_labelled(sample, "train"),
        validation=read_labelled(sample, "validation"),
        parameters=teacher,
        settings=ClassifierSettings(
            text_version=TEXT_VERSION,
            taxonomy_version=short_version(read_manifest(taxonomy_folder).digest),
            max_tokens=teacher.max_tokens,
            instruction=teacher.instruction,
        ),
        timed_offers=parameters.timed_offers,
    )


def _place(candidate: ComparedEncoder) -> str:
    """Name for files of a candidate, whatever characters its own has."""
    return hashlib.sha256(msgspec.json.encode(candidate)).hexdigest()[:16]


def _kept_row(context: StageContext, candidate: ComparedEncoder) -> EncoderRow | None:
    path = context.checkpoints / f"encoder-{_place(candidate)}.json"
    return msgspec.json.decode(path.read_bytes(), type=EncoderRow) if path.exists() else None


def _refused(context: StageContext, candidate: ComparedEncoder, error: InputError) -> EncoderRow:
    """Not kept: what is missing now may be there when the stage is started again."""
    context.progress.say(f"{candidate.name} is left out: {error}")
    return EncoderRow(name=candidate.name, reason=str(error))


def _prepared(context: StageContext, candidate: ComparedEncoder, task: _Task) -> str:
    """The setting with which the candidate is trained: itself, or a folder with the layers that are kept.

    Raises:
        InputError: it cannot be loaded.
    """
    labels = sorted(set(task.training.categories))
    model = Classifier.from_encoder(candidate.encoder, labels, task.settings, digest=candidate.digest)
    if not candidate.layers:
        return candidate.encoder
    folder = context.scratch / f"layers-{_place(candidate)}"
    model.keep_layers(candidate.layers).save(folder)
    return str(folder / "encoder")


def _seconds_of_training(name: str, choice: str, task: _Task) -> float:
    """How long training takes, roughly: from a few steps on the first offers."""
    labels, size = sorted(set(task.training.categories)), task.parameters.batch_size
    model = Classifier.from_encoder(choice, labels, task.settings).to(best_device()).train()
    texts = model.tokenize(task.training.texts[: size * _TIMED_STEPS])
    seconds, rows_seen = 0.0, 0
    for step, rows in enumerate(np.array_split(np.argsort(texts.lengths), _TIMED_STEPS)):
        if not len(rows):
            continue
        started_at = time.perf_counter()
        ids, mask = texts.padded(rows, model.pad_id)
        logits = model(ids.to(model.device), mask.to(model.device))
        loss = functional.cross_entropy(
            logits.float(), torch.zeros(len(rows), dtype=torch.long, device=model.device)
        )
        loss.backward()
        model.zero_grad(set_to_none=True)
        loss.item()  # waits for a GPU
        if step or len(texts) < _TIMED_STEPS:  # the first one warms up
            seconds, rows_seen = seconds + time.perf_counter() - started_at, rows_seen + len(rows)
    return seconds / max(1, rows_seen) * len(task.training.texts) * task.parameters.epochs


def _estimate(seconds: dict[str, float], task: _Task) -> str:
    each = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    return (
        f"{len(seconds)} encoders to train on {len(task.training.texts):,} offers, {task.parameters.epochs} "
        f"passes each: about {sum(seconds.values()) / 60:.1f} minutes ({each})"
    )


def _measured(context: StageContext, candidate: ComparedEncoder, choice: str, task: _Task) -> EncoderRow:
    context.progress.say(f"{candidate.name}: training")
    parameters = msgspec.structs.replace(
        task.parameters, encoder=choice, encoder_digest="" if candidate.layers else candidate.digest
    )
    trained = train_inside(context, _TEACHER, parameters, _place(candidate), context.progress)
    model = Classifier.load(trained.folder)
    scores = held_out_scores(
        model.predict_logits(task.validation.texts), model.labels, task.validation.categories, task.taxonomy
    )
    texts = (task.validation.texts + task.training.texts)[: task.timed_offers]
    row = EncoderRow(
        name=candidate.name,
        mean_weighted_f1=round(scores["mean_weighted_f1"], 6),
        macro_f1=round(scores["macro_f1"], 6),
        accuracy=round(scores["accuracy"], 6),
        texts_per_second=round(_texts_per_second(model, texts), 1),
        parameters=model.parameter_count,
        size_bytes=sum(path.stat().st_size for path in trained.folder.rglob("*") if path.is_file()),
        training_seconds=float(trained.metrics["training_seconds"]),
    )
    path = context.checkpoints / f"encoder-{_place(candidate)}.json"
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.encode(row))
    partial.rename(path)
    trained.forget()
    context.progress.say(
        f"{row.name}: mean weighted F1 {row.mean_weighted_f1:.4f}, "
        f"{row.texts_per_second:,.0f} texts/s on one thread"
    )
    return row


def _texts_per_second(model: Classifier, texts: list[str]) -> float:
    """Of the fastest of three passes on one thread: what disturbs only ever slows down."""
    threads = torch.get_num_threads()
    model.to("cpu").eval()
    torch.set_num_threads(1)
    try:
        model.predict_logits(texts[:_TIMED_BATCH], _TIMED_BATCH)
        seconds = []
        for _ in range(_PASSES):
            started_at = time.perf_counter()
            model.predict_logits(texts, _TIMED_BATCH)
            seconds.append(time.perf_counter() - started_at)
    finally:
        torch.set_num_threads(threads)
    return len(texts) / min(seconds)


def _write(folder: Path, rows: list[EncoderRow]) -> None:
    """``encoders.json`` and ``encoders.parquet``, a row per encoder in the order asked for, and the plot."""
    (folder / "encoders.json").write_bytes(msgspec.json.format(msgspec.json.encode(rows), indent=2))
    columns: list[tuple[str, Any]] = [
        ("name", pa.string()),
        ("mean_weighted_f1", pa.float64()),
        ("macro_f1", pa.float64()),
        ("accuracy", pa.float64()),
        ("texts_per_second", pa.float64()),
        ("parameters", pa.int64()),
        ("size_bytes", pa.int64()),
        ("training_seconds", pa.float64()),
        ("on_front", pa.bool_()),
        ("reason", pa.string()),
    ]
    table = pa.Table.from_pylist(msgspec.to_builtins(rows), pa.schema(columns))
    pq.write_table(table, folder / "encoders.parquet")
    (folder / "quality_over_throughput.png").write_bytes(comparison_plot(msgspec.to_builtins(rows)))


def _metrics(rows: list[EncoderRow], task: _Task, machine: str) -> dict[str, Any]:
    measured = [row for row in rows if not row.reason]
    front = sorted((row for row in measured if row.on_front), key=lambda row: -(row.mean_weighted_f1 or 0.0))
    return {
        "sentence": "on the front, best first: "
        + ", ".join(
            f"{row.name} ({row.mean_weighted_f1:.4f}, {row.texts_per_second:,.0f} texts/s)" for row in front
        ),
        "encoders": len(rows),
        "measured": len(measured),
        "left_out": len(rows) - len(measured),
        "on_front": len(front),
        "best_mean_weighted_f1": front[0].mean_weighted_f1,
        "rows": len(task.training.texts),
        "validation_rows": len(task.validation.texts),
        "epochs": task.parameters.epochs,
        "machine": machine,
    }

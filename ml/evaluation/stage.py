"""How good the models are, on offers that none of them has seen.

Teacher, student, fast model and the version in production answer the same offers of the evaluation
set, each with its own labels; a category that a model does not know is a mistake of that model.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import InputError
from ml.evaluation import plots
from ml.evaluation.metrics import (
    Array,
    Band,
    Calibration,
    Floats,
    Interval,
    Scores,
    calibration,
    class_scores,
    paired_bootstrap,
    scores,
    scores_by_level,
    scores_by_segment,
    scores_by_size,
)
from ml.learning.encoder import Classifier, use_available_cores
from ml.learning.fast_model import FastModel
from ml.offers import TEXT_VERSION
from ml.runner import StageContext
from ml.serving.predictor import Predictor
from ml.stages import EvaluationParameters
from ml.taxonomy import Taxonomy

STUDENT, TEACHER, FAST, PRODUCTION = "student", "teacher", "fast", "production"

_CHUNK_OFFERS = 1024
"""Offers scored at once: bounds the matrix of probabilities, whatever the number of offers."""
_TABLE_ROWS = 15
_LEAST_SUPPORT = 3
"""Categories with fewer evaluation offers are in neither table: their F1 is a matter of luck."""
_UNKNOWN = "unknown"


class Model(Protocol):
    """What is measured here."""

    labels: list[str]

    def predict_probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        """Probabilities, (texts, labels)."""


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What one model said, offer by offer."""

    category_ids: Array
    """Predicted category, (n,)."""
    confidence: Floats
    """Its probability, (n,)."""
    seconds: float
    unknown_labels: int
    """Offers whose true category is not among the model's labels."""


class CategoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the tables of best and worst categories."""

    category_id: str
    path: str
    offers: int
    precision: float
    recall: float
    f1: float
    mostly_taken_for: str | None
    """Path of the wrong category chosen most often, if any was."""


class ModelReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured about one model."""

    overall: Scores
    levels: list[Scores]
    """From level 1 (the roots) down; a category above a level counts as itself there."""
    mean_weighted_f1: float
    size_bands: list[Band]
    countries: dict[str, Scores]
    calibration: Calibration
    unknown_labels: int
    offers_per_second: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``evaluation.json``."""

    offers: int
    categories: int
    text_version: str
    models: dict[str, ModelReport]
    student_minus: dict[str, Interval]
    """Weighted F1 of the student minus that of each other model, with its interval."""
    best_categories: list[CategoryRow]
    """The student's best categories."""
    worst_categories: list[CategoryRow]
    """The student's worst categories."""
    production_not_comparable: str | None = None


def evaluate_student(context: StageContext, parameters: EvaluationParameters) -> dict[str, Any]:
    """Write ``evaluation.json``, ``predictions.parquet`` and the plots.

    Answers of a model are kept in the checkpoints, so that a killed run starts with the next model.

    Returns:
        Flat figures ``<model>_weighted_f1`` and the like, ``student_share_of_teacher``, and
        ``student_minus_production`` with ``_low`` and ``_high`` where a version is in production.

    Raises:
        InputError: the evaluation set is empty or a model cannot be loaded.
    """
    use_available_cores()
    offers = _read_offers(context.input("evaluation_set"))
    taxonomy = Taxonomy.load(context.input("catalog_taxonomy"))
    training_counts = _training_counts(context.optional_input("training_sample"))
    loaders, not_comparable = _loaders(context, parameters)
    truth = _texts_of(offers, "category_id")
    texts = [str(text) for text in offers["text"].to_pylist()]

    answers = {name: _answers(context, name, load, texts, truth) for name, load in loaders.items()}
    reports = {
        name: _report(answer, offers, truth, taxonomy, training_counts) for name, answer in answers.items()
    }
    clusters = _texts_of(offers, "product_id", "gtin", "text")
    best, worst = _best_and_worst(truth, answers[STUDENT].category_ids, taxonomy)
    evaluation = Evaluation(
        offers=len(offers),
        categories=len(np.unique(truth)),
        text_version=TEXT_VERSION,
        models=reports,
        student_minus={
            name: paired_bootstrap(
                truth,
                answers[STUDENT].category_ids,
                answer.category_ids,
                clusters=clusters,
                resamples=parameters.bootstrap,
                seed=parameters.seed,
            )
            for name, answer in answers.items()
            if name != STUDENT
        },
        best_categories=best,
        worst_categories=worst,
        production_not_comparable=not_comparable,
    )
    _write(context, evaluation, answers, offers, truth)
    for name, report in reports.items():
        context.progress.say(
            f"{name}: weighted F1 {report.overall.weighted_f1:.4f}, macro F1 {report.overall.macro_f1:.4f}, "
            f"mean over levels {report.mean_weighted_f1:.4f}, {report.offers_per_second:,.0f} offers/s"
        )
    return flat_metrics(evaluation)


def flat_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """The figures that checks, tracking and people look at first."""
    metrics: dict[str, Any] = {
        "offers": evaluation.offers,
        "categories": evaluation.categories,
        "text_version": evaluation.text_version,
    }
    for name, report in evaluation.models.items():
        metrics |= {
            f"{name}_accuracy": report.overall.accuracy,
            f"{name}_weighted_f1": report.overall.weighted_f1,
            f"{name}_macro_f1": report.overall.macro_f1,
            f"{name}_mean_weighted_f1": report.mean_weighted_f1,
            **{
                f"{name}_weighted_f1_level_{n}": level.weighted_f1 for n, level in enumerate(report.levels, 1)
            },
            f"{name}_ece": report.calibration.expected_calibration_error,
            f"{name}_mean_confidence": report.calibration.mean_confidence,
            f"{name}_offers_per_second": report.offers_per_second,
            f"{name}_unknown_labels": report.unknown_labels,
        }
    for name, interval in evaluation.student_minus.items():
        metrics |= {
            f"student_minus_{name}": interval.difference,
            f"student_minus_{name}_low": interval.low,
            f"student_minus_{name}_high": interval.high,
        }
    teacher_f1 = metrics["teacher_weighted_f1"]
    metrics["student_share_of_teacher"] = metrics["student_weighted_f1"] / teacher_f1 if teacher_f1 else 0.0
    if evaluation.production_not_comparable:
        metrics["production_not_comparable"] = evaluation.production_not_comparable
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()}


def _read_offers(evaluation_set: Path) -> pa.Table:
    path = evaluation_set / "offers.parquet"
    columns = ["offer_id", "country", "product_id", "gtin", "category_id", "text"]
    offers = pq.read_table(path, columns=columns)
    if len(offers) == 0:
        raise InputError(
            f"{path} holds no offers, there is nothing to measure on; make the evaluation set anew"
        )
    return offers


def _training_counts(training_sample: Path | None) -> dict[str, int] | None:
    """Labelled training offers of each category, if the sample is at hand."""
    if training_sample is None:
        return None
    sample = pq.read_table(training_sample / "labelled.parquet", columns=["category_id", "split"])
    return Counter(
        str(category)
        for category, split in zip(
            sample["category_id"].to_pylist(), sample["split"].to_pylist(), strict=True
        )
        if split == "train"
    )


def _loaders(
    context: StageContext, parameters: EvaluationParameters
) -> tuple[dict[str, Callable[[], Model]], str | None]:
    """How to load each model, and why production's cannot be compared if so. One is in memory at a time."""

    def classifier(name: str) -> Callable[[], Model]:
        return lambda: _Batched(Classifier.load(context.input(name)), parameters.batch_size)

    loaders: dict[str, Callable[[], Model]] = {
        STUDENT: classifier("student_checkpoint"),
        TEACHER: classifier("teacher_checkpoint"),
        FAST: lambda: FastModel.load(context.input("fast_checkpoint")),
    }
    production = context.optional_input("production_model")
    if production is None:
        return loaders, None
    version = msgspec.json.decode((production / "model.json").read_bytes()).get("text_version")
    if version != TEXT_VERSION:
        # Not an error here: the version in production stays as it is, and whether a release may
        # go ahead without the comparison is for the gate to say.
        reason = f"it reads offer text version {version}, this version makes {TEXT_VERSION}"
        context.progress.say(f"the version in production is left out: {reason}")
        return loaders, reason
    return loaders | {PRODUCTION: lambda: Predictor.load(production)}, None


class _Batched:
    """A classifier with the batch size of this stage."""

    def __init__(self, classifier: Classifier, batch_size: int) -> None:
        self._classifier = classifier
        self._batch_size = batch_size
        self.labels: list[str] = classifier.labels

    def predict_probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        return self._classifier.predict_probabilities(texts, self._batch_size)


def _answers(
    context: StageContext, name: str, load: Callable[[], Model], texts: list[str], truth: Array
) -> Answers:
    checkpoint = context.checkpoints / f"{name}.parquet"
    if not checkpoint.exists():
        partial = checkpoint.with_suffix(".partial")
        pq.write_table(_ask(context, name, load(), texts, truth), partial)
        partial.rename(checkpoint)
    table = pq.read_table(checkpoint)
    facts = table.schema.metadata
    return Answers(
        category_ids=_texts_of(table, "category_id"),
        confidence=table["confidence"].to_numpy(),
        seconds=float(facts[b"seconds"]),
        unknown_labels=int(facts[b"unknown_labels"]),
    )


def _ask(context: StageContext, name: str, model: Model, texts: list[str], truth: Array) -> pa.Table:
    category_ids: list[str] = []
    confidence: list[float] = []
    started_at = time.monotonic()
    with context.progress.bar(f"asking {name}", len(texts), "offers") as bar:
        for start in range(0, len(texts), _CHUNK_OFFERS):
            probabilities = model.predict_probabilities(texts[start : start + _CHUNK_OFFERS])
            best = probabilities.argmax(axis=1)
            category_ids += [model.labels[label] for label in best]
            confidence += probabilities[np.arange(len(best)), best].tolist()
            bar.update(len(best))
    facts = {
        "seconds": repr(time.monotonic() - started_at),
        "unknown_labels": str(int((~np.isin(truth, np.array(model.labels))).sum())),
    }
    table = pa.table({"category_id": category_ids, "confidence": pa.array(confidence, pa.float64())})
    return table.replace_schema_metadata(facts)


def _report(
    answers: Answers,
    offers: pa.Table,
    truth: Array,
    taxonomy: Taxonomy,
    training_counts: dict[str, int] | None,
) -> ModelReport:
    predicted = answers.category_ids
    levels = scores_by_level(truth, predicted, taxonomy.ancestor_at, taxonomy.levels)
    return ModelReport(
        overall=scores(truth, predicted),
        levels=levels,
        mean_weighted_f1=float(np.mean([level.weighted_f1 for level in levels])),
        size_bands=[] if training_counts is None else scores_by_size(truth, predicted, training_counts),
        countries=scores_by_segment(truth, predicted, _texts_of(offers, "country")),
        calibration=calibration(answers.confidence, predicted == truth),
        unknown_labels=answers.unknown_labels,
        offers_per_second=len(truth) / max(answers.seconds, 1e-9),
    )


def _best_and_worst(
    truth: Array, predicted: Array, taxonomy: Taxonomy
) -> tuple[list[CategoryRow], list[CategoryRow]]:
    per_class = class_scores(truth, predicted)

    def path(category_id: str) -> str:
        return taxonomy.path(category_id) if category_id in taxonomy else category_id

    def row(index: int) -> CategoryRow:
        category = str(per_class.classes[index])
        mistakes = Counter(predicted[(truth == category) & (predicted != category)].tolist())
        return CategoryRow(
            category_id=category,
            path=path(category),
            offers=int(per_class.support[index]),
            precision=float(per_class.precision[index]),
            recall=float(per_class.recall[index]),
            f1=float(per_class.f1[index]),
            mostly_taken_for=path(min(mistakes, key=lambda c: (-mistakes[c], c))) if mistakes else None,
        )

    measured = np.flatnonzero(per_class.support >= _LEAST_SUPPORT).tolist()
    # Among equals, the category with more offers says more.
    worst = sorted(measured, key=lambda i: (per_class.f1[i], -per_class.support[i], i))
    best = sorted(measured, key=lambda i: (-per_class.f1[i], -per_class.support[i], i))
    return [row(i) for i in best[:_TABLE_ROWS]], [row(i) for i in worst[:_TABLE_ROWS]]


def _write(
    context: StageContext, evaluation: Evaluation, answers: dict[str, Answers], offers: pa.Table, truth: Array
) -> None:
    columns: dict[str, Any] = {
        "offer_id": offers["offer_id"],
        "country": offers["country"],
        "category_id": truth.tolist(),
    }
    for name, answer in answers.items():
        columns[f"{name}_category_id"] = answer.category_ids.tolist()
        columns[f"{name}_confidence"] = answer.confidence
    pq.write_table(pa.table(columns), context.output / "predictions.parquet")
    (context.output / "evaluation.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(evaluation), indent=2)
    )
    reports = evaluation.models
    pictures = {
        "reliability": plots.reliability({name: report.calibration for name, report in reports.items()}),
        "countries": plots.segments({name: report.countries for name, report in reports.items()}, "country"),
    }
    if any(report.size_bands for report in reports.values()):
        pictures["size_bands"] = plots.size_bands({name: r.size_bands for name, r in reports.items()})
    if curves := _learning_curves(context):
        pictures["learning_curves"] = plots.learning_curves(curves)
    for name, content in pictures.items():
        (context.output / f"{name}.png").write_bytes(content)


def _learning_curves(context: StageContext) -> dict[str, list[dict[str, float]]]:
    paths = {name: context.input(f"{name}_checkpoint") / "learning_curve.json" for name in (STUDENT, TEACHER)}
    curves = {
        name: msgspec.json.decode(path.read_bytes(), type=list[dict[str, float]])
        for name, path in paths.items()
        if path.exists()
    }
    return {name: points for name, points in curves.items() if points}


def _texts_of(table: pa.Table, *columns: str) -> Array:
    """The first of the columns that is not null, row by row, as text (n,)."""
    return np.array(
        [
            next((str(value) for value in values if value is not None), _UNKNOWN)
            for values in zip(*(table[column].to_pylist() for column in columns), strict=True)
        ],
        dtype=str,
    )

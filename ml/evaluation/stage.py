"""How good the models are, on offers that none of them has seen.

The student is measured as it is served: with the fast model's word beside its own, weighed on validation
offers as :mod:`ml.learning.cascade` does; ``student_alone`` is the encoder without it.

Teacher, student, fast model and the version in production answer the same offers of the evaluation
set, each with its own labels; a category that a model does not know is a mistake of that model. The
version in production may know an older taxonomy only: what it answers counts as the category that most
of the offers of the older one belong to today.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import InputError
from ml.evaluation import plots
from ml.evaluation.comparison import Comparison, Group
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
    paired_segments,
    scores,
    scores_by_level,
    scores_by_segment,
    scores_by_size,
)
from ml.learning.cascade import TierOutput, choose_cascade, validation_offers
from ml.learning.devices import use_available_cores
from ml.learning.encoder import Classifier
from ml.learning.ensemble import Teacher
from ml.offers import TEXT_VERSION
from ml.runner import StageContext
from ml.sampling.label_sources import WEAK
from ml.serving.cascade import OTHER_COUNTRIES, Cascade
from ml.serving.fast_model import FastModel
from ml.serving.predictor import Predictor
from ml.stages import CompileParameters, EvaluationParameters
from ml.taxonomy import TAXONOMY_FILE, Taxonomy
from ml.taxonomy_change.change import changed_categories, changed_since
from ml.taxonomy_change.transitions import Transition, Transitions, most_likely_moves

STUDENT, TEACHER, FAST, PRODUCTION = "student", "teacher", "fast", "production"
ALONE = "student_alone"
"""The student without the fast model's word, with which it is served."""

_CHUNK_OFFERS = 1024
"""Offers scored at once: bounds the matrix of probabilities, whatever the number of offers."""
_TABLE_ROWS = 15
_LEAST_SUPPORT = 3
"""Categories with fewer evaluation offers are in neither table: their F1 is a matter of luck."""
_UNKNOWN = "unknown"
_UNCHANGED = "unchanged"


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
    changes: dict[str, Scores]
    """By what happened to the true category since production's taxonomy (if there is no version in
    production, in the last change): unchanged, changed, new."""
    weak_categories: Scores | None
    """On weakly labelled categories; None if there are none or it is not known."""
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
    comparisons: list[Comparison]
    """The student against production, overall and by segment; empty where there is none."""
    best_categories: list[CategoryRow]
    """The student's best categories."""
    worst_categories: list[CategoryRow]
    """The student's worst categories."""
    segments_too_small: int
    """Segments that have too few offers or products to be compared on their own."""
    weak_categories_not_measured: int | None
    """Weakly labelled categories without an evaluation offer; None if it is not known."""
    production_not_comparable: str | None = None


def evaluate_student(context: StageContext, parameters: EvaluationParameters) -> dict[str, Any]:
    """Write ``evaluation.json``, ``predictions.parquet`` and the plots.

    Answers of a model are kept in the checkpoints, so that a killed run starts with the next model.

    Returns:
        Flat figures ``<model>_weighted_f1`` and the like, ``student_share_of_teacher``, and where a
        version is in production ``student_minus_production`` with ``_low`` and ``_high``, the list
        ``comparisons`` (see :class:`Comparison`) and ``segments_too_small``.

    Raises:
        InputError: the evaluation set is empty or a model cannot be loaded.
    """
    use_available_cores()
    offers = _read_offers(context.input("evaluation_set"))
    taxonomy = Taxonomy.load(context.input("catalog_taxonomy"))
    trained = _trained(context.optional_input("training_sample"))
    loaders, not_comparable = _loaders(context, parameters)
    truth = _texts_of(offers, "category_id")
    production = context.input("production_model") if PRODUCTION in loaders else None
    changes = _changes(context.optional_input("taxonomy_change"), production, taxonomy, truth)
    texts = [str(text) for text in offers["text"].to_pylist()]

    answers = {name: _answers(context, name, load, texts, truth) for name, load in loaders.items()}
    reports = {
        name: _report(answer, offers, truth, taxonomy, changes, trained) for name, answer in answers.items()
    }
    clusters = _texts_of(offers, "product_id", "gtin", "text")
    best, worst = _best_and_worst(truth, answers[STUDENT].category_ids, taxonomy)
    student_minus = {
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
    }
    comparisons, too_small = list[Comparison](), 0
    if PRODUCTION in answers:
        segments = _segments(offers, truth, taxonomy, changes)
        compared = _compared(answers, truth, segments, clusters, parameters)
        comparisons = [_comparison("overall", "all offers", len(truth), student_minus[PRODUCTION]), *compared]
        too_small = len(segments) - len(compared)
    evaluation = Evaluation(
        offers=len(offers),
        categories=len(np.unique(truth)),
        text_version=TEXT_VERSION,
        models=reports,
        student_minus=student_minus,
        comparisons=comparisons,
        best_categories=best,
        worst_categories=worst,
        segments_too_small=too_small,
        weak_categories_not_measured=(
            len(set(trained.weakly_labelled) - set(truth.tolist())) if trained else None
        ),
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
            **{f"{name}_weighted_f1_{change}": part.weighted_f1 for change, part in report.changes.items()},
        }
        if report.weak_categories:
            metrics[f"{name}_weighted_f1_weak_categories"] = report.weak_categories.weighted_f1
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
    if PRODUCTION in evaluation.student_minus:
        metrics["comparisons"] = [
            _rounded(msgspec.to_builtins(comparison)) for comparison in evaluation.comparisons
        ]
        metrics["segments_too_small"] = evaluation.segments_too_small
    if evaluation.weak_categories_not_measured is not None:
        metrics["weak_categories_not_measured"] = evaluation.weak_categories_not_measured
    return _rounded(metrics)


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in figures.items()}


def _read_offers(evaluation_set: Path) -> pa.Table:
    path = evaluation_set / "offers.parquet"
    columns = ["offer_id", "country", "product_id", "gtin", "category_id", "text"]
    offers = pq.read_table(path, columns=columns)
    if len(offers) == 0:
        raise InputError(
            f"{path} holds no offers, there is nothing to measure on; make the evaluation set anew"
        )
    return offers


class _Trained(msgspec.Struct, frozen=True):
    """What the models learned from."""

    offers: dict[str, int]
    """Training offers of each category."""
    weakly_labelled: list[str]
    """Categories at least half of whose training offers have weak labels: guesses say what they are."""


def _trained(training_sample: Path | None) -> _Trained | None:
    """Training offers by category, if the sample is at hand."""
    if training_sample is None:
        return None
    sample = pq.read_table(
        training_sample / "labelled.parquet",
        columns=["category_id", "label_source"],
        filters=[("split", "==", "train")],
    )
    rows = Counter(zip(sample["category_id"].to_pylist(), sample["label_source"].to_pylist(), strict=True))
    offers: Counter[str] = Counter()
    for (category, _), count in rows.items():
        offers[str(category)] += count
    weakly_labelled = [name for name, count in offers.items() if rows[name, WEAK] >= count / 2]
    return _Trained(offers=offers, weakly_labelled=weakly_labelled)


def _changes(
    taxonomy_change: Path | None, production: Path | None, taxonomy: Taxonomy, truth: Array
) -> Array | None:
    """What happened to each offer's category, (n,): since production's taxonomy, or in the last change.

    None if that is unknown.
    """
    if taxonomy_change is None:
        return None
    changed: Mapping[str, str]
    if production:
        known = Taxonomy.load(production / TAXONOMY_FILE)
        changed = changed_since(known, taxonomy, _transitions_since(production, taxonomy_change))
    else:
        changed = changed_categories(taxonomy_change)
    return np.array([changed.get(category, _UNCHANGED) for category in truth.tolist()], dtype=str)


def _segments(
    offers: pa.Table, truth: Array, taxonomy: Taxonomy, changes: Array | None
) -> dict[tuple[Group, str], npt.NDArray[np.bool_]]:
    """Offers of each segment, (n,).

    A segment that holds all offers is left out: it would say again what the overall comparison says.
    """
    names: dict[Group, Array] = {
        "country": _texts_of(offers, "country"),
        "top_level": _top_levels(truth, taxonomy),
    }
    if changes is not None:
        names["change"] = changes
    segments = {
        (group, name): of_offers == name
        for group, of_offers in names.items()
        for name in np.unique(of_offers).tolist()
    }
    return {place: inside for place, inside in segments.items() if not inside.all()}


def _compared(
    answers: Mapping[str, Answers],
    truth: Array,
    segments: Mapping[tuple[Group, str], npt.NDArray[np.bool_]],
    clusters: Array,
    parameters: EvaluationParameters,
) -> list[Comparison]:
    """The student against production on every segment that has enough offers and products."""
    large = {
        place: inside for place, inside in segments.items() if inside.sum() >= parameters.min_segment_offers
    }
    intervals = paired_segments(
        truth,
        answers[STUDENT].category_ids,
        answers[PRODUCTION].category_ids,
        list(large.values()),
        clusters=clusters,
        resamples=parameters.bootstrap,
        seed=parameters.seed,
    )
    return [
        _comparison(*place, int(inside.sum()), interval)
        for (place, inside), interval in zip(large.items(), intervals, strict=True)
        if interval
    ]


def _comparison(group: Group, segment: str, offers: int, interval: Interval) -> Comparison:
    return Comparison(group=group, segment=segment, offers=offers, **msgspec.structs.asdict(interval))


def _top_levels(truth: Array, taxonomy: Taxonomy) -> Array:
    """Name of the root above each category, (n,); with its id where roots share a name."""
    shared = Counter(taxonomy.name(root) for root in taxonomy.roots)

    def name(category_id: str) -> str:
        root = taxonomy.ancestor_at(category_id, 1)
        if root not in taxonomy:
            return root
        return taxonomy.name(root) if shared[taxonomy.name(root)] == 1 else f"{taxonomy.name(root)} ({root})"

    ids, codes = np.unique(truth, return_inverse=True)
    names: Array = np.array([name(str(category_id)) for category_id in ids])[codes]
    return names


def _loaders(
    context: StageContext, parameters: EvaluationParameters
) -> tuple[dict[str, Callable[[], Model]], str | None]:
    """How to load each model, and why production's cannot be compared if so. One is in memory at a time."""
    student, teacher = context.input("student_checkpoint"), context.input("teacher_checkpoint")
    fast, sample = context.input("fast_checkpoint"), context.optional_input("training_sample")
    taxonomy = Taxonomy.load(context.input("catalog_taxonomy"))

    def alone() -> Model:
        return _Batched(Classifier.load(student), parameters.batch_size)

    loaders: dict[str, Callable[[], Model]] = {
        STUDENT: lambda: _AsServed(alone(), FastModel.load(fast), sample, taxonomy) if sample else alone(),
        **({ALONE: alone} if sample else {}),
        TEACHER: lambda: _Batched(Teacher.load(teacher), parameters.batch_size),
        FAST: lambda: FastModel.load(fast),
    }
    production = context.optional_input("production_model")
    if production is None:
        return loaders, None
    facts = msgspec.json.decode((production / "model.json").read_bytes())
    version = facts.get("text_version")
    if version != TEXT_VERSION:
        # Not an error here: the version in production stays as it is, and whether a release may
        # go ahead without the comparison is for the gate to say.
        reason = f"it reads offer text version {version}, this version makes {TEXT_VERSION}"
        context.progress.say(f"the version in production is left out: {reason}")
        return loaders, reason
    taxonomy_change = context.optional_input("taxonomy_change")
    since = _transitions_since(production, taxonomy_change) if taxonomy_change else {}
    moves = most_likely_moves(since.values())
    # As if its fast model were sure of nothing, as the new one is; what a cascade may lose is stated apart.
    return loaders | {PRODUCTION: lambda: _Moved(Predictor.load(production), moves)}, None


def _transitions_since(production: Path, taxonomy_change: Path) -> dict[str, Transition]:
    """Where categories of production's taxonomy belong today, by id, as far as they do not simply live on."""
    transitions = Transitions.read(taxonomy_change)
    version = msgspec.json.decode((production / "model.json").read_bytes())["taxonomy_version"]
    # A model knows the short form of the digest; an unknown one counts as older than all.
    digest = transitions.digest_of(version)
    return transitions.for_labels_of(digest)


class _Moved:
    """The deep answers of an earlier taxonomy's model, as categories of today's."""

    def __init__(self, predictor: Predictor, moves: Mapping[str, str]) -> None:
        self._predictor = predictor
        self.labels: list[str] = [moves.get(label, label) for label in predictor.labels]

    def predict_probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        return self._predictor.deep_probabilities(texts)


class _AsServed:
    """Student and fast model together, as a compiled model answers what the fast model is not sure of."""

    def __init__(self, student: Model, fast: Model, training_sample: Path, taxonomy: Taxonomy) -> None:
        offers = validation_offers(training_sample)
        said = [
            TierOutput(labels=model.labels, probabilities=model.predict_probabilities(offers.texts))
            for model in (fast, student)
        ]
        chosen = CompileParameters()
        settings = choose_cascade(
            offers,
            *said,
            max_loss=chosen.max_loss,
            min_precision=chosen.min_precision,
            country_offers=chosen.country_offers,
        )
        self._student, self._fast = student, fast
        self._cascade = Cascade(settings, fast.labels, student.labels, taxonomy)
        self.labels = self._cascade.labels

    def predict_probabilities(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        countries = [OTHER_COUNTRIES] * len(texts)
        fast = self._cascade.fast_probabilities(self._fast.predict_probabilities(texts), countries)
        return self._cascade.deep_probabilities(fast, self._student.predict_probabilities(texts), countries)


class _Batched:
    """A classifier with the batch size of this stage."""

    def __init__(self, classifier: Classifier | Teacher, batch_size: int) -> None:
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
    changes: Array | None,
    trained: _Trained | None,
) -> ModelReport:
    predicted = answers.category_ids
    weak = np.isin(truth, np.array(trained.weakly_labelled if trained else [], dtype=str))
    levels = scores_by_level(truth, predicted, taxonomy.ancestor_at, taxonomy.levels)
    return ModelReport(
        overall=scores(truth, predicted),
        levels=levels,
        mean_weighted_f1=float(np.mean([level.weighted_f1 for level in levels])),
        size_bands=scores_by_size(truth, predicted, trained.offers) if trained else [],
        countries=scores_by_segment(truth, predicted, _texts_of(offers, "country")),
        changes={} if changes is None else scores_by_segment(truth, predicted, changes),
        weak_categories=scores(truth[weak], predicted[weak]) if weak.any() else None,
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
    if evaluation.comparisons:
        pictures["comparisons"] = plots.comparisons(evaluation.comparisons)
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

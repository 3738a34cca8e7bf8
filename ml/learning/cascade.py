"""Choosing a cascade: how much the fast model's word counts, and from which confidence on it is the last.

All is chosen on validation offers that people labelled; no model was trained on them. Their temperatures were
fitted on them, and so is the deep answer here: it looks a little better on them than it is, and what is lost
against it a little larger, so that what is certified of the loss errs on the safe side.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ml.learning.averaging import choose_share
from ml.learning.calibration import fit_temperature, targets_of
from ml.learning.risk_control import (
    CONFIDENCE,
    paired_loss_p_value,
    rejected_in_sequence,
    share_p_value,
)
from ml.learning.training_data import strings
from ml.sampling.label_sources import GUESSED
from ml.serving.cascade import (
    OTHER_COUNTRIES,
    CascadeSettings,
    FastThreshold,
    Floats,
    Mask,
    ReviewThreshold,
    Temperatures,
    blended,
    deep_labels,
    placed_logs,
    places_in,
    softmax,
)

Strings = NDArray[np.str_]

REVIEW_GRID = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Confidences below which answers may be marked; few, as each of them costs certainty."""

FAST_GRID = (
    *(0.9995, 0.999, 0.998, 0.997, 0.996, 0.995, 0.9935, 0.992, 0.99, 0.9875, 0.985, 0.9825, 0.98, 0.975),
    *(
        0.97,
        0.965,
        0.96,
        0.95,
        0.94,
        0.93,
        0.92,
        0.91,
        0.9,
        0.885,
        0.87,
        0.85,
        0.825,
        0.8,
        0.775,
        0.75,
        0.725,
    ),
    *(0.7, 0.675, 0.65, 0.625, 0.6, 0.575, 0.55, 0.525, 0.5, 0.475, 0.45, 0.425, 0.4),
)
"""Confidences from which on the fast model may answer, strictest first. Fixed, so that none is chosen for
how it looks on the offers it is tested on; has all of :data:`REVIEW_GRID`, see
:meth:`CascadeSettings.fast_from`."""

_LEAST_OFFERS_FOR_TEMPERATURE = 200
"""Of a country, so that one more number may be fitted on them."""


class ValidationOffers(msgspec.Struct, frozen=True, kw_only=True):
    """Labelled offers that no model was trained on."""

    texts: list[str]
    category_ids: list[str]
    countries: list[str]
    """Upper case; empty where it is not known."""


class TierOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one of the two models says of the validation offers."""

    labels: list[str]
    probabilities: Floats
    """Calibrated by the model's own temperature, (offers, labels)."""


def validation_offers(training_sample: Path) -> ValidationOffers:
    """The validation offers of a training sample whose labels people gave; guesses certify nothing."""
    path = training_sample / "labelled.parquet"
    columns = ["text", "category_id", "country", "label_source"]
    columns = [name for name in columns if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=columns, filters=[("split", "==", "validation")])
    if "label_source" in columns:
        table = table.filter(~np.isin(strings(table["label_source"]), GUESSED))
    countries = table["country"].to_pylist() if "country" in columns else [None] * len(table)
    return ValidationOffers(
        texts=strings(table["text"]),
        category_ids=strings(table["category_id"]),
        countries=[(country or OTHER_COUNTRIES).upper() for country in countries],
    )


def choose_cascade(
    offers: ValidationOffers,
    fast: TierOutput,
    student: TierOutput,
    *,
    max_loss: float,
    min_precision: float,
    country_offers: int,
) -> CascadeSettings:
    """Choose weight, temperatures and thresholds.

    Countries with at least ``country_offers`` offers get a threshold of their own, all others share one. The
    error allowed is divided by the number of thresholds, so that with 95 % confidence each of them keeps the
    stated loss on its own offers, and hence all do together. What the thresholds promise of the loss and what
    the mark promises of precision are two statements of 95 % each.

    Args:
        offers: At least none; without any, all goes to the student and every answer below the highest
            threshold is marked.
        fast: Of the same offers.
        student: Of the same offers, by the model that will serve.
        max_loss: Accuracy that may be lost against the deep answer alone.
        min_precision: Share of right answers that are wanted among those without a mark.
        country_offers: Fewest offers of a country with a threshold of its own.
    """
    countries = np.array(offers.countries, dtype=str)
    truth = np.array(offers.category_ids, dtype=str)
    fast_temperatures = _temperatures(
        _logs(fast), targets_of(fast.labels, offers.category_ids), countries, 1.0
    )
    fast_probabilities = softmax(_logs(fast) / fast_temperatures.of(offers.countries)[:, None])
    labels = deep_labels(fast.labels, student.labels)
    targets = targets_of(labels, offers.category_ids)
    fast_logs = placed_logs(fast_probabilities, places_in(fast.labels, labels), len(labels))
    student_logs = placed_logs(student.probabilities, places_in(student.labels, labels), len(labels))
    weight = choose_share(lambda share: blended(fast_logs, student_logs, share), targets)
    deep_logs = blended(fast_logs, student_logs, weight)
    deep_temperatures = _temperatures(deep_logs, targets, countries)
    deep = softmax(deep_logs / deep_temperatures.of(offers.countries)[:, None])

    fast_right = np.array(fast.labels, dtype=str)[fast_probabilities.argmax(axis=1)] == truth
    deep_right = np.array(labels, dtype=str)[deep.argmax(axis=1)] == truth
    fast_confidence, deep_confidence = fast_probabilities.max(axis=1), deep.max(axis=1)
    groups = _groups(countries, country_offers)
    error = (1 - CONFIDENCE) / len(groups)
    thresholds = {
        name: fast_threshold(
            fast_confidence[inside], fast_right[inside], deep_right[inside], max_loss=max_loss, error=error
        )
        for name, inside in groups.items()
    }
    fast_from = np.full(len(truth), np.inf)
    for name, inside in groups.items():
        if (confidence := thresholds[name].confidence) is not None:
            fast_from[inside] = confidence
    return CascadeSettings(
        max_loss=max_loss,
        min_precision=min_precision,
        stated_confidence=CONFIDENCE,
        fast_weight=weight,
        fast_temperatures=fast_temperatures,
        deep_temperatures=deep_temperatures,
        thresholds=thresholds,
        review=review_threshold(
            fast_confidence,
            fast_right,
            deep_confidence,
            deep_right,
            fast_from,
            min_precision=min_precision,
            error=1 - CONFIDENCE,
        ),
    )


def fast_threshold(
    confidence: Floats, fast_right: Mask, deep_right: Mask, *, max_loss: float, error: float
) -> FastThreshold:
    """The laxest confidence of :data:`FAST_GRID` that is certified, going down from the strictest.

    Args:
        confidence: Of the fast model, (offers,).
        fast_right: Whether the fast model is right, (offers,).
        deep_right: Whether the deep answer is, (offers,).
        max_loss: Accuracy that may be lost against the deep answer alone.
        error: Probability with which the threshold may lose more after all.
    """
    offers = len(confidence)
    only_deep, only_fast = deep_right & ~fast_right, fast_right & ~deep_right

    def counts(threshold: float) -> tuple[int, int]:
        answered = confidence >= threshold
        return int((only_deep & answered).sum()), int((only_fast & answered).sum())

    def p_value(threshold: float) -> float:
        return paired_loss_p_value(*counts(threshold), offers, max_loss, error)

    certified = rejected_in_sequence(map(p_value, FAST_GRID), error)
    if not certified:
        return FastThreshold(confidence=None, offers=offers, answered=0.0, loss=0.0, p_value=None)
    chosen = FAST_GRID[certified - 1]
    losses, gains = counts(chosen)
    return FastThreshold(
        confidence=chosen,
        offers=offers,
        answered=float(np.mean(confidence >= chosen)),
        loss=(losses - gains) / offers,
        p_value=p_value(chosen),
    )


def review_threshold(
    fast_confidence: Floats,
    fast_right: Mask,
    deep_confidence: Floats,
    deep_right: Mask,
    fast_from: NDArray[np.float64],
    *,
    min_precision: float,
    error: float,
) -> ReviewThreshold:
    """The lowest confidence of :data:`REVIEW_GRID` from which on answers are as precise as wanted.

    The error allowed is divided by the length of the grid (Bonferroni): with few offers above a threshold the
    strictest is the hardest to certify, so there is no order in which to test them one after the other. Where
    none is certified it is the highest, and that is noted.

    Args:
        fast_confidence: Of the fast model, (offers,).
        fast_right: Whether the fast model is right, (offers,).
        deep_confidence: Of the deep answer, (offers,).
        deep_right: Whether the deep answer is right, (offers,).
        fast_from: Confidence from which on the fast model answers, (offers,).
        min_precision: Share of right answers that are wanted among those without a mark.
        error: Probability with which precision may be lower after all.
    """
    offers = len(fast_confidence)

    def unmarked_right(threshold: float) -> Mask:
        """Which of the answers without a mark are right."""
        by_fast = fast_confidence >= np.maximum(fast_from, threshold)
        is_unmarked = by_fast | (deep_confidence >= threshold)
        right: Mask = np.where(by_fast, fast_right, deep_right)[is_unmarked]
        return right

    def is_certified(threshold: float) -> bool:
        right = unmarked_right(threshold)
        p_value = share_p_value(int((~right).sum()), len(right), 1 - min_precision)
        return p_value <= error / len(REVIEW_GRID)

    certified = [threshold for threshold in REVIEW_GRID if is_certified(threshold)]
    chosen = min(certified, default=max(REVIEW_GRID))
    right = unmarked_right(chosen)
    return ReviewThreshold(
        confidence=chosen,
        certified=bool(certified),
        offers=offers,
        marked=1 - len(right) / offers if offers else 1.0,
        precision=float(right.mean()) if len(right) else None,
    )


def _groups(countries: Strings, country_offers: int) -> dict[str, Mask]:
    """Offers of each country that has enough of them, and of all other countries; (offers,) each."""
    sizes = Counter(countries.tolist())
    large = sorted(name for name, size in sizes.items() if name and size >= country_offers)
    groups: dict[str, Mask] = {name: countries == name for name in large}
    return {OTHER_COUNTRIES: ~np.isin(countries, large), **groups}


def _temperatures(
    logs: Floats, targets: NDArray[np.int64], countries: Strings, overall: float | None = None
) -> Temperatures:
    """Of all offers (unless given), and of each country with enough offers of a known category."""
    known = targets >= 0
    sizes = Counter(countries[known].tolist())
    return Temperatures(
        overall=round(fit_temperature(logs, targets), 4) if overall is None else overall,
        by_country={
            name: round(fit_temperature(logs[countries == name], targets[countries == name]), 4)
            for name in sorted(sizes)
            if name and sizes[name] >= _LEAST_OFFERS_FOR_TEMPERATURE
        },
    )


def _logs(output: TierOutput) -> Floats:
    classes = len(output.labels)
    return placed_logs(output.probabilities, np.arange(classes), classes)

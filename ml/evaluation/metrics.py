"""Figures of merit for classifiers with many unequal classes; NumPy and SciPy only.

Truth and predictions are arrays of shape (n,) of category ids (any one dtype that NumPy sorts).
Averages are those of scikit-learn: over every class that occurs in truth or predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import stdtrit

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

SIZE_BANDS: tuple[tuple[str, int, float], ...] = (
    ("0", 0, 0),
    ("1-9", 1, 9),
    ("10-99", 10, 99),
    ("100+", 100, float("inf")),
)
"""Name, least and largest number of training offers of a category in the band."""

LEAST_CLUSTERS = 10
"""With fewer clusters their spread says next to nothing about chance (Cameron et al., 2008)."""
_WEIGHTS_AT_ONCE = 4_000_000
"""Bootstrap weights that are in memory at once (32 MB), whatever the number of offers."""


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """Quality over all offers; each figure in [0, 1]."""

    offers: int
    accuracy: float
    weighted_f1: float
    macro_f1: float


class ClassScores(msgspec.Struct, frozen=True, kw_only=True):
    """Per-class figures; arrays of shape (classes,), in the order of ``classes`` (sorted)."""

    classes: Array
    support: Floats
    precision: Floats
    recall: Floats
    f1: Floats


class Band(msgspec.Struct, frozen=True, kw_only=True):
    """Quality on the categories of one size, by offers in training."""

    band: str
    categories: int
    offers: int
    accuracy: float
    weighted_f1: float
    """F1 of the band's categories, weighted by their offers."""
    macro_f1: float


class ReliabilityBin(msgspec.Struct, frozen=True, kw_only=True):
    """Offers whose confidence lies in [low, high)."""

    low: float
    high: float
    offers: int
    confidence: float
    """Mean confidence, 0 for an empty bin."""
    accuracy: float


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How far confidence is from the share of right answers."""

    expected_calibration_error: float
    mean_confidence: float
    bins: list[ReliabilityBin]


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A difference with its bootstrap confidence interval."""

    difference: float
    low: float
    high: float


def class_scores(truth: Array, predicted: Array, weights: Array | None = None) -> ClassScores:
    """Precision, recall and F1 of every class, 0 where undefined; row i counts ``weights[i]`` times."""
    classes, codes = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    true, guess = codes[: len(truth)], codes[len(truth) :]
    return ClassScores(classes=classes, **_per_class(true, guess, len(classes), weights))


def scores(truth: Array, predicted: Array) -> Scores:
    """Accuracy, weighted F1 and macro F1; all 0 without offers."""
    if len(truth) == 0:
        return Scores(offers=0, accuracy=0.0, weighted_f1=0.0, macro_f1=0.0)
    per_class = class_scores(truth, predicted)
    return Scores(
        offers=len(truth),
        accuracy=float(np.mean(truth == predicted)),
        weighted_f1=float(np.average(per_class.f1, weights=per_class.support)),
        macro_f1=float(per_class.f1.mean()),
    )


def scores_by_level(
    truth: Array, predicted: Array, ancestor_at: Callable[[str, int], str], levels: int
) -> list[Scores]:
    """Scores of the ancestors at levels 1 (root) to ``levels``; ``ancestor_at(category_id, level)``."""
    return [
        scores(_mapped(truth, ancestor_at, level), _mapped(predicted, ancestor_at, level))
        for level in range(1, levels + 1)
    ]


def scores_by_size(
    truth: Array,
    predicted: Array,
    training_counts: Mapping[str, int],
    bands: Sequence[tuple[str, int, float]] = SIZE_BANDS,
) -> list[Band]:
    """Scores per class-size band; a category that is not in ``training_counts`` has 0 offers there.

    The F1 of a class counts its false positives from everywhere, so bands are comparable with the
    overall figures. Bands without evaluation offers are left out.
    """
    per_class = class_scores(truth, predicted)
    trained = np.array([training_counts.get(str(name), 0) for name in per_class.classes])
    is_right = truth == predicted
    right = dict(zip(*np.unique(truth[is_right], return_counts=True), strict=True))
    found = []
    for name, least, largest in bands:
        inside = (trained >= least) & (trained <= largest) & (per_class.support > 0)
        if not inside.any():
            continue
        support = per_class.support[inside]
        found.append(
            Band(
                band=name,
                categories=int(inside.sum()),
                offers=int(support.sum()),
                accuracy=float(sum(right.get(c, 0) for c in per_class.classes[inside]) / support.sum()),
                weighted_f1=float(np.average(per_class.f1[inside], weights=support)),
                macro_f1=float(per_class.f1[inside].mean()),
            )
        )
    return found


def scores_by_segment(truth: Array, predicted: Array, segments: Array) -> dict[str, Scores]:
    """Scores within each segment (a country, say), the largest first; ``segments``: (n,) text."""
    names, counts = np.unique(segments, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {
        str(names[i]): scores(truth[segments == names[i]], predicted[segments == names[i]]) for i in order
    }


def calibration(confidence: Floats, is_right: npt.NDArray[np.bool_], bins: int = 15) -> Calibration:
    """Expected calibration error over ``bins`` equal bins of [0, 1] (Guo et al., 2017).

    Args:
        confidence: Probability of the predicted class, shape (n,).
        is_right: Whether the prediction was right, shape (n,).
        bins: Number of bins.
    """
    if len(confidence) == 0:
        return Calibration(expected_calibration_error=0.0, mean_confidence=0.0, bins=[])
    place = np.clip((confidence * bins).astype(np.int64), 0, bins - 1)
    offers = np.bincount(place, minlength=bins)
    filled = np.maximum(offers, 1)
    mean_confidence = np.bincount(place, weights=confidence, minlength=bins) / filled
    accuracy = np.bincount(place, weights=is_right, minlength=bins) / filled
    error = float(np.sum(offers * np.abs(mean_confidence - accuracy)) / len(confidence))
    return Calibration(
        expected_calibration_error=error,
        mean_confidence=float(confidence.mean()),
        bins=[
            ReliabilityBin(
                low=i / bins,
                high=(i + 1) / bins,
                offers=int(offers[i]),
                confidence=float(mean_confidence[i]),
                accuracy=float(accuracy[i]),
            )
            for i in range(bins)
        ],
    )


def paired_bootstrap(
    truth: Array,
    first: Array,
    second: Array,
    *,
    clusters: Array | None = None,
    resamples: int = 500,
    seed: int = 0,
    coverage: float = 0.95,
) -> Interval:
    """Weighted F1 of ``first`` minus that of ``second`` on the same offers, with a percentile interval.

    Args:
        truth: Shape (n,).
        first: Predictions of one model, shape (n,).
        second: Predictions of the other, shape (n,).
        clusters: What is drawn as a whole, shape (n,): offers of one product are near-copies, and
            drawing them one by one would make the interval too narrow. None: single offers.
        resamples: Number of bootstrap resamples.
        seed: Seed of the draws.
        coverage: Share of resamples inside the interval.
    """
    difference, drawn = _bootstrapped(truth, first, second, clusters, resamples, seed)
    tail = (1 - coverage) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(difference=difference, low=float(low), high=float(high))


def paired_segments(
    truth: Array,
    first: Array,
    second: Array,
    segments: Sequence[npt.NDArray[np.bool_]],
    *,
    clusters: Array | None = None,
    resamples: int = 500,
    seed: int = 0,
    coverage: float = 0.95,
) -> list[Interval | None]:
    """Weighted F1 of ``first`` minus that of ``second`` within each segment; all intervals hold at once.

    Of a segment of fewer than ``LEAST_CLUSTERS`` nothing can be said: it gets None, and costs the others
    nothing. Each interval has the coverage ``1 - (1 - coverage) / intervals`` (Bonferroni). So far out in
    the tails percentiles of some hundred resamples say nothing: 60 segments would need the smallest of
    2,400. The interval is therefore Student's, from the standard deviation of the resamples, with one
    degree of freedom less than there are clusters. Where both models answer alike the interval has no
    width, at 0; without any spread it has none elsewhere either, which takes a difference that every
    cluster shares.

    Args:
        truth: Shape (n,).
        first: Predictions of one model, shape (n,).
        second: Predictions of the other, shape (n,).
        segments: Offers of each segment, shape (n,) each; they may overlap.
        clusters: As for :func:`paired_bootstrap`.
        resamples: Number of bootstrap resamples per segment.
        seed: Seed of the draws.
        coverage: Probability that all intervals hold.
    """
    of_offer = np.arange(len(truth)) if clusters is None else clusters
    clusters_in = [len(np.unique(of_offer[inside])) for inside in segments]
    judged = sum(units >= LEAST_CLUSTERS for units in clusters_in)
    intervals: list[Interval | None] = []
    for inside, units in zip(segments, clusters_in, strict=True):
        if units < LEAST_CLUSTERS:
            intervals.append(None)
            continue
        difference, drawn = _bootstrapped(
            truth[inside], first[inside], second[inside], of_offer[inside], resamples, seed
        )
        # Drawing from as many units as there are makes the spread too small by this factor.
        spread = float(np.std(drawn, ddof=1)) * (units / (units - 1)) ** 0.5
        reach = float(stdtrit(units - 1, 1 - (1 - coverage) / judged / 2)) * spread
        intervals.append(
            Interval(
                difference=difference, low=max(-1.0, difference - reach), high=min(1.0, difference + reach)
            )
        )
    return intervals


def _bootstrapped(
    truth: Array, first: Array, second: Array, clusters: Array | None, resamples: int, seed: int
) -> tuple[float, Floats]:
    """The difference of weighted F1, and that of each resample (resamples,).

    Counts per class are sums over clusters, so those of many resamples are one sparse product.
    """
    classes, codes = np.unique(np.concatenate([truth, first, second]), return_inverse=True)
    true, one, other = np.split(codes, 3)
    unit = np.arange(len(truth)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    units = int(unit.max()) + 1

    def per_unit(codes: Array, counted: Array | None = None) -> csr_array:
        ones = np.ones(len(codes)) if counted is None else counted.astype(float)
        return csr_array((ones, (codes, unit)), shape=(len(classes), units))

    support = per_unit(true)
    counts = [(per_unit(true, true == guess), per_unit(guess)) for guess in (one, other)]

    def differences(weights: Floats) -> Floats:
        """Of resamples whose clusters count so often; ``weights``: (clusters, resamples)."""
        sizes = support @ weights
        f1 = [_ratio(2 * (right @ weights), sizes + guessed @ weights) for right, guessed in counts]
        difference: Floats = ((f1[0] - f1[1]) * sizes).sum(axis=0) / sizes.sum(axis=0)
        return difference

    random = np.random.default_rng(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // (units + len(classes)))
    drawn = []
    for start in range(0, resamples, at_once):
        number = min(at_once, resamples - start)
        places = random.integers(units, size=(units, number)) * number + np.arange(number)
        weights = np.bincount(places.ravel(), minlength=units * number).reshape(units, number)
        drawn.append(differences(weights.astype(float)))
    return float(differences(np.ones((units, 1)))[0]), np.concatenate(drawn)


def _per_class(true: Array, guess: Array, classes: int, weights: Array | None) -> dict[str, Floats]:
    hit = true == guess
    right = np.bincount(true[hit], None if weights is None else weights[hit], classes).astype(float)
    support = np.bincount(true, weights, classes).astype(float)
    guessed = np.bincount(guess, weights, classes).astype(float)
    return {
        "support": support,
        "precision": _ratio(right, guessed),
        "recall": _ratio(right, support),
        "f1": _ratio(2 * right, support + guessed),
    }


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _mapped(ids: Array, ancestor_at: Callable[[str, int], str], level: int) -> Array:
    names, codes = np.unique(ids, return_inverse=True)
    return np.array([ancestor_at(str(name), level) for name in names])[codes]

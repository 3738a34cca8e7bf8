"""Statistics of labels that come late, from a selection of offers: arrays in, figures out.

Labels of one day are more alike than labels of different days (a shop, a fashion, whoever was on duty), so
every uncertainty here has a part between days beside the one of single labels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

_Z = 1.959963984540054
_PRIOR_DAYS = 4
_PRIOR_SPREAD = 0.05
"""Before any day was seen: days differ by 5 % of the deviation of a single label (1.5 points at 90 %), and
that is believed as much as four days that say so. It keeps two or three equal days from promising that all
days are equal."""
_LEAST_IN_STRATUM = 5


class Spread(NamedTuple):
    """How much days differ beyond chance."""

    variance: float
    """Of the share of right labels between days."""
    freedom: float
    """Degrees of freedom behind it."""


class Estimate(NamedTuple):
    """A share or a difference with its uncertainty."""

    value: float
    variance: float
    labels: float
    """Effective number of labels behind it."""


def arrival_curve(ages: Sequence[int], delays: Sequence[Integers]) -> Floats:
    """Expected share of a day's labels that have come after 0, 1, 2 … days.

    Days are seen up to their age only, so long delays of young days are missing from the data: the delays
    are truncated on the right. The estimate is that of Lagakos, Barraj and De Gruttola (1988), known to
    actuaries as chain ladder: of the labels that came within k days, the share that took exactly k, from
    all days that are old enough to have seen it.

    Args:
        ages: Days since each day.
        delays: Delays of each day's labels, none longer than its age.

    Returns:
        Cumulative shares, shape (longest delay + 1,), the last 1; empty without labels. It says nothing of
        labels that take longer than the longest delay seen.
    """
    longest = max((int(of_day.max()) for of_day in delays if len(of_day)), default=-1)
    arrived = np.ones(longest + 1)
    for delay in range(longest, 0, -1):
        old_enough = [of_day for age, of_day in zip(ages, delays, strict=True) if age >= delay]
        within = sum(int((of_day <= delay).sum()) for of_day in old_enough)
        exactly = sum(int((of_day == delay).sum()) for of_day in old_enough)
        arrived[delay - 1] = arrived[delay] * (1.0 - exactly / within if within else 1.0)
    return arrived


def arrived_at(curve: Floats, age: int) -> float:
    """Expected share of a day's labels at this age; 0 without a curve or before the day."""
    if age < 0 or not len(curve):
        return 0.0
    return float(curve[min(age, len(curve) - 1)])


def wilson(share: float, labels: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927); (0, 1) without labels."""
    if labels <= 0:
        return 0.0, 1.0
    z2 = _Z**2 / labels
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * np.sqrt(max(share * (1 - share), 0.0) / labels + z2 / (4 * labels))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def spread_between_days(right: Booleans, day: Integers) -> Spread:
    """Moment estimate of the variance between days (as for a beta-binomial), moderated by a prior."""
    labels = np.bincount(day).astype(np.float64) if len(day) else np.zeros(0)
    hits = np.bincount(day, right.astype(np.float64)) if len(day) else np.zeros(0)
    labels, hits = labels[labels > 0], hits[labels > 0]
    # Two labels more, one of each kind: a share of exactly 1 would leave no room for any variance.
    share = (hits.sum() + 1) / (labels.sum() + 2)
    single = share * (1 - share)
    prior = _PRIOR_SPREAD**2 * single
    days = len(labels)
    if days < 2:
        return Spread(prior, _PRIOR_DAYS)
    excess = float(((hits - labels * share) ** 2 / labels).sum() / single) - (days - 1)
    room = labels.sum() - (labels**2).sum() / labels.sum()
    found = max(0.0, excess * single / room)
    freedom = _PRIOR_DAYS + days - 1
    return Spread((_PRIOR_DAYS * prior + (days - 1) * found) / freedom, freedom)


def mean_of(values: Floats, weights: Floats, day: Integers, spread: Spread) -> Estimate:
    """Weighted mean of the labels' ``values``, all of one kind, with the variance of labels and of days."""
    total = weights.sum()
    if total <= 0:
        return Estimate(0.0, np.inf, 0.0)
    shares = weights / total
    value = float(shares @ values)
    labels = 1.0 / float(shares @ shares)
    # As if one label more had come out wrong and one right: few equal labels are no certainty.
    single = max(float(shares**2 @ (values - value) ** 2), 0.25 / (labels + 2) ** 2)
    between = spread.variance * float((np.bincount(day, shares) ** 2).sum())
    return Estimate(value, single + between, labels)


def interval_of(share: Estimate) -> tuple[float, float]:
    """95 % interval of a share: Wilson's, at the number of independent labels its variance stands for."""
    if not np.isfinite(share.variance):
        return 0.0, 1.0
    room = max(share.value * (1 - share.value), 1e-9)
    independent = min(share.labels, max(room / share.variance, 1.0)) if room > 1e-9 else share.labels
    return wilson(share.value, independent)


def p_value(difference: float, variance: float, freedom: float, *, one_sided: bool = False) -> float:
    """Of a difference from 0 under Student's distribution; one-sided: that it is below 0."""
    if not np.isfinite(variance) or variance <= 0:
        return 1.0
    statistic = difference / np.sqrt(variance)
    if one_sided:
        return float(stdtr(freedom, statistic))
    return float(2 * stdtr(freedom, -abs(statistic)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm 1979)."""
    corrected, largest = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - place)))
        corrected[name] = largest
    return corrected


def weights_at_equal_age(older: Integers, recent_ages: Integers, recent_labels: Integers) -> Floats:
    """Weights of older labels that give them the ages that the recent ones have.

    A recent day of age a has no label that took longer than a. It is held against those older labels that
    took at most a, and the recent days count by their labels.

    Args:
        older: Delays of the older labels.
        recent_ages: Age of each recent day.
        recent_labels: Its labels.

    Returns:
        Shape of ``older``; the sum is 1, or less where an age has no older label at all.
    """
    weights = np.zeros(len(older))
    total = recent_labels.sum()
    for age, labels in zip(recent_ages, recent_labels, strict=True):
        in_time = older <= age
        if total and in_time.any():
            weights[in_time] += labels / total / in_time.sum()
    return weights


def weights_of_mix(
    category: Sequence[str],
    department: Sequence[str],
    mix: Mapping[str, float],
    department_of: Mapping[str, str],
    weights: Floats,
) -> Floats:
    """``weights`` changed such that the labels have the mix of predicted categories that all offers have.

    People look at some offers more than at others. Within a predicted category their choice is taken for
    random, between categories it is evened out (post-stratification). Categories with fewer than five labels
    are taken together by department, those of departments with fewer in one.

    Args:
        category: Predicted category of each label.
        department: Its top-level category.
        mix: Offers by predicted category.
        department_of: Top-level category of each category in ``mix``.
        weights: Of the labels as they are.

    Returns:
        Weights that sum to 1; ``weights`` as shares where no label is of the mix.
    """
    by_category = Counter(category)
    large = {name for name, count in by_category.items() if count >= _LEAST_IN_STRATUM}
    rest = Counter(d for c, d in zip(category, department, strict=True) if c not in large)
    departments = {name for name, count in rest.items() if count >= _LEAST_IN_STRATUM}

    def stratum(name: str, inside: str) -> tuple[str, str]:
        if name in large:
            return "category", name
        return ("department", inside) if inside in departments else ("rest", "")

    strata = [stratum(c, d) for c, d in zip(category, department, strict=True)]
    offers: dict[tuple[str, str], float] = defaultdict(float)
    seen: dict[tuple[str, str], float] = defaultdict(float)
    for name, count in mix.items():
        offers[stratum(name, department_of.get(name, ""))] += count
    for place, weight in zip(strata, weights.tolist(), strict=True):
        seen[place] += weight
    mixed = weights * np.array([offers[place] / seen[place] if seen[place] else 0.0 for place in strata])
    changed = mixed if mixed.sum() > 0 else weights
    return np.asarray(changed / changed.sum()) if changed.sum() > 0 else changed


def share_differences(
    predicted: Integers, actual: Integers, weights: Floats, categories: int
) -> tuple[Floats, Floats, Floats, Floats]:
    """Predicted and actual share of each category, their difference and its variance, from the same labels.

    Predicted and actual category of a label are a pair: where they agree the label adds nothing to either
    the difference or its variance (as in McNemar's test).

    Returns:
        Four arrays of shape (categories,).
    """
    total = weights.sum() or 1.0
    shares = weights / total
    as_predicted: Floats = np.bincount(predicted, shares, categories).astype(np.float64)
    as_decided: Floats = np.bincount(actual, shares, categories).astype(np.float64)
    apart = predicted != actual
    squares = shares[apart] ** 2
    both = np.bincount(predicted[apart], squares, categories) + np.bincount(
        actual[apart], squares, categories
    )
    difference = as_predicted - as_decided
    variance = both - difference**2 * float(shares @ shares)
    one_label = float(shares @ shares) ** 2
    return as_predicted, as_decided, difference, np.asarray(np.maximum(variance, one_label))


def overdispersion(spread: Spread, share: float, labels: float, days: float) -> float:
    """Factor by which days make a variance larger than that of single labels."""
    single = max(share * (1 - share), 1e-4)
    return 1.0 + spread.variance / single * labels / max(days, 1.0)

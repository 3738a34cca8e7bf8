"""What is usual of a question's series: their expectation, and how far from it their days lie.

Here belongs what is learned from the days of the reference, and no verdict on today: the variance between
days, moderated over the series of a measure (Smyth 2004), what neighbouring days remember of each other, and
the range that follows.
"""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise

import msgspec
import numpy as np
from scipy import special, stats

from ml.drift.bad_days import without_bad_days
from ml.drift.expected import WEEKDAYS, expected_values
from ml.drift.grid import Bools, Floats, Grid, Ints, is_of_all_offers, numbered
from ml.drift.questions import SPANS, Limits
from ml.drift.scales import restored, slope_of_values, stabilised, variance_of_drawing

_LEAST_COUNT = 5.0
"""Expected offers below which a series tells nothing of how much days differ."""
_OWN_DAYS = 4.0
"""Days of reference that the measure counts as for a series, at least: one measure's series are alike."""


class Usual(msgspec.Struct, kw_only=True):
    """What the reference lets expect of each series of a question, on each day of the grid."""

    grid: Grid
    """Without the reference's bad days."""
    expected: Floats
    between: Floats
    """Variance between days that the residuals are scaled with; of a measure, on its natural scale."""
    residual: Floats
    variance: Floats
    """Of the residuals of a series, moderated."""
    freedom: Floats
    """Degrees of freedom of the variance."""
    by_days: Floats
    """Part of a residual's variance that is differences between days, and so remembered by the next."""
    uncertainty: Floats
    """Variance of the expectation, over that of a residual."""
    autocorrelation: float

    @classmethod
    def of(cls, grid: Grid, limits: Limits) -> Usual:
        """Fit the reference's days; steps 0 to 3 of :mod:`ml.drift.series`."""
        references = grid.references
        supposed = _per_kind(grid, limits, "supposed") ** 2
        grid = without_bad_days(grid, supposed, limits)
        least = _per_kind(grid, limits, "least") ** 2
        days = np.isfinite(grid.in_reference).sum(axis=1)
        expected, weekdays = expected_values(grid, supposed)
        freedom = np.maximum(days - 1.0 - (WEEKDAYS - 1) * weekdays, 0.0)
        drawing = variance_of_drawing(grid, expected)
        # In all offers the ups and downs of countries and shops cancel out; their series tell nothing of it.
        measures = numbered([(key[1], key[4], is_of_all_offers(key)) for key in grid.keys])

        between = np.empty(len(grid))
        relative = ((grid.value - expected) / slope_of_values(grid, expected))[:, :references]
        for rows in _groups(measures):
            between[rows] = _between_days(
                relative[rows], drawing[rows, :references], freedom[rows], supposed[rows], limits
            )
        between = np.maximum(between, least)
        residual = stabilised(grid, grid.value, between) - stabilised(grid, expected, between)

        variance, prior = np.ones(len(grid)), np.full(len(grid), limits.short_reference_days)
        if references >= WEEKDAYS:
            informative = (freedom >= 3) & _has_offers(grid, expected)
            for rows in _groups(measures):
                variance[rows], prior[rows] = _moderation(
                    residual[rows, :references], freedom[rows], informative[rows]
                )
        own = np.nansum(residual[:, :references] ** 2, axis=1)
        variance = (prior * variance + own) / (prior + freedom)
        # No luck makes a day's offers less random than drawing them is, nor days more alike than the least.
        usually = _usual_drawing(drawing[:, :references])
        variance = np.maximum(variance, (usually + least) / (usually + between))
        by_days = between[:, None] / (drawing + between[:, None])
        autocorrelation = _autocorrelation(grid, residual[:, :references], limits)
        remembered = 1 + between / (usually + between) * (
            inflation_of_a_mean(references, autocorrelation) - 1
        )
        told = np.where(np.isfinite(grid.in_reference), by_days[:, :references], 0.0).sum(axis=1)
        # Days of one weekday are a week apart and remember nothing of each other.
        of_mean = (remembered + (WEEKDAYS - 1) * weekdays) / np.maximum(told, 1e-300)
        return cls(
            grid=grid,
            expected=expected,
            between=between,
            residual=residual,
            variance=variance,
            freedom=prior + freedom,
            by_days=by_days,
            uncertainty=by_days * of_mean[:, None],
            autocorrelation=autocorrelation,
        )

    def ranges(self, chances: Floats, rows: Ints) -> tuple[Floats, Floats]:
        """Where each day's value of these series lies, but for its chance on both sides together."""
        grid, expected, between = self.grid.at(rows), self.expected[rows], self.between[rows]
        spread = np.sqrt(self.variance[rows, None] * (1 + self.uncertainty[rows]))
        width = stats.t.isf(chances[rows] / 2, self.freedom[rows])[:, None] * spread
        centre = stabilised(grid, expected, between)
        spans = np.array([SPANS.get(key[1], (-np.inf, np.inf)) for key in grid.keys]).reshape(-1, 2)
        spans[~grid.of_kind("number")] = -np.inf, np.inf
        low = np.maximum(restored(grid, centre - width, between), spans[:, :1])
        high = np.minimum(restored(grid, centre + width, between), spans[:, 1:])
        return np.minimum(low, expected), np.maximum(high, expected)


def inflation_of_a_mean(days: int, autocorrelation: float) -> float:
    """How many times the variance of a mean of so many days is what it is of unrelated ones."""
    apart = np.arange(1, days)
    return float(1 + 2 * ((1 - apart / max(days, 1)) * autocorrelation**apart).sum())


def _per_kind(grid: Grid, limits: Limits, name: str) -> Floats:
    has_week = grid.references >= WEEKDAYS
    found = [
        limits.differences(key[4], of_all_offers=has_week and is_of_all_offers(key)) for key in grid.keys
    ]
    return np.array([getattr(between, name) for between in found], dtype=np.float64)


def _groups(numbers: Ints) -> list[Ints]:
    """The places of each number."""
    return [np.flatnonzero(numbers == number) for number in range(int(numbers.max(initial=-1)) + 1)]


def _usual_drawing(drawing: Floats) -> Floats:
    """Median over the days that have offers; 0 where none has, of what is not tested."""
    known = np.where(np.isfinite(drawing), drawing, np.nan)
    known[np.isnan(known).all(axis=1)] = 0.0
    usual: Floats = np.nanmedian(known, axis=1)
    return usual


def _has_offers(grid: Grid, expected: Floats) -> Bools:
    """Which series have, on a day of the reference, offers enough to tell how much days differ."""
    drawing = variance_of_drawing(grid, expected)[:, : grid.references]
    usual = np.median(drawing, axis=1)
    return np.asarray(usual <= 1 / _LEAST_COUNT, dtype=bool)


def _between_days(
    relative: Floats, drawing: Floats, freedom: Floats, supposed: Floats, limits: Limits
) -> Floats:
    """Variance between days of a measure: what its series show, and what is supposed, by their days."""
    known = np.isfinite(relative) & np.isfinite(drawing)
    times = np.maximum(known.sum(axis=1), 1)
    explained = np.where(known, drawing, 0.0).sum(axis=1) / times
    excess = np.where(known, relative, 0.0)
    shown = (excess**2).sum(axis=1) / np.maximum(freedom, 1.0) - explained
    # The less drawing hides, the more a series tells.
    telling = freedom * (supposed / (supposed + explained)) ** 2
    days = min(telling.sum(), 3 * freedom.max(initial=0.0))
    mean = max(float((telling * shown).sum() / max(telling.sum(), 1e-12)), 0.0)
    mixed = (limits.supposed_days * supposed + days * mean) / (limits.supposed_days + days)
    between: Floats = np.maximum(mixed, supposed) if relative.shape[1] < WEEKDAYS else mixed
    return between


def _moderation(residual: Floats, freedom: Floats, informative: Bools) -> tuple[float, float]:
    """Variance that a measure's series have in common, and the degrees of freedom it counts as.

    Smyth (2004), section 6.2: the logarithms of the series' variances scatter more than chance alone lets
    them, by what series differ. Series that move together are not as many witnesses as there are series.
    """
    if informative.sum() < 3:
        return 1.0, _OWN_DAYS
    residual, freedom = np.nan_to_num(residual[informative]), freedom[informative]
    variance = np.maximum((residual**2).sum(axis=1) / freedom, 1e-3)
    logs = np.log(variance) - special.digamma(freedom / 2) + np.log(freedom / 2)
    scatter = float(np.var(logs, ddof=1) - special.polygamma(1, freedom / 2).mean())
    witnesses = float(
        np.clip(residual.var(axis=1).mean() / max(residual.mean(axis=0).var(), 1e-12), 1, len(logs))
    )
    most = _OWN_DAYS + (witnesses - 1) * float(freedom.mean())
    prior = min(2 * _inverse_trigamma(scatter), most) if scatter > 0 else most
    prior = max(prior, 2.0)
    common = float(np.exp(logs.mean() + special.digamma(prior / 2) - np.log(prior / 2)))
    return common, prior


def _inverse_trigamma(value: float) -> float:
    """Newton's iteration of Smyth (2004), appendix."""
    found = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, found))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, found))
        found += step
        if -step / found < 1e-8:
            break
    return found


def _autocorrelation(grid: Grid, residual: Floats, limits: Limits) -> float:
    """Correlation of neighbouring days of the reference, at least what is always allowed for."""
    days = [date.fromisoformat(day) for day in grid.days[: grid.references]]
    if len(days) < 2 * WEEKDAYS:
        return limits.autocorrelation
    follows = np.array([after - before == timedelta(days=1) for before, after in pairwise(days)])
    known = np.nan_to_num(residual)
    products = (known[:, :-1] * known[:, 1:])[:, follows].sum() / max(follows.sum(), 1)
    found = products / max((known**2).sum() / len(days), 1e-12) + 1 / len(days)
    return float(np.clip(found, limits.autocorrelation, 0.9))

"""What value a series is expected to have on a day: the reference's mean, or its weekday's.

Here belongs what the reference says of the middle; how far days lie from it is :mod:`ml.drift.usual`.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date

import numpy as np

from ml.drift.grid import Floats, Grid, Ints
from ml.drift.scales import variance_of_drawing

WEEKDAYS = 7
"""How many there are."""


def weekdays_are_known(days: Iterable[str]) -> bool:
    """Whether these days hold every weekday at least twice."""
    counts = np.bincount([date.fromisoformat(day).weekday() for day in set(days)], minlength=WEEKDAYS)
    return bool(counts.min() >= 2)


def expected_values(grid: Grid, supposed: Floats) -> tuple[Floats, Floats]:
    """Expected value of each series and day, and how far weekdays are trusted (0 to 1) in it."""
    mean = _mean(grid, supposed)[:, None]
    expected = np.repeat(mean, len(grid.days), axis=1)
    reference = grid.days[: grid.references]
    if not weekdays_are_known(reference):
        return expected, np.zeros(len(grid))
    weekday = np.array([date.fromisoformat(day).weekday() for day in grid.days])
    is_weekday = np.eye(WEEKDAYS)[weekday]
    known = np.isfinite(grid.in_reference).astype(np.float64)
    times = known @ is_weekday[: grid.references]
    deviation = np.nan_to_num(grid.in_reference - mean)
    deviation -= known * (
        deviation.sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    )
    of_weekday = deviation @ is_weekday[: grid.references] / np.maximum(times, 1)
    rest = (deviation - known * of_weekday[:, weekday[: grid.references]]) ** 2
    freedom = np.maximum(known.sum(axis=1) - WEEKDAYS, 1)
    within, across = rest.sum(axis=1) / freedom, (times * of_weekday**2).sum(axis=1) / (WEEKDAYS - 1)
    shrinkage = (WEEKDAYS - 3) / (WEEKDAYS - 1) * freedom / (freedom + 2)
    trust = np.clip(1 - shrinkage * within / np.maximum(across, 1e-300), 0, 1)
    trust[(times.min(axis=1) < 2) | (across <= 0)] = 0.0
    shifted = expected + trust[:, None] * of_weekday[:, weekday]
    shares, numbers = grid.of_kind("share")[:, None], grid.of_kind("number")[:, None]
    # A weekday holds a tenth of the usual at least, so that logarithms stay finite.
    bounded = np.clip(shifted, 0.1 * expected, np.where(shares, 1 - 0.1 * (1 - expected), np.inf))
    return np.where(numbers, shifted, bounded), trust


def _mean(grid: Grid, supposed: Floats) -> Floats:
    """Mean of the reference's days, each weighted by how much it tells.

    A share or count of zero is taken for half an offer in all of the reference: more may come.
    """
    value, offers = grid.in_reference, grid.offers[:, : grid.references]
    total = np.where(np.isfinite(value), offers, 0.0).sum(axis=1)
    plain = np.nansum(value * offers, axis=1) / np.maximum(total, 1.0)
    days = np.isfinite(value).sum(axis=1)
    plain = np.where(grid.of_kind("count"), np.nansum(value, axis=1) / np.maximum(days, 1), plain)
    plain = _inside(grid, plain, total, days)
    drawing = variance_of_drawing(grid, np.repeat(plain[:, None], len(grid.days), axis=1))[
        :, : grid.references
    ]
    weight = np.where(np.isfinite(value), 1 / (drawing + supposed[:, None]), 0.0)
    weighted = np.nansum(value * weight, axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
    return _inside(grid, weighted, total, days)


def _inside(grid: Grid, mean: Floats, offers: Floats, days: Ints) -> Floats:
    half = 0.5 / np.where(grid.of_kind("share"), offers + 1, np.maximum(days, 1))
    limited = np.maximum(mean, half)
    limited = np.where(grid.of_kind("share"), np.minimum(limited, 1 - half), limited)
    return np.where(grid.of_kind("number"), mean, limited)

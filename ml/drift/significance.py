"""Whether a day, or the week up to it, is further from the usual than chance takes it.

Here belong the p-values of series, their correction for how many there are (Holm 1979), and how the chance
of false alarms is divided; whether what is found matters is :mod:`ml.drift.findings`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from scipy import special, stats

from ml.drift.grid import Bools, Floats, Grid, Ints, is_of_all_offers
from ml.drift.questions import QUESTIONS, Limits
from ml.drift.usual import Usual, inflation_of_a_mean


class Window(msgspec.Struct, kw_only=True):
    """What a question's series show over some days that end today."""

    columns: list[int]
    p_value: Floats
    """Of each series; NaN where it was not tested."""
    value: Floats
    expected: Floats
    width: Floats
    """Of the range of the window's mean, over that of one day."""


def is_tested(grid: Grid, usual: Usual, limits: Limits) -> Bools:
    """Which series today and the reference have offers enough for."""
    counts = grid.of_kind("count")
    offers = np.where(np.isfinite(grid.value), grid.offers, 0.0)
    of_reference = offers[:, : grid.references].sum(axis=1)
    enough = (offers[:, -1] >= limits.least_segment_offers) & (of_reference >= limits.least_offers)
    if offers[~counts, -1].max(initial=0.0) < limits.least_offers:
        enough[:] = False
    known = np.isfinite(grid.value[:, -1]) & np.isfinite(grid.in_reference).any(axis=1)
    return np.asarray(known & (enough | counts), dtype=bool)


def window_of(usual: Usual, tested: Bools, columns: list[int], limits: Limits) -> Window:
    """The mean of these days against its expectation.

    A week that was unusual until yesterday is yesterday's news: today has to lie on the same side, at least
    half as far out.
    """
    grid, counts = usual.grid, usual.grid.of_kind("count")[:, None]
    offers = np.where(np.isfinite(grid.value), grid.offers, 0.0)[:, columns]
    known = np.isfinite(grid.value[:, columns]) & ((offers >= limits.least_segment_offers) | counts)
    days = known.sum(axis=1)
    tested = tested & (days >= min(limits.least_window_days, len(columns)))
    weight = np.where(counts, 1.0, offers) * known
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
    value = (np.where(known, grid.value[:, columns], 0.0) * weight).sum(axis=1)
    expected = (usual.expected[:, columns] * weight).sum(axis=1)

    mean = np.where(known, usual.residual[:, columns], 0.0).sum(axis=1) / np.maximum(days, 1)
    remembered = 1 + usual.by_days[:, -1] * (inflation_of_a_mean(len(columns), usual.autocorrelation) - 1)
    uncertainty = usual.uncertainty[:, columns].mean(axis=1)
    spread = remembered / np.maximum(days, 1) + uncertainty
    p_value = 2 * stats.t.sf(np.abs(mean) / np.sqrt(usual.variance * spread), usual.freedom)
    p_value = np.maximum(p_value, _of_two_rates(usual, columns))
    change, change_today = value - expected, grid.value[:, -1] - usual.expected[:, -1]
    goes_on = (change * change_today > 0) & (2 * np.abs(change_today) >= np.abs(change))
    return Window(
        columns=columns,
        p_value=np.where(tested, np.where(goes_on, p_value, 1.0), np.nan),
        value=value,
        expected=expected,
        width=np.sqrt(spread / (1 + uncertainty)),
    )


def _of_two_rates(usual: Usual, columns: Sequence[int]) -> Floats:
    """p-value of as many offers as on these days, given those of the reference; 0 for numbers.

    If only drawing offers made the difference, the offers of both sides together would fall on these days
    by their part of what is expected of both. The rarer side of a share is the one that is counted.
    """
    grid, references = usual.grid, slice(0, usual.grid.references)
    shares, counts = grid.of_kind("share"), grid.of_kind("count")
    size = np.where(shares[:, None], grid.offers, 1.0)
    rare = np.where(shares & (usual.expected.mean(axis=1) > 0.5), -1.0, 1.0)[:, None]
    found = np.nan_to_num(np.where(rare < 0, 1 - grid.value, grid.value) * size)
    awaited = np.where(
        np.isfinite(grid.value), np.where(rare < 0, 1 - usual.expected, usual.expected) * size, 0.0
    )
    here, there = np.round(found[:, columns].sum(axis=1)), np.round(found[:, references].sum(axis=1))
    part = awaited[:, columns].sum(axis=1), awaited[:, references].sum(axis=1)
    odds = np.clip(part[0] / np.maximum(part[0] + part[1], 1e-300), 0, 1)
    at_least = np.where(here > 0, special.betainc(np.maximum(here, 1), there + 1, odds), 1.0)
    at_most = np.where(there > 0, special.betaincc(here + 1, np.maximum(there, 1), odds), 1.0)
    p_value = np.minimum(2 * np.where(here >= part[0], at_least, at_most), 1.0)
    return np.where(shares | counts, p_value, 0.0)


def corrected_p_values(grid: Grid, p_values: Floats) -> Floats:
    """p-values corrected for the number of families, and in each of them of series and windows."""
    corrected = np.empty_like(p_values)
    families = _families(grid)
    for rows in families:
        corrected[:, rows] = np.minimum(len(families) * _holm(p_values[:, rows]), 1.0)
    return corrected


def _holm(p_values: Floats) -> Floats:
    """p-values corrected for their number (Holm 1979); what was not tested stays NaN and is not counted."""
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")  # NaN last
    count = int(np.isfinite(flat).sum())
    corrected = np.full(flat.shape, np.nan)
    steps = np.maximum.accumulate(flat[order[:count]] * np.arange(count, 0, -1))
    corrected[order[:count]] = np.minimum(steps, 1.0)
    return corrected.reshape(p_values.shape)


def share_of_chance(chance: float) -> float:
    """What each question has of a chance of false alarms; the deterministic one needs none."""
    return chance / (len(QUESTIONS) - 1)


def warning_chances(grid: Grid, tested: Bools, limits: Limits) -> Floats:
    """Chance at which each series leaves its range; each is tested on two windows."""
    chances = np.empty(len(grid))
    families = _families(grid)
    for rows in families:
        chances[rows] = 1 / len(families) / max(2 * int(tested[rows].sum()), 1)
    return share_of_chance(limits.false_warnings_per_day) * chances


def _families(grid: Grid) -> list[Ints]:
    """Series that share a chance of false alarms; each family has an equal part of its question's.

    The counts of all offers and of all shops are one for themselves: everything else is a part of them, and
    they are not to pay for the number of shops.
    """
    of_all = np.array([is_of_all_offers(key) for key in grid.keys], dtype=bool)
    return [rows for rows in (np.flatnonzero(of_all), np.flatnonzero(~of_all)) if len(rows)]

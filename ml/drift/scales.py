"""Scales on which the values of days compare, whichever share, count or mean they are of.

Here belongs what is known of values before any day is looked at: on the natural scale (log odds of shares,
logarithm of counts, numbers over their standard deviation), what drawing offers explains; and the
transforms to a scale on which days that differ as supposed have a variance of one.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
from scipy import special

from ml.drift.answers import Kind
from ml.drift.grid import Bools, Floats, Grid

_KINDS: tuple[Kind, ...] = get_args(Kind)
_ANSCOMBE = 3 / 8
"""Added to counts before they are transformed (Anscombe 1948)."""


def stabilised(grid: Grid, value: Floats, between: Floats) -> Floats:
    """Values on a scale on which their variance is one.

    A share's variance is q(1-q)/n + b q²(1-q)²: integrating its inverse root gives an elliptic integral,
    which is the arc sine of Anscombe for b = 0 and log odds over √b for many offers. A count's is
    m + b m², which gives asinh.
    """
    stable = np.empty_like(value)
    shares, counts, numbers = (grid.of_kind(kind) for kind in _KINDS)
    root, modulus, offers = _elliptic(grid, shares, between)
    centred = 2 * (value[shares] * offers + _ANSCOMBE) / (offers + 2 * _ANSCOMBE) - 1
    stable[shares] = root * special.ellipkinc(np.arcsin(np.clip(centred, -1, 1)), modulus)
    b = between[counts][:, None]
    stable[counts] = 2 / np.sqrt(b) * np.arcsinh(np.sqrt(b * (value[counts] + _ANSCOMBE)))
    stable[numbers] = value[numbers] / _spread_of_numbers(grid, numbers, between)
    return stable


def restored(grid: Grid, stable: Floats, between: Floats) -> Floats:
    """The values that :func:`stabilised` makes these of."""
    value = np.empty_like(stable)
    shares, counts, numbers = (grid.of_kind(kind) for kind in _KINDS)
    root, modulus, offers = _elliptic(grid, shares, between)
    quarter = special.ellipk(modulus)
    centred = special.ellipj(np.clip(stable[shares] / np.maximum(root, 1e-300), -quarter, quarter), modulus)[
        0
    ]
    plain = (centred + 1) / 2 * (offers + 2 * _ANSCOMBE) - _ANSCOMBE
    value[shares] = np.clip(plain / np.maximum(offers, 1e-300), 0, 1)
    b = between[counts][:, None]
    angle = np.maximum(stable[counts] * np.sqrt(b) / 2, 0)
    value[counts] = np.maximum(np.sinh(np.minimum(angle, 300)) ** 2 / b - _ANSCOMBE, 0)
    value[numbers] = stable[numbers] * _spread_of_numbers(grid, numbers, between)
    return value


def _elliptic(grid: Grid, shares: Bools, between: Floats) -> tuple[Floats, Floats, Floats]:
    offers = grid.offers[shares]
    ratio = offers * between[shares][:, None] / 4
    return np.sqrt(offers / (1 + ratio)), ratio / (1 + ratio), offers


def _spread_of_numbers(grid: Grid, numbers: Bools, between: Floats) -> Floats:
    drawn = np.where(grid.is_drawn[numbers][:, None], 1 / np.maximum(grid.offers[numbers], 1.0), 0.0)
    return grid.unit[numbers][:, None] * np.sqrt(drawn + between[numbers][:, None])


def slope_of_values(grid: Grid, expected: Floats) -> Floats:
    """What one unit of the natural scale is worth in values: log odds, logarithm, or deviations."""
    slope = np.repeat(grid.unit[:, None], expected.shape[1], axis=1)
    shares, counts = grid.of_kind("share"), grid.of_kind("count")
    slope[shares] = expected[shares] * (1 - expected[shares])
    slope[counts] = expected[counts]
    return slope


def variance_of_drawing(grid: Grid, expected: Floats) -> Floats:
    """Variance, on the natural scale, that drawing offers explains."""
    shares, counts = grid.of_kind("share"), grid.of_kind("count")
    with np.errstate(divide="ignore"):
        drawing = np.where(grid.is_drawn[:, None], 1 / grid.offers, 0.0)
        drawing[shares] = 1 / (grid.offers[shares] * expected[shares] * (1 - expected[shares]))
        drawing[counts] = 1 / expected[counts]
    return drawing

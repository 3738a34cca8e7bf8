"""Findings in a sentence, with figures that a person reads at a glance.

Here belongs how values are named, given units and rounded; what is a finding is :mod:`ml.drift.findings`.
"""

from __future__ import annotations

import numpy as np

from ml.drift.answers import Finding, Kind
from ml.drift.questions import NAMES, PRICE_OVER_USUAL, UNITS

_MOST_DECIMALS = 6
"""Of a figure in a sentence."""


def sentence_of(finding: Finding, kind: Kind) -> str:
    """For example "offers, country IT: 0, usually 1,400–1,900"."""
    measure = finding.measure
    name = NAMES.get(measure, measure) if kind == "number" else measure
    what = ", ".join(part for part in (name, finding.group, finding.segment) if part)
    value, low, high = in_words(measure, kind, finding.value, finding.usual_low, finding.usual_high)
    unit = "%" if kind == "share" else UNITS.get(measure, "") if kind == "number" else ""
    unit = f" {unit}" if unit else ""
    over = f" over {finding.days} days" if finding.days > 1 else ""
    dash = " to " if low.startswith("-") else "–"
    return f"{what}: {value}{unit}{over}, usually {low}{dash}{high}{unit}"


def in_words(measure: str, kind: Kind, value: float, low: float, high: float) -> tuple[str, str, str]:
    """Value and range, with as many digits as it takes to tell the value from either end."""
    shown = [_shown(measure, kind, number) for number in (value, low, high)]
    decimals = [_decimals(kind, number) for number in shown]
    if kind == "share" and shown[1] < 0.05:
        decimals[1] = 0  # next to none
    for end in (1, 2):
        while shown[0] != shown[end] and max(decimals[0], decimals[end]) < _MOST_DECIMALS:
            if f"{shown[0]:.{decimals[0]}f}" != f"{shown[end]:.{decimals[end]}f}":
                break
            decimals[0] = decimals[end] = max(decimals[0], decimals[end]) + 1
    first, second, third = (f"{number:,.{places}f}" for number, places in zip(shown, decimals, strict=True))
    return first, second, third


def _shown(measure: str, kind: Kind, number: float) -> float:
    if kind == "share":
        return 100 * number
    return float(np.exp(number)) if measure == PRICE_OVER_USUAL else number


def _decimals(kind: Kind, shown: float) -> int:
    """Of a number by itself: about three digits, and of a small percentage the first that is not zero."""
    if kind == "count":
        return 0
    if kind == "share":
        return 1 if shown == 0 or shown >= 0.1 else min(int(np.ceil(-np.log10(shown))), _MOST_DECIMALS)
    return 2 if abs(shown) < 10 else 1 if abs(shown) < 100 else 0

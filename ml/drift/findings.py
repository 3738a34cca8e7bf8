"""What is told of series that moved: which of them matter, how much, and in which order.

Here belong the size of an effect and the level that follows; whether it may be chance is
:mod:`ml.drift.significance`, how it is put is :mod:`ml.drift.sentences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from ml.drift.answers import LEVELS, Finding, Kind
from ml.drift.grid import Floats, Grid, numbered
from ml.drift.questions import SPANS, LeastEffect, Limits
from ml.drift.sentences import sentence_of
from ml.drift.significance import Window, corrected_p_values, share_of_chance
from ml.drift.usual import Usual

_NARROWER_FIRST = 1.25
"""How much more a finding of one country or shop counts in the order of findings. What moved in one country
alone moves all offers by as much times its part, and the country is what a person has to be told."""


def findings_of(usual: Usual, windows: Sequence[Window], chances: Floats, limits: Limits) -> list[Finding]:
    """At most one of each series: the day's or the week's, whichever is stronger.

    First what a person would name first: of the worst level, what concerns most of all offers.
    """
    corrected = corrected_p_values(usual.grid, np.stack([window.p_value for window in windows]))
    unlikely = corrected < share_of_chance(limits.false_warnings_per_day)
    rows = np.flatnonzero(unlikely.any(axis=0))
    if not len(rows):
        return []
    low, high = usual.ranges(chances, rows)
    findings: list[Finding] = []
    places: dict[tuple[str, str, str], int] = {}
    for place, row in enumerate(rows.tolist()):
        found = [
            finding
            for window, p_values in zip(windows, corrected, strict=True)
            if p_values[row] < share_of_chance(limits.false_warnings_per_day)
            and (
                finding := _finding(usual, window, row, float(p_values[row]), low[place], high[place], limits)
            )
        ]
        findings.extend(sorted(found, key=strongest_first)[:1])
        places.update((_series_of(finding), row) for finding in found)
    parts = _parts_of_offers(usual.grid)
    return sorted(
        findings,
        key=lambda finding: (
            -LEVELS[finding.level],
            -abs(finding.effect)
            * parts[places[_series_of(finding)]]
            * (_NARROWER_FIRST if finding.group else 1.0),
            *strongest_first(finding),
        ),
    )


def strongest_first(finding: Finding) -> tuple[Any, ...]:
    """What findings are sorted by: level, then effect; the rest settles ties."""
    return (
        -LEVELS[finding.level],
        -abs(finding.effect),
        finding.measure,
        finding.group,
        finding.segment,
        finding.days,
    )


def _series_of(finding: Finding) -> tuple[str, str, str]:
    return finding.measure, finding.group, finding.segment


def _parts_of_offers(grid: Grid) -> Floats:
    """The part of all offers that each series is measured on; the effect of a count is one of all anyway."""
    offers = grid.offers[:, : grid.references].mean(axis=1)
    measures = numbered([(key[1], key[4]) for key in grid.keys])
    most = np.zeros(int(measures.max(initial=-1)) + 1)
    np.maximum.at(most, measures, offers)
    parts: Floats = np.where(grid.of_kind("count"), 1.0, offers / np.maximum(most[measures], 1e-300))
    return parts


def _finding(
    usual: Usual, window: Window, row: int, p_value: float, low: Floats, high: Floats, limits: Limits
) -> Finding | None:
    """The finding of a series, if it moved far enough to matter."""
    question, measure, group, segment, kind = usual.grid.keys[row]
    value, expected = float(window.value[row]), float(window.expected[row])
    change, factor = _effect(usual, row, value, expected)
    least = limits.least_effect(question, measure, group, segment, kind)
    if p_value < share_of_chance(limits.false_errors_per_day) and _is_large(change, factor, least.error):
        level = limits.most(question, measure, segment, kind, change)
    elif _is_large(change, factor, least.warn):
        level = "WARN"
    else:
        return None
    days, width = usual.expected[row, window.columns], float(window.width[row])
    usual_low = expected - width * float((days - low[window.columns]).mean())
    usual_high = expected + width * float((high[window.columns] - days).mean())
    least_value, greatest_value = _span(measure, kind)
    finding = Finding(
        question=question,
        measure=measure,
        group=group,
        segment=segment,
        level=level,
        value=value,
        usual=expected,
        usual_low=min(max(usual_low, least_value), expected),
        usual_high=max(min(usual_high, greatest_value), expected),
        effect=change,
        p_value=p_value,
        days=len(window.columns),
        sentence="",
    )
    return msgspec.structs.replace(finding, sentence=sentence_of(finding, kind))


def _effect(usual: Usual, row: int, value: float, expected: float) -> tuple[float, float]:
    """Change and factor (1 or more, in either direction) as :class:`LeastEffect` measures them."""
    kind = usual.grid.keys[row][4]
    if kind == "number":
        return (value - expected) / float(usual.grid.unit[row]), 1.0
    if kind == "share":
        return value - expected, _times(_odds(value), _odds(expected))
    # All offers of the day are the greatest of its counts.
    all_offers = float(usual.expected[usual.grid.of_kind("count"), -1].max())
    return (value - expected) / all_offers, _times(value, expected)


def _times(one: float, other: float) -> float:
    greater, lesser = max(one, other), min(one, other)
    return greater / lesser if lesser > 0 else float("inf")


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else float("inf")


def _is_large(change: float, factor: float, least: LeastEffect) -> bool:
    return abs(change) >= least.change or (factor >= least.factor and abs(change) >= least.part)


def _span(measure: str, kind: Kind) -> tuple[float, float]:
    """Least and greatest value that a series can have."""
    if kind == "number":
        return SPANS.get(measure, (-np.inf, np.inf))
    return 0.0, 1.0 if kind == "share" else np.inf

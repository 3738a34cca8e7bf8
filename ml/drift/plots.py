"""Pictures of what is not usual, as PNG bytes; readable at a width of 900 pixels.

Above, the strongest findings, each by how far it is outside of its own usual range. Below, the strongest
ones over time.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ml.drift.answers import Finding, Kind, Level
from ml.drift.questions import PRICE_OVER_USUAL, SHOPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GRID, _USUAL = "#334155", "#e2e8f0", "#94a3b8"
_LEVEL_COLOURS: dict[Level, str] = {"ERROR": "#dc2626", "WARN": "#ea580c", "OK": "#059669", "UNKNOWN": _USUAL}
_INCHES_WIDE = 7.0
_DOTS_PER_INCH = 130
_MOST_FINDINGS = 6
_MOST_SERIES = 2
_INCHES_PER_FINDING, _INCHES_PER_SERIES = 0.42, 1.9
_NAME_CHARACTERS = 80


def picture(title: str, findings: Sequence[Finding], series: pa.Table, day: str) -> bytes:
    """What moved on a day, and how it got there.

    Args:
        title: Of the picture.
        findings: The strongest first.
        series: Rows of ``ml.drift.series.EXPECTATION_SCHEMA`` with the series of the findings; those
            that it does not have are not drawn over time.
        day: ISO date of the day.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = findings[:_MOST_FINDINGS]
    drawn = [(finding, rows) for finding in shown if len(rows := _rows_of(finding, series))][:_MOST_SERIES]
    heights = [0.7 + _INCHES_PER_FINDING * len(shown), *[_INCHES_PER_SERIES] * len(drawn)]
    figure = Figure(figsize=(_INCHES_WIDE, sum(heights) + 0.4), dpi=_DOTS_PER_INCH, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK, fontsize=11)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, labelsize=7)
    _draw_findings(panels[0], shown)
    for axes, (finding, rows) in zip(panels[1:], drawn, strict=True):
        _draw_series(axes, finding, rows, day)
    content = io.BytesIO()
    # No version or date in the file: the same figures give the same bytes.
    canvas.print_png(content, metadata={"Software": None})
    return content.getvalue()


def _rows_of(finding: Finding, series: pa.Table) -> pa.Table:
    return series.filter(
        (pc.field("measure") == finding.measure)
        & (pc.field("group") == finding.group)
        & (pc.field("segment") == finding.segment)
    )


def _draw_findings(axes: Axes, findings: Sequence[Finding]) -> None:
    """One line each; the usual range is from -1 to 1, beyond it the scale is logarithmic."""
    axes.axvspan(-1, 1, color=_GRID)
    axes.axvline(0, color=_USUAL, linewidth=1)
    for row, finding in enumerate(findings):
        place = _outside(finding)
        colour = _LEVEL_COLOURS[finding.level]
        axes.plot([math.copysign(1, place), place], [row, row], color=colour, linewidth=1.5)
        axes.plot([place], [row], "o", color=colour, markersize=6)
        beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "color": _INK, "fontsize": 7}
        axes.text(0.01, row - 0.3, _name(finding), ha="left", **beside)
        axes.text(0.99, row - 0.3, _range(finding), ha="right", **beside)
    furthest = max((abs(_outside(finding)) for finding in findings), default=1.0)
    axes.set_xlim(-furthest - 0.3, furthest + 0.3)
    axes.set_ylim(len(findings) - 0.5, -0.75)
    axes.set_yticks([])
    axes.set_xticks([-1, 0, 1], ["less than usual ←", "usual", "→ more than usual"])


def _outside(finding: Finding) -> float:
    """How many times as far from the usual value as the end of the usual range."""
    change = finding.value - finding.usual
    end = finding.usual_high if change > 0 else finding.usual_low
    half = max(abs(end - finding.usual), 1e-3 * max(abs(finding.usual), 1e-3))
    times = abs(change) / half
    return math.copysign(times if times <= 1 else 1 + math.log10(times), change)


def _range(finding: Finding) -> str:
    kind = _kind_of(finding)
    value, low, high = (
        _shown(finding.measure, kind, number)
        for number in (finding.value, finding.usual_low, finding.usual_high)
    )
    over = f" over {finding.days} days" if finding.days > 1 else ""
    return f"{value}{over}, usually {low} to {high}"


def _name(finding: Finding) -> str:
    name = ", ".join(part for part in (finding.measure, finding.group, finding.segment) if part)
    return name if len(name) <= _NAME_CHARACTERS else name[: _NAME_CHARACTERS - 1] + "…"


def _kind_of(finding: Finding) -> Kind:
    """Of a finding without its series: shares end at 1, counts are of volume."""
    if finding.segment:
        return "share"
    return "count" if finding.measure in ("offers", SHOPS) else "number"


def _draw_series(axes: Axes, finding: Finding, rows: pa.Table, day: str) -> None:
    rows = rows.sort_by("day")
    kind = _kind_of(finding)
    days = [date.fromisoformat(str(on)) for on in rows["day"].to_pylist()]
    scale = np.exp if finding.measure == PRICE_OVER_USUAL and kind == "number" else np.asarray
    factor = 100.0 if kind == "share" else 1.0
    value, expected, low, high = (
        factor * scale(rows[name].to_numpy().astype(np.float64))
        for name in ("value", "expected", "low", "high")
    )
    places: Any = np.arange(len(days))
    axes.fill_between(places, low, high, step="mid", color=_GRID, label="usual range")
    axes.plot(places, expected, color=_USUAL, linewidth=1, drawstyle="steps-mid", label="expected")
    axes.plot(places, value, "o-", color=_INK, markersize=2.5, linewidth=0.8)
    today = [place for place, on in enumerate(days) if on.isoformat() == day]
    axes.plot(places[today], value[today], "o", color=_LEVEL_COLOURS[finding.level], markersize=6, label=day)
    ticks = sorted({*np.linspace(0, len(days) - 1, min(5, len(days))).round().astype(int).tolist()})
    axes.set_xticks(ticks, [days[place].isoformat() for place in ticks])
    unit = {"share": "% of offers", "count": "offers", "number": ""}[kind]
    axes.set_title(_name(finding), fontsize=8, color=_INK, loc="left")
    axes.set_ylabel("times" if scale is np.exp else unit, fontsize=7, color=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.legend(fontsize=6, edgecolor="none", framealpha=0.7, loc="best")


def _shown(measure: str, kind: Kind, number: float) -> str:
    if kind == "share":
        return f"{100 * number:.3g} %"
    if kind == "count":
        return f"{number:,.0f}"
    return f"{np.exp(number):.2f}×" if measure == PRICE_OVER_USUAL else f"{number:.4g}"

"""Pictures of live quality, as PNG bytes."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ml.quality.answers import CategoryShares
    from ml.quality.compared import DecidedDay
    from ml.quality.live import DayQuality

_BLUE, _ORANGE, _GREY, _INK = "#2563eb", "#ea580c", "#cbd5e1", "#334155"
_MOST_CATEGORIES = 20
_LONGEST_NAME = 45
_MOST_DAY_NAMES = 14
_MOST_DECISION_DAYS = 90


def accuracy_plot(days: Sequence[DayQuality]) -> bytes:
    """Share right of each day with its 95 % interval, what is usual at its age, and how many labels came."""
    figure = _figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    places = range(len(days))
    for young, colour, name in ((False, _BLUE, "old enough to judge"), (True, _GREY, "too young")):
        chosen = [
            (place, day)
            for place, day in zip(places, days, strict=True)
            if day.labels and day.too_young == young
        ]
        if chosen:
            upper.errorbar(
                [place for place, _ in chosen],
                [day.right for _, day in chosen],
                [
                    [max(0.0, day.right - day.low) for _, day in chosen],
                    [max(0.0, day.high - day.right) for _, day in chosen],
                ],
                fmt="o",
                markersize=4,
                capsize=2,
                color=colour,
                label=name,
            )
    usual = [(place, day.usual) for place, day in zip(places, days, strict=True) if day.usual is not None]
    if usual:
        upper.plot(
            *zip(*usual, strict=True), "_", markersize=12, color=_ORANGE, label="older days at equal age"
        )
    upper.set_ylabel("share right")
    upper.set_title("Categories that people confirm, by day they were given", fontsize=10, color=_INK)
    upper.legend(fontsize=7, edgecolor="none")
    lower.bar(places, [day.completeness for day in days], color=_GREY)
    for place, day in zip(places, days, strict=True):
        if len(days) <= _MOST_DAY_NAMES:
            lower.text(place, 0.05, f"{day.labels:,}", ha="center", fontsize=6, color=_INK)
    lower.set(ylabel="labels come", ylim=(0, 1.05))
    _name_days(lower, [day.day for day in days])
    return _png(figure)


def decisions_plot(decided: Mapping[str, DecidedDay], newest_day: str) -> bytes:
    """Decisions of each day up to the newest catalogued one, and how many are about offers nobody knows."""
    last = datetime.date.fromisoformat(max(newest_day, *decided))
    first = max(
        datetime.date.fromisoformat(min(decided)), last - datetime.timedelta(days=_MOST_DECISION_DAYS - 1)
    )
    days = [(first + datetime.timedelta(days=n)).isoformat() for n in range((last - first).days + 1)]
    unknown = [decided[day].unknown if day in decided else 0 for day in days]
    known = [decided[day].decisions - decided[day].unknown if day in decided else 0 for day in days]
    figure = _figure(2.8)
    axes = figure.subplots()
    axes.bar(range(len(days)), known, color=_BLUE, label="about catalogued offers")
    axes.bar(range(len(days)), unknown, bottom=known, color=_ORANGE, label="about others")
    axes.set_ylabel("decisions", fontsize=8)
    axes.set_title("Decisions of people, by day they were made", fontsize=10, color=_INK)
    axes.legend(fontsize=7, edgecolor="none")
    _name_days(axes, days)
    return _png(figure)


def shares_plot(shares: Sequence[CategoryShares], name_of: Callable[[str], str]) -> bytes:
    """Predicted against actual share, and their difference before and now.

    Departments, then the categories that differ most, with intervals.
    """
    ordered = sorted(shares, key=lambda share: (share.level == "category", -abs(share.difference)))
    shown = ordered[:_MOST_CATEGORIES][::-1]
    figure = _figure(1.3 + 0.27 * len(shown))
    axes, changes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(shown))
    axes.barh(
        [place + 0.2 for place in places], [s.predicted for s in shown], 0.38, color=_BLUE, label="predicted"
    )
    axes.barh(
        [place - 0.2 for place in places],
        [s.actual for s in shown],
        0.38,
        color=_ORANGE,
        label="as people decide",
        xerr=[
            [max(0.0, s.high - s.difference) for s in shown],
            [max(0.0, s.difference - s.low) for s in shown],
        ],
        error_kw={"elinewidth": 0.8, "ecolor": _INK},
    )
    names = [f"{'' if s.level == 'department' else '· '}{_shortened(name_of(s.category_id))}" for s in shown]
    axes.set_yticks(places, names, fontsize=7)
    axes.set_xlabel("share of offers, all days (95 % interval of the difference)", fontsize=8)
    axes.set_xlim(0, None)
    axes.legend(fontsize=7, edgecolor="none")
    changes.axvline(0, color=_GREY, linewidth=0.8)
    changes.plot([s.older_difference for s in shown], places, "|", color=_ORANGE, label="days before")
    changes.plot(
        [s.recent_difference for s in shown], places, "o", markersize=3, color=_BLUE, label="newest days"
    )
    changes.locator_params(axis="x", nbins=5)
    changes.set_xlabel("predicted less decided", fontsize=8)
    changes.legend(fontsize=7, edgecolor="none")
    return _png(figure)


def _name_days(axes: Axes, days: Sequence[str]) -> None:
    step = -(-len(days) // _MOST_DAY_NAMES)
    axes.set_xticks(list(range(len(days)))[::step], [day[5:] for day in days][::step], fontsize=7)


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7, colors=_INK)
    target = io.BytesIO()
    # No version or date in the file: the same figures give the same bytes.
    figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()


def _shortened(path: str) -> str:
    """The end of a path: the start is what most of them share."""
    return path if len(path) <= _LONGEST_NAME else "…" + path[-_LONGEST_NAME:]

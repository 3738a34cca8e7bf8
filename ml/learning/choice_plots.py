"""Pictures to choose by, as PNG bytes: encoders side by side, and trials of a search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ml.drawing import INK, figure_of, png, tidy

_CHOSEN, _OTHER, _REFUSED = "#059669", "#64748b", "#ea580c"
_LINE = "#2563eb"
_LEAST_AREA, _LARGEST_AREA = 30.0, 400.0
_PANELS_PER_ROW = 3
_LEAST_GAP = 0.15
"""Of a panel's width, between two ticks: nearer ones would be written over each other."""
_MANY_TIMES = 100
"""A logarithmic axis this wide has ticks at powers of ten alone."""
_ALL_DECADES, _PARTS_OF_DECADES = (1.0,), (1.0, 2.0, 5.0)


def comparison_plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Quality over throughput, one dot per encoder, its area by size; the Pareto front is a line.

    Args:
        rows: ``name``, ``mean_weighted_f1``, ``texts_per_second``, ``size_bytes``, ``on_front`` and
            ``reason`` of each; those with a reason have no figures and are left out.
    """
    figure = figure_of(4.2)
    axes = figure.subplots()
    measured = [row for row in rows if not row["reason"]]
    largest = max((row["size_bytes"] for row in measured), default=1)
    front = sorted((row for row in measured if row["on_front"]), key=lambda row: row["texts_per_second"])
    axes.plot(
        [row["texts_per_second"] for row in front],
        [row["mean_weighted_f1"] for row in front],
        "-",
        color=_CHOSEN,
        linewidth=1,
        label="Pareto front",
    )
    for row in measured:
        place = (row["texts_per_second"], row["mean_weighted_f1"])
        area = max(_LEAST_AREA, _LARGEST_AREA * row["size_bytes"] / largest)
        axes.scatter(*place, area, color=_CHOSEN if row["on_front"] else _OTHER, alpha=0.7)
        axes.annotate(
            f"{row['name'].rsplit('/', maxsplit=1)[-1]}, {row['size_bytes'] / 1e6:,.0f} MB",
            place,
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            fontsize=7,
            color=INK,
        )
    axes.margins(0.18)
    axes.set(
        xlabel="texts/s on one thread, full precision (area of a dot: size on disk)",
        ylabel="mean weighted F1 on validation offers",
    )
    axes.set_title("Encoders: quality and throughput", fontsize=10, color=INK)
    tidy(axes)
    axes.legend(fontsize=7, edgecolor="none")
    return png(figure)


def history_plot(trials: Sequence[Mapping[str, Any]]) -> bytes:
    """Quality of every trial in order, and the best so far.

    Args:
        trials: ``number``, ``state`` and ``mean_weighted_f1`` (None where a trial was not finished) and
            ``last_weighted_f1`` (the newest figure of one that was given up early, or None) of each.
    """
    figure = figure_of(3.6)
    axes = figure.subplots()
    finished = [trial for trial in trials if trial["mean_weighted_f1"] is not None]
    pruned = [t for t in trials if t["state"] == "pruned" and t["last_weighted_f1"] is not None]
    axes.plot(
        [trial["number"] + 1 for trial in finished],
        [trial["mean_weighted_f1"] for trial in finished],
        "o",
        color=_CHOSEN,
        label="finished",
    )
    axes.plot(
        [trial["number"] + 1 for trial in pruned],
        [trial["last_weighted_f1"] for trial in pruned],
        "x",
        color=_OTHER,
        label="given up early (weighted F1 of the lowest level then)",
    )
    best = -math.inf
    steps = []
    for trial in finished:
        best = max(best, trial["mean_weighted_f1"])
        steps.append(best)
    axes.step(
        [trial["number"] + 1 for trial in finished],
        steps,
        where="post",
        color=_LINE,
        linewidth=1,
        label="best so far",
    )
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="trial", ylabel="mean weighted F1 on validation offers")
    axes.set_title("How the search went", fontsize=10, color=INK)
    tidy(axes)
    axes.legend(fontsize=7, edgecolor="none")
    return png(figure)


def slice_plot(
    trials: Sequence[Mapping[str, Any]], parameters: Mapping[str, bool], best: int | None = None
) -> bytes:
    """Quality of the finished trials over each parameter; the best one stands out.

    Args:
        trials: ``number``, ``mean_weighted_f1`` and ``parameters`` of each.
        parameters: Name of each parameter, and whether its axis is logarithmic.
        best: Number of the best trial.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    across = min(_PANELS_PER_ROW, len(parameters))
    down = math.ceil(len(parameters) / across)
    figure = figure_of(0.5 + 2.3 * down)
    panels = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
    finished = [trial for trial in trials if trial["mean_weighted_f1"] is not None]
    for axes, (name, is_logarithmic) in zip(panels, parameters.items(), strict=False):
        for trial in finished:
            is_best = trial["number"] == best
            axes.scatter(
                trial["parameters"][name],
                trial["mean_weighted_f1"],
                60 if is_best else 20,
                color=_CHOSEN if is_best else _OTHER,
                alpha=0.8,
                zorder=3 if is_best else 2,
            )
        values = sorted({trial["parameters"][name] for trial in finished})
        if is_logarithmic:
            axes.set_xscale("log")
        if all(isinstance(value, int) for value in values) and are_apart(values, is_logarithmic):
            axes.set_xticks(values, [f"{value:,}" for value in values])
            axes.minorticks_off()
        elif is_logarithmic:
            subs = _ALL_DECADES if values[-1] >= _MANY_TIMES * values[0] else _PARTS_OF_DECADES
            axes.xaxis.set_major_locator(LogLocator(subs=subs))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.minorticks_off()
        axes.set_xlabel(name)
        tidy(axes)
    for axes in panels[len(parameters) :]:
        axes.set_visible(False)
    figure.suptitle("Mean weighted F1 over each parameter (green: the best trial)", fontsize=10, color=INK)
    return png(figure)


def are_apart(values: Sequence[float], is_logarithmic: bool) -> bool:
    """Whether each of the ascending ``values`` can have a tick of its own that can be read."""
    places = [math.log(value) if is_logarithmic else value for value in values]
    width = places[-1] - places[0] if places else 0.0
    return all(after - before >= _LEAST_GAP * width for before, after in itertools.pairwise(places))


def importance_plot(importances: Mapping[str, float]) -> bytes:
    """How much of the differences between trials each parameter explains."""
    figure = figure_of(0.9 + 0.32 * len(importances))
    axes = figure.subplots()
    ordered = sorted(importances.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=_LINE)
    axes.bar_label(bars, fmt="{:.2f}", fontsize=7, color=INK, padding=2)
    axes.set(xlabel="share of the differences in quality", xlim=(0, 1.08))
    axes.set_title("Which parameters mattered", fontsize=10, color=INK)
    tidy(axes)
    return png(figure)

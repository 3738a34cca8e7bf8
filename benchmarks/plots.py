"""Pictures of what the benchmarks measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_OURS, _THEIRS, _FRONT = "#2563eb", "#64748b", "#ea580c"
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#64748b", "#db2777")
_DOTS_PER_INCH = 110


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other beats in both coordinates, from left to right."""
    by_first = sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1]))
    front: list[int] = []
    for place in by_first:
        if not front or points[place][1] > points[front[-1]][1]:
            front.append(place)
    return front[::-1]


def quality_over_throughput(rows: Sequence[Mapping[str, Any]], title: str, quality: str, path: Path) -> None:
    """Draw every model as a labelled point, and the front of those that none beats in both.

    Args:
        rows: With ``model``, ``is_ours``, ``quality`` and ``offers_per_second`` (any may be None: left out).
        title: Above the picture.
        quality: What the quality is.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row["quality"] is not None and row["offers_per_second"] is not None]
    figure = Figure(figsize=(9.0, 5.6), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    points = [(float(row["offers_per_second"]), float(row["quality"])) for row in drawn]
    front = pareto_front(points)
    if front:
        axes.step(
            *zip(*(points[place] for place in front), strict=True),
            where="pre",
            color=_FRONT,
            linewidth=1,
            label="nothing is both better and faster",
            zorder=1,
        )
    for row, (rate, score) in zip(drawn, points, strict=True):
        colour = _OURS if row["is_ours"] else _THEIRS
        axes.scatter(rate, score, color=colour, s=42 if row["is_ours"] else 26, zorder=3)
        axes.annotate(
            row["model"], (rate, score), xytext=(5, 5), textcoords="offset points", fontsize=7.5, color=colour
        )
    axes.set(xscale="log", xlabel="offers per second, all cores", ylabel=quality, title=title)
    if points:
        axes.set_xlim(min(rate for rate, _ in points) / 1.5, max(rate for rate, _ in points) * 6)
    axes.grid(alpha=0.25)
    if front:
        axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    title: str,
    x_label: str,
    y_label: str,
    logarithmic: bool,
) -> None:
    """Draw one line per name through its points (x, y) into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(series.items(), _COLOURS * len(series), strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=colour)
    if logarithmic:
        axes.set(xscale="log", yscale="log")
    else:
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25, which="both")
    if any(series.values()):
        axes.legend(fontsize=8)
    figure.savefig(path)

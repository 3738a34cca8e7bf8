"""Pictures of what serving costs and how long it takes, as PNG bytes; readable at a width of 700 pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml.drawing import INK, figure_of, png, tidy
from ml.serving.instances import MEASURED, InstanceRow

_MEETS, _FAILS = "#059669", "#ea580c"
_COLOURS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#64748b")
_INCHES_PER_ROW = 0.24
_MOST_ROWS = 30


def costs(rows: Sequence[InstanceRow]) -> bytes:
    """What bearing the peak costs, and throughput against the cost of a million offers.

    Empty bars and dots are projected.
    """
    priced = [row for row in rows if row.usd_per_hour_for_peak is not None][:_MOST_ROWS]
    figure = figure_of(1.6 + _INCHES_PER_ROW * max(len(priced), 8))
    bars, dots = figure.subplots(1, 2)
    bars.barh(
        range(len(priced)),
        [row.usd_per_hour_for_peak for row in priced],
        color=[_filling(row) for row in priced],
        edgecolor=[_colour(row) for row in priced],
    )
    bars.set_yticks(range(len(priced)), [row.instance_type for row in priced], fontsize=7)
    bars.invert_yaxis()
    bars.set_xlabel("$ per hour for the peak load, one to spare")
    for row in priced:
        dots.scatter(
            [row.offers_per_second],
            [row.usd_per_million_offers],
            facecolor=_filling(row),
            edgecolor=_colour(row),
        )
        dots.annotate(
            row.instance_type.removeprefix("ml."),
            (row.offers_per_second, row.usd_per_million_offers),
            textcoords="offset points",
            xytext=(3, 3),
            rotation=45,
            fontsize=6,
            color=INK,
        )
    if priced:
        dots.set_xscale("log")
    dots.set(xlabel="offers/s of an instance, in bulk", ylabel="$ per million offers", ylim=(0, None))
    for axes in (bars, dots):
        tidy(axes)
    figure.suptitle(
        "What serving costs: full measured, empty projected; green meets the limits", color=INK, fontsize=10
    )
    return png(figure)


def latencies(rows: Sequence[Mapping[str, Any]], limit: float) -> bytes:
    """p50 and p99 of each measured host by offers of a request; crosses are at the stated load.

    Args:
        rows: Of :func:`ml.serving.benchmark.latency_rows`.
        limit: Of p99, in milliseconds.
    """
    figure = figure_of(4.2)
    axes = figure.subplots()
    for number, host in enumerate(dict.fromkeys((row["host"], row["target"]) for row in rows)):
        colour = _COLOURS[number % len(_COLOURS)]
        of_host = [row for row in rows if (row["host"], row["target"]) == host]
        idle = sorted(
            (row for row in of_host if not row["asked_offers_per_second"]),
            key=lambda row: row["request_offers"],
        )
        loaded = [row for row in of_host if row["asked_offers_per_second"]]
        for quantile, style in (("p50_milliseconds", ":"), ("p99_milliseconds", "-")):
            name = f"{' '.join(host)}, {quantile[:3]}"
            sizes = [row["request_offers"] for row in idle]
            axes.plot(
                sizes,
                [row[quantile] for row in idle],
                style,
                marker="o",
                color=colour,
                label=name,
                markersize=4,
            )
            sizes = [row["request_offers"] for row in loaded]
            axes.plot(sizes, [row[quantile] for row in loaded], "x", color=colour)
    axes.axhline(limit, color=_FAILS, linewidth=0.8, linestyle="--", label=f"limit of p99, {limit:,.0f} ms")
    axes.set(
        xlabel="offers of a request (crosses: at the stated load)", ylabel="ms", xscale="log", yscale="log"
    )
    axes.set_title("Latency over HTTP", fontsize=10, color=INK)
    tidy(axes)
    axes.legend(fontsize=6, edgecolor="none")
    return png(figure)


def _colour(row: InstanceRow) -> str:
    return _MEETS if row.meets_limits else _FAILS


def _filling(row: InstanceRow) -> str:
    return _colour(row) if row.basis == MEASURED else "white"

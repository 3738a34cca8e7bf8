"""Pictures of a model's quality, as PNG bytes; readable at a width of 700 pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from ml.evaluation.comparison import Comparison
from ml.evaluation.metrics import Band, Calibration, Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#64748b")
"""One per model or curve, in the order they come; told apart in greyscale and by the colour-blind."""
_INK = "#334155"
_SIZE_INCHES = (7.0, 4.2)
_DOTS_PER_INCH = 130
_MOST_BARS = 12
_MOST_COMPARISONS = 40
_BETTER, _WORSE, _EQUAL = "better", "worse", "no difference beyond chance"
_VERDICT_COLOURS = {_BETTER: "#059669", _WORSE: "#dc2626", _EQUAL: "#64748b"}
_INCHES_PER_ROW = 0.19
_LOSS = "loss"
_CURVE_NAMES = {
    _LOSS: "training loss",
    "validation_loss": "validation loss",
    "validation_weighted_f1": "weighted F1",
    "validation_agreement_with_teacher": "agreement with teacher",
}
_LINE_STYLES = {
    _LOSS: "-",
    "validation_loss": "--",
    "validation_weighted_f1": "-",
    "validation_accuracy": "--",
}


def learning_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Loss and validation scores over epochs, per model.

    Args:
        curves: Name of the model → points of its ``learning_curve.json`` (``step``, ``epoch``,
            ``loss``, ``validation_…``), in order.
    """
    canvas = _Canvas("Learning curves", panels=2)
    losses, quality = canvas.axes
    for (name, points), colour in zip(curves.items(), _COLOURS, strict=False):
        steps_per_epoch = _largest(points, "step") / _largest(points, "epoch")
        for figure in sorted({figure for point in points for figure in point} - {"step", "epoch"}):
            drawn = [(p["step"] / steps_per_epoch, p[figure]) for p in points if figure in p]
            (losses if figure.endswith(_LOSS) else quality).plot(
                *zip(*drawn, strict=True),
                _LINE_STYLES.get(figure, ":"),
                color=colour,
                marker="o" if len(drawn) == 1 else "",
                label=f"{name}: {_CURVE_NAMES.get(figure, figure.removeprefix('validation_'))}",
            )
    losses.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    quality.set(xlabel="epoch", ylabel="on validation offers")
    return canvas.png(legend="best")


def _largest(points: Sequence[Mapping[str, float]], name: str) -> float:
    return max((point[name] for point in points), default=1)


def reliability(calibrations: Mapping[str, Calibration]) -> bytes:
    """Share of right answers over confidence; on the diagonal, confidence means what it says."""
    canvas = _Canvas("Is the confidence right?")
    (axes,) = canvas.axes
    axes.plot([0, 1], [0, 1], ":", color=_INK, label="perfect")
    for (name, calibration), colour in zip(calibrations.items(), _COLOURS, strict=False):
        filled = [b for b in calibration.bins if b.offers]
        most = max((b.offers for b in filled), default=1)
        error = calibration.expected_calibration_error
        confidence, accuracy = [b.confidence for b in filled], [b.accuracy for b in filled]
        axes.plot(confidence, accuracy, color=colour, label=f"{name} (calibration error {error:.3f})")
        axes.scatter(
            confidence, accuracy, [10 + 90 * b.offers / most for b in filled], color=colour, alpha=0.6
        )
    axes.set(
        xlabel="confidence (size of a dot: number of offers)",
        ylabel="share right",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    return canvas.png(legend="above")


def risk_coverage(
    shares: Sequence[float],
    losses: Sequence[float],
    precisions: Sequence[float],
    *,
    share_fast: float,
    max_loss: float,
    share_unmarked: float,
    min_precision: float,
) -> bytes:
    """What it costs to answer more offers with the fast model, and to mark fewer for review.

    Args:
        shares: Of all offers, ascending.
        losses: Accuracy lost against the student alone if the fast model answers the share it is surest of.
        precisions: Share right among the share of answers that are surest.
        share_fast: That the fast model answers.
        max_loss: Stated loss.
        share_unmarked: That is not marked.
        min_precision: Stated share right among these.
    """
    canvas = _Canvas("What the thresholds cost", panels=2)
    loss, precision = canvas.axes
    loss.plot(shares, losses, color=_COLOURS[0])
    loss.axhline(max_loss, color=_INK, linestyle=":", label=f"stated {max_loss:.3f}")
    loss.axvline(share_fast, color=_COLOURS[1], label=f"chosen {share_fast:.0%}")
    loss.set(xlabel="answered by the fast model", ylabel="accuracy lost against the student", xlim=(0, 1))
    precision.plot(shares, precisions, color=_COLOURS[0])
    precision.axhline(min_precision, color=_INK, linestyle=":", label=f"stated {min_precision:.2f}")
    precision.axvline(share_unmarked, color=_COLOURS[1], label=f"chosen {share_unmarked:.0%}")
    precision.set(xlabel="not marked for review", ylabel="share right", xlim=(0, 1))
    return canvas.png(legend="best")


def size_bands(bands: Mapping[str, Sequence[Band]]) -> bytes:
    """Macro F1 by number of training offers of the category, one bar per model."""
    first: dict[str, Band] = {band.band: band for rows in bands.values() for band in rows}
    names = sorted(first, key=lambda name: int(name.split("-")[0].rstrip("+")))
    labels = [f"{name}\n{first[name].categories:,} categories" for name in names]
    heights = {
        model: [next((b.macro_f1 for b in rows if b.band == name), 0.0) for name in names]
        for model, rows in bands.items()
    }
    return _bars("Small and large categories", labels, heights, "training offers of the category", "macro F1")


def segments(scores: Mapping[str, Mapping[str, Scores]], what: str) -> bytes:
    """Weighted F1 in the largest segments (countries, say), one bar per model."""
    sizes = {name: rows.offers for by_name in scores.values() for name, rows in by_name.items()}
    names = sorted(sizes, key=lambda name: (-sizes[name], name))[:_MOST_BARS]
    heights = {
        model: [by_name[name].weighted_f1 if name in by_name else 0.0 for name in names]
        for model, by_name in scores.items()
    }
    labels = [f"{name}\n{sizes[name]:,} offers" for name in names]
    return _bars(f"Quality by {what}", labels, heights, what, "weighted F1")


def comparisons(rows: Sequence[Comparison]) -> bytes:
    """Student minus production with its interval: one line per segment, the overall figure on top.

    Where there are more segments than fit, those are shown whose interval reaches up the least.
    """
    shown = sorted(rows, key=lambda row: (row.group != "overall", row.high))[:_MOST_COMPARISONS]
    shown.sort(key=lambda row: (row.group != "overall", row.group, row.difference, row.segment))
    title = "Student against the version in production"
    if len(shown) < len(rows):
        title += f" ({len(shown)} of {len(rows)} segments, the worst)"
    canvas = _Canvas(title, height=1.4 + _INCHES_PER_ROW * len(shown))
    (axes,) = canvas.axes
    verdicts = [_verdict(row) for row in shown]
    for verdict in sorted(set(verdicts)):
        places = [place for place, found in enumerate(verdicts) if found == verdict]
        of_kind = [shown[place] for place in places]
        reach = [[r.difference - r.low for r in of_kind], [r.high - r.difference for r in of_kind]]
        axes.errorbar(
            [row.difference for row in of_kind],
            places,
            xerr=reach,
            fmt="o",
            color=_VERDICT_COLOURS[verdict],
            label=verdict,
            markersize=4,
            capsize=2,
            linewidth=1.2,
        )
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(shown)), [f"{row.title} ({row.offers:,})" for row in shown])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="difference of weighted F1 (95 % intervals, of all segments at once)")
    return canvas.png(legend="above")


def _verdict(row: Comparison) -> str:
    if row.high < 0:
        return _WORSE
    return _BETTER if row.low > 0 else _EQUAL


def _bars(
    title: str, labels: Sequence[str], heights: Mapping[str, Sequence[float]], xlabel: str, ylabel: str
) -> bytes:
    canvas = _Canvas(title)
    (axes,) = canvas.axes
    width = 0.8 / max(1, len(heights))
    for index, (name, values) in enumerate(heights.items()):
        places = [place - 0.4 + width * (index + 0.5) for place in range(len(labels))]
        bars = axes.bar(places, values, width * 0.92, color=_COLOURS[index % len(_COLOURS)], label=name)
        if len(labels) * len(heights) <= 2 * _MOST_BARS:
            axes.bar_label(bars, fmt="{:.2f}", fontsize=7, color=_INK, padding=1)
    axes.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) <= 6 else 6)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.05))
    return canvas.png(legend="above")


class _Canvas:
    """A figure in the house's style; uses no global state, so that threads may draw at once."""

    def __init__(self, title: str, panels: int = 1, height: float | None = None) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        size = (_SIZE_INCHES[0], height or _SIZE_INCHES[1])
        self._figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
        self._agg = FigureCanvasAgg(self._figure)
        self._figure.suptitle(title, color=_INK, fontsize=12)
        self.axes: list[Axes] = list(self._figure.subplots(1, panels, squeeze=False)[0])
        for axes in self.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(colors=_INK, labelsize=8)

    def png(self, *, legend: Literal["above", "best"]) -> bytes:
        """The finished picture; the legend stands above the axes, or where they have most room."""
        place: dict[str, Any] = {"loc": "best", "framealpha": 0.7}
        if legend == "above":
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
        for axes in self.axes:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7, edgecolor="none", **place)
        content = io.BytesIO()
        # No version or date in the file: the same figures give the same bytes.
        self._agg.print_png(content, metadata={"Software": None})
        return content.getvalue()

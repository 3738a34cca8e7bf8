"""How a model gets better with more offers to learn from, and how many a goal would take.

What is wrong falls about as a power of what is learned from (Hestness et al., "Deep learning scaling is
predictable, empirically", 2017): a straight line where both scales are logarithmic. It is fitted to the
points that were measured and drawn out to the goal, as if all further offers came from shops like those
before, and as if there were no error that no number of offers could mend. So it says how many it takes at
least.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.plots import curves

_LEAST_ERROR = 1e-6
"""Has a logarithm."""


class LearningCurve(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model."""

    model: str
    points: list[tuple[int, float]]
    """(offers to learn from, mean weighted F1), fewest offers first."""
    exponent: float
    """Of the fitted power of the number of offers; the error of twice as many is 2 to minus this as large."""
    offers_for: dict[str, int | None]
    """Offers that each goal takes by the fitted line; None where more offers do not help."""


def learning_curves(figures: Mapping[str, Any], goals: Sequence[float]) -> list[LearningCurve]:
    """A curve of each model that was trained on several numbers of offers.

    Args:
        figures: Of ``benchmarks.quality`` with ``--training-shares``.
        goals: Mean weighted F1 that somebody would like to reach, each below 1.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for part in (figures, *figures.get("further", [])):
        for row in part["models"]:
            if "mean" in row:
                points.setdefault(row["model"], []).append((part["training_offers"], row["mean"]))
    return [_fitted(model, sorted(found), goals) for model, found in points.items() if len(dict(found)) > 1]


def _fitted(model: str, points: list[tuple[int, float]], goals: Sequence[float]) -> LearningCurve:
    offers, quality = np.array(points, np.float64).T
    slope, level = np.polyfit(np.log(offers), np.log(np.maximum(1 - quality, _LEAST_ERROR)), 1)
    needed = {
        f"{goal:g}": round(float(np.exp((np.log(1 - goal) - level) / slope))) if slope < -1e-3 else None
        for goal in goals
    }
    return LearningCurve(model=model, points=points, exponent=-float(slope), offers_for=needed)


def curve_rows(found: Sequence[LearningCurve]) -> list[dict[str, Any]]:
    """What people see of the curves: a row per model."""
    return [
        {
            "model": curve.model,
            **{f"{offers:,} offers": quality for offers, quality in curve.points},
            "exponent": curve.exponent,
            **{f"offers for {goal}": offers for goal, offers in curve.offers_for.items()},
        }
        for curve in found
    ]


def draw_learning_curves(found: Sequence[LearningCurve], path: Path) -> None:
    """Draw what is wrong over the offers to learn from, both logarithmic, into a PNG file."""
    curves(
        {
            curve.model: [(offers, max(1 - quality, _LEAST_ERROR)) for offers, quality in curve.points]
            for curve in found
        },
        path,
        title="How much is wrong, by how many offers were learned from",
        x_label="labelled offers to learn from",
        y_label="1 - mean weighted F1 of held-out offers",
        logarithmic=True,
    )

"""Which of several candidates are worth a look, where more than one figure counts."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point is on the Pareto front: no other is as good in all figures and better in one.

    Args:
        points: Figures of each candidate, all finite and as many for each; more is better.
    """
    return [not any(_dominates(other, point) for other in points) for point in points]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

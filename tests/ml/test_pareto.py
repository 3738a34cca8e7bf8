"""The Pareto front: what holds of it whatever the candidates are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ml.learning.pareto import pareto_front

FIGURES = st.integers(min_value=0, max_value=4).map(float)  # few values: ties and copies are frequent
POINTS = st.integers(min_value=1, max_value=3).flatmap(
    lambda width: st.lists(st.tuples(*[FIGURES] * width), max_size=12)
)


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


@given(POINTS)
def test_nothing_on_the_front_is_dominated(points):
    on_front = [point for point, is_on in zip(points, pareto_front(points), strict=True) if is_on]
    assert not [point for point in on_front for other in points if dominates(other, point)]


@given(POINTS)
def test_everything_off_the_front_is_dominated_by_something_on_it(points):
    front = pareto_front(points)
    on_front = [point for point, is_on in zip(points, front, strict=True) if is_on]
    off = [point for point, is_on in zip(points, front, strict=True) if not is_on]
    assert all(any(dominates(better, point) for better in on_front) for point in off)


@given(POINTS, st.randoms(use_true_random=False))
def test_the_order_of_candidates_does_not_matter(points, random):
    before = dict(zip(points, pareto_front(points), strict=True))
    shuffled = random.sample(points, len(points))
    assert dict(zip(shuffled, pareto_front(shuffled), strict=True)) == before


def test_quality_against_throughput():
    points = [(0.90, 100.0), (0.88, 300.0), (0.87, 250.0), (0.90, 100.0), (0.80, 900.0)]
    assert pareto_front(points) == [True, True, False, True, True]
    assert pareto_front([]) == []

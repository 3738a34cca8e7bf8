from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ml.learning.averaging import EQUAL, SHARES, choose_share


def judges(rows: int, first: float, second: float, seed: int = 3) -> tuple[Callable, np.ndarray]:
    """Two that see the class of each row through noise, as log-likelihood ratios, and the classes."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(5, size=rows)
    truth = np.eye(5)[targets]
    one, other = (signal * (truth * signal + rng.normal(size=truth.shape)) for signal in (first, second))
    return lambda share: (1 - share) * one + share * other, targets


@pytest.mark.parametrize("rows", [1, 20, 300, 3_000])
def test_judges_that_are_about_as_good_count_the_same(rows: int) -> None:
    average, targets = judges(rows, 2.0, 2.1)
    assert choose_share(average, targets) == EQUAL


def one_knows_one_guesses() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    targets = rng.integers(5, size=400)
    return 3 * np.eye(5)[targets] + rng.normal(size=(400, 5)), 3 * rng.normal(size=(400, 5)), targets


def test_one_that_guesses_is_left_out_once_there_are_offers_enough_to_see_it() -> None:
    knows, guesses, targets = one_knows_one_guesses()
    assert choose_share(lambda share: (1 - share) * knows + share * guesses, targets) <= 0.2
    assert choose_share(lambda share: (1 - share) * guesses + share * knows, targets) >= 0.8
    few = slice(0, 4)
    assert choose_share(lambda share: ((1 - share) * knows + share * guesses)[few], targets[few]) == EQUAL


def test_of_shares_that_are_right_equally_often_the_nearest_to_equal_ones_is_taken() -> None:
    targets = np.zeros(40, np.int64)

    def average(share: float) -> np.ndarray:
        return np.tile([1.0, 0.0] if share < 0.5 else [0.0, 1.0], (40, 1))

    assert choose_share(average, targets) == 0.4


def test_offers_of_unknown_class_and_no_offers_say_nothing() -> None:
    knows, guesses, targets = one_knows_one_guesses()

    def average(share: float) -> np.ndarray:
        return (1 - share) * knows + share * guesses

    half_known = np.where(np.arange(len(targets)) % 2, targets, -1)
    assert choose_share(average, half_known) <= 0.2
    assert choose_share(average, np.full_like(targets, -1)) == EQUAL
    assert choose_share(lambda share: np.empty((0, 5)), np.empty(0, np.int64)) == EQUAL


@given(
    right=hnp.arrays(np.bool_, st.tuples(st.integers(1, 120), st.just(len(SHARES)))),
)
def test_what_is_chosen_is_never_right_less_often_than_equal_shares(right: np.ndarray) -> None:
    def average(share: float) -> np.ndarray:
        is_right = right[:, SHARES.index(share)]
        return np.stack([is_right, ~is_right], axis=1).astype(float)

    chosen = choose_share(average, np.zeros(len(right), np.int64))
    assert chosen in SHARES
    assert right[:, SHARES.index(chosen)].sum() >= right[:, SHARES.index(EQUAL)].sum()

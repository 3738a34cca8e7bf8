"""Which variant answers the next request, so that shares are kept exactly and nobody can guess the order."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Sequence

BLOCK = 100
"""Requests after which every share is exact, as far as it is a whole number of them."""


class Shares:
    """Chooses by weight: in every block of requests each variant gets its share, in random order.

    A coin per request would leave a canary of 10 % without one among 20 requests every eighth time; taking
    turns in a fixed order would give a client with a rhythm of its own (every tenth request a large one) the
    same variant for the same kind of request, and the comparison would be of requests and not of models. So
    each request of a block draws from its own stratum of [0, 1), and the strata come in random order.
    """

    def __init__(self, weights: Sequence[float], generator: random.Random | None = None) -> None:
        """Take weights, relative to each other.

        Args:
            weights: At least one, none negative, not all 0.
            generator: Source of the order.
        """
        total = sum(weights)
        self._edges = list(itertools.accumulate(weight / total for weight in weights))
        self._last = max(index for index, weight in enumerate(weights) if weight)
        self._generator = generator or random.Random()
        self._strata: list[int] = []

    def next(self) -> int:
        """Index of the weight that the next request falls to."""
        if not self._strata:
            self._strata = self._generator.sample(range(BLOCK), BLOCK)
        point = (self._strata.pop() + self._generator.random()) / BLOCK
        # Sums of floats may end just below 1.
        return min(bisect.bisect_right(self._edges, point), self._last)

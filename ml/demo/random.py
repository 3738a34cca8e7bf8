"""Random numbers that are a function of what they are for: no state, no order.

A draw depends on the seed, on the key of the thing (a product's number, say) and on the name of the
draw, so it comes out the same wherever and whenever it is made.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


class Draws:
    """Named draws for an array of keys."""

    def __init__(self, seed: str, keys: npt.NDArray[np.uint64]) -> None:
        """Draws for ``keys``, shape (n,); other seeds give unrelated draws."""
        self._keys = _mix(keys ^ _number_of(seed))

    def uniform(self, name: str) -> npt.NDArray[np.float64]:
        """Numbers from [0, 1), shape (n,)."""
        return np.asarray((_mix(self._keys ^ _number_of(name)) >> np.uint64(11)) * 2.0**-53)

    def integers(self, name: str, count: int) -> npt.NDArray[np.int64]:
        """Integers from 0 to ``count - 1``, shape (n,)."""
        return (self.uniform(name) * count).astype(np.int64)

    def normal(self, name: str) -> npt.NDArray[np.float64]:
        """Standard normal numbers (Box and Muller), shape (n,)."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(name + " radius")))
        return np.asarray(radius * np.cos(2.0 * np.pi * self.uniform(name + " angle")))


def _mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _number_of(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little"))

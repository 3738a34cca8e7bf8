"""A hash table from keys to numbers that is asked for thousands of keys at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_SLOTS_PER_KEY = 3
"""At least; the fuller a table, the longer the way from a key's first slot to its own."""


class KeyTable:
    """Non-negative numbers by key, with linear probing (Knuth, The Art of Computer Programming, 6.4)."""

    def __init__(self, capacity: int) -> None:
        """An empty table.

        Args:
            capacity: Keys that it can hold.
        """
        bits = max(4, (_SLOTS_PER_KEY * capacity - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._last = (1 << bits) - 1
        self._keys = np.zeros(1 << bits, dtype=np.int64)  # 0: nobody's slot
        self._values = np.full(1 << bits, -1, dtype=np.int32)

    def find(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each key, (keys,); -1 for one that is not there."""
        slots = self._first_slots(keys)
        there = self._keys[slots]
        result = np.where(there == keys, self._values[slots], -1).astype(np.int64)
        waiting = np.flatnonzero((there != keys) & (there != 0))
        while len(waiting):
            slots[waiting] = (slots[waiting] + 1) & self._last
            there = self._keys[slots[waiting]]
            is_found = there == keys[waiting]
            result[waiting[is_found]] = self._values[slots[waiting[is_found]]]
            waiting = waiting[~is_found & (there != 0)]
        return result

    def insert(self, keys: NDArray[np.int64], values: NDArray[np.integer]) -> None:
        """Take up keys, distinct ones that are not there, none of them 0."""
        slots = self._first_slots(keys)
        waiting = np.arange(len(keys))
        while len(waiting):
            free = waiting[self._keys[slots[waiting]] == 0]
            self._keys[slots[free]] = keys[free]
            # Of several that come to one slot, one has got it.
            has_got = self._keys[slots[waiting]] == keys[waiting]
            settled = waiting[has_got]
            self._values[slots[settled]] = values[settled]
            waiting = waiting[~has_got]
            slots[waiting] = (slots[waiting] + 1) & self._last

    def _first_slots(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((keys.view(np.uint64) * _SPREAD) >> self._shift).view(np.int64)

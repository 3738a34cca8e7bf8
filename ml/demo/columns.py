"""Columns of text, made and put together by the column: the few operations the demo feed needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Texts: TypeAlias = "pa.Array[Any]"
"""A column of strings, possibly null."""
Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Booleans: TypeAlias = npt.NDArray[np.bool_]


class Ranges:
    """Lists of texts of different lengths, laid end to end so that rows can pick from them at once."""

    def __init__(self, lists: Sequence[Sequence[str]]) -> None:
        self.counts = np.array([len(texts) for texts in lists])
        self.starts = np.cumsum(self.counts) - self.counts
        self.texts = pa.array([text for texts in lists for text in texts])

    def places(self, which: Integers, uniform: Floats) -> Integers:
        """Position in ``texts`` of an element of list ``which``, per row."""
        return np.asarray(self.starts[which] + (uniform * self.counts[which]).astype(np.int64))


def by_group(groups: Integers, make: Callable[[int, Integers], Texts]) -> Texts:
    """``make(group, rows)`` for the rows of each group, put back in order."""
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    made = [make(int(group), rows) for group, rows in zip(present, np.split(order, starts[1:]), strict=True)]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return pa.concat_arrays(made).take(back)


def chosen_indices(chosen: Booleans, indices: Integers) -> Texts:
    """Indices to take; null where not chosen."""
    return pa.array(indices, mask=~chosen)


def either(chosen: Booleans, texts: Texts, others: Texts) -> Texts:
    """The texts where chosen, the others elsewhere."""
    mixed: Texts = pc.if_else(pa.array(chosen), texts, others)
    return mixed


def only(chosen: Booleans, texts: Texts) -> Texts:
    """The texts where chosen, null elsewhere."""
    return either(chosen, texts, pa.nulls(len(texts), pa.string()))


def join(parts: Sequence[Texts], separator: str) -> Texts:
    """The parts of each row with a separator between them; nulls are left out."""
    joined: Texts = pc.binary_join_element_wise(*parts, separator, null_handling="skip")  # type: ignore[call-overload]
    return joined


def as_text(numbers: npt.NDArray[np.int64] | npt.NDArray[np.uint64]) -> Texts:
    """Numbers in decimal."""
    return pa.array(numbers).cast(pa.string())


def same(text: str, count: int) -> Texts:
    """The same text in every row."""
    return pa.repeat(text, count)


def flat(texts: Sequence[Sequence[str]]) -> Texts:
    """Rows of equal length, end to end."""
    return pa.array([text for row in texts for text in row])


def words(words: Sequence[str]) -> Texts:
    """One list, as a column."""
    return pa.array(list(words))

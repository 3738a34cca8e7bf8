"""Series side by side: a row each, with a column per day of the reference, earlier day, and today.

Here belongs how the tables of days become rows and columns, and what goes without saying in them; nothing
of what their values mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ml.drift.answers import SERIES_SCHEMA, Kind
from ml.drift.questions import Limits

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Key = tuple[str, str, str, str, Kind]
"""What tells a series from others: its values of ``KEY_COLUMNS``."""
KEY_COLUMNS = ("question", "measure", "group", "segment", "kind")
"""Columns of ``SERIES_SCHEMA`` that together tell series apart."""


class Grid(msgspec.Struct, kw_only=True):
    """Series as rows, days as columns: those of the reference, earlier ones, and today as the last."""

    keys: list[Key]
    days: list[str]
    references: int
    """How many of the columns are the reference's."""
    value: Floats
    """NaN where a day does not have the series."""
    offers: Floats
    unit: Floats
    """Of numbers, the standard deviation of one offer's number in the reference; 1 where it has none."""
    is_drawn: Bools
    """False for numbers without a deviation: what drawing offers explains of them is not known."""

    @classmethod
    def of(
        cls, day: str, today: pa.Table, reference: pa.Table, earlier: Sequence[pa.Table], limits: Limits
    ) -> Grid:
        """All series of all days, with the zeros that go without saying filled in."""
        before = {str(table["day"][0]): table for table in earlier if table.num_rows}
        within = [on for on in sorted(before) if 0 < _days_between(on, day) < limits.window_days]
        reference_days = sorted({str(on) for on in reference["day"].to_pylist()})
        days = [*reference_days, *within, day]
        place_of_reference = pc.index_in(reference["day"], pa.array(reference_days, pa.string())).to_numpy()
        tables = [reference, *(before[on] for on in within), today]
        columns = [place_of_reference.astype(np.int64)]
        for place, table in enumerate(tables[1:], start=len(reference_days)):
            columns.append(np.full(table.num_rows, place, dtype=np.int64))
        everything = pa.concat_tables([table.select(SERIES_SCHEMA.names) for table in tables])
        keys, rows = _series(everything)
        column = np.concatenate(columns)

        def spread(name: str) -> Floats:
            numbers = np.full((len(keys), len(days)), np.nan)
            numbers[rows, column] = everything[name].to_numpy()
            return numbers

        offers, deviation = np.nan_to_num(spread("offers")), spread("deviation")
        unit = _pooled(deviation[:, : len(reference_days)], offers[:, : len(reference_days)])
        is_drawn = unit > 0
        grid = cls(
            keys=keys,
            days=days,
            references=len(reference_days),
            value=spread("value"),
            offers=offers,
            unit=np.where(is_drawn, unit, 1.0),
            is_drawn=is_drawn,
        )
        grid._fill_what_has_no_offers()
        return grid

    def __len__(self) -> int:
        return len(self.keys)

    def of_question(self, question: str) -> Grid:
        """The series of one question."""
        return self.at(np.flatnonzero(np.array([key[0] == question for key in self.keys], dtype=bool)))

    def at(self, rows: Ints) -> Grid:
        """The series of these rows."""
        return Grid(
            keys=[self.keys[row] for row in rows],
            days=self.days,
            references=self.references,
            value=self.value[rows],
            offers=self.offers[rows],
            unit=self.unit[rows],
            is_drawn=self.is_drawn[rows],
        )

    def of_kind(self, kind: Kind) -> Bools:
        """Which series are of that kind."""
        return np.array([key[4] == kind for key in self.keys], dtype=bool)

    @property
    def in_reference(self) -> Floats:
        """Values of the reference's days."""
        return self.value[:, : self.references]

    def _fill_what_has_no_offers(self) -> None:
        """Write down as zero what a day has no offers of.

        Who counts offers by country has no row for a country that sends none. Where a day has other
        segments of the same measure and group, it has offers that are not of this one.
        """
        families = numbered([key[:3] if key[4] == "share" else key[:1] for key in self.keys])
        for kind in ("share", "count"):
            of_kind = np.flatnonzero(self.of_kind(kind))
            known = np.where(np.isnan(self.value[of_kind]), -1.0, self.offers[of_kind])
            most = np.full((int(families.max(initial=-1)) + 1, len(self.days)), -1.0)
            np.maximum.at(most, families[of_kind], known)
            of_family = most[families[of_kind]]
            fill = np.isnan(self.value[of_kind]) & (of_family >= 0)
            self.value[of_kind] = np.where(fill, 0.0, self.value[of_kind])
            if kind == "share":
                self.offers[of_kind] = np.where(fill, of_family, self.offers[of_kind])


def is_of_all_offers(key: Key) -> bool:
    """Whether a series is the count of all offers, or of all shops."""
    return key[4] == "count" and not key[2] and not key[3]


def numbered(names: Sequence[Any]) -> Ints:
    """Equal names get equal numbers."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _series(table: pa.Table) -> tuple[list[Key], Ints]:
    """The series of a table in order, and of each row the place of its series."""
    code = np.zeros(table.num_rows, dtype=np.int64)
    names, sizes = [], []
    for column in KEY_COLUMNS:
        encoded = table[column].combine_chunks().dictionary_encode()
        words = cast(list[str], encoded.dictionary.to_pylist())
        order = np.argsort(np.array(words, dtype=object))
        rank = np.empty(len(words), dtype=np.int64)
        rank[order] = np.arange(len(words))
        code = code * max(len(words), 1) + rank[encoded.indices.to_numpy()]
        names.append([words[place] for place in order])
        sizes.append(max(len(words), 1))
    codes, rows = np.unique(code, return_inverse=True)
    parts = np.unravel_index(codes, sizes)
    keys = [
        cast(
            Key,
            tuple(words[place] for words, place in zip(names, places, strict=True)),
        )
        for places in zip(*parts, strict=True)
    ]
    return keys, rows


def _pooled(deviation: Floats, offers: Floats) -> Floats:
    """Standard deviation of one offer's number over all days; 0 where no day tells."""
    known = np.isfinite(deviation)
    weight = np.where(known, np.maximum(offers, 1.0), 0.0)
    squares = (np.nan_to_num(deviation) ** 2 * weight).sum(axis=1)
    pooled: Floats = np.sqrt(squares / np.maximum(weight.sum(axis=1), 1.0))
    return pooled


def _days_between(earlier: str, later: str) -> int:
    return (date.fromisoformat(later) - date.fromisoformat(earlier)).days

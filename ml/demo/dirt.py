"""What is wrong in real feeds, in small shares: the demo feed has all of it every day."""

from __future__ import annotations

import html
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ml.demo.random import Draws
from ml.demo.words import BAD_DATES, BAD_PRICES, CONTROL_CHARACTERS, UNKNOWN_CATEGORIES

HUGE_TITLE_BYTES = 100_000

REPEATED_OFFERS = 0.0015

_Spoiler = Callable[[str | None, int], str | None]
"""Makes of a value and a number (which of the possible ways) the value that is delivered."""


def _mojibake(text: str | None, _way: int) -> str | None:
    """UTF-8 read as Windows-1252, as happens between two systems."""
    return f"{text} – für é".encode().decode("cp1252", errors="replace")


def _escaped(text: str | None, way: int) -> str | None:
    """Title as HTML, or HTML in the title; twice escaped, even."""
    return (html.escape(f"{text} & more"), f"<b>{text}</b><br/>", html.escape(html.escape(f'{text} 15"')))[
        way % 3
    ]


def _one_of(*values: str | None) -> _Spoiler:
    return lambda _text, way: values[way % len(values)]


DIRT: tuple[tuple[str, str, float, _Spoiler], ...] = (
    ("empty title", "title", 0.0012, _one_of("", "   ", None)),
    (
        "control characters",
        "title",
        0.0012,
        lambda text, way: f"{text}{CONTROL_CHARACTERS[way % len(CONTROL_CHARACTERS)]}",
    ),
    ("mojibake", "title", 0.0020, _mojibake),
    ("HTML in the title", "title", 0.0040, _escaped),
    ("unparsable price", "price", 0.0015, _one_of(*BAD_PRICES)),
    ("negative price", "price", 0.0008, _one_of("-1.00", "-19.99")),
    ("unknown category", "category_id", 0.0012, _one_of(*UNKNOWN_CATEGORIES)),
    ("no shop", "shop_id", 0.0010, _one_of("", None)),
    ("no offer id", "offer_id", 0.0010, _one_of("", None)),
    ("bad date", "offered_at", 0.0012, _one_of(*BAD_DATES)),
    ("bad currency", "currency", 0.0010, _one_of("€", "Euro", "£")),
    ("bad country", "country", 0.0010, _one_of("Germany", "???", "D")),
    ("bad language", "language", 0.0010, _one_of("deutsch!", "??", "1")),
)
"""Kind of dirt, column, share of the offers, and what becomes of the value. The shares are disjoint.
Mojibake and HTML are odd but acceptable; the rest is not."""


def repeated_rows(draws: Draws) -> npt.NDArray[np.int64]:
    """Row of the chunk that each row takes its listing from: its own, or now and then the one before."""
    repeated = draws.uniform("repeated") < REPEATED_OFFERS
    repeated[:1] = False
    own = np.arange(len(repeated))
    return np.where(repeated, own - 1, own)


def add_dirt(table: pa.Table, draws: Draws, *, huge_row: int) -> pa.Table:
    """Spoil a small share of the rows of ``table``, and give ``huge_row`` a title of 100 KB."""
    fate = draws.uniform("fate")
    way = draws.integers("way", 1000)
    spoiled: dict[str, dict[int, str | None]] = {"title": {}}
    above = 0.0
    for _, column, share, spoil in DIRT:
        rows = np.flatnonzero((fate >= above) & (fate < above + share))
        above += share
        values = table[column].take(rows).to_pylist()
        changes = spoiled.setdefault(column, {})
        for row, value in zip(rows.tolist(), values, strict=True):
            changes[row] = spoil(value, int(way[row]))
    words = f"{table['title'][huge_row].as_py()} "
    spoiled["title"][huge_row] = (words * (HUGE_TITLE_BYTES // len(words) + 1))[:HUGE_TITLE_BYTES]
    for column, changes in spoiled.items():
        table = _with_changes(table, column, changes)
    return table


def _with_changes(table: pa.Table, column: str, changes: dict[int, str | None]) -> pa.Table:
    """``table`` with some values of a text column replaced."""
    old = table[column].combine_chunks()
    picks = np.arange(len(old))
    picks[list(changes)] = len(old) + np.arange(len(changes))
    both = pa.concat_arrays([old, pa.array(list(changes.values()), pa.string())])
    return table.set_column(table.schema.get_field_index(column), column, both.take(picks))

"""Labelled offers of any feed, and how a benchmark divides them into those to learn from and those held out.

All rows are used, whatever columns the feed has. What the feed's rules ask for and this one lacks is stood
in for here, not in the product, and said in the notes that travel with every result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA, offer_texts
from ml.sampling.split import PRODUCT_KEYS

SplitBy = Literal["shop", "product", "offer"]
SPLITS: tuple[SplitBy, ...] = ("shop", "product", "offer")

STAND_IN_SHOP = "no-shop:"
"""Before the id of an offer that names no shop: each is a shop of its own."""

_NEEDED = ("offer_id", "title", "category_id")


@dataclass(frozen=True)
class LabelledOffers:
    """Offers in the columns of a feed (``ml.offers.CLEAN_SCHEMA``), each with a label."""

    table: pa.Table
    notes: list[str] = field(default_factory=list)
    """What was stood in for or left out, in words."""


@dataclass(frozen=True)
class Divided:
    """Both sides of a split; they share no offer."""

    train: pa.Table
    test: pa.Table
    notes: list[str] = field(default_factory=list)


def read_labelled_offers(path: Path) -> LabelledOffers:
    """Offers with a label, from a Parquet or CSV file.

    Raises:
        InputError: the file cannot be read, or lacks a column that nothing can stand in for.
    """
    try:
        table = pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if missing := [name for name in _NEEDED if name not in table.column_names]:
        raise InputError(f"{path} has no column {', '.join(missing)}; a labelled feed needs it")
    notes = []
    usable = pc.and_(pc.is_valid(table["category_id"]), pc.is_valid(table["title"]))
    if left_out := table.num_rows - pc.sum(usable).as_py():
        notes.append(f"{left_out:,} offers without label or title are left out")
        table = table.filter(usable)
    columns = _feed_columns(table)
    if without_shop := columns["shop_id"].null_count:
        stand_ins = pc.binary_join_element_wise(STAND_IN_SHOP, columns["offer_id"], "")
        columns["shop_id"] = pc.coalesce(columns["shop_id"], stand_ins)
        notes.append(f"{without_shop:,} of {table.num_rows:,} offers name no shop: each got one of its own")
    return LabelledOffers(pa.table(columns, schema=CLEAN_SCHEMA), notes)


def with_labels(offers: pa.Table, categories: Mapping[str, str]) -> pa.Table:
    """``offers``, of which each gets the category that ``categories`` has for its id."""
    labels = pa.array([categories[name] for name in offers["offer_id"].to_pylist()], pa.string())
    return pa.table({**_feed_columns(offers), "category_id": labels}, schema=CLEAN_SCHEMA)


def divide(offers: pa.Table, by: SplitBy, share: float, seed: int) -> Divided:
    """Hold out a share of the shops, products or offers, drawn by hash.

    Split by shop or product, nothing that shares a product (id, GTIN or title) with a held-out offer is
    trained on: near-copies would make the comparison one of memories. Split by offer, copies stay.
    """
    ids = [str(name) for name in offers["offer_id"].to_pylist()]
    keys = _product_keys(offers)
    if by == "shop":
        units = [str(name) for name in offers["shop_id"].to_pylist()]
    elif by == "product":
        units = _smallest_of(_connected(keys), ids)
    else:
        units = ids
    held_out = np.array([_draw(f"{seed}:benchmark:{unit}") < share for unit in units], dtype=bool)
    kept = ~held_out
    notes = []
    if by == "shop":
        for values in keys:
            tested = {key for key, held in zip(values, held_out, strict=True) if held} - {None}
            kept &= np.array([key not in tested for key in values], dtype=bool)
        if copies := int((~held_out & ~kept).sum()):
            notes.append(f"{copies:,} offers of held-out products are not trained on")
    return Divided(offers.filter(pa.array(kept)), offers.filter(pa.array(held_out)), notes)


def without_languages(offers: pa.Table, languages: Sequence[str]) -> pa.Table:
    """Offers that are not in one of ``languages`` (those that state none stay)."""
    return offers.filter(pc.invert(_in_languages(offers, languages)))


def only_languages(offers: pa.Table, languages: Sequence[str]) -> pa.Table:
    """Offers in one of ``languages``."""
    return offers.filter(_in_languages(offers, languages))


def duplicate_share(offers: pa.Table) -> float:
    """Share of offers whose text another one before them has."""
    texts = offer_texts(offers)
    return 1 - len(set(texts)) / len(texts) if texts else 0.0


def _feed_columns(table: pa.Table) -> dict[str, Any]:
    """The columns of a feed; null where the table has none, or text for a number (no model reads those)."""
    return {
        column.name: table[column.name].cast(column.type)
        if column.name in table.column_names
        and (pa.types.is_string(column.type) or not pa.types.is_string(table[column.name].type))
        else pa.nulls(table.num_rows, column.type)
        for column in CLEAN_SCHEMA
    }


def _in_languages(offers: pa.Table, languages: Sequence[str]) -> pa.ChunkedArray:
    return pc.fill_null(pc.is_in(offers["language"], pa.array(languages, pa.string())), False)


def _product_keys(offers: pa.Table) -> list[list[str | None]]:
    """The product's own keys of every row, one list per key."""
    with duckdb.connect(config={"threads": 1}) as database:
        database.register("offers", offers.append_column("row", pa.array(range(offers.num_rows))))
        columns = ", ".join(f"{sql} AS {name}" for name, sql in PRODUCT_KEYS.items())
        rows = database.sql(f"SELECT {columns} FROM offers ORDER BY row").fetchall()
    return [[row[place] for row in rows] for place in range(len(PRODUCT_KEYS))]


def _connected(keys: Sequence[Sequence[str | None]]) -> NDArray[np.int32]:
    """Number of the component of each row (n,); rows that share a key are in one."""
    numbers: dict[tuple[int, str], int] = {}
    edges = [
        (row, numbers.setdefault((kind, value), len(numbers)))
        for kind, values in enumerate(keys)
        for row, value in enumerate(values)
        if value is not None
    ]
    count = len(keys[0])
    size = count + len(numbers)
    rows, columns = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (rows, columns + count)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:count]


def _smallest_of(units: NDArray[np.int32], ids: Sequence[str]) -> list[str]:
    """A name for each row's unit that does not depend on the order of rows: its smallest offer id."""
    first: dict[int, str] = {}
    for unit, name in zip(units.tolist(), ids, strict=True):
        first[unit] = min(name, first.get(unit, name))
    return [first[unit] for unit in units.tolist()]


def _draw(text: str) -> float:
    """Uniform in [0, 1)."""
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:13], 16) / 16**13

"""Which labelled offers are kept for validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from hashlib import md5
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ml.sampling.label_sources import GUESSED
from ml.sampling.split import PRODUCT_KEYS
from ml.stages import TrainingSampleParameters

_FEW_OFFERS = 10
"""Categories with fewer labelled offers than this are reported: they are hardly learnable."""


def write_splits(path: Path, parameters: TrainingSampleParameters) -> dict[str, int]:
    """Add column ``split`` to the labelled offers and return the counts of each.

    Split by product, everything connected by product, GTIN or title goes to one side. Split by
    shop that would connect nearly all shops, so whole shops are validated on, and those of their
    offers that repeat a training product are left out. Labels that a model guessed (weak ones, and those
    moved by evidence) have no say in who validates: they are trained on, and left out where they share
    something with a validation offer.
    """
    sampled = pq.read_table(path)
    is_guessed = pc.field("label_source").isin(GUESSED)
    table = sampled.filter(~is_guessed)
    keys = _keys_of(table)
    units = table["shop_id"].to_numpy() if parameters.split_by == "shop" else _connected(keys)
    names = [str(name) for name in table["offer_id"].to_pylist()]
    if parameters.split_by == "shop":
        draws = np.array([_draw(f"{parameters.seed}:validation:{unit}") for unit in units.tolist()])
    else:
        draws = _smallest_draw(names, units, parameters.seed)
    validates = draws < parameters.validation_share
    categories = np.asarray(table["category_id"].to_pylist(), dtype=object)
    _give_back(validates, units, draws, categories)
    if parameters.validation_share > 0 and not validates.any():
        _take_one(validates, units, draws, categories)

    leave_out = np.zeros(len(validates), dtype=bool)
    if parameters.split_by == "shop":
        for values in keys.values():
            trained = {
                key for key, held in zip(values, validates, strict=True) if not held and key is not None
            }
            leave_out |= validates & np.array([key in trained for key in values])
    labels = pa.array(np.where(validates, "validation", "train").tolist(), pa.string())
    table = table.append_column("split", labels).filter(pa.array(~leave_out))
    guessed = _apart_from(
        table.filter(pc.field("split") == "validation"), sampled.filter(is_guessed), parameters.split_by
    )
    guessed = guessed.append_column("split", pa.array(["train"] * len(guessed), pa.string()))
    table = pa.concat_tables([table, guessed]).sort_by("offer_id")
    pq.write_table(table, path)

    sizes = np.unique(np.asarray(table["category_id"].to_pylist(), dtype=str), return_counts=True)[1]
    validation = int((validates & ~leave_out).sum())
    return {
        "train": len(table) - validation,
        "validation": validation,
        "left_out_between_splits": len(sampled) - len(table),
        "categories": len(sizes),
        "categories_with_fewer_than_10": int((sizes < _FEW_OFFERS).sum()),
    }


def _apart_from(validation: pa.Table, guessed: pa.Table, split_by: str) -> pa.Table:
    """Rows of ``guessed`` that share no key (nor shop, if split by shop) with a row of ``validation``."""
    held, keys = _keys_of(validation), _keys_of(guessed)
    if split_by == "shop":
        held["shop_id"], keys["shop_id"] = validation["shop_id"].to_pylist(), guessed["shop_id"].to_pylist()
    shares = np.zeros(len(guessed), dtype=bool)
    for name, values in keys.items():
        known = set(held[name]) - {None}
        shares |= np.array([value in known for value in values], dtype=bool)
    return guessed.filter(pa.array(~shares))


def _give_back(validates: Any, units: Any, draws: Any, categories: Any) -> None:
    """Move one unit back to training for each category that would be in the validation split only."""
    for category in sorted(set(categories[validates]) - set(categories[~validates])):
        rows = np.flatnonzero(categories == category)
        if validates[rows].all():
            last = max(rows, key=lambda row: (draws[row], str(units[row])))
            validates[units == units[last]] = False


def _take_one(validates: Any, units: Any, draws: Any, categories: Any) -> None:
    """Where no unit was drawn, validate on the first that costs no category its last training offer."""
    in_all = Counter(categories.tolist())
    for row in sorted(range(len(draws)), key=lambda row: (draws[row], str(units[row]))):
        unit = units == units[row]
        if all(in_all[name] > count for name, count in Counter(categories[unit].tolist()).items()):
            validates[unit] = True
            return


def _keys_of(table: pa.Table) -> dict[str, list[str | None]]:
    """The three keys of each row, by the same expressions that the split uses."""
    with duckdb.connect() as database:
        database.register("sample", table.append_column("row", pa.array(range(len(table)))))
        columns = ", ".join(f"{sql} AS {name}" for name, sql in PRODUCT_KEYS.items())
        rows = database.sql(f"SELECT {columns} FROM sample ORDER BY row").fetchall()
    return {name: [row[index] for row in rows] for index, name in enumerate(PRODUCT_KEYS)}


def _connected(keys: Mapping[str, list[str | None]]) -> Any:
    """Number of the component of each row (n,); rows that share a key are in one."""
    rows, columns = [], []
    key_numbers: dict[tuple[str, str], int] = {}
    for name, values in keys.items():
        for row, value in enumerate(values):
            if value is not None:
                rows.append(row)
                columns.append(key_numbers.setdefault((name, value), len(key_numbers)))
    count = len(next(iter(keys.values())))
    size = count + len(key_numbers)
    edges = coo_array((np.ones(len(rows)), (rows, np.array(columns, dtype=int) + count)), shape=(size, size))
    return connected_components(edges, directed=False)[1][:count]


def _smallest_draw(names: list[str], units: Any, seed: int) -> Any:
    """One number in [0, 1) per unit, uniform and independent of the unit's size, given to each row."""
    first: dict[int, str] = {}
    for name, unit in zip(names, units.tolist(), strict=True):
        first[unit] = min(name, first.get(unit, name))
    return np.array([_draw(f"{seed}:validation:{first[unit]}") for unit in units.tolist()])


def _draw(text: str) -> float:
    return int(md5(text.encode(), usedforsecurity=False).hexdigest()[:13], 16) / 16**13

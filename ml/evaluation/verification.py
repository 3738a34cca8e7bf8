"""Propositions about finished artifacts, checked on the files themselves.

Each function reads what another module wrote and trusts none of its counts. DuckDB does the work,
so memory stays flat whatever the size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import msgspec

from ml.offers import trimmed_sql
from ml.sampling.split import PRODUCT_KEYS

_PRODUCT_KEYS = {name.removesuffix("_key"): sql for name, sql in PRODUCT_KEYS.items()}
"""What makes two offers the same product: ``product``, ``gtin`` or ``title``, by the split's own rule."""


class Conservation(msgspec.Struct, frozen=True):
    """Where the offers of one day went."""

    raw: int
    clean: int
    quarantined: int
    lost: int
    """Offer ids that were delivered and are in neither table (counted as often as they are missing)."""
    invented: int
    """Offer ids in either table that were not delivered."""

    @property
    def holds(self) -> bool:
        """Nothing lost, nothing invented, nothing twice."""
        return self.raw == self.clean + self.quarantined and self.lost == 0 and self.invented == 0


def conservation(raw_offers: Path, offers: Path) -> Conservation:
    """Compare a day's ``raw_offers`` with the clean and quarantined offers made of them.

    Counts rows, and compares the offer ids as multisets, so that a loss cannot hide behind a duplicate.
    """
    trimmed = trimmed_sql("offer_id")
    raw = f"SELECT {trimmed} AS id FROM {_parquet(raw_offers / 'offers.parquet')}"
    clean = f"SELECT offer_id AS id FROM {_parquet(offers / 'offers.parquet')}"
    quarantined = f"SELECT {trimmed} AS id FROM {_parquet(offers / 'quarantine.parquet')}"
    both = f"({clean}) UNION ALL ({quarantined})"
    return Conservation(
        raw=_count(raw),
        clean=_count(clean),
        quarantined=_count(quarantined),
        lost=_count(f"({raw}) EXCEPT ALL ({both})"),
        invented=_count(f"({both}) EXCEPT ALL ({raw})"),
    )


def unknown_labels(offer_tables: list[Path], catalog_taxonomy: Path) -> dict[str, int]:
    """Labels in ``offer_tables`` (Parquet files) that the taxonomy does not have, with their offers."""
    tables = " UNION ALL ".join(f"SELECT category_id FROM {_parquet(table)}" for table in offer_tables)
    rows = _rows(
        f"SELECT category_id, count(*) FROM ({tables}) WHERE category_id IS NOT NULL AND category_id NOT IN "
        f"(SELECT category_id FROM {_parquet(catalog_taxonomy / 'taxonomy.parquet')}) "
        "GROUP BY ALL ORDER BY 2 DESC, 1"
    )
    return {str(label): int(offers) for label, offers in rows}


def shared_groups(training_sample: Path, evaluation_set: Path, split_by: str) -> dict[str, int]:
    """How many training offers share a product (or shop) with the evaluation set, by what they share.

    Looks at labelled and unlabelled training offers, and between the sample's own training and
    validation part. All counts are zero if the split holds.
    """
    keys = dict(_PRODUCT_KEYS)
    if split_by == "shop":
        keys["shop_id"] = "shop_id"
    training = (
        f"SELECT * FROM {_parquet(training_sample / 'labelled.parquet')} UNION ALL BY NAME "
        f"SELECT * FROM {_parquet(training_sample / 'unlabelled.parquet')}"
    )
    evaluation = f"SELECT * FROM {_parquet(evaluation_set / 'offers.parquet')}"
    labelled = f"SELECT * FROM {_parquet(training_sample / 'labelled.parquet')}"
    shared = {}
    for name, key in keys.items():
        shared[f"evaluation_{name}"] = _count(_overlap(training, evaluation, key))
        shared[f"validation_{name}"] = _count(
            _overlap(
                f"SELECT * FROM ({labelled}) WHERE split = 'train'",
                f"SELECT * FROM ({labelled}) WHERE split = 'validation'",
                key,
            )
        )
    return shared


def same_offers(offers: Path, catalogued_offers: Path) -> tuple[int, int, int]:
    """Clean offers of a day, catalogued ones, and how many ids are in one table only.

    An offer that the model refused is in the table without a category: it is not catalogued.
    """
    clean = f"SELECT offer_id FROM {_parquet(offers / 'offers.parquet')}"
    table = _parquet(catalogued_offers / "catalogued.parquet")
    catalogued = f"SELECT offer_id FROM {table} WHERE category_id IS NOT NULL"
    return (
        _count(clean),
        _count(catalogued),
        _count(f"({clean}) EXCEPT ALL ({catalogued})") + _count(f"({catalogued}) EXCEPT ALL ({clean})"),
    )


def _overlap(left: str, right: str, key: str) -> str:
    return f"SELECT 1 FROM ({left}) WHERE {key} IN (SELECT {key} FROM ({right}) WHERE {key} IS NOT NULL)"


def _parquet(path: Path) -> str:
    return "read_parquet('{}')".format(str(path).replace("'", "''"))


def _count(query: str) -> int:
    return int(_rows(f"SELECT count(*) FROM ({query})")[0][0])


def _rows(query: str) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        rows: list[tuple[Any, ...]] = connection.execute(query).fetchall()
        return rows

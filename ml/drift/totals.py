"""What is counted over all offers of a day, by SQL and exactly: no sample, no model.

What is measured of single offers, of a sample, is :mod:`ml.drift.measured_offers`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import duckdb
import msgspec

from ml.drift.measures import MISSING, OTHER
from ml.offers import CLEAN_FILE, FEED_COLUMNS, QUARANTINE_FILE

OPTIONAL_COLUMNS = tuple(
    column.name for column in FEED_COLUMNS if not column.needed and column.name != "category_id"
)
"""Columns that may be missing; whether people labelled an offer is not a property of the feed."""

_KEPT_SHOP_SHARE, _KEPT_SHOPS = 0.001, 200


class DayTotals(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted over all offers of a day, exactly."""

    day: str
    complete: bool
    """Whether the day is over; else its volume says nothing."""
    offers: int
    """Clean offers."""
    by_country: dict[str, int]
    """Offers per country, ``(missing)`` for none."""
    by_shop: dict[str, int]
    """Offers of the large shops (and of those asked for), all others as ``(other)``."""
    missing: dict[str, dict[str, int]]
    """Column → country → offers without a value; countries where every offer has one may be absent."""
    quarantined: dict[str, int]
    """Rows per reason; a row may have several."""
    delivered: int
    """Rows of the feed: clean and quarantined ones."""
    shops: int
    """Shops with an offer."""


def totals_of(offers_folder: Path, day: str, complete: bool, shops: Collection[str] = ()) -> DayTotals:
    """Count the offers of an ``offers`` artifact, out of core.

    Args:
        offers_folder: Folder of the artifact.
        day: ISO date.
        complete: Whether the day is over.
        shops: Shops to count however small they are on this day.
    """
    offers, quarantine = str(offers_folder / CLEAN_FILE), str(offers_folder / QUARANTINE_FILE)
    missing = ", ".join(f"count(*) - count({name})" for name in OPTIONAL_COLUMNS)
    with duckdb.connect() as database:
        by_country = database.execute(
            f"SELECT coalesce(country, '{MISSING}') AS name, count(*), {missing} FROM read_parquet(?) "
            "GROUP BY name ORDER BY name",
            [offers],
        ).fetchall()
        by_shop = database.execute(
            "SELECT shop_id, count(*) AS offers FROM read_parquet(?) GROUP BY shop_id "
            "QUALIFY row_number() OVER (ORDER BY offers DESC, shop_id) <= ? "
            "OR offers >= ? * sum(offers) OVER () OR shop_id IN (SELECT unnest(?::VARCHAR[])) "
            "ORDER BY offers DESC, shop_id",
            [offers, _KEPT_SHOPS, _KEPT_SHOP_SHARE, list(shops)],
        ).fetchall()
        by_reason = database.execute(
            "SELECT reason, count(*) FROM (SELECT unnest(string_split(reason, ',')) AS reason "
            "FROM read_parquet(?)) GROUP BY reason ORDER BY reason",
            [quarantine],
        ).fetchall()
        ((number_of_shops,),) = database.execute(
            "SELECT count(DISTINCT shop_id) FROM read_parquet(?)", [offers]
        ).fetchall()
        ((quarantined,),) = database.execute("SELECT count(*) FROM read_parquet(?)", [quarantine]).fetchall()
    total = sum(row[1] for row in by_country)
    of_shops = {str(shop): int(offers) for shop, offers in by_shop}
    if rest := total - sum(of_shops.values()):
        of_shops[OTHER] = rest
    return DayTotals(
        day=day,
        complete=complete,
        offers=total,
        by_country={row[0]: row[1] for row in by_country},
        by_shop=of_shops,
        missing={
            name: {row[0]: row[2 + place] for row in by_country if row[2 + place]}
            for place, name in enumerate(OPTIONAL_COLUMNS)
        },
        quarantined=dict(by_reason),
        delivered=total + quarantined,
        shops=number_of_shops,
    )

"""Which category was given to an offer that somebody decided about later: the two side by side.

A decision is about what was known when it was made: it is held against the newest catalogued day of the offer
up to the day of the decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ml.quality.corrections import CORRECTIONS_FILE, DELIVERIES_FILE, NEWEST
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.transitions import Transition, Transitions, most_likely_moves

if TYPE_CHECKING:
    import duckdb

    from ml.runner import StageContext

NONE_PREDICTED = ""
"""Stands for the category of an offer that the model gave none; never right."""

_MEMORY_LIMIT = "1GB"

_COLUMN_TYPES: dict[str, pa.DataType] = {
    "offer_id": pa.string(),
    "day": pa.string(),  # that it was catalogued on
    "delay_days": pa.int64(),  # from that day to the decision
    "country": pa.string(),  # empty where it is not known
    "model_version": pa.string(),
    "predicted_as": pa.string(),  # in the model's own taxonomy
    "predicted": pa.string(),  # in the taxonomy in force, the most likely one where that is not certain
    "predicted_top": pa.string(),
    "confidence": pa.float64(),
    "actual": pa.string(),  # in the taxonomy in force
    "actual_top": pa.string(),
    "right": pa.bool_(),  # in the model's own taxonomy: its category, or one of its successors
    "right_in_force": pa.bool_(),  # ``predicted`` is ``actual``
    # Of an answer marked for review, which leaves a choice, both hold too if ``actual`` lies below it.
}
COMPARED_SCHEMA = pa.schema(_COLUMN_TYPES)
"""One row per offer that somebody decided about and the model had catalogued."""


@dataclass(frozen=True)
class Unmatched:
    """Decisions that count and are about no catalogued offer of these days."""

    before: int = 0
    """Made before the first of the days."""
    too_early: int = 0
    """Of offers that were only catalogued later."""
    unknown: int = 0
    """Of offers that none of the days has."""


@dataclass(frozen=True)
class DecidedDay:
    """Decisions that count, of one day."""

    decisions: int
    unknown: int
    """About offers that no catalogued day has."""


@dataclass(frozen=True)
class Delivery:
    """Files of the feed that were first seen on one day."""

    loaded_on: str
    decided_until: str
    """ISO date of their newest decision; empty without a good one."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    labels: pd.DataFrame
    """Columns of :data:`COMPARED_SCHEMA`."""
    traffic: dict[str, dict[str, int]]
    """Catalogued offers by day and category (of the taxonomy in force)."""
    unmatched: Unmatched = field(default_factory=Unmatched)
    labels_until: str = ""
    """ISO date of the newest decision, whatever it is about; empty without one."""
    decided: dict[str, DecidedDay] = field(default_factory=dict)
    """By ISO date of the decision, in order; of all time, also before the first catalogued day."""
    deliveries: tuple[Delivery, ...] = ()
    """In order."""


def compare(
    context: StageContext, taxonomy: Taxonomy, transitions: Transitions, newest_day: str
) -> Comparison:
    """Hold every decision that counts against what was predicted for its offer.

    DuckDB streams through the catalogued days; what stays in memory are the decisions.
    """
    import duckdb

    days = {
        day: folder for day, folder in context.partitions("catalogued_offers").items() if day <= newest_day
    }
    settings = {"memory_limit": _MEMORY_LIMIT, "temp_directory": str(context.scratch)}
    with duckdb.connect(config=settings) as database:
        _see(database, context, days)
        until = database.execute("SELECT max(decided_on) FROM every_decision").fetchall()[0][0]
        found = database.execute("""
            SELECT c.offer_id, c.day, date_diff('day', c.day::DATE, decided_on::DATE) AS delay_days,
                coalesce(country, '') AS country, model_version, taxonomy_version,
                coalesce(c.category_id, '') AS predicted_as, confidence, needs_review,
                d.category_id AS actual
            FROM decision AS d JOIN catalogued AS c ON c.offer_id = d.offer_id AND c.day <= d.decided_on
            LEFT JOIN place ON place.offer_id = c.offer_id AND place.day = c.day
            QUALIFY row_number() OVER (PARTITION BY c.offer_id ORDER BY c.day DESC) = 1
            ORDER BY c.day, c.offer_id""").df()
        counts = database.execute("""
            SELECT day, taxonomy_version, coalesce(category_id, ''), count(*) FROM catalogued GROUP BY ALL
            ORDER BY ALL""").fetchall()
        decided = _decided(database)
    unmatched = _unmatched(decided, min(days, default=newest_day), len(found))
    force = _InForce(taxonomy, transitions)
    traffic: dict[str, dict[str, int]] = {day: {} for day in days}
    for day, version, category, offers in counts:
        today = force.category(version, category)
        traffic[day][today] = traffic[day].get(today, 0) + offers
    deliveries = _deliveries(context.input("corrections") / DELIVERIES_FILE)
    return Comparison(force.complete(found), traffic, unmatched, until or "", decided, deliveries)


def _see(database: duckdb.DuckDBPyConnection, context: StageContext, days: Mapping[str, Path]) -> None:
    """Views ``every_decision``, ``decision`` (those that count), ``catalogued`` and ``place`` (countries)."""
    corrections = _literal(context.input("corrections") / CORRECTIONS_FILE)
    database.execute(
        f"CREATE TEMP VIEW every_decision AS SELECT *, strftime(decided_at, '%Y-%m-%d') AS decided_on "
        f"FROM read_parquet({corrections})"
    )
    database.execute(
        f"CREATE TEMP TABLE decision AS SELECT offer_id, category_id, decided_on FROM every_decision "
        f"WHERE standing = '{NEWEST}'"
    )
    catalogued = [
        f"SELECT offer_id, category_id, confidence, coalesce(needs_review, false) AS needs_review, "
        f"model_version, taxonomy_version, {_literal(day)} AS day "
        f"FROM read_parquet({_literal(folder / 'catalogued.parquet')})"
        for day, folder in days.items()
    ]
    nothing = (
        "SELECT NULL::VARCHAR AS offer_id, NULL::VARCHAR AS category_id, NULL::DOUBLE AS confidence, "
        "NULL::BOOLEAN AS needs_review, "
        "NULL::VARCHAR AS model_version, NULL::VARCHAR AS taxonomy_version, NULL::VARCHAR AS day LIMIT 0"
    )
    database.execute(f"CREATE TEMP VIEW catalogued AS {' UNION ALL '.join(catalogued or [nothing])}")
    places = [
        f"SELECT offer_id, country, {_literal(day)} AS day "
        f"FROM read_parquet({_literal(folder / 'offers.parquet')}) SEMI JOIN decision USING (offer_id)"
        for day, folder in context.partitions("offers").items()
        if day in days
    ]
    no_places = "SELECT NULL::VARCHAR AS offer_id, NULL::VARCHAR AS country, NULL::VARCHAR AS day LIMIT 0"
    database.execute(f"CREATE TEMP VIEW place AS {' UNION ALL '.join(places or [no_places])}")


def _decided(database: duckdb.DuckDBPyConnection) -> dict[str, DecidedDay]:
    unknown = dict(
        database.execute(
            "SELECT decided_on, count(*) FROM decision ANTI JOIN catalogued USING (offer_id) GROUP BY ALL"
        ).fetchall()
    )
    every = database.execute("SELECT decided_on, count(*) FROM decision GROUP BY ALL ORDER BY ALL").fetchall()
    return {day: DecidedDay(decisions, unknown.get(day, 0)) for day, decisions in every}


def _unmatched(decided: Mapping[str, DecidedDay], first_day: str, compared: int) -> Unmatched:
    before = sum(day.decisions for date, day in decided.items() if date < first_day)
    unknown = sum(day.unknown for date, day in decided.items() if date >= first_day)
    decisions = sum(day.decisions for day in decided.values())
    return Unmatched(before=before, too_early=decisions - before - unknown - compared, unknown=unknown)


def _deliveries(file: Path) -> tuple[Delivery, ...]:
    return tuple(
        Delivery(loaded_on=row["loaded_on"], decided_until=row["decided_until"] or "")
        for row in pq.read_table(file, columns=["loaded_on", "decided_until"]).to_pylist()
    )


class _InForce:
    """Brings the categories of each model's own taxonomy to the one in force."""

    def __init__(self, taxonomy: Taxonomy, transitions: Transitions) -> None:
        self._taxonomy = taxonomy
        self._transitions = transitions
        self._needed: dict[str, dict[str, Transition]] = {}
        self._moves: dict[str, dict[str, str]] = {}

    def category(self, taxonomy_version: str, category_id: str) -> str:
        """The category in force that is most likely meant."""
        self._prepare(taxonomy_version)
        return self._moves[taxonomy_version].get(category_id, category_id)

    def complete(self, found: pd.DataFrame) -> pd.DataFrame:
        """With the columns of :data:`COMPARED_SCHEMA` that follow from the others."""
        versions, predicted = found["taxonomy_version"].tolist(), found["predicted_as"].tolist()
        actual = found["actual"].tolist()
        found["predicted"] = [self.category(v, p) for v, p in zip(versions, predicted, strict=True)]
        found["predicted_top"] = [self._top(category) for category in found["predicted"]]
        found["actual_top"] = [self._top(category) for category in actual]
        answered = [
            {a, *(self._above(a) if is_marked else ())}
            for a, is_marked in zip(actual, found["needs_review"], strict=True)
        ]
        found["right_in_force"] = [p in of for p, of in zip(found["predicted"], answered, strict=True)]
        found["right"] = [
            not self._meanings(v, p).isdisjoint(of)
            for v, p, of in zip(versions, predicted, answered, strict=True)
        ]
        return found[COMPARED_SCHEMA.names]

    def _meanings(self, taxonomy_version: str, category_id: str) -> set[str]:
        transition = self._needed[taxonomy_version].get(category_id)
        if transition is None:
            return {category_id}
        return {successor.category_id for successor in transition.to}

    def _prepare(self, taxonomy_version: str) -> None:
        if taxonomy_version not in self._needed:
            needed = self._transitions.for_labels_of(self._transitions.digest_of(taxonomy_version))
            self._needed[taxonomy_version] = needed
            self._moves[taxonomy_version] = most_likely_moves(needed.values())

    def _above(self, category_id: str) -> list[str]:
        return self._taxonomy.ancestors(category_id) if category_id in self._taxonomy else []

    def _top(self, category_id: str) -> str:
        return self._taxonomy.ancestor_at(category_id, 1)


def _literal(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"

"""Corrections: what people decided about offers after the model did.

The stage here reads the whole corrections feed and puts every row into one of two tables: corrections (typed,
and in the categories of today) or quarantine (as delivered, with all reasons). What they say of the model is
:mod:`ml.quality.live`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import InputError
from ml.feed.reading import BrokenFileError, fingerprint, read_batches
from ml.feed.rows import Layout
from ml.offers import timestamp_sql, trimmed_sql
from ml.stages import CorrectionsParameters, FeedFile
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.transitions import Transitions, certain_moves

if TYPE_CHECKING:
    import duckdb

    from ml.runner import StageContext

CORRECTIONS_FILE = "corrections.parquet"
QUARANTINE_FILE = "quarantine.parquet"
DELIVERIES_FILE = "deliveries.parquet"

COLUMNS = {
    "offer_id": "Offer of the feed that somebody looked at.",
    "category_id": "Category that they gave it; that of the model, where they confirm it.",
    "decided_at": "When, as ISO 8601 date or time (UTC where it has no offset).",
}
LAYOUT = Layout(rows="corrections", columns=tuple(COLUMNS), needed=tuple(COLUMNS))
"""The columns of a corrections feed."""

NEWEST, SUPERSEDED, REPEATED = "newest", "superseded", "repeated"
"""Standing of a decision: it counts; somebody decided otherwise (or again) later; it was delivered twice."""

_COLUMN_TYPES: dict[str, pa.DataType] = {
    "offer_id": pa.string(),
    "category_id": pa.string(),  # of the taxonomy in force
    "decided_as": pa.string(),  # as delivered
    "decided_at": pa.timestamp("us"),  # UTC
    "standing": pa.string(),
    "source_file": pa.string(),
    "source_row": pa.int64(),
}
CORRECTIONS_SCHEMA = pa.schema(_COLUMN_TYPES)

_DELIVERY_TYPES: dict[str, pa.DataType] = {
    "loaded_on": pa.string(),  # ISO date on which its files were first seen
    "rows": pa.int64(),
    "quarantined": pa.int64(),
    "at_fault": pa.int64(),  # of the quarantined: what is wrong is the feed's fault
    "decided_until": pa.string(),  # ISO date of the newest good decision; null without one
}
DELIVERIES_SCHEMA = pa.schema(_DELIVERY_TYPES)
"""One row per day on which files came, in order."""

REASONS = {
    "malformed_row": "the line could not be split into values; no other reason is looked for",
    "invalid_encoding": "bytes that are not UTF-8",
    "missing_offer_id": "no offer_id",
    "missing_category_id": "no category_id",
    "missing_decided_at": "no decided_at",
    "invalid_decided_at": "no ISO 8601 date or time from 1990 to 2100",
    "decided_in_the_future": "a date more than a day after the file was first seen",
    "unknown_category": "a category that the taxonomy does not have, nor had in an earlier version",
    "uncertain_category": "a category of an earlier taxonomy whose offers went nobody knows exactly where",
    "contradiction": "another decision on the offer at the very same time names another category",
}
"""Why a row is quarantined; it gets all that apply, in this order, joined by commas."""

NOBODYS_FAULT = "uncertain_category"
"""The reason that the taxonomy gives, not the feed."""

_FUTURE_SLACK_DAYS = 1
"""A decision is dated by the clock and the time zone of whoever made it."""

_RECENT_DAYS = 7
"""Files that came within so many days of the newest are judged: in all rows of all time a feed that breaks
today would not be seen for months."""

_MEMORY_LIMIT = "1GB"
_RAW_FILE = "raw.parquet"
_ROW_GROUP_ROWS = 65_536
_MAX_IGNORED_SHOWN = 100
_RAW_SCHEMA = LAYOUT.schema.append(pa.field("loaded_on", pa.string()))


def write_corrections(context: StageContext, parameters: CorrectionsParameters) -> dict[str, Any]:
    """Stage ``corrections``: ``corrections.parquet`` and ``quarantine.parquet``, from all files of the feed.

    ``deliveries.parquet`` says what came when.

    Decisions in a category of an earlier taxonomy are brought to the one in force where that move is certain.
    Of several decisions on an offer the newest counts; the others stay in the table, marked. Of decisions of
    one instant that contradict each other none counts, and an older one stands.

    A file that is broken contributes nothing (not half of itself) and is listed in the metric
    ``unreadable_files``; the others count. One that could not be reached fails the stage instead: the same
    files read again later would give another result. No file at all is two empty tables.

    Raises:
        InputError: a file cannot be reached, or changed since it was looked at.
    """
    import duckdb

    raw = context.checkpoints / _RAW_FILE
    unreadable, ignored = _gather(context, parameters.files, raw)
    transitions = Transitions.read(context.input("taxonomy_change"))
    settings = {"memory_limit": _MEMORY_LIMIT, "temp_directory": str(context.scratch)}
    with duckdb.connect(config=settings) as database:
        database.execute("SET TimeZone = 'UTC'")
        _read_typed(database, raw)
        _say_where_categories_go(database, Taxonomy.load(context.input("catalog_taxonomy")), transitions)
        _judge(database)
        _write_tables(database, context.output)
        counts = _counts(database) | _recent_counts(_write_deliveries(database, context.output))
    if counts["rows"] != counts["corrections"] + counts["quarantined"]:
        raise RuntimeError(f"corrections were lost or invented: {counts}")
    context.progress.say(
        f"{counts['rows']:,} decisions: {counts['newest']:,} count, {counts['superseded']:,} superseded, "
        f"{counts['repeated']:,} repeated, {counts['quarantined']:,} quarantined"
    )
    return {
        **counts,
        "files": len(parameters.files) - len(unreadable),
        "unreadable_files": unreadable,
        "ignored_columns": sorted(ignored)[:_MAX_IGNORED_SHOWN],
    }


def _gather(context: StageContext, files: list[FeedFile], raw: Path) -> tuple[list[str], set[str]]:
    """Write all rows of readable files to ``raw``; returns what is wrong with others, and other columns."""
    unreadable: list[str] = []
    ignored: set[str] = set()
    part = context.checkpoints / "part.parquet"
    with (
        pq.ParquetWriter(raw, _RAW_SCHEMA, compression="zstd") as writer,
        context.progress.bar("reading", len(files), "files") as bar,
    ):
        for file in files:
            try:
                others = _copy_file(file, part)
            except BrokenFileError as error:
                unreadable.append(str(error))
                context.progress.say(f"left out: {error}")
            else:
                for batch in pq.ParquetFile(part).iter_batches(batch_size=_ROW_GROUP_ROWS):
                    writer.write_batch(batch)
                ignored |= others
            bar.update(1)
    part.unlink(missing_ok=True)
    return unreadable, ignored


def _copy_file(file: FeedFile, part: Path) -> set[str]:
    if file.fingerprint and fingerprint(file.uri) != file.fingerprint:
        raise InputError(f"{file.uri} changed since it was looked at; run again to look again")
    ignored: set[str] = set()
    with pq.ParquetWriter(part, _RAW_SCHEMA) as writer:
        for batch in read_batches(file.uri, ignored, LAYOUT):
            loaded_on = pa.repeat(file.loaded_on, batch.num_rows)
            writer.write_batch(pa.RecordBatch.from_arrays([*batch.columns, loaded_on], schema=_RAW_SCHEMA))
    return ignored


def _read_typed(database: duckdb.DuckDBPyConnection, raw: Path) -> None:
    """Table ``delivered``: a line per raw row, its values trimmed and typed."""
    trimmed = ", ".join(f"{trimmed_sql(name)} AS {name}" for name in COLUMNS)
    path = str(raw).replace("'", "''")
    database.execute(f"CREATE TEMP VIEW raw AS FROM read_parquet('{path}', file_row_number = true)")
    database.execute(f"""
        CREATE TEMP TABLE delivered AS
        SELECT row, offer_id, category_id, problem, loaded_on, decided_at IS NOT NULL AS is_dated,
            {timestamp_sql("decided_at")} AS moment, strftime(moment, '%Y-%m-%d') AS day
        FROM (SELECT file_row_number AS row, problem, loaded_on, {trimmed} FROM raw)""")


def _say_where_categories_go(
    database: duckdb.DuckDBPyConnection, taxonomy: Taxonomy, transitions: Transitions
) -> None:
    """Tables ``version_of_day`` (day, version) and ``place`` (version, category_id, today; null: unsure)."""
    newest = transitions.history[-1]
    days = [
        row[0]
        for row in database.execute("SELECT DISTINCT day FROM delivered WHERE day IS NOT NULL").fetchall()
    ]
    digest_of_day = {day: transitions.version_of_labels(newest, day) for day in days}
    places: dict[str, Mapping[str, str | None]] = {}
    for digest in set(digest_of_day.values()):
        needed = transitions.for_labels_of(digest)
        certain = certain_moves(needed.values())
        places[digest] = {
            **{category_id: category_id for category_id in taxonomy},
            **{former: certain.get(former) for former in needed},
        }
    rows = [(digest, c, today) for digest, place in places.items() for c, today in place.items()]
    _put(database, "version_of_day", ("day", "version"), list(digest_of_day.items()))
    _put(database, "place", ("version", "category_id", "today"), rows)


def _put(
    database: duckdb.DuckDBPyConnection, name: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]
) -> None:
    schema = pa.schema([(column, pa.string()) for column in columns])
    values = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in columns]
    arrays = [pa.array(column, pa.string()) for column in values]
    database.register("incoming", pa.Table.from_arrays(arrays, schema=schema))
    database.execute(f"CREATE TEMP TABLE {name} AS FROM incoming")
    database.unregister("incoming")


def _judge(database: duckdb.DuckDBPyConnection) -> None:
    """Table ``judged``: a line per raw row with its reason (null: none) and its standing."""
    is_known = "version IS NULL OR category_id IN (SELECT category_id FROM place)"
    latest = f"try_cast(loaded_on AS DATE) + {_FUTURE_SLACK_DAYS}"
    conditions = {
        "invalid_encoding": "problem = 'invalid_encoding'",
        "missing_offer_id": "offer_id IS NULL",
        "missing_category_id": "category_id IS NULL",
        "missing_decided_at": "NOT is_dated",
        "invalid_decided_at": "is_dated AND moment IS NULL",
        "decided_in_the_future": f"moment::DATE > {latest}",
        "unknown_category": f"category_id IS NOT NULL AND NOT ({is_known})",
        NOBODYS_FAULT: f"category_id IS NOT NULL AND version IS NOT NULL AND today IS NULL AND ({is_known})",
    }
    cases = ", ".join(f"CASE WHEN {test} THEN '{reason}' END" for reason, test in conditions.items())
    database.execute(f"""
        CREATE TEMP TABLE checked AS
        SELECT row, offer_id, moment, today,
            CASE WHEN problem = 'malformed_row' THEN problem
                 ELSE nullif(concat_ws(',', {cases}), '') END AS reason
        FROM delivered LEFT JOIN version_of_day USING (day) LEFT JOIN place USING (version, category_id)""")
    database.execute(f"""
        CREATE TEMP TABLE judged AS
        SELECT row, today, moment, coalesce(reason, contradiction) AS reason,
            CASE WHEN coalesce(reason, contradiction) IS NOT NULL THEN NULL
                 WHEN row_number() OVER (same_decision ORDER BY row) > 1 THEN '{REPEATED}'
                 WHEN rank() OVER (of_offer ORDER BY moment DESC) > 1 THEN '{SUPERSEDED}'
                 ELSE '{NEWEST}' END AS standing
        FROM (
            SELECT *, CASE WHEN reason IS NULL AND
                min(today) FILTER (reason IS NULL) OVER instant
                <> max(today) FILTER (reason IS NULL) OVER instant
                THEN 'contradiction' END AS contradiction
            FROM checked WINDOW instant AS (PARTITION BY offer_id, moment))
        WINDOW
            same_decision AS (PARTITION BY offer_id, moment, coalesce(reason, contradiction)),
            of_offer AS (PARTITION BY offer_id, coalesce(reason, contradiction) IS NULL)""")


def _write_tables(database: duckdb.DuckDBPyConnection, output: Path) -> None:
    delivered = ", ".join(f"raw.{name}" for name in COLUMNS)
    _copy(
        database,
        f"SELECT {trimmed_sql('offer_id')} AS offer_id, today AS category_id, "
        f"{trimmed_sql('category_id')} AS decided_as, moment AS decided_at, standing, source_file, "
        "source_row FROM raw JOIN judged ON file_row_number = row WHERE reason IS NULL ORDER BY row",
        output / CORRECTIONS_FILE,
    )
    _copy(
        database,
        f"SELECT {delivered}, reason, source_file, source_row, content "
        "FROM raw JOIN judged ON file_row_number = row WHERE reason IS NOT NULL ORDER BY row",
        output / QUARANTINE_FILE,
    )


def _write_deliveries(database: duckdb.DuckDBPyConnection, output: Path) -> list[dict[str, Any]]:
    rows = database.execute(f"""
        SELECT loaded_on, count(*), count(reason), count(*) FILTER (reason <> '{NOBODYS_FAULT}'),
            strftime(max(judged.moment) FILTER (reason IS NULL), '%Y-%m-%d')
        FROM judged JOIN delivered USING (row) GROUP BY loaded_on ORDER BY loaded_on""").fetchall()
    deliveries = [dict(zip(DELIVERIES_SCHEMA.names, row, strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(deliveries, DELIVERIES_SCHEMA), output / DELIVERIES_FILE)
    return deliveries


def _recent_counts(deliveries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the files that came last."""
    if not deliveries:
        return {"recent_since": "", "recent_rows": 0, "recent_quarantined_by_fault_of_the_feed": 0}
    newest = datetime.date.fromisoformat(deliveries[-1]["loaded_on"])
    since = (newest - datetime.timedelta(days=_RECENT_DAYS - 1)).isoformat()
    recent = [delivery for delivery in deliveries if delivery["loaded_on"] >= since]
    return {
        "recent_since": recent[0]["loaded_on"],
        "recent_rows": sum(delivery["rows"] for delivery in recent),
        "recent_quarantined_by_fault_of_the_feed": sum(delivery["at_fault"] for delivery in recent),
    }


def _copy(database: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
    target = str(path).replace("'", "''")
    database.execute(f"COPY ({query}) TO '{target}' (FORMAT parquet, COMPRESSION zstd)")


def _counts(database: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    names = ["rows", "quarantined", "corrections", NEWEST, SUPERSEDED, REPEATED, *REASONS]
    standings = ", ".join(f"count(*) FILTER (standing = '{name}')" for name in (NEWEST, SUPERSEDED, REPEATED))
    reasons = ", ".join(
        f"count(*) FILTER (list_contains(string_split(reason, ','), '{reason}'))" for reason in REASONS
    )
    figures = database.execute(
        f"SELECT count(*), count(reason), count(standing), {standings}, {reasons} FROM judged"
    ).fetchall()[0]
    moved, first, last = database.execute("""
        SELECT count(*) FILTER (today <> category_id),
            min(delivered.moment)::DATE, max(delivered.moment)::DATE
        FROM judged JOIN delivered USING (row) WHERE reason IS NULL""").fetchall()[0]
    at_fault = database.execute("SELECT count(*) FROM judged WHERE reason <> ?", [NOBODYS_FAULT]).fetchall()[
        0
    ][0]
    return {
        **dict(zip(names, figures, strict=True)),
        "quarantined_by_fault_of_the_feed": at_fault,
        "of_earlier_taxonomies": moved,
        "decided_from": _iso(first),
        "decided_until": _iso(last),
    }


def _iso(date: datetime.date | None) -> str:
    return date.isoformat() if date else ""

"""Dagster's event log, read on from a bookmark: nothing is left out, nothing comes twice.

Dagster has no public way to read check evaluations across runs on every storage, and the one it uses itself
ends in silence at the first row that it cannot read. The table and the connection are the same on all of
them, so they are used here, and nowhere else; a contract test holds this for each storage.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import dagster as dg
import msgspec
from dagster import DagsterEventType, EventLogEntry

_SETTLE_SECONDS = 60.0
"""PostgreSQL gives out ids before it commits: so long after a look, a row with a smaller id may appear."""

_CLOCK_SECONDS = 600.0
"""By so much, the clocks of machines that write events may differ."""

_SAME_TIME_SECONDS = 0.001

_Row = tuple[int, str, datetime.datetime]
"""Id, the event, and when it happened."""


class LoggedEvent(msgspec.Struct, frozen=True):
    """One event of the log."""

    id: int
    entry: EventLogEntry

    @property
    def at(self) -> float:
        """Unix time at which it happened."""
        return self.entry.timestamp

    @property
    def key(self) -> str:
        """Of this event and no other: ids start again in a log that was deleted."""
        return f"{self.id}@{self.at:.3f}"


class Reading(msgspec.Struct, frozen=True):
    """What was found after a bookmark."""

    events: list[LoggedEvent]
    """Oldest id first."""
    unreadable: list[int]
    """Rows that cannot be read, as when a newer Dagster wrote them; they are stepped over."""
    bookmark: str
    """Where the next reading goes on."""
    is_all: bool
    """Whether this was all there is now."""


class _Bookmark(msgspec.Struct, frozen=True, kw_only=True):
    settled: int
    """Up to this id, no row is awaited any more."""
    seen: tuple[int, ...] = ()
    """Rows after that which were read."""
    looks: tuple[tuple[float, int], ...] = ()
    """Unix time and largest id of the looks by which further rows will settle."""
    anchor: tuple[int, float] | None = None
    """A row that was there, and its time: without it, this may be another log."""


def read_events(
    instance: dg.DagsterInstance,
    types: Sequence[DagsterEventType],
    bookmark: str | None,
    *,
    now: float,
    look_back: float,
    limit: int,
) -> Reading:
    """Events of these types after ``bookmark``.

    A row that becomes visible late is read late, once. Where the log was pruned or deleted, reading goes on
    by time, and events of a few minutes may come again: with the same key.

    Args:
        instance: Whose log.
        types: Of the events.
        bookmark: Of the reading before; None or one that cannot be read: begin ``look_back`` seconds ago.
        now: Unix time.
        look_back: Seconds.
        limit: At most so many events.
    """
    with _connection(instance) as connection:
        mark = _decode(bookmark)
        if mark is None or not _is_in_step(connection, mark):
            last_read = mark.anchor[1] if mark is not None and mark.anchor is not None else None
            since = now - look_back if last_read is None else last_read - _CLOCK_SECONDS
            mark = _begin(connection, types, since)
        most = limit + len(mark.seen)
        ids = _ids(connection, types, mark.settled, most)
        rows = _rows(connection, sorted({*ids} - {*mark.seen}))
    events, unreadable = list[LoggedEvent](), list[int]()
    for id, content, _ in rows:
        entry = _entry(content)
        if entry is None:
            unreadable.append(id)
        else:
            events.append(LoggedEvent(id, entry))
    is_all = len(ids) < most
    covered = ids[-1] if ids and not is_all else None
    return Reading(events, unreadable, _encode(_moved(mark, rows, now, covered)), is_all)


def _moved(mark: _Bookmark, rows: Sequence[_Row], now: float, covered: int | None) -> _Bookmark:
    """The bookmark after these rows; the same one where there are none and nothing settled.

    Args:
        mark: The bookmark before.
        rows: New ones.
        now: Unix time.
        covered: Up to this id all was read; None: to the end.
    """
    ids = [*mark.seen, *(row[0] for row in rows)]
    last = max(ids, default=mark.settled)
    # A look settles what was visible then, once a later look has read everything below it.
    old = [id for at, id in mark.looks if at <= now - _SETTLE_SECONDS and (covered is None or id <= covered)]
    settled = max([mark.settled, *old])
    looks = [(at, id) for at, id in mark.looks if id > settled and at <= now]
    if last > (looks[-1][1] if looks else settled):
        looks.append((now, last))
    return _Bookmark(
        settled=settled,
        seen=tuple(sorted({id for id in ids if id > settled})),
        looks=tuple(looks),
        anchor=(rows[-1][0], _unix(rows[-1][2])) if rows else mark.anchor,
    )


def _connection(instance: dg.DagsterInstance) -> AbstractContextManager[Any]:
    connection: AbstractContextManager[Any] = instance.event_log_storage.index_connection()
    return connection


def _is_in_step(connection: Any, mark: _Bookmark) -> bool:
    """Whether the bookmark is of this log: the row that it remembers is there, with its time."""
    from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Log
    from sqlalchemy import select

    if mark.anchor is None:
        return False
    id, at = mark.anchor
    found = connection.execute(select(Log.c.timestamp).where(Log.c.id == id)).scalar()
    return found is not None and abs(_unix(found) - at) < _SAME_TIME_SECONDS


def _begin(connection: Any, types: Sequence[DagsterEventType], since: float) -> _Bookmark:
    """Before the first event since then, or at the end of the log."""
    from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Log
    from sqlalchemy import func, select

    names = [type.value for type in types]
    start = datetime.datetime.fromtimestamp(since, datetime.UTC).replace(tzinfo=None)
    first = connection.execute(
        select(func.min(Log.c.id)).where(Log.c.dagster_event_type.in_(names), Log.c.timestamp >= start)
    ).scalar()
    last = connection.execute(select(Log.c.id, Log.c.timestamp).order_by(Log.c.id.desc()).limit(1)).first()
    if last is None:
        return _Bookmark(settled=0)
    settled = first - 1 if first is not None else last[0]
    return _Bookmark(settled=settled, anchor=(last[0], _unix(last[1])))


def _ids(connection: Any, types: Sequence[DagsterEventType], after: int, limit: int) -> list[int]:
    from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Log
    from sqlalchemy import select

    names = [type.value for type in types]
    query = select(Log.c.id).where(Log.c.dagster_event_type.in_(names), Log.c.id > after)
    return [row[0] for row in connection.execute(query.order_by(Log.c.id).limit(limit))]


def _rows(connection: Any, ids: Sequence[int]) -> list[_Row]:
    from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Log
    from sqlalchemy import select

    if not ids:
        return []
    query = select(Log.c.id, Log.c.event, Log.c.timestamp).where(Log.c.id.in_(ids)).order_by(Log.c.id)
    return [tuple(row) for row in connection.execute(query)]


def _entry(content: str) -> EventLogEntry | None:
    from dagster._serdes import deserialize_value

    try:
        return deserialize_value(content, EventLogEntry)
    except Exception:  # whatever makes it unreadable must not hide the rows behind it
        return None


def _unix(time: datetime.datetime) -> float:
    return time.replace(tzinfo=datetime.UTC).timestamp()


def _decode(bookmark: str | None) -> _Bookmark | None:
    try:
        return msgspec.json.decode(bookmark, type=_Bookmark) if bookmark else None
    except msgspec.DecodeError:
        return None


def _encode(mark: _Bookmark) -> str:
    return msgspec.json.encode(mark).decode()

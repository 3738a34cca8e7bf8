"""The durable outbox: incidents, what people are to be told of them, and which message is on its way.

Everything happens in short transactions, and whatever is killed in between, the next who comes finds
one of the states that are meant to be:

- *told*: news, its incidents, what each channel is to be told (*notifications*) and the bookmarks of the
  sources are kept in one step;
- *batched*: the notifications of a channel become one message with an id, before anybody sends it;
- *leased*: one sender at a time has the message; a sender that dies loses it after a while, and the next
  one sends the same message under the same id, so that a receiver can tell that it has it already;
- *sent*: the channel has taken it.

How a message is handed over is not decided here, see :mod:`resources.alerting`.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import sqlalchemy as sa

from resources.alerts import SEVERITIES, ChannelState, Incident, Moved, News, Severity
from resources.channels import Line, LineKind, Message
from resources.outbox_database import (
    OutboxDatabase,
    batches,
    bookmarks,
    channels,
    facts,
    hearers,
    incidents,
    is_open,
    is_queued,
    is_waiting,
    notifications,
    seen,
)
from resources.redaction import without_secrets

if TYPE_CHECKING:
    from resources.alert_routes import Routes

LEASE_SECONDS = 120.0
"""So long a message belongs to its sender: longer than any channel may take."""

_SOONEST_RETRY, _LATEST_RETRY = 30.0, 1800.0
_SET_ASIDE_AFTER = 12
"""So often, in some 6 hours, a message is refused before what comes after it waits no longer."""
_SET_ASIDE_SECONDS = 86400.0
"""What was set aside is tried so rarely: it is most likely the message, which nobody can mend."""
_FLAPPING_AFTER, _FLAPPING_WITHIN_SECONDS = 3, 3600.0
"""What opens again so often within so long is told as one incident from then on."""
_QUIET_SECONDS = 1800.0
"""Such an incident ends when nothing was found for so long."""
_LINES_PER_MESSAGE = 1000
"""What is queued beyond that, after days without a channel, goes into the next message."""
_KEPT_SECONDS = 30 * 86400.0
"""So long sent messages and ids of news are kept.

News that is older cannot come again from a source with a bookmark, because the bookmark is moved in the
step in which the news is kept. News from elsewhere is told again and again as long as it is true, and the
30 days begin anew each time (see ``_unseen``).
"""
_SEEN_AGAIN_SECONDS = 86400.0
"""How exactly it is known when news was told for the last time."""
_PRUNED_EVERY_SECONDS = 86400.0
_REMINDED_TOGETHER = 1 / 8
"""Share of the time between reminders by which one may come early, to be in the message of another."""
_LONGEST_KEY, _LONGEST_TITLE, _LONGEST_TEXT = 300, 300, 10_000
_VALUES_PER_STATEMENT = 1000
_WHAT_CHANGES = (
    "state",
    "severity",
    "text",
    "link",
    "run",
    "last_at",
    "resolved_at",
    "times",
    "told_at",
    "reminders",
    "quiet_since",
)
"""Of an incident; the rest is as it was when it opened."""
_FLAPPING = (
    f"It opened {_FLAPPING_AFTER + 1} times within an hour (flapping), and stays open until nothing was "
    f"found for {_QUIET_SECONDS / 60:.0f} min."
)

_is_set_aside = batches.c.refused >= _SET_ASIDE_AFTER


class Leased(msgspec.Struct, frozen=True, kw_only=True):
    """A message that is ours to send for a while."""

    message: Message
    owner: str
    """Of this lease: whoever comes later has another one."""
    attempt: int
    """1 for the first."""


class Outbox:
    """Incidents and messages in a database, for any number of processes at once."""

    def __init__(
        self,
        url: str,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """Nothing is opened yet.

        Args:
            url: As SQLAlchemy has it, e.g. ``sqlite:////data/outbox.db`` or ``postgresql+psycopg2://…``.
            clock: Unix time.
            chance: Number from 0 to 1 that spreads the next attempts.
            lease_seconds: How long a message belongs to its sender.
        """
        self._database = OutboxDatabase(url)
        self._clock = clock
        self._chance = chance
        self._lease_seconds = lease_seconds

    # What happens

    def tell(
        self,
        news: Sequence[News],
        bookmarks: Mapping[str, str] | None,
        routes: Routes,
        expected: Mapping[str, str | None] | None = None,
    ) -> list[News]:
        """Keep ``news`` and ``bookmarks`` and queue what the channels of ``routes`` are to be told.

        Returns:
            What people will hear of, without secrets; a resolved one with what its incident is known for.

        Raises:
            Moved: a bookmark is not as ``expected``; nothing was kept.
        """
        now = self._clock()
        cleaned = [_cleaned(item, now, routes.without_secrets) for item in news]
        with self._database.writing() as connection:
            for source, value in (expected or {}).items():
                if _bookmark(connection, source) != value:
                    raise Moved(f"{source} was read on by somebody else")
            told = _Telling(connection, routes, now).of(_unseen(connection, cleaned, now))
            for source, value in (bookmarks or {}).items():
                _keep(connection, _BOOKMARK, source, value)
            _prune(connection, now)
        return told

    def remind(self, routes: Routes) -> int:
        """Queue reminders of incidents that have been open for long; returns of how many.

        A channel that has not even been given the last word about an incident is not reminded of it. What
        came and went all the time and has been quiet for a while is resolved before.
        """
        now = self._clock()
        quiet = sa.select(incidents.c.key).where(is_open, incidents.c.quiet_since <= now - _QUIET_SECONDS)
        with self._database.writing() as connection:
            _Telling(connection, routes, now).quiet_ended(connection.execute(quiet).scalars().all())
            due = [
                row
                for severity, hours in routes.reminder_hours.items()
                for row in _due_for_reminder(connection, severity, hours * 3600.0, now)
            ]
            return _Telling(connection, routes, now).reminders_of(due)

    # What is known

    def bookmark(self, source: str) -> str | None:
        """How far ``source`` has been read."""
        with self._database.reading() as connection:
            return _bookmark(connection, source)

    def incidents(self, all_of_them: bool = False) -> list[Incident]:
        """Open incidents, or all that were ever kept with the notices, the oldest first."""
        chosen = sa.select(incidents).order_by(incidents.c.id)
        with self._database.reading() as connection:
            rows = connection.execute(chosen if all_of_them else chosen.where(is_open)).mappings()
            found = [_incident(row) for row in rows]
        # Not by the database: what comes first among texts depends on its language.
        return sorted(found, key=lambda incident: incident.opened_at)

    def channels(self, names: Iterable[str]) -> list[ChannelState]:
        """How channels are doing: ``names``, and every other one that has something waiting."""
        with self._database.reading() as connection:
            sent = {row.channel: row.sent for row in connection.execute(sa.select(channels))}
            waiting = _messages_waiting(connection)
            since = _waiting_since(connection)
            aside = _set_aside(connection)
            errors = _oldest_errors(connection)
        return [
            ChannelState(
                channel=name,
                sent=sent.get(name, 0),
                waiting=waiting.get(name, 0),
                waiting_since=_iso(since[name]) if name in since else "",
                set_aside=aside.get(name, 0),
                last_error=errors.get(name, ""),
            )
            for name in dict.fromkeys([*names, *sorted(waiting)])
        ]

    def check(self) -> None:
        """Open the database if there is one.

        Raises:
            InputError: it is damaged, not ours to write, or of another version.
        """
        if self._database.exists:
            with self._database.writing():
                pass

    # What is on its way

    def lease(
        self, channel: str, seconds_between_messages: float = 0.0, gather_seconds: float = 0.0
    ) -> Leased | None:
        """The next message for ``channel``, ours to send; None if nothing is due.

        A message that was tried before comes first. Otherwise everything that is queued becomes one,
        unless the last message was less than ``seconds_between_messages`` ago, or the first of what is
        queued came less than ``gather_seconds`` ago and nothing of it is CRITICAL.
        """
        now = self._clock()
        with self._database.writing() as connection:
            batch_id = _due_batch(connection, channel, now)
            if batch_id is None and _may_begin(connection, channel, seconds_between_messages, now):
                batch_id = _new_batch(connection, channel, gather_seconds, now)
            if batch_id is None:
                return None
            owner = uuid.uuid4().hex
            connection.execute(
                batches.update()
                .where(batches.c.id == batch_id)
                .values(
                    lease_owner=owner,
                    lease_until=now + self._lease_seconds,
                    attempts=batches.c.attempts + 1,
                )
            )
            batch = connection.execute(sa.select(batches).where(batches.c.id == batch_id)).one()
            return Leased(message=_message(connection, batch), owner=owner, attempt=batch.attempts)

    def sent(self, leased: Leased) -> None:
        """The channel has taken the message: whoever has the lease by now, it is sent."""
        now = self._clock()
        with self._database.writing() as connection:
            marked = connection.execute(
                batches.update()
                .where(batches.c.id == leased.message.id, is_waiting)
                .values(sent_at=now, lease_owner="", lease_until=0.0, last_error="")
            )
            if marked.rowcount:
                _count_sent(connection, leased.message.channel, now)

    def failed(
        self, leased: Leased, reason: str, *, permanent: bool = False, retry_after: float | None = None
    ) -> None:
        """The channel has not taken the message; it is tried again under the same id.

        Args:
            leased: If somebody else has the lease by now, his attempt counts and this one does not.
            reason: One line.
            permanent: It has to be mended first: it is tried again slowly, and what comes after it need
                not wait; of two such messages it must, until they are set aside.
            retry_after: Seconds for which the channel asked to be left alone.
        """
        ours = sa.and_(batches.c.id == leased.message.id, is_waiting, batches.c.lease_owner == leased.owner)
        with self._database.writing() as connection:
            refused = connection.execute(sa.select(batches.c.refused).where(ours)).scalar()
            if refused is None:
                return
            refused += permanent
            delay = self._delay(leased.attempt)
            if permanent:
                delay = _LATEST_RETRY if refused < _SET_ASIDE_AFTER else _SET_ASIDE_SECONDS
            if retry_after is not None:
                delay = max(delay, min(retry_after, _LATEST_RETRY))
            connection.execute(
                batches.update()
                .where(ours)
                .values(
                    next_attempt_at=self._clock() + delay,
                    lease_owner="",
                    lease_until=0.0,
                    refused=refused,
                    last_error=_one_line(without_secrets(reason), _LONGEST_TITLE),
                )
            )

    def _delay(self, attempt: int) -> float:
        """Twice as long each time, and spread, so that those who failed together do not come together."""
        longest = min(_LATEST_RETRY, 2 * _SOONEST_RETRY * 2 ** min(attempt - 1, 10))
        shortest = max(_SOONEST_RETRY, longest / 2)
        delay: float = shortest + self._chance() * (longest - shortest)
        return delay


class _Telling:
    """What one transaction makes of news: read at the beginning, written at the end, decided in between."""

    def __init__(self, connection: sa.Connection, routes: Routes, now: float) -> None:
        self._connection = connection
        self._routes = routes
        self._now = now
        self._open: dict[str, dict[str, Any]] = {}
        self._numbers: dict[str, int] = {}
        self._openings: dict[str, list[str]] = {}
        """When incidents with this key opened, as far as flapping asks for it."""
        self._hearers: dict[int, list[str]] = {}
        self._new_incidents: list[dict[str, Any]] = []
        self._changed: dict[int, dict[str, Any]] = {}
        self._new_hearers: list[dict[str, Any]] = []
        self._queued: list[dict[str, Any]] = []
        self._next_id = _next(connection, incidents.c.id)
        self._next_place = _next(connection, notifications.c.place)

    def of(self, news: Sequence[News]) -> list[News]:
        """What of ``news`` people will hear of."""
        self._look_up(sorted({item.incident for item in news}))
        told = [heard for item in news if (heard := self._tell(item)) is not None]
        self._write()
        return told

    def reminders_of(self, rows: Sequence[sa.RowMapping]) -> int:
        """Queue a reminder of every open incident in ``rows``; returns how many people will hear of."""
        self._look_up(sorted({row["key"] for row in rows}))
        unsent = _with_unsent_lines(self._connection, [row["id"] for row in rows])
        reminded = 0
        for row in rows:
            incident = self._open[row["key"]]
            names = self._channels_for(incident)
            # Without anybody to hear of it, it stays due: a channel that is added is told what is open.
            if not names:
                continue
            self._change(incident, told_at=self._now, reminders=incident["reminders"] + 1)
            listening = [name for name in names if (incident["id"], name) not in unsent]
            at = _iso(self._now)
            self._queue(incident, "reminder", listening, at, f"reminder:{incident['reminders']}")
            reminded += bool(listening)
        self._write()
        return reminded

    def quiet_ended(self, keys: Sequence[str]) -> None:
        """Resolve open incidents that have been quiet."""
        self._look_up(keys)
        text = f"Nothing was found for {_QUIET_SECONDS / 60:.0f} min."
        for key in keys:
            news = News(id="", incident=key, state="resolved", text=text, at=_iso(self._now))
            self._resolved(self._open[key], news)
        self._write()

    def _look_up(self, keys: Sequence[str]) -> None:
        for some in _in_parts(keys):
            rows = self._connection.execute(sa.select(incidents).where(is_open, incidents.c.key.in_(some)))
            self._open |= {row["key"]: dict(row) for row in rows.mappings()}
            for row in self._connection.execute(_newest_of(some)):
                self._numbers[row.key] = row.number
                self._openings.setdefault(row.key, []).append(row.opened_at)
        for ids in _in_parts([incident["id"] for incident in self._open.values()]):
            found = sa.select(hearers.c.incident_id, hearers.c.channel).where(hearers.c.incident_id.in_(ids))
            for incident_id, channel in self._connection.execute(found):
                self._hearers.setdefault(incident_id, []).append(channel)

    def _tell(self, news: News) -> News | None:
        if news.state == "notice":
            self._opened(news, "notice")
            return news
        incident = self._open.get(news.incident)
        if news.state == "resolved":
            if incident is None:
                return None
            if incident["flapping"] and not news.by_hand:
                self._was_quiet(incident)
                return None
            return self._resolved(incident, news)
        if incident is None:
            is_flapping = self._is_flapping(news)
            if is_flapping:
                news = msgspec.structs.replace(news, text=f"{_FLAPPING} {news.text}".rstrip())
            self._open[news.incident] = self._opened(news, "opened", is_flapping)
            return news
        return self._found_again(incident, news)

    def _is_flapping(self, news: News) -> bool:
        openings = self._openings.get(news.incident, [])
        if len(openings) < _FLAPPING_AFTER:
            return False
        earlier = datetime.datetime.fromisoformat(openings[-_FLAPPING_AFTER])
        since = datetime.datetime.fromisoformat(news.at) - earlier
        return since.total_seconds() <= _FLAPPING_WITHIN_SECONDS

    def _opened(self, news: News, kind: LineKind, is_flapping: bool = False) -> dict[str, Any]:
        number = self._numbers[news.incident] = self._numbers.get(news.incident, 0) + 1
        self._openings.setdefault(news.incident, []).append(news.at)
        incident = {
            "id": self._next_id,
            "key": news.incident,
            "number": number,
            "state": "open" if kind == "opened" else "notice",
            "severity": news.severity,
            "title": news.title,
            "text": news.text,
            "asset": news.asset,
            "link": news.link,
            "run": news.run,
            "asset_group": news.group,
            "owners": json.dumps(news.owners),
            "opened_at": news.at,
            "last_at": news.at,
            "resolved_at": None,
            "times": 1,
            "told_at": self._now,
            "reminders": 0,
            "flapping": int(is_flapping),
            "quiet_since": None,
        }
        self._next_id += 1
        self._new_incidents.append(incident)
        self._queue(incident, kind, self._channels_for(incident), news.at)
        return incident

    def _found_again(self, incident: dict[str, Any], news: News) -> News | None:
        self._change(
            incident,
            times=incident["times"] + 1,
            last_at=max(incident["last_at"], news.at),
            text=news.text or incident["text"],
            link=news.link or incident["link"],
            run=news.run or incident["run"],
            quiet_since=None,
        )
        if SEVERITIES.index(news.severity) <= SEVERITIES.index(incident["severity"]):
            return None
        self._change(incident, severity=news.severity, told_at=self._now)
        heard = self._hearers.get(incident["id"], [])
        names = list(dict.fromkeys([*heard, *self._channels_for(incident)]))
        self._queue(incident, "worse", names, news.at, f"worse:{news.severity}")
        return msgspec.structs.replace(news, title=news.title or incident["title"])

    def _was_quiet(self, incident: dict[str, Any]) -> None:
        if incident["quiet_since"] is None:
            self._change(incident, quiet_since=self._now)

    def _resolved(self, incident: dict[str, Any], news: News) -> News:
        self._change(
            incident,
            state="resolved",
            resolved_at=news.at,
            last_at=max(incident["last_at"], news.at),
            text=news.text or incident["text"],
            link=news.link or incident["link"],
            run=news.run or incident["run"],
        )
        del self._open[news.incident]
        self._queue(incident, "resolved", self._hearers.get(incident["id"], []), news.at)
        return msgspec.structs.replace(
            news,
            title=news.title or incident["title"],
            severity=incident["severity"],
            asset=news.asset or incident["asset"],
        )

    def _channels_for(self, incident: Mapping[str, Any]) -> list[str]:
        owners = json.loads(incident["owners"])
        return self._routes.channels_for(incident["severity"], incident["asset_group"], owners)

    def _change(self, incident: dict[str, Any], **values: object) -> None:
        incident.update(values)
        self._changed[incident["id"]] = incident

    def _queue(
        self,
        incident: Mapping[str, Any],
        kind: LineKind,
        names: Sequence[str],
        at: str,
        cause: str | None = None,
    ) -> None:
        ui, link, run = self._routes.ui_url.rstrip("/"), incident["link"] or "", incident["run"]
        for name in names:
            self._queued.append(
                {
                    "place": self._next_place,
                    # Each of these is told once, so this can be there once.
                    "id": f"{incident['id']}:{cause or kind}:{name}",
                    "incident_id": incident["id"],
                    "channel": name,
                    "kind": kind,
                    "severity": incident["severity"],
                    "title": incident["title"],
                    "text": incident["text"],
                    "link": ui + link if link.startswith("/") else link,
                    "run_link": f"{ui}/runs/{quote(run, safe='')}" if run else "",
                    "opened_at": incident["opened_at"],
                    "at": at,
                    "times": incident["times"],
                    "page_key": "",
                    "queued_at": self._now,
                }
            )
            self._next_place += 1
            heard = self._hearers.setdefault(incident["id"], [])
            if kind != "notice" and name not in heard:
                heard.append(name)
                self._new_hearers.append({"incident_id": incident["id"], "channel": name, "page_key": ""})

    def _write(self) -> None:
        self._write_changes()  # before the new ones: an incident may be resolved and open again
        for table, rows in (
            (incidents, self._new_incidents),
            (hearers, self._new_hearers),
            (notifications, self._queued),
        ):
            if rows:
                self._connection.execute(table.insert(), rows)

    def _write_changes(self) -> None:
        new = {incident["id"] for incident in self._new_incidents}
        changed = [incident for incident in self._changed.values() if incident["id"] not in new]
        if changed:
            self._connection.execute(
                incidents.update()
                .where(incidents.c.id == sa.bindparam("which"))
                .values({name: sa.bindparam(f"new_{name}") for name in _WHAT_CHANGES}),
                [
                    {"which": incident["id"]} | {f"new_{name}": incident[name] for name in _WHAT_CHANGES}
                    for incident in changed
                ],
            )


def _newest_of(keys: Sequence[str]) -> sa.Select[Any]:
    """The newest incidents of each key, open or not, as many as flapping asks for."""
    same = incidents.alias()
    newest = sa.select(sa.func.max(same.c.number)).where(same.c.key == incidents.c.key).scalar_subquery()
    return (
        sa.select(incidents.c.key, incidents.c.number, incidents.c.opened_at)
        .where(incidents.c.key.in_(keys), incidents.c.number > newest - _FLAPPING_AFTER)
        .order_by(incidents.c.key, incidents.c.number)
    )


def _cleaned(news: News, now: float, blotted: Callable[[str], str]) -> News:
    """``news`` as it is kept: no secrets, no characters that a database refuses, texts of bearable length."""
    if not news.id or not news.incident:
        raise ValueError(f"news needs an id and an incident: {news.id!r}, {news.incident!r}")
    return msgspec.structs.replace(
        news,
        incident=_key(news.incident, blotted),
        title=_one_line(blotted(_storable(news.title)), _LONGEST_TITLE),
        text=_shortened(blotted(_storable(news.text)), _LONGEST_TEXT),
        asset=_storable(news.asset) if news.asset is not None else None,
        link=blotted(_storable(news.link)) if news.link is not None else None,
        run=_storable(news.run) if news.run is not None else None,
        group=_storable(news.group) if news.group is not None else None,
        owners=tuple(_storable(owner) for owner in news.owners),
        at=_time_of(news.at, now),
    )


def _key(text: str, blotted: Callable[[str], str]) -> str:
    """``text`` as the key of an incident; one that is too long ends in its digest, and stays apart."""
    key = blotted(_storable(text))
    if len(key) <= _LONGEST_KEY:
        return key
    return f"{key[: _LONGEST_KEY - 17]}~{_digest(text)[:16]}"


def _storable(text: str) -> str:
    """PostgreSQL takes no NUL, and neither database half a character."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def _one_line(text: str, longest: int) -> str:
    return _shortened(" ".join(text.split()), longest)


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _time_of(text: str, now: float) -> str:
    """An ISO time in UTC; now in place of what is none: a wrong time must not stop the news."""
    try:
        at = datetime.datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC).isoformat()
    except (ValueError, OverflowError):
        return _iso(now)


def _iso(now: float) -> str:
    return datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat()


def _pairs(connection: sa.Connection, query: sa.Select[Any]) -> dict[Any, Any]:
    """A query of two columns as keys and values; of several with one key the last counts."""
    return {row[0]: row[1] for row in connection.execute(query)}


def _in_parts(values: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _VALUES_PER_STATEMENT):
        yield list(values[start : start + _VALUES_PER_STATEMENT])


def _next(connection: sa.Connection, column: sa.Column[Any]) -> int:
    """The next number of ``column``: nobody else writes meanwhile."""
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(column), 0))).scalar_one()) + 1


def _unseen(connection: sa.Connection, news: Sequence[News], now: float) -> list[News]:
    """Those of ``news`` that nobody has told before; all of it counts as told by now."""
    by_digest: dict[str, News] = {}
    for item in news:
        by_digest.setdefault(_digest(item.id), item)
    known: dict[str, float] = {}
    for some in _in_parts(list(by_digest)):
        known |= _pairs(connection, sa.select(seen.c.digest, seen.c.at).where(seen.c.digest.in_(some)))
    new = [{"digest": digest, "at": now} for digest in by_digest if digest not in known]
    if new:
        connection.execute(seen.insert(), new)
    for some in _in_parts([digest for digest, at in known.items() if at < now - _SEEN_AGAIN_SECONDS]):
        connection.execute(seen.update().where(seen.c.digest.in_(some)).values(at=now))
    return [item for digest, item in by_digest.items() if digest not in known]


def _bookmark(connection: sa.Connection, source: str) -> str | None:
    found = connection.execute(sa.select(bookmarks.c.value).where(bookmarks.c.source == source))
    value: str | None = found.scalar()
    return value


_BOOKMARK = (bookmarks, bookmarks.c.source, bookmarks.c.value)
_FACT = (facts, facts.c.name, facts.c.value)


def _keep(
    connection: sa.Connection,
    where: tuple[sa.Table, sa.Column[Any], sa.Column[Any]],
    name: str,
    value: str,
) -> None:
    table, name_column, value_column = where
    changed = connection.execute(table.update().where(name_column == name).values({value_column: value}))
    if not changed.rowcount:
        connection.execute(table.insert().values({name_column: name, value_column: value}))


def _prune(connection: sa.Connection, now: float) -> None:
    """Forget what nobody asks for any more, once a day. Incidents stay: they are the history."""
    last = connection.execute(sa.select(facts.c.value).where(facts.c.name == "pruned_at")).scalar()
    if last is not None and now - float(last) < _PRUNED_EVERY_SECONDS:
        return
    _keep(connection, _FACT, "pruned_at", repr(now))
    connection.execute(seen.delete().where(seen.c.at < now - _KEPT_SECONDS))
    old = sa.select(batches.c.id).where(batches.c.sent_at < now - _KEPT_SECONDS)
    connection.execute(notifications.delete().where(notifications.c.batch_id.in_(old)))
    connection.execute(batches.delete().where(batches.c.sent_at < now - _KEPT_SECONDS))


def _due_for_reminder(
    connection: sa.Connection, severity: Severity, period: float, now: float
) -> Sequence[sa.RowMapping]:
    """Open incidents to be reminded of: none, or one that is due and all that would be soon after it."""
    if period <= 0:
        return []
    last_told = sa.select(incidents).where(is_open, incidents.c.severity == severity)
    due = last_told.where(incidents.c.told_at <= now - period).limit(1)
    if connection.execute(due).first() is None:
        return []
    soon = last_told.where(incidents.c.told_at <= now - period * (1 - _REMINDED_TOGETHER))
    return connection.execute(soon.order_by(incidents.c.id)).mappings().all()


def _with_unsent_lines(connection: sa.Connection, incident_ids: Sequence[int]) -> set[tuple[int, str]]:
    """Incident and channel, where the channel has not been given its last word about the incident."""
    wanted = set(incident_ids)
    queued = sa.select(notifications.c.incident_id, notifications.c.channel).where(is_queued)
    under_way = (
        sa.select(notifications.c.incident_id, notifications.c.channel)
        .join(batches, batches.c.id == notifications.c.batch_id)
        .where(is_waiting)
    )
    rows = itertools.chain(connection.execute(queued), connection.execute(under_way))
    return {(incident_id, channel) for incident_id, channel in rows if incident_id in wanted}


def _incident(row: Mapping[Any, Any]) -> Incident:
    values = {name: row[name] for name in Incident.__struct_fields__ if name in row}
    values |= {"group": row["asset_group"], "owners": tuple(json.loads(row["owners"]))}
    return Incident(**values)


def _due_batch(connection: sa.Connection, channel: str, now: float) -> str | None:
    """The oldest message that was begun, is not sent, and that nobody is sending."""
    found: str | None = connection.execute(
        sa.select(batches.c.id)
        .where(
            batches.c.channel == channel,
            is_waiting,
            batches.c.next_attempt_at <= now,
            batches.c.lease_until <= now,
        )
        .order_by(batches.c.created_at)
        .limit(1)
    ).scalar()
    return found


def _may_begin(connection: sa.Connection, channel: str, pause: float, now: float) -> bool:
    """Whether it is time for another message.

    One after the other, so that they arrive in order. One that was refused is passed by: it may be the
    message. When the next one is refused too, it is the channel, and what is queued stays together, until
    one of them is set aside: it may have been the messages after all.
    """
    waiting = sa.select(batches.c.refused).where(batches.c.channel == channel, is_waiting, ~_is_set_aside)
    refused = connection.execute(waiting).scalars().all()
    if len(refused) > 1 or 0 in refused:
        return False
    last = connection.execute(
        sa.select(channels.c.last_sent_at).where(channels.c.channel == channel)
    ).scalar()
    # A last message in the future was sent before the clock was put back.
    return last is None or not 0 <= now - last < pause


def _new_batch(connection: sa.Connection, channel: str, gather_seconds: float, now: float) -> str | None:
    """Everything that is queued for ``channel`` as one message; None if there is nothing, or too soon."""
    in_refused = (
        sa.select(notifications.c.incident_id)
        .join(batches, batches.c.id == notifications.c.batch_id)
        .where(batches.c.channel == channel, is_waiting)
    )
    rows = connection.execute(
        sa.select(notifications, incidents.c.key)
        .join(incidents, incidents.c.id == notifications.c.incident_id)
        # Nobody hears of the end of what he was not told the beginning of.
        .where(
            is_queued,
            notifications.c.channel == channel,
            notifications.c.incident_id.not_in(in_refused),
        )
        .order_by(notifications.c.place)
        .limit(_LINES_PER_MESSAGE)
    ).all()
    # A first one in the future was queued before the clock was put back.
    if not rows or (
        0 <= now - rows[0].queued_at < gather_seconds and all(row.severity != "CRITICAL" for row in rows)
    ):
        return None
    batch_id = uuid.uuid4().hex
    pages = _pages(connection, channel, batch_id, rows)
    connection.execute(
        notifications.update()
        .where(notifications.c.place == sa.bindparam("which"))
        .values(batch_id=batch_id, page_key=sa.bindparam("page")),
        [{"which": row.place, "page": pages[row.incident_id]} for row in rows],
    )
    connection.execute(
        batches.insert().values(
            id=batch_id,
            channel=channel,
            created_at=now,
            open_page_keys=json.dumps(_still_open(connection, channel, set(pages.values()))),
            attempts=0,
            next_attempt_at=now,
            lease_owner="",
            lease_until=0.0,
            refused=0,
            last_error="",
        )
    )
    return batch_id


def _pages(connection: sa.Connection, channel: str, batch_id: str, rows: Sequence[Any]) -> dict[int, str]:
    """Page key of each incident in a new message, kept for as long as the channel has to hear of it.

    Incidents that come in one message of several lines are one page; an incident that comes alone is a
    page of its own. What is told of it later goes to the same page.
    """
    ids = {row.incident_id for row in rows}
    told = sa.and_(hearers.c.channel == channel, hearers.c.incident_id.in_(ids))
    pages = _pairs(connection, sa.select(hearers.c.incident_id, hearers.c.page_key).where(told))
    page = batch_id if len(rows) > 1 else rows[0].key
    connection.execute(hearers.update().where(told, hearers.c.page_key == "").values(page_key=page))
    resolved = {row.incident_id for row in rows if row.kind == "resolved"}
    connection.execute(
        hearers.delete().where(hearers.c.channel == channel, hearers.c.incident_id.in_(resolved))
    )
    return {incident_id: pages.get(incident_id) or page for incident_id in ids}


def _still_open(connection: sa.Connection, channel: str, pages: set[str]) -> list[str]:
    """Those of ``pages`` that have an incident whose end the channel has still to hear of."""
    rows = connection.execute(
        sa.select(hearers.c.page_key)
        .where(hearers.c.channel == channel, hearers.c.page_key.in_(pages))
        .distinct()
    )
    return sorted(rows.scalars())


def _message(connection: sa.Connection, batch: sa.Row[Any]) -> Message:
    rows = connection.execute(
        sa.select(notifications, incidents.c.key, incidents.c.number)
        .join(incidents, incidents.c.id == notifications.c.incident_id)
        .where(notifications.c.batch_id == batch.id)
        .order_by(notifications.c.place)
    ).mappings()
    kept = set(Line.__struct_fields__) - {"incident"}
    return Message(
        id=batch.id,
        channel=batch.channel,
        lines=tuple(Line(incident=row["key"], **{name: row[name] for name in kept}) for row in rows),
        created_at=_iso(batch.created_at),
        open_page_keys=tuple(json.loads(batch.open_page_keys)),
    )


def _count_sent(connection: sa.Connection, channel: str, now: float) -> None:
    counted = connection.execute(
        channels.update()
        .where(channels.c.channel == channel)
        .values(sent=channels.c.sent + 1, last_sent_at=now)
    )
    if not counted.rowcount:
        connection.execute(channels.insert().values(channel=channel, sent=1, last_sent_at=now))


def _messages_waiting(connection: sa.Connection) -> dict[str, int]:
    """Messages by channel that were begun and not sent, and those that the queue will make."""
    begun = sa.select(batches.c.channel, sa.func.count()).where(is_waiting).group_by(batches.c.channel)
    waiting: dict[str, int] = _pairs(connection, begun)
    queued = sa.select(notifications.c.channel, sa.func.count()).where(is_queued)
    for channel, lines in connection.execute(queued.group_by(notifications.c.channel)):
        waiting[channel] = waiting.get(channel, 0) + -(-int(lines) // _LINES_PER_MESSAGE)
    return waiting


def _waiting_since(connection: sa.Connection) -> dict[str, float]:
    """By channel, since when the oldest waits of what is neither set aside nor held back by it."""
    begun = sa.select(batches.c.channel, sa.func.min(batches.c.created_at)).where(is_waiting, ~_is_set_aside)
    since: dict[str, float] = _pairs(connection, begun.group_by(batches.c.channel))
    lines = notifications.alias()
    held_back = sa.exists().where(
        is_waiting,
        _is_set_aside,
        batches.c.channel == notifications.c.channel,
        lines.c.batch_id == batches.c.id,
        lines.c.incident_id == notifications.c.incident_id,
    )
    queued = sa.select(notifications.c.channel, sa.func.min(notifications.c.queued_at))
    queued = queued.where(is_queued, ~held_back).group_by(notifications.c.channel)
    for channel, at in connection.execute(queued):
        since[channel] = min(at, since.get(channel, at))
    return since


def _set_aside(connection: sa.Connection) -> dict[str, int]:
    """Messages by channel that nothing waits for any more."""
    found = sa.select(batches.c.channel, sa.func.count()).where(is_waiting, _is_set_aside)
    return _pairs(connection, found.group_by(batches.c.channel))


def _oldest_errors(connection: sa.Connection) -> dict[str, str]:
    """By channel, why it did not take the oldest of its messages, and rather one that is not set aside."""
    errors = sa.select(batches.c.channel, batches.c.last_error).where(is_waiting)
    return _pairs(connection, errors.order_by(_is_set_aside.desc(), batches.c.created_at.desc()))

"""Tables of the outbox and the way to them: SQLite or PostgreSQL, one writer at a time.

Whoever writes holds the database alone until he commits, so that what he has read still holds when he
writes. That is cheap here, because nobody sends, waits or computes in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from ml.errors import InputError
from resources.atomic_files import only_one
from resources.redaction import without_secrets

_SCHEMA_VERSION = "1"
_LOCKED_FOR_SECONDS = 30
"""So long another writer is waited for; he needs milliseconds."""
_WRITER_LOCK = 0x6F7574626F78
"""PostgreSQL's advisory lock that the writer holds; the number only has to be ours."""

_WRITABLE = "Make file and folder writable for this user and see that the disk is not full"

_METADATA = sa.MetaData()

incidents = sa.Table(
    "alert_incidents",
    _METADATA,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("asset", sa.Text),
    sa.Column("link", sa.Text),
    sa.Column("run", sa.Text),
    sa.Column("asset_group", sa.Text),
    sa.Column("owners", sa.Text, nullable=False),
    sa.Column("opened_at", sa.Text, nullable=False),
    sa.Column("last_at", sa.Text, nullable=False),
    sa.Column("resolved_at", sa.Text),
    sa.Column("times", sa.Integer, nullable=False),
    # When people were last told of it, and how often they were reminded.
    sa.Column("told_at", sa.Float, nullable=False),
    sa.Column("reminders", sa.Integer, nullable=False),
    # Of one that came and went all the time: it ends when it has been quiet, and since when it is.
    sa.Column("flapping", sa.Integer, nullable=False),
    sa.Column("quiet_since", sa.Float),
    sa.UniqueConstraint("key", "number"),
)
is_open = incidents.c.state == sa.literal_column("'open'")
"""Written out and not as a parameter: SQLite uses the partial index only for what it can see."""
sa.Index("alert_open_incidents", incidents.c.key, unique=True, sqlite_where=is_open, postgresql_where=is_open)

hearers = sa.Table(
    # The channels that were told of an open incident, or will be: they hear of its end.
    "alert_hearers",
    _METADATA,
    sa.Column("incident_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("channel", sa.Text, primary_key=True),
    sa.Column("page_key", sa.Text, nullable=False),
)
sa.Index("alert_pages", hearers.c.channel, hearers.c.page_key)

notifications = sa.Table(
    # What one channel is to be told, in the words of the moment in which it happened.
    "alert_notifications",
    _METADATA,
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.Text, nullable=False, unique=True),
    sa.Column("incident_id", sa.BigInteger, nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("batch_id", sa.Text),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("severity", sa.Text, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("link", sa.Text, nullable=False),
    sa.Column("run_link", sa.Text, nullable=False),
    sa.Column("opened_at", sa.Text, nullable=False),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("times", sa.Integer, nullable=False),
    sa.Column("page_key", sa.Text, nullable=False),
    sa.Column("queued_at", sa.Float, nullable=False),
)
is_queued = notifications.c.batch_id.is_(None)
sa.Index(
    "alert_queued_notifications",
    notifications.c.channel,
    notifications.c.place,
    sqlite_where=is_queued,
    postgresql_where=is_queued,
)
sa.Index("alert_batched_notifications", notifications.c.batch_id)

batches = sa.Table(
    # A message to one channel. Its id is the receiver's idempotency key, and is kept before the first send.
    "alert_batches",
    _METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("open_page_keys", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("next_attempt_at", sa.Float, nullable=False),
    sa.Column("lease_owner", sa.Text, nullable=False),
    sa.Column("lease_until", sa.Float, nullable=False),
    # How often the channel said that it will never take it.
    sa.Column("refused", sa.Integer, nullable=False),
    sa.Column("last_error", sa.Text, nullable=False),
    sa.Column("sent_at", sa.Float),
)
is_waiting = batches.c.sent_at.is_(None)
sa.Index("alert_waiting_batches", batches.c.channel, sqlite_where=is_waiting, postgresql_where=is_waiting)
sa.Index("alert_sent_batches", batches.c.sent_at)
_is_under_way = sa.and_(is_waiting, batches.c.refused == sa.literal_column("0"))
sa.Index(
    "alert_batch_under_way",
    batches.c.channel,
    unique=True,
    sqlite_where=_is_under_way,
    postgresql_where=_is_under_way,
)

channels = sa.Table(
    "alert_channels",
    _METADATA,
    sa.Column("channel", sa.Text, primary_key=True),
    sa.Column("sent", sa.Integer, nullable=False),
    sa.Column("last_sent_at", sa.Float, nullable=False),
)

bookmarks = sa.Table(
    "alert_bookmarks",
    _METADATA,
    sa.Column("source", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

seen = sa.Table(
    "alert_news_seen",
    _METADATA,
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("at", sa.Float, nullable=False, index=True),
)

facts = sa.Table(
    # About the outbox itself.
    "alert_outbox",
    _METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)


class OutboxDatabase:
    """Transactions on the outbox. Its tables are made when it is used for the first time."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._engine = self._sqlite_engine() if self._is_sqlite else sa.create_engine(url, poolclass=NullPool)
        self._is_ready = False

    @property
    def exists(self) -> bool:
        """Whether there is a file; a server is taken to be there."""
        return not self._is_sqlite or self._file.exists()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that sees one state of the outbox and changes nothing."""
        with self._errors_in_a_line():
            self._make_ready()
            with self._engine.connect() as connection, connection.begin():
                yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction during which nobody else writes; nothing of it is kept if it fails."""
        with self._errors_in_a_line():
            self._make_ready()
            with self._alone() as connection:
                yield connection

    @contextmanager
    def _alone(self) -> Iterator[sa.Connection]:
        with self._engine.connect() as plain:
            connection = plain.execution_options(writes=True)
            with connection.begin():
                if not self._is_sqlite:
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER_LOCK)))
                yield connection

    @property
    def _file(self) -> Path:
        return Path(self._url.database or "")

    def _sqlite_engine(self) -> sa.Engine:
        engine = sa.create_engine(
            self._url, poolclass=NullPool, connect_args={"timeout": _LOCKED_FOR_SECONDS}
        )

        @sa.event.listens_for(engine, "connect")
        def prepare(connection: Any, _: object) -> None:
            connection.isolation_level = None  # transactions begin where we say, not at the first change
            connection.execute("PRAGMA journal_mode=WAL")  # who reads does not wait for the writer
            connection.execute("PRAGMA synchronous=FULL")  # what was told survives a power cut

        @sa.event.listens_for(engine, "invalidate")
        def let_go(connection: Any, *_: object) -> None:
            connection.rollback()  # who is interrupted frees the file now, not when Python drops the cursor

        @sa.event.listens_for(engine, "begin")
        def begin(connection: sa.Connection) -> None:
            writes = connection.get_execution_options().get("writes")
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    def _make_ready(self) -> None:
        if self._is_ready and self.exists:
            return
        if self._is_sqlite:
            self._make_folder()
        # Two that switch a new file to WAL at once lock each other out without waiting: one after the other.
        lock = only_one(self._file.with_name(self._file.name + ".lock")) if self._is_sqlite else nullcontext()
        with lock, self._alone() as connection:
            _METADATA.create_all(connection)
            self._agree_on_version(connection)
        self._is_ready = True

    def _make_folder(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self._name} cannot be made: {error.strerror}. {_WRITABLE}") from None

    @staticmethod
    def _agree_on_version(connection: sa.Connection) -> None:
        version = sa.select(facts.c.value).where(facts.c.name == "schema_version")
        found = connection.execute(version).scalar()
        if found is None:
            connection.execute(facts.insert().values(name="schema_version", value=_SCHEMA_VERSION))
        elif found != _SCHEMA_VERSION:
            raise _OtherVersion(found)

    @property
    def _name(self) -> str:
        return f"the outbox {self._file if self._is_sqlite else self._url.render_as_string()}"

    @contextmanager
    def _errors_in_a_line(self) -> Iterator[None]:
        """Say what is wrong with the database in one line, without the statement, which holds the texts.

        Raises:
            InputError: a person has to mend it.
            dg.Failure: it may be gone at the next attempt.
        """
        try:
            yield
        except _OtherVersion as error:
            raise InputError(
                f"{self._name} has version {error} of its tables, and this code knows {_SCHEMA_VERSION}: "
                "run the code that wrote it, or move it away and a new one is started"
            ) from None
        except OSError as error:
            raise InputError(f"{self._name} cannot be opened: {error.strerror}. {_WRITABLE}") from None
        except (sa.exc.IntegrityError, sa.exc.DataError, sa.exc.ProgrammingError):
            raise
        except sa.exc.DBAPIError as error:
            raise self._plainly(str(error.orig)) from None

    def _plainly(self, text: str) -> InputError | dg.Failure:
        reason = without_secrets(" ".join(text.split()))
        if not self._is_sqlite:
            return dg.Failure(f"{self._name} does not answer: {reason}")
        if "locked" in reason:
            return dg.Failure(
                f"{self._name} has been locked for {_LOCKED_FOR_SECONDS} s: close the program that holds it"
            )
        if "not a database" in reason or "malformed" in reason:
            return InputError(
                f"{self._name} is damaged ({reason}): bring back a copy, or move it away with its -wal and "
                "-shm files; a new one is started without what was waiting in it"
            )
        return InputError(f"{self._name} cannot be used: {reason}. {_WRITABLE}")


class _OtherVersion(Exception):
    """The tables are of another version of this code."""

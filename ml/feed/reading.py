"""The offer feed: which files it is made of, which days they hold, and one day of it as delivered.

A feed is a file, a folder, a glob or a URI of these, as Parquet, CSV or JSON lines. What an
offer's day is, is decided here and nowhere else; whether an offer is any good, in :mod:`ml.offers`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.errors import InputError
from ml.feed.csv_files import read_csv
from ml.feed.json_lines import read_json_lines
from ml.feed.parquet_files import read_parquet
from ml.feed.rows import (
    INVALID_ENCODING,
    MALFORMED_ROW,
    OFFERS,
    RAW_SCHEMA,
    Layout,
    UnusableFileError,
    first_line,
    without_first,
)
from ml.feed.source import open_source, uncompressed, unreachable
from ml.offers import timestamp_sql, trimmed_sql
from ml.stages import FeedFile, RawOffersParameters

if TYPE_CHECKING:
    from ml.runner import StageContext

RAW_OFFERS_FILE = "offers.parquet"

_logger = logging.getLogger(__name__)

_READERS = {
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_lines,
}
_KNOWN_EXTENSIONS = f"{', '.join(_READERS)}, each also with .gz"
_GLOB_CHARACTERS = frozenset("*?[")
_STAMP_FIELDS = ("ETag", "etag", "checksum", "md5Hash", "mtime", "LastModified", "last_modified", "updated")
"""What file systems call the figure that changes with a file's content, the most telling first."""

_BROKEN_FILE_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException)
"""What reading a broken file raises, whatever its format; beside these, OSError without a number."""

_BUFFER_BYTES = 1 << 20
_ROW_GROUP_ROWS = 65_536
_ROW_GROUP_BYTES = 128 << 20
_MAX_FILES_SHOWN = 5
_NOWHERE = "points nowhere: there is no such file or folder"
_MAX_IGNORED_SHOWN = 100


class BrokenFileError(InputError):
    """A file of the feed cannot be used, however often it is read: truncated, say, or not UTF-8."""


class NoFilesError(InputError):
    """The place of the feed is there, and no file lies in it (yet)."""


class FileProfile(msgspec.Struct, frozen=True, kw_only=True):
    """How many offers of which day a file holds."""

    rows: int
    days: dict[str, int]
    """Offers by ISO date of ``offered_at`` (UTC), in order of the dates."""
    undated: int
    """Offers whose ``offered_at`` is absent or cannot be understood: they belong to the day of loading."""


def discover_files(feed: str, setting: str = "OFFER_FEED", rows: str = "offers") -> list[str]:
    """The files that a feed is made of, sorted.

    Args:
        feed: File, folder (searched with its subfolders; names that begin with ``.`` or ``_`` are
            left out, and so are files of other formats, such as a README, if there are offers beside
            them), glob, or a URI of one of these on any file system that fsspec knows.
        setting: What messages call the feed.
        rows: What they call its rows.

    Returns:
        Absolute paths of local files, full URIs of others.

    Raises:
        NoFilesError: the feed is a glob that matches nothing, or a folder without files.
        InputError: it points nowhere, names a file of unknown format, or is a folder with no other files.
    """
    import fsspec

    if not feed.strip():
        raise InputError(f"{setting} is empty; give a file, folder, glob or URI of {rows}")
    try:
        filesystem, path = fsspec.core.url_to_fs(feed)
        if _GLOB_CHARACTERS & set(path) and not filesystem.exists(path):
            what = "matches no file"
            found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
        elif filesystem.isdir(path):
            what = "is a folder without files"
            found = _offer_files(name for name in filesystem.find(path) if not _is_hidden(name, path))
        else:
            what = _NOWHERE
            found = [path] if filesystem.isfile(path) else []
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{setting}={feed} cannot be looked at: {first_line(error)}") from None
    if not found:
        kind = InputError if what == _NOWHERE else NoFilesError
        raise kind(f"{setting}={feed} {what}; looked for {_KNOWN_EXTENSIONS}")
    for name in found:
        if _extension(name) not in _READERS:
            raise InputError(
                f"{setting}={feed}: {name} is of no known format, expected {_KNOWN_EXTENSIONS}; "
                f"name the {rows} by a folder or a narrower glob"
            )
    is_local = "file" in filesystem.protocol
    return sorted(name if is_local else filesystem.unstrip_protocol(name) for name in found)


def fingerprint(uri: str) -> str:
    """A value (16 hex digits) that changes when the file does; reads its size and time or ETag only.

    Raises:
        InputError: there is no such file.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
        info = filesystem.info(path)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{uri} cannot be looked at: {first_line(error)}") from None
    stamp = next((str(info[name]) for name in _STAMP_FIELDS if info.get(name) is not None), "")
    return hashlib.sha256(f"{info.get('size')} {stamp}".encode()).hexdigest()[:16]


def profile_file(uri: str) -> FileProfile:
    """Count a file's offers by day, in constant memory (of Parquet, two columns are read).

    Raises:
        InputError: the file cannot be read; the message names it.
    """
    rows, days = 0, Counter[str | None]()
    calendar = _Calendar()
    for batch in _read(uri, set(), columns=("offer_id", "offered_at")):
        rows += batch.num_rows
        days.update(calendar.days_of(batch).to_pylist())
    undated = days.pop(None, 0)
    return FileProfile(
        rows=rows, days={str(day): days[day] for day in sorted(days, key=str)}, undated=undated
    )


def read_batches(
    uri: str, ignored: set[str] | None = None, layout: Layout = OFFERS, skip: int = 0
) -> Iterator[pa.RecordBatch]:
    """All rows of a file as delivered, in its order, with constant memory.

    Args:
        uri: Path or URI of a Parquet, CSV or JSON lines file, gzipped or not.
        ignored: Set that gets the names of the columns that are not part of the feed.
        layout: Columns of the feed.
        skip: Rows to leave out at the beginning; of Parquet, row groups of these alone are not read.

    Yields:
        Batches of the layout's schema: every feed column as text (null where absent),
        ``source_file``, ``source_row`` (from 1, header and blank lines not counted), ``problem``
        (``malformed_row``, ``invalid_encoding`` or null) and ``content`` (the original of such a row).

    Raises:
        BrokenFileError: the file as a whole cannot be used: empty, truncated, not UTF-8, without a
            needed column, with a column twice. One line that names it. Batches may have been
            yielded before the place where a truncated file breaks off.
        InputError: the file cannot be reached, or not to its end: missing, forbidden, network down.
            One line that names it.
    """
    yield from _read(uri, set() if ignored is None else ignored, layout=layout, skip=skip)


def write_raw_offers(context: StageContext, parameters: RawOffersParameters) -> dict[str, Any]:
    """Stage ``raw_offers``: the offers of one day, exactly as delivered, as ``offers.parquet``.

    An offer belongs to the UTC date of its ``offered_at``; without one that can be understood, to the
    day its file was loaded. A file that cannot be used contributes nothing (not half of itself) and
    is listed in the metric ``unreadable_files``; the others still load. A file that just could not be
    reached fails the stage instead: the same files read again later would give another result.

    Raises:
        InputError: no file can be used, one cannot be reached or changed since it was looked at, or
            there is no offer of this day.
    """
    totals: Counter[str] = Counter()
    ignored: set[str] = set()
    unreadable: list[str] = []
    with (
        _Writer(context.output / RAW_OFFERS_FILE) as writer,
        context.progress.bar("reading", len(parameters.files), "files") as bar,
    ):
        for number, file in enumerate(parameters.files):
            part = context.checkpoints / f"part-{number:05}.parquet"
            try:
                counts, others = _write_day_of_file(file, parameters.day, part)
            except BrokenFileError as error:
                unreadable.append(str(error))
                context.progress.say(f"left out: {error}")
            else:
                for batch in pq.ParquetFile(part).iter_batches(batch_size=_ROW_GROUP_ROWS):
                    writer.write(batch)
                totals += counts
                ignored |= others
            part.unlink(missing_ok=True)
            bar.update(1, offers=totals["rows"])
    if not totals["rows"]:
        raise InputError(_why_empty(parameters, unreadable, totals["rows_of_all_days"]))
    return {
        "rows": totals["rows"],
        "files": len(parameters.files) - len(unreadable),
        "rows_of_all_days": totals["rows_of_all_days"],
        "undated": totals["undated"],
        "malformed": totals[MALFORMED_ROW],
        "invalid_encoding": totals[INVALID_ENCODING],
        "ignored_columns": sorted(ignored)[:_MAX_IGNORED_SHOWN],
        "unreadable_files": unreadable,
    }


def _write_day_of_file(file: FeedFile, day: str, part: Path) -> tuple[Counter[str], set[str]]:
    """Write the file's offers of ``day`` to ``part``; returns counts and the columns left out."""
    if file.fingerprint and fingerprint(file.uri) != file.fingerprint:
        raise InputError(
            f"{file.uri} changed since it was looked at; look again (its offers may have moved day)"
        )
    counts: Counter[str] = Counter()
    ignored: set[str] = set()
    calendar = _Calendar()
    with _Writer(part) as writer:
        for batch in read_batches(file.uri, ignored):
            days = calendar.days_of(batch)
            chosen = batch.filter(_equal(days.fill_null(file.loaded_on), day))
            counts["rows_of_all_days"] += batch.num_rows
            counts["rows"] += chosen.num_rows
            counts["undated"] += days.null_count if file.loaded_on == day else 0
            for problem in (MALFORMED_ROW, INVALID_ENCODING):
                counts[problem] += _equal(chosen["problem"], problem).true_count
            writer.write(chosen)
    return counts, ignored


def _why_empty(parameters: RawOffersParameters, unreadable: list[str], rows_of_all_days: int) -> str:
    if not parameters.files:
        return f"the feed has no files for {parameters.day}; look at OFFER_FEED"
    if unreadable:
        more = f" (and {len(unreadable) - 1} more files)" if len(unreadable) > 1 else ""
        return unreadable[0] + more
    names = ", ".join(file.uri for file in parameters.files[:_MAX_FILES_SHOWN])
    if rows_of_all_days:
        return f"{names}: none of the {rows_of_all_days:,} offers is of {parameters.day}; choose another day"
    return f"the feed is empty: {names} holds no offers, only columns; deliver offers or leave the file out"


def _equal(column: pa.Array[Any], value: str) -> pa.BooleanArray:
    return pc.equal(column, pa.scalar(value, pa.string()))


class _Calendar:
    """Finds the day of offers as :mod:`ml.offers` will read their ``offered_at``."""

    def __init__(self) -> None:
        import duckdb

        self._connection = duckdb.connect(config={"threads": 1})
        self._connection.execute("SET TimeZone = 'UTC'")

    def days_of(self, batch: pa.RecordBatch) -> pa.Array[Any]:
        """ISO date of each offer's ``offered_at`` in UTC; null where absent or not understood."""
        column = batch.column("offered_at")
        if column.null_count == len(column):
            return column
        distinct = column.dictionary_encode()
        self._connection.register("distinct_values", pa.table({"value": distinct.dictionary}))
        days = self._connection.sql(
            f"SELECT strftime({timestamp_sql(trimmed_sql('value'))}, '%Y-%m-%d') AS day FROM distinct_values"
        ).to_arrow_table()
        by_value: pa.Array[Any] = days["day"].combine_chunks()
        return by_value.take(distinct.indices)


class _Writer:
    """Writes batches as row groups of a sensible size."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, RAW_SCHEMA, compression="zstd")
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *failure: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        self._waiting.append(batch)
        rows = sum(waiting.num_rows for waiting in self._waiting)
        size = sum(waiting.nbytes for waiting in self._waiting)
        if rows >= _ROW_GROUP_ROWS or size >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting, RAW_SCHEMA)
            self._writer.write_table(table, row_group_size=table.num_rows)
            self._waiting = []


def _read(
    uri: str,
    ignored: set[str],
    columns: tuple[str, ...] | None = None,
    layout: Layout = OFFERS,
    skip: int = 0,
) -> Iterator[pa.RecordBatch]:
    """Open ``uri``, undo gzip, read it in its format; whatever breaks becomes an InputError naming it."""
    extension = _extension(uri)
    if extension not in _READERS:
        raise BrokenFileError(f"{uri} is of no known format, expected {_KNOWN_EXTENSIONS}")
    is_parquet = extension == ".parquet"
    with ExitStack() as stack:
        source = stack.enter_context(open_source(uri))
        try:
            file: IO[bytes] = stack.enter_context(io.BufferedReader(source, _BUFFER_BYTES))
            if uri.lower().endswith(".gz"):
                file = stack.enter_context(uncompressed(file, seekable=is_parquet))
            if is_parquet:
                yield from read_parquet(file, uri, ignored, layout, columns, skip)
            else:
                yield from without_first(_READERS[extension](file, uri, ignored, layout), skip)
        except UnusableFileError as error:
            raise BrokenFileError(f"{uri} {error}") from None
        except Exception as error:
            if source.failure is not None:
                raise unreachable(uri, source.failure) from error
            if isinstance(error, _BROKEN_FILE_ERRORS) or (isinstance(error, OSError) and error.errno is None):
                raise BrokenFileError(f"{uri} cannot be read: {first_line(error)}") from None
            raise


def _extension(name: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(name.partition("::")[0]).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _offer_files(names: Iterable[str]) -> list[str]:
    """The files among those of a folder that can be offers; all of them if none can."""
    every = sorted(names)
    found = [name for name in every if _extension(name) in _READERS]
    if found and len(found) < len(every):
        _say_left_out(tuple(name for name in every if _extension(name) not in _READERS))
    return found or every


@cache
def _say_left_out(names: tuple[str, ...]) -> None:
    """Once, however often the folder is looked at."""
    shown = ", ".join(names[:_MAX_FILES_SHOWN])
    _logger.warning("left out %d files of no offer format: %s", len(names), shown)


def _is_hidden(name: str, folder: str) -> bool:
    return any(part.startswith((".", "_")) for part in Path(name).relative_to(folder).parts)

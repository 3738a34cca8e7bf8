"""Finished parts of a bulk classification: what of it a kill leaves, and how a file is made of them.

While ``OUT`` is being made, ``OUT.parts/`` holds ``job.json`` (what is classified, and by which model),
``part-000000.parquet`` and so on in the order of the feed, and a lock. A part appears when it is
complete, and knows the place in the feed behind its last offer: no more is needed to go on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.errors import InputError
from ml.progress import Progress

_FORMAT = 1
"""Of job and parts. Raise it when the same model would answer the same offers otherwise."""

_ROW_GROUP_OFFERS = 65_536
_JOB_FILE = "job.json"
_LOCK_FILE = "lock"
_ALL_PARTS = "part-*.parquet"
_PARTIAL = ".partial"
_PLACE_KEY = b"offer_assets_place"
"""In each part: the :class:`Place` behind it."""
_JOB_KEY = "offer_assets_job"
"""In the result: the digest of its :class:`Job`."""


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A place in a feed: in front of row ``row`` (from 0) of its file ``file`` (from 0)."""

    file: int = 0
    row: int = 0


class Source(msgspec.Struct, frozen=True):
    """One file of the feed."""

    uri: str
    fingerprint: str
    """Changes when the file's content changes."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the answers depend on."""

    model: str
    """Digest of the artifact."""
    text_version: str
    columns: list[str]
    """Name and type of each column of the result."""
    sources: list[Source]
    format: int = _FORMAT

    @property
    def digest(self) -> str:
        """Of all of it, 64 hex digits."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def answers_as(self, other: Job) -> bool:
        """Whether ``other`` would give an offer the same row."""
        return self._without_sources() == other._without_sources()

    def files_in_common(self, other: Job) -> int:
        """Files from the first on that are the same in both."""
        pairs = zip(self.sources, other.sources, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _without_sources(self) -> Job:
        return msgspec.structs.replace(self, sources=[])


class Parts:
    """The work folder of one output; see :func:`parts_of`."""

    def __init__(self, output: Path, job: Job) -> None:
        self._output = output
        self._folder = work_folder(output)
        self._job = job
        self.count = 0
        self.offers = 0
        """In the finished parts."""
        self.place = Place()
        """Behind them in the feed."""

    def take_over(self, *, only_look: bool = False) -> str | None:
        """Count the parts that an earlier run left and that are of use still; the others go.

        All are of use if the job is the same. If only files of the feed changed, those are that hold
        no offer of a changed file, nor of one behind it.

        Args:
            only_look: Leave those that are of no use where they are.

        Returns:
            What became of them, for people; None if there was nothing.
        """
        before = self._job_before()
        found = sorted(self._folder.glob(_ALL_PARTS))
        same = before is not None and before.answers_as(self._job)
        unchanged = before.files_in_common(self._job) if before is not None and same else 0
        for number, path in enumerate(found):
            place = _place_behind(path) if path == self._path(number) and number == self.count else None
            if place is None or place.file >= unchanged:
                if not only_look:
                    path.unlink()
                continue
            self._count(pq.read_metadata(path).num_rows, place)
        if not only_look:
            self._write(_JOB_FILE, msgspec.json.encode(self._job))
        if not found:
            return None
        return self._taken_over(before, len(found) - self.count)

    def _taken_over(self, before: Job | None, dropped: int) -> str:
        if not dropped:
            return f"going on after {self.offers:,} offers"
        if before is None or not before.answers_as(self._job):
            reason = "the model or this program is another"
        elif before.files_in_common(self._job) < len(before.sources):
            reason = "files of the feed changed"
        else:
            reason = "a part is damaged or gone"
        if self.count:
            return f"{reason}: going on after {self.offers:,} offers, {dropped:,} later parts are made anew"
        return f"{reason} since {self._folder} was begun: starting anew, {dropped:,} parts are dropped"

    def add(self, table: pa.Table, place: Place) -> None:
        """Keep the next offers; ``place`` is the one behind them."""
        metadata = {_PLACE_KEY: msgspec.json.encode(place)}
        path = self._path(self.count)
        partial = path.with_suffix(_PARTIAL)
        pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")
        _to_disk(partial)
        partial.rename(path)
        self._count(table.num_rows, place)

    def join(self, schema: pa.Schema, progress: Progress) -> Counter[str | None]:
        """Make the output of all parts, a row group at a time; it appears, or is replaced, in one step.

        Parquet has no way to glue files together, and pyarrow none to copy a row group as it is, so rows
        are decoded and encoded once more: a small part of the time that it took to classify them.

        Returns:
            Offers by problem; None is the key of those that were classified.
        """
        counts: Counter[str | None] = Counter()
        partial = self._folder / f"joined{_PARTIAL}"
        with (
            pq.ParquetWriter(partial, schema, compression="zstd") as writer,
            progress.bar("joining", total=self.offers, unit="offers") as bar,
        ):
            for table in _row_groups([self._path(number) for number in range(self.count)], schema):
                writer.write_table(table, row_group_size=_ROW_GROUP_OFFERS)
                counts.update(problems_in(table))
                bar.update(table.num_rows)
            writer.add_key_value_metadata({_JOB_KEY: self._job.digest})
        if counts.total() != self.offers:
            raise RuntimeError(f"{self._folder}: {self.offers:,} offers in parts, {counts.total():,} joined")
        _to_disk(partial)
        partial.rename(self._output)
        return counts

    def is_joined(self) -> bool:
        """Whether the output is there already, of this very job."""
        try:
            metadata = pq.read_metadata(self._output).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return metadata.get(_JOB_KEY.encode()) == self._job.digest.encode()

    def clear(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self._folder)

    def _job_before(self) -> Job | None:
        try:
            return msgspec.json.decode((self._folder / _JOB_FILE).read_bytes(), type=Job)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _count(self, offers: int, place: Place) -> None:
        self.count += 1
        self.offers += offers
        self.place = place

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.parquet"

    def _write(self, name: str, content: bytes) -> None:
        partial = self._folder / (name + _PARTIAL)
        partial.write_bytes(content)
        _to_disk(partial)
        partial.rename(self._folder / name)


@contextmanager
def parts_of(output: Path, job: Job) -> Iterator[Parts]:
    """The parts of ``output``, for this process alone; a folder in which nothing is kept goes again.

    Raises:
        InputError: ``output`` is a folder, it would lie in none, or another process is making it.
    """
    folder = work_folder(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder; name the Parquet file to write")
    if not output.parent.is_dir():
        raise InputError(f"{output}: folder {output.parent} does not exist; create it or name another")
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            raise InputError(
                f"{output} is being made by another process; wait for it or name another file"
            ) from None
        parts = Parts(output, job)
        try:
            yield parts
        finally:
            if folder.exists() and not any(folder.glob(_ALL_PARTS)):
                parts.clear()


def work_folder(output: Path) -> Path:
    """Where the parts of ``output`` lie until it is complete."""
    return output.with_name(output.name + ".parts")


def problems_in(table: pa.Table) -> Counter[str | None]:
    """Offers of ``table`` by the value of its column ``problem``."""
    values, counts = table["problem"].value_counts().flatten()
    return Counter(dict(zip(values.to_pylist(), counts.to_pylist(), strict=True)))


def _place_behind(part: Path) -> Place | None:
    """None if the part cannot be read: a machine that lost power may have kept half of it."""
    try:
        return msgspec.json.decode(pq.read_schema(part).metadata[_PLACE_KEY], type=Place)
    except (OSError, pa.ArrowException, KeyError, TypeError, msgspec.DecodeError):
        return None


def _row_groups(paths: Sequence[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    """All rows in order, so many at a time as make a row group worth reading."""
    tables: list[pa.Table] = []
    for path in paths:
        tables.append(pq.read_table(path).cast(schema))
        if sum(table.num_rows for table in tables) >= _ROW_GROUP_OFFERS:
            yield pa.concat_tables(tables)
            tables = []
    if tables:
        yield pa.concat_tables(tables)


def _to_disk(path: Path) -> None:
    """So that a rename never shows an empty file after a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

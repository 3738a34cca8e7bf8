"""Reads a feed in CSV: one record after the other, none lost to its neighbour's mistakes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from ml.feed.rows import (
    INVALID_ENCODING,
    MALFORMED_ROW,
    MAX_LINE_BYTES,
    OFFERS,
    UTF_8_MARK,
    Batcher,
    Layout,
    UnusableFileError,
    check_is_utf_8_text,
    check_names_are_unique,
    check_needed_columns,
    escaped,
    printable,
)

_DELIMITERS = (",", ";", "\t", "|")
_MAX_RECORD_LINES = 2_000
"""A quoted value with more line breaks than this is taken for a quote that was never closed."""


def read_csv(
    file: IO[bytes], uri: str, ignored: set[str], layout: Layout = OFFERS
) -> Iterator[pa.RecordBatch]:
    """CSV with a header; the delimiter is found by which of ``, ; tab |`` gives known columns.

    A record is one or more lines (quoted values may hold line breaks). Where a record turns out
    wrong, only its first line is given up, and reading goes on with the next: one stray quote does
    not swallow the rest of the file.
    """
    lines = _Lines(file, layout.rows)
    first = lines.header()
    header, delimiter = _csv_header(first, layout)
    places = _places(header, ignored, layout)
    width = len(header)
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    batcher = Batcher(uri, layout)
    while True:
        lines.begin_record()
        try:
            values = next(reader)
        except StopIteration:
            break
        except (csv.Error, _RecordTooLongError):
            values = []
        if len(values) != width:
            if lines.record_is_blank:
                continue
            batcher.add_problem(MALFORMED_ROW, printable(lines.give_up_all_but_first()))
        elif lines.record_is_text:
            batcher.add([values[place] if place is not None else None for place in places], lines.record_size)
        else:
            row = [escaped(values[place]) if place is not None else None for place in places]
            batcher.add_problem(INVALID_ENCODING, printable(lines.record), row)
        if batcher.is_full:
            yield batcher.take()
    if batcher.rows:
        yield batcher.take()


class _RecordTooLongError(Exception):
    pass


class _Lines:
    """Iterator over the decoded lines of a file that remembers those of the current record.

    Bytes that are not UTF-8 come through as lone surrogates, so that splitting a line into values
    does not depend on them.
    """

    def __init__(self, file: IO[bytes], rows: str) -> None:
        self._file = file
        self._rows = rows
        self._again: list[str] = []
        self._record: list[str] = []
        self._has_met_other_bytes = False

    def header(self) -> str:
        """The first line that is not blank."""
        first = self._file.readline(MAX_LINE_BYTES)
        check_is_utf_8_text(first)
        first = first.removeprefix(UTF_8_MARK)
        while not first.strip():
            first = self._file.readline(MAX_LINE_BYTES)
            if not first:
                raise UnusableFileError(f"is empty, expected a header line and {self._rows}")
        try:
            return first.decode()
        except UnicodeDecodeError:
            raise UnusableFileError("has a header line that is not UTF-8; save it as UTF-8") from None

    def begin_record(self) -> None:
        self._record = []

    @property
    def record(self) -> str:
        """The text of the record."""
        return "".join(self._record)

    @property
    def record_size(self) -> int:
        return sum(map(len, self._record))

    @property
    def record_is_blank(self) -> bool:
        return len(self._record) == 1 and not self._record[0].strip()

    @property
    def record_is_text(self) -> bool:
        """Whether the whole record was UTF-8."""
        return not self._has_met_other_bytes or all(map(_is_text, self._record))

    def give_up_all_but_first(self) -> str:
        """Put all lines but the first of the record back, to be read again; returns the first."""
        first, *rest = self._record
        self._again.extend(reversed(rest))
        self._record = [first]
        return first

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self._record) >= _MAX_RECORD_LINES:
            raise _RecordTooLongError
        if self._again:
            line = self._again.pop()
        else:
            raw = self._file.readline(MAX_LINE_BYTES)
            if not raw:
                raise StopIteration
            if len(raw) == MAX_LINE_BYTES:
                raise UnusableFileError(f"has a line longer than {MAX_LINE_BYTES >> 20} MiB; is it CSV?")
            try:
                line = raw.decode()
            except UnicodeDecodeError:
                self._has_met_other_bytes = True
                line = raw.decode("utf-8", "surrogateescape")
        self._record.append(line)
        return line


def _csv_header(line: str, layout: Layout) -> tuple[list[str], str]:
    """Column names (lower case, trimmed) and the delimiter that leads to most known ones."""
    candidates = []
    for delimiter in _DELIMITERS:
        try:
            names = next(csv.reader([line], delimiter=delimiter))
        except csv.Error as error:
            raise UnusableFileError(f"has a header line that is not CSV: {error}") from None
        header = [name.strip().lower() for name in names]
        candidates.append((len(set(header) & set(layout.columns)), header, delimiter))
    _, header, delimiter = max(candidates, key=lambda candidate: candidate[0])
    return header, delimiter


def _places(header: list[str], ignored: set[str], layout: Layout) -> list[int | None]:
    """Where in a record each feed column is, None if it is absent."""
    check_names_are_unique(header)
    check_needed_columns(set(header), layout)
    ignored |= {name for name in header if name} - set(layout.columns)
    return [header.index(name) if name in header else None for name in layout.columns]


def _is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True

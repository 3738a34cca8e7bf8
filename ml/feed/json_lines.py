"""Reads a feed in JSON lines: one object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import IO, Any

import msgspec
import pyarrow as pa

from ml.feed.rows import (
    INVALID_ENCODING,
    MALFORMED_ROW,
    MAX_LINE_BYTES,
    OFFERS,
    UTF_8_MARK,
    Batcher,
    Layout,
    Row,
    UnusableFileError,
    check_is_utf_8_text,
    check_needed_columns,
    escaped,
    printable,
)

_MAX_LAYOUTS = 1_000
"""Sets of names that are remembered; a feed has a few, a broken one a new one per line."""
_ENCODER = msgspec.json.Encoder(decimal_format="number")


def read_json_lines(
    file: IO[bytes], uri: str, ignored: set[str], layout: Layout = OFFERS
) -> Iterator[pa.RecordBatch]:
    """One JSON object a line. Numbers keep the digits they were written with; nested values stay JSON."""
    batcher = Batcher(uri, layout)
    reader = _JsonLines(layout)
    is_checked = False
    line = file.readline(MAX_LINE_BYTES)
    check_is_utf_8_text(line)
    line = line.removeprefix(UTF_8_MARK)
    if line.lstrip().startswith(b"["):
        raise UnusableFileError("is a JSON array, expected one object a line")
    while line:
        if len(line) == MAX_LINE_BYTES:
            raise UnusableFileError(f"has a line longer than {MAX_LINE_BYTES >> 20} MiB; is it JSON lines?")
        if not line.isspace():
            reader.read(line, batcher)
        if batcher.is_full:
            _check_columns(reader.names, layout)
            is_checked = True
            yield batcher.take()
        line = file.readline(MAX_LINE_BYTES)
    if batcher.rows:
        if not is_checked:
            _check_columns(reader.names, layout)
        yield batcher.take()
    ignored |= reader.names - set(layout.columns)


def _check_columns(names: set[str], layout: Layout) -> None:
    """Names vary from line to line; that of a needed column has to turn up in the first batch."""
    if not names:
        raise UnusableFileError("starts with lines that are no JSON objects; is it JSON lines?")
    check_needed_columns(names, layout)


class _JsonLines:
    """Turns lines into rows; knows which names it has seen."""

    def __init__(self, layout: Layout) -> None:
        self._columns = layout.columns
        self.names: set[str] = set()
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(float_hook=Decimal).decode
        self._layouts: dict[tuple[str, ...], list[str | None] | None] = {}

    def read(self, line: bytes, batcher: Batcher) -> None:
        """Add the row that ``line`` is, or what is wrong with it."""
        text = line.rstrip(b"\r\n")
        try:
            value = self._decode(text)
        except UnicodeDecodeError:
            self._read_wrongly_encoded(text.decode("utf-8", "surrogateescape"), batcher)
            return
        except (msgspec.DecodeError, ValueError, RecursionError):
            batcher.add_problem(MALFORMED_ROW, printable(text.decode("utf-8", "surrogateescape")))
            return
        row = self._row(value)
        if row is None:
            batcher.add_problem(MALFORMED_ROW, text.decode())
        else:
            batcher.add(row, len(text))

    def _read_wrongly_encoded(self, text: str, batcher: Batcher) -> None:
        try:
            row = self._row(json.loads(text))
        except (ValueError, RecursionError):
            row = None
        if row is None:
            batcher.add_problem(MALFORMED_ROW, printable(text))
        else:
            batcher.add_problem(
                INVALID_ENCODING, printable(text), [value and escaped(value) for value in row]
            )

    def _row(self, value: Any) -> Row | None:
        """The row in a decoded line; None if it is no object or names a column twice."""
        if not isinstance(value, dict):
            return None
        keys = tuple(value)
        if keys not in self._layouts:
            if len(self._layouts) == _MAX_LAYOUTS:
                self._layouts.clear()
            self._layouts[keys] = self._layout(keys)
        layout = self._layouts[keys]
        if layout is None:
            return None
        return [_json_text(value[key]) if key is not None else None for key in layout]

    def _layout(self, keys: tuple[str, ...]) -> list[str | None] | None:
        by_name = {key.strip().lower(): key for key in keys}
        if len(by_name) < len(keys):
            return None
        self.names.update(map(escaped, by_name))
        return [by_name.get(name) for name in self._columns]


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return _ENCODER.encode(value).decode()

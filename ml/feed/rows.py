"""Rows of a feed as every format delivers them, and what all formats ask of a file.

A row that cannot be understood is still a row: it is delivered with its ``problem`` and its original
``content``. Only what makes a whole file unusable raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from ml.offers import FEED_COLUMNS

MALFORMED_ROW = "malformed_row"
INVALID_ENCODING = "invalid_encoding"


@dataclass(frozen=True)
class Layout:
    """Which columns a feed has."""

    rows: str
    """What messages call its rows, e.g. ``offers``."""
    columns: tuple[str, ...]
    needed: tuple[str, ...]
    """Those without which a file cannot be used."""

    @property
    def schema(self) -> pa.Schema:
        """A row as delivered: every column as text, where it came from, and what was wrong with it."""
        types: dict[str, pa.DataType] = {
            **dict.fromkeys(self.columns, pa.string()),
            "source_file": pa.string(),
            "source_row": pa.int64(),
            "problem": pa.string(),
            "content": pa.string(),
        }
        return pa.schema(types)


OFFERS = Layout(
    rows="offers",
    columns=tuple(column.name for column in FEED_COLUMNS),
    needed=tuple(column.name for column in FEED_COLUMNS if column.needed),
)
FEED_COLUMN_NAMES = OFFERS.columns
RAW_SCHEMA = OFFERS.schema
"""An offer as delivered."""

BATCH_ROWS = 16_384
BATCH_BYTES = 32 << 20
"""A batch ends at whichever of the two comes first, so that huge values do not fill the memory."""

MAX_LINE_BYTES = 16 << 20

UTF_8_MARK = b"\xef\xbb\xbf"
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")

Row = list[str | None]
"""Values of one row in the order of its layout."""


class UnusableFileError(Exception):
    """A whole file cannot be used; the message says why without naming the file."""


class Batcher:
    """Gathers rows into batches."""

    def __init__(self, uri: str, layout: Layout = OFFERS) -> None:
        self._uri = uri
        self._layout = layout
        self._schema = layout.schema
        self._next_row = 1
        self._clear()

    def _clear(self) -> None:
        self._rows: list[Row] = []
        self._problems: list[str | None] = []
        self._contents: list[str | None] = []
        self._bytes = 0

    def add(self, row: Row, size: int) -> None:
        """A good row, which takes about ``size`` bytes."""
        self._rows.append(row)
        self._problems.append(None)
        self._contents.append(None)
        self._bytes += size

    def add_problem(self, problem: str, content: str, row: Row | None = None) -> None:
        """A row with something wrong, and its values as far as they are known."""
        self._rows.append(row or [None] * len(self._layout.columns))
        self._problems.append(problem)
        self._contents.append(content)
        self._bytes += 2 * len(content)

    @property
    def rows(self) -> int:
        """Rows that wait to be taken."""
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        """Whether it is time to :meth:`take`."""
        return len(self._rows) >= BATCH_ROWS or self._bytes >= BATCH_BYTES

    def take(self) -> pa.RecordBatch:
        """The rows added since the last call, numbered on from there."""
        count = len(self._rows)
        columns = [pa.array(values, pa.string()) for values in zip(*self._rows, strict=True)]
        batch = pa.RecordBatch.from_arrays(
            [
                *columns,
                pa.repeat(self._uri, count),
                pa.array(range(self._next_row, self._next_row + count), pa.int64()),
                pa.array(self._problems, pa.string()),
                pa.array(self._contents, pa.string()),
            ],
            schema=self._schema,
        )
        self._next_row += count
        self._clear()
        return batch


def without_first(batches: Iterable[pa.RecordBatch], skip: int) -> Iterator[pa.RecordBatch]:
    """The rows of ``batches`` behind the first ``skip``."""
    for batch in batches:
        if skip < batch.num_rows:
            yield batch.slice(skip) if skip else batch
        skip = max(0, skip - batch.num_rows)


def check_names_are_unique(names: list[str]) -> None:
    """Raise :class:`UnusableFileError` if a column occurs twice (columns without a name may)."""
    if doubled := sorted({name for name in names if name and names.count(name) > 1}):
        raise UnusableFileError(f"has more than one column {', '.join(doubled)}; name each once")


def check_needed_columns(present: set[str], layout: Layout = OFFERS) -> None:
    """Raise :class:`UnusableFileError` if a needed column is not among ``present``."""
    if missing := [name for name in layout.needed if name not in present]:
        shown = ", ".join(sorted(name for name in present if name)) or "none"
        raise UnusableFileError(f"has no column {', '.join(missing)}; its columns are {shown}")


def check_is_utf_8_text(first: bytes) -> None:
    """Raise :class:`UnusableFileError` if a file that begins like this is empty or UTF-16."""
    if not first:
        raise UnusableFileError("is empty (0 bytes)")
    if first.startswith(_UTF_16_MARKS) or b"\0" in first[:4]:
        raise UnusableFileError("is not UTF-8 text (UTF-16?); save it as UTF-8")


def escaped(value: str) -> str:
    r"""``value`` with every byte that was not UTF-8 written as ``\xe4``."""
    try:
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that JSON spelled out
        return value.encode("utf-8", "backslashreplace").decode()


def printable(line: str) -> str:
    """A line as it is kept in ``content``: without its end, see :func:`escaped`."""
    return escaped(line.rstrip("\r\n"))


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__

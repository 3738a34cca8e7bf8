"""Reads a feed in Parquet: whatever the types of its columns, text comes out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.feed.rows import (
    BATCH_BYTES,
    BATCH_ROWS,
    INVALID_ENCODING,
    OFFERS,
    Layout,
    check_names_are_unique,
    check_needed_columns,
    without_first,
)

_EXACT_FLOAT_INTEGERS = pa.scalar(float(1 << 53))
_HOLDS_BYTES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
)


def read_parquet(
    file: IO[bytes],
    uri: str,
    ignored: set[str],
    layout: Layout = OFFERS,
    columns: Sequence[str] | None = None,
    skip: int = 0,
) -> Iterator[pa.RecordBatch]:
    """Every column is turned into text, nested ones into JSON.

    Only ``columns`` (all of the layout if not given) are read, of which at least one must be a needed one;
    the others come out null. The first ``skip`` rows are left out; row groups of these alone are not read.
    """
    parquet = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    schema = parquet.schema_arrow
    names = [name.strip().lower() for name in schema.names]
    check_names_are_unique(names)
    by_name = dict(zip(names, schema.names, strict=True))
    check_needed_columns(set(by_name), layout)
    ignored |= set(by_name) - set(layout.columns)
    wanted = {name: by_name[name] for name in columns or layout.columns if name in by_name}
    groups, skipped = _groups_behind(parquet.metadata, skip)
    row = 1 + skip
    batches = parquet.iter_batches(
        batch_size=_batch_rows(parquet.metadata), columns=list(wanted.values()), row_groups=groups
    )
    for batch in without_first(batches, skip - skipped):
        yield _raw_batch(batch, wanted, uri, row, layout)
        row += batch.num_rows


def _groups_behind(metadata: pq.FileMetaData, skip: int) -> tuple[list[int], int]:
    """Row groups that hold a row behind the first ``skip``, and the rows of those before them."""
    skipped = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if skipped + rows > skip:
            return list(range(group, metadata.num_row_groups)), skipped
        skipped += rows
    return [], skipped


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows that fit into a batch, by the row group whose rows are largest."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0.0)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(largest, 1.0))))


def _raw_batch(
    batch: pa.RecordBatch, wanted: dict[str, str], uri: str, first_row: int, layout: Layout
) -> pa.RecordBatch:
    count = batch.num_rows
    columns: dict[str, pa.Array[Any]] = {}
    wrong: set[int] = set()
    for name in layout.columns:
        if name in wanted:
            columns[name], places = _text_column(batch.column(wanted[name]))
            wrong.update(places)
        else:
            columns[name] = pa.nulls(count, pa.string())
    problems: list[str | None] = [None] * count
    contents: list[str | None] = [None] * count
    for place in wrong:
        problems[place] = INVALID_ENCODING
        contents[place] = json.dumps(
            {name: columns[name][place].as_py() for name in wanted if columns[name][place].is_valid},
            ensure_ascii=False,
        )
    return pa.RecordBatch.from_arrays(
        [
            *columns.values(),
            pa.repeat(uri, count),
            pa.array(range(first_row, first_row + count), pa.int64()),
            pa.array(problems, pa.string()),
            pa.array(contents, pa.string()),
        ],
        schema=layout.schema,
    )


def _text_column(column: pa.Array[Any]) -> tuple[pa.Array[Any], list[int]]:
    """``column`` as strings, and the places whose bytes were not UTF-8 (their bytes are escaped)."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_nested(kind):
        texts = [None if value is None else _nested_text(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string()), []
    if pa.types.is_floating(kind):
        return _float_text(column), []
    if any(is_kind(kind) for is_kind in _HOLDS_BYTES):
        return _checked_text(column)
    try:
        return column.cast(pa.string()), []
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        return pa.array(texts, pa.string()), []


def _nested_text(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _float_text(column: pa.Array[Any]) -> pa.Array[Any]:
    """Whole numbers without an exponent: a GTIN that was stored as a float stays readable."""
    numbers: Any = column.cast(pa.float64())
    whole = pc.and_(pc.less(pc.abs(numbers), _EXACT_FLOAT_INTEGERS), pc.equal(pc.floor(numbers), numbers))
    integers = pc.if_else(whole, numbers, pa.scalar(None, pa.float64())).cast(pa.int64()).cast(pa.string())
    return pc.coalesce(integers, numbers.cast(pa.string()))


def _checked_text(column: pa.Array[Any]) -> tuple[pa.Array[Any], list[int]]:
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowInvalid:
        texts: list[str | None] = []
        wrong = []
        for place, value in enumerate(column.cast(pa.binary()).to_pylist()):
            texts.append(None if value is None else value.decode("utf-8", "backslashreplace"))
            if value is not None and not _is_utf_8(value):
                wrong.append(place)
        return pa.array(texts, pa.string()), wrong
    return text, []


def _is_utf_8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True

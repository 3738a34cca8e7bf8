"""A day's clean offers as a bulk job takes them: files of JSON lines, without what is answered already.

Every offer is either in one of the files, once, or in the table of captured answers. The artifact is made
once, so that however long the job takes, and whatever is captured meanwhile, its answers have their place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.runner import StageContext
from ml.serving.captures import Captures, encoded_digest
from ml.serving.predictor import PREDICTION_SCHEMA, prediction_table
from ml.serving.sent import SHARDS_FOLDER, EncodedOffer, encoded_offers
from ml.stages import TransformInputParameters

SHARDS_FILE = "shards.json"
CAPTURED_FILE = "captured.parquet"

CAPTURED_SCHEMA = pa.schema([pa.field("row", pa.int64()), *PREDICTION_SCHEMA])
"""A captured answer, and the row of ``offers.parquet`` (from 0) that it belongs to; sorted by row."""

MAX_LINE_BYTES = 1_000_000
"""A job sends lines together up to 1 MiB; a single one has to fit."""

_OFFERS_FILE = "offers.parquet"
_ROWS_AT_ONCE = 10_000
_MEMORY_LIMIT = "2GB"


_JOIN = f"""
    SELECT offer.file_row_number AS row, {", ".join(f"answer.{name}" for name in PREDICTION_SCHEMA.names)}
    FROM read_parquet(?, file_row_number = true) AS offer
    JOIN (
        FROM read_parquet(?, file_row_number = true)
        QUALIFY row_number() OVER (PARTITION BY payload ORDER BY file_row_number) = 1
    ) AS answer USING (payload)
    ORDER BY row
"""

Item = TypeVar("Item")


class Shard(msgspec.Struct, frozen=True):
    """One file of offers."""

    file: str
    """Its name in :data:`SHARDS_FOLDER`; in the order of these names offers are as in the table."""
    offers: int


def write_transform_input(context: StageContext, parameters: TransformInputParameters) -> dict[str, Any]:
    """Stage ``transform_input``: what a bulk job is to be asked, and what it need not be asked any more.

    Returns:
        ``offers``, ``captured`` (answered already), ``asked`` (the others), ``shards``, and
        ``skipped_captures`` (captured lines that could not be read).

    Raises:
        InputError: an offer is too large to be sent.
    """
    path = context.input("offers") / _OFFERS_FILE
    version = short_version(read_manifest(context.input("compiled_student")).digest)
    captured = context.output / CAPTURED_FILE
    skipped = 0
    if parameters.captured:
        captures = Captures(Path(parameters.captured), version, context.progress)
        _write_captured(context, captures, path, captured)
        skipped = captures.skipped_lines
        if captures.of_other_versions:
            context.progress.say(
                f"{captures.of_other_versions:,} captured answers are by other versions than {version}"
            )
    else:
        pq.write_table(CAPTURED_SCHEMA.empty_table(), captured)
    with_answer = pq.read_metadata(captured).num_rows
    total = pq.read_metadata(path).num_rows

    (context.output / SHARDS_FOLDER).mkdir()
    with context.progress.bar("preparing", total - with_answer, "offers") as bar:
        shards = []
        for shard in _write_shards(_not_answered(path, captured), context.output, parameters.shard_offers):
            shards.append(shard)
            bar.update(shard.offers)
    (context.output / SHARDS_FILE).write_bytes(msgspec.json.encode(shards))
    asked = sum(shard.offers for shard in shards)
    if asked + with_answer != total:
        raise RuntimeError(f"of {total:,} offers {with_answer:,} are answered and {asked:,} to be asked")
    context.progress.say(f"{asked:,} offers in {len(shards):,} files, {with_answer:,} answered already")
    return {
        "offers": total,
        "captured": with_answer,
        "asked": asked,
        "shards": len(shards),
        "skipped_captures": skipped,
    }


def read_shards(folder: Path) -> list[Shard]:
    """The files of offers in an artifact ``transform_input``."""
    return msgspec.json.decode((folder / SHARDS_FILE).read_bytes(), type=list[Shard])


def _write_captured(context: StageContext, captures: Captures, offers: Path, output: Path) -> None:
    """Join offers and captured answers by what was sent; of several answers the first one counts."""
    import duckdb

    context.scratch.mkdir(exist_ok=True)
    found, payloads = context.scratch / "found.parquet", context.scratch / "payloads.parquet"
    digest = pa.field("payload", pa.binary())
    with pq.ParquetWriter(found, pa.schema([digest, *PREDICTION_SCHEMA])) as writer:
        for answers in _in_chunks(captures.answers()):
            table = prediction_table([prediction for _, prediction in answers])
            column = pa.array([payload for payload, _ in answers], pa.binary())
            writer.write_table(table.add_column(0, digest, column))
    if not pq.read_metadata(found).num_rows:
        pq.write_table(CAPTURED_SCHEMA.empty_table(), output)
        return
    schema = pa.schema([digest])
    with pq.ParquetWriter(payloads, schema) as writer:
        for chunk in _in_chunks(encoded_offers(offers)):
            column = pa.array([encoded_digest(offer.json) for offer in chunk], pa.binary())
            writer.write_table(pa.table([column], schema=schema))
    settings = {"memory_limit": _MEMORY_LIMIT, "temp_directory": str(context.scratch / "duckdb")}
    with (
        duckdb.connect(config=settings) as database,
        pq.ParquetWriter(output, CAPTURED_SCHEMA, compression="zstd") as writer,
    ):
        joined = database.sql(_JOIN, params=[str(payloads), str(found)])
        for batch in joined.to_arrow_reader(_ROWS_AT_ONCE):
            writer.write_batch(batch.cast(CAPTURED_SCHEMA))


def _not_answered(offers: Path, captured: Path) -> Iterator[EncodedOffer]:
    """The offers without a captured answer."""
    rows = _rows(captured)
    answered = next(rows, None)
    for row, offer in enumerate(encoded_offers(offers)):
        if row == answered:
            answered = next(rows, None)
        else:
            yield offer


def _rows(captured: Path) -> Iterator[int]:
    with pq.ParquetFile(captured) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["row"]):
            yield from cast("list[int]", batch["row"].to_pylist())


def _write_shards(offers: Iterator[EncodedOffer], output: Path, size: int) -> Iterator[Shard]:
    """Write files of ``size`` offers, as many as it takes."""
    number, following = 0, next(offers, None)
    while following is not None:
        name, count = f"offers-{number:06d}.jsonl", 0
        with (output / SHARDS_FOLDER / name).open("wb") as file:
            while following is not None and count < size:
                if len(following.json) > MAX_LINE_BYTES:
                    raise InputError(
                        f"offer {following.offer_id[:100]} is {len(following.json):,} bytes as JSON, a bulk "
                        f"job takes {MAX_LINE_BYTES:,}: shorten its offer_id in the feed"
                    )
                file.write(following.json + b"\n")
                count, following = count + 1, next(offers, None)
        yield Shard(name, count)
        number += 1


def _in_chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _ROWS_AT_ONCE)):
        yield chunk

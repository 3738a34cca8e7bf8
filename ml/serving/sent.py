"""What is sent of an offer to be catalogued, whoever answers: the columns that a prediction is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

SENT_COLUMNS = ("offer_id", "title", "brand", "shop_category", "description")

JSON_LINES = (
    "application/jsonlines",
    "application/x-jsonlines",
    "application/x-ndjson",
    "application/jsonl",
)
"""Content types of a body with one offer, or one prediction, per line; the first is the one that we send."""

_SENT_CHARACTERS = 10_000
"""Of each column; the text a model reads is made of the first 2,000."""


def sent(offer: Mapping[str, Any]) -> dict[str, str]:
    """What travels of an offer, always in the same order; equal offers are equally sent."""
    return {name: value[:_SENT_CHARACTERS] for name in SENT_COLUMNS if (value := offer.get(name)) is not None}


def encoded_offers(path: Path, skip: int = 0, rows_at_once: int = 1024) -> Iterator[tuple[str, bytes]]:
    """Id, and JSON as it is sent, of the offers of a Parquet file behind the first ``skip``."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(rows_at_once, columns=list(SENT_COLUMNS)):
            kept = batch.slice(min(skip, batch.num_rows))
            skip -= batch.num_rows - kept.num_rows
            for offer in kept.to_pylist():
                yield offer["offer_id"], msgspec.json.encode(sent(offer))

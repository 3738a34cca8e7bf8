"""What is sent of an offer to be catalogued, whoever answers: the columns that a prediction is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow.parquet as pq

SENT_COLUMNS = ("offer_id", "title", "brand", "shop_category", "description", "country")

JSON_LINES = (
    "application/jsonlines",
    "application/x-jsonlines",
    "application/x-ndjson",
    "application/jsonl",
)
"""Content types of a body with one offer, or one prediction, per line; the first is the one that we send."""

SHARDS_FOLDER = "shards"
"""Of a ``transform_input``: the files of JSON lines that a bulk job reads."""

OUT_SUFFIX = ".out"
"""What a batch transform puts behind the name of a file, for the file with its answers."""

_REQUEST_BYTES = 4 << 20
"""Requests are cut here, well below what an endpoint accepts (6,291,456)."""

_SENT_CHARACTERS = 10_000
"""Of each column; the text a model reads is made of the first 2,000."""


def sent(offer: Mapping[str, Any]) -> dict[str, str]:
    """What travels of an offer, always in the same order; equal offers are equally sent."""
    return {name: value[:_SENT_CHARACTERS] for name in SENT_COLUMNS if (value := offer.get(name)) is not None}


class EncodedOffer(NamedTuple):
    """An offer as it is sent."""

    offer_id: str
    json: bytes


def encoded_offers(path: Path, skip: int = 0, rows_at_once: int = 1024) -> Iterator[EncodedOffer]:
    """The offers of a Parquet file behind the first ``skip``."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(rows_at_once, columns=list(SENT_COLUMNS)):
            kept = batch.slice(min(skip, batch.num_rows))
            skip -= batch.num_rows - kept.num_rows
            for offer in kept.to_pylist():
                yield EncodedOffer(offer["offer_id"], msgspec.json.encode(sent(offer)))


def in_requests(offers: Iterable[EncodedOffer], size: int) -> Iterator[list[EncodedOffer]]:
    """Offers that travel together: ``size`` at a time, or as many as an endpoint accepts at once."""
    request, byte_count = list[EncodedOffer](), 0
    for offer in offers:
        if request and (len(request) == size or byte_count + len(offer.json) > _REQUEST_BYTES):
            yield request
            request, byte_count = [], 0
        request.append(offer)
        byte_count += len(offer.json)
    if request:
        yield request

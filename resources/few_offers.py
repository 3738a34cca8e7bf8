"""The few offers for which a bulk job is not worth its start, sent to the endpoint instead."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ml.serving.sent import OUT_SUFFIX, SHARDS_FOLDER, EncodedOffer, in_requests
from resources.endpoints import Endpoints

_OFFERS_PER_REQUEST = 256


def ask_endpoint(endpoints: Endpoints, variant: str, prepared: Path, answers: Path) -> None:
    """Have the endpoint answer what a bulk job would, in the same files.

    Args:
        endpoints: Where to ask.
        variant: Who has to answer.
        prepared: Folder of the ``transform_input``.
        answers: Empty folder for the answers.

    Raises:
        InputFailure: the endpoint refused the offers, or has no such variant.
        EndpointError: it does not answer.
    """
    for shard in sorted((prepared / SHARDS_FOLDER).iterdir()):
        offers = map(_as_sent, shard.read_bytes().splitlines())
        with (answers / f"{shard.name}{OUT_SUFFIX}").open("wb") as file:
            for request in in_requests(offers, _OFFERS_PER_REQUEST):
                asked = [msgspec.json.decode(offer.json) for offer in request]
                file.write(msgspec.json.Encoder().encode_lines(endpoints.invoke(asked, variant)))


def _as_sent(line: bytes) -> EncodedOffer:
    return EncodedOffer(msgspec.json.decode(line)["offer_id"], line)

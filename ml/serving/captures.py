"""What a SageMaker endpoint captured of its requests, as answers that need not be asked for again.

Each line of a captured file is one request with its answer. An answer counts if it is by the very model
version, and the offer was sent with the very columns that we would send.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ml.progress import Progress
from ml.serving.predictor import Prediction
from ml.serving.sent import JSON_LINES, sent

_LINES_TOLD = 20
"""Of lines that are skipped; the others are only counted."""


class _Side(msgspec.Struct, rename="camel"):
    data: str
    observed_content_type: str = "application/json"
    encoding: str = "JSON"

    @property
    def body(self) -> bytes:
        """What travelled, whichever way it was noted."""
        return base64.b64decode(self.data, validate=True) if self.encoding == "BASE64" else self.data.encode()

    @property
    def is_lines(self) -> bool:
        return self.observed_content_type.split(";")[0].strip().lower() in JSON_LINES


class _Data(msgspec.Struct, rename="camel"):
    endpoint_input: _Side
    endpoint_output: _Side


class _Event(msgspec.Struct, rename="camel"):
    capture_data: _Data


class _Asked(msgspec.Struct):
    offers: list[dict[str, Any]]


class _Answered(msgspec.Struct):
    predictions: list[Prediction]


class Captures:
    """Reads the captured files of a folder; afterwards it knows what it passed over."""

    def __init__(self, folder: Path, model_version: str, progress: Progress) -> None:
        self._folder = folder
        self._version = model_version
        self._progress = progress
        self.skipped_lines = 0
        """Of which nothing could be read: half-written, or not this project's requests."""
        self.of_other_versions = 0
        """Answers by other model versions."""

    def answers(self) -> Iterator[tuple[bytes, Prediction]]:
        """Digest of what was sent (see :func:`payload_digest`) and its prediction, file by file in order."""
        for path in sorted(self._folder.rglob("*.jsonl")):
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from self._answers_in(line, f"{path.relative_to(self._folder)} line {number}")
        if self.skipped_lines > _LINES_TOLD:
            self._progress.say(f"{self.skipped_lines:,} captured lines were skipped in all")

    def _answers_in(self, line: bytes, place: str) -> Iterator[tuple[bytes, Prediction]]:
        try:
            pairs = _pairs(msgspec.json.decode(line, type=_Event).capture_data)
        except (ValueError, RecursionError) as error:  # those of msgspec, base64 and Unicode are ValueErrors
            self.skipped_lines += 1
            if self.skipped_lines <= _LINES_TOLD:
                self._progress.say(f"captured {place} is skipped: {_one_line(error)}")
            return
        for offer, prediction in pairs:
            if prediction.model_version != self._version:
                self.of_other_versions += 1
            elif prediction.problem is None and (digest := payload_digest(offer)) is not None:
                yield digest, prediction


def payload_digest(offer: Mapping[str, Any]) -> bytes | None:
    """16 bytes that stand for what is sent of an offer; None if it is nothing that we would send."""
    try:
        return encoded_digest(msgspec.json.encode(sent(offer)))
    except (TypeError, ValueError):
        return None  # a column that is no text


def encoded_digest(encoded: bytes) -> bytes:
    """The same, of the JSON as it is sent."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _pairs(data: _Data) -> list[tuple[dict[str, Any], Prediction]]:
    """Each offer of a request with its prediction: by position, or else by an id that only one has.

    Raises:
        ValueError: it is no request of offers, or no answer to it.
    """
    try:
        offers, predictions = _offers(data.endpoint_input), _predictions(data.endpoint_output)
    except binascii.Error as error:
        raise ValueError(f"no base64: {error}") from None
    if len(offers) == len(predictions) and all(
        prediction.offer_id == _id_of(offer) for offer, prediction in zip(offers, predictions, strict=True)
    ):
        return list(zip(offers, predictions, strict=True))
    by_id = {prediction.offer_id: prediction for prediction in predictions}
    ids = {_id_of(offer) for offer in offers}
    if None in by_id or None in ids or not len(ids) == len(offers) == len(predictions) == len(by_id):
        raise ValueError(f"{len(predictions)} predictions for {len(offers)} offers do not fit together")
    if ids != by_id.keys():
        raise ValueError("its predictions are for other offers")
    return [(offer, by_id[_id_of(offer)]) for offer in offers]


def _offers(side: _Side) -> list[dict[str, Any]]:
    if side.is_lines:
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in _lines(side.body)]
    return msgspec.json.decode(side.body, type=_Asked).offers


def _predictions(side: _Side) -> list[Prediction]:
    if side.is_lines:
        return [msgspec.json.decode(line, type=Prediction) for line in _lines(side.body)]
    return msgspec.json.decode(side.body, type=_Answered).predictions


def _lines(body: bytes) -> list[bytes]:
    return [line for line in body.split(b"\n") if line.strip()]


def _id_of(offer: Mapping[str, Any]) -> str | None:
    offer_id = offer.get("offer_id")
    return None if offer_id is None else str(offer_id)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""One serving process with its model: offers out of the body, predictions into the answer.

Inference has a thread of its own, so that the event loop stays free for pings. What was answered is told in
the log as JSON, from which metrics can be made where nothing but the log leaves the container. The process
binds its port only once the model is loaded, beside those who are there already. Starting, watching and
ending such processes is :mod:`ml.serving.server`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from ml.errors import InputError
from ml.serving.app import Answer, DrainingServer, Refusal, ServingApp
from ml.serving.predictor import Prediction, Predictor
from ml.serving.sent import JSON_LINES
from ml.serving.server import Listening, bound_socket
from ml.serving.variants import (
    LOW_CONFIDENCE,
    OFFERS_HEADER,
    TARGET_VARIANT_HEADER,
    names_a_version,
    variant_of,
)

_ENCODER = msgspec.json.Encoder()
_SECONDS_PER_LINE = 30


class _Request(msgspec.Struct):
    offers: list[dict[str, Any]]


class _Predictions(msgspec.Struct):
    predictions: list[Prediction]


class PredictorAnswers:
    """Answers of one :class:`Predictor`, which is called from one thread only."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._variant = variant_of(predictor.model_version)
        self._inference = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._tally = _Tally(predictor.model_version)

    async def health(self) -> dict[str, Any]:
        """Which model this is, and which process."""
        return {
            "model_version": self._predictor.model_version,
            "taxonomy_version": self._predictor.taxonomy_version,
            "pid": os.getpid(),
        }

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """One prediction per offer of ``body``, in their order.

        Raises:
            Refusal: the body is not what was agreed, or another variant was asked for.
        """
        wanted = headers.get(TARGET_VARIANT_HEADER, self._variant)
        if names_a_version(wanted) and wanted != self._variant:
            raise Refusal(400, f"there is no variant {wanted} here: {self._variant} serves")
        content_type = headers.get("content-type", "").split(";")[0].strip().lower()
        loop = asyncio.get_running_loop()
        accepted = _accepted_lines(headers)
        answer, offers, unsure = await loop.run_in_executor(
            self._inference, self._predict, body, content_type, bool(accepted)
        )
        self._tally.add(offers, unsure)
        told = {"content-type": accepted} if accepted else {}
        return Answer(body=answer, headers={OFFERS_HEADER: f"{offers};{unsure}", **told})

    def close(self) -> None:
        """Tell what was not told yet."""
        self._tally.tell()

    def _predict(self, body: bytes, content_type: str, in_lines: bool) -> tuple[bytes, int, int]:
        offers = _decode_lines(body) if content_type in JSON_LINES else _decode(body)
        predictions = self._predictor.predict(offers)
        answer = (
            _ENCODER.encode_lines(predictions) if in_lines else _ENCODER.encode(_Predictions(predictions))
        )
        return answer, len(predictions), _unsure(predictions)


class _Tally:
    """Counts answers, and writes them as one JSON line to standard output from time to time."""

    def __init__(self, model_version: str) -> None:
        self._model_version = model_version
        self._offers = self._low_confidence = 0
        self._began = 0.0
        self._next: asyncio.TimerHandle | None = None

    def add(self, offers: int, low_confidence: int) -> None:
        self._offers += offers
        self._low_confidence += low_confidence
        if self._next is None:
            loop = asyncio.get_running_loop()
            self._began = loop.time()
            self._next = loop.call_later(_SECONDS_PER_LINE, self.tell)

    def tell(self) -> None:
        """Write the line, unless nothing was answered since the last."""
        if self._next is None:
            return
        self._next.cancel()
        line = {
            "event": "answers",
            "model_version": self._model_version,
            "offers": self._offers,
            "low_confidence": self._low_confidence,
            "seconds": round(asyncio.get_running_loop().time() - self._began),
        }
        print(msgspec.json.encode(line).decode(), flush=True)
        self._offers = self._low_confidence = 0
        self._next = None


def _unsure(predictions: Sequence[Prediction]) -> int:
    """Offers without a category, or of whose likeliest category the model is less than half sure."""
    return sum(_confidence(prediction) < LOW_CONFIDENCE for prediction in predictions)


def _confidence(prediction: Prediction) -> float:
    """Of the likeliest category, which an answer for review names among the alternatives."""
    if prediction.needs_review:
        return prediction.alternatives[0].confidence
    return prediction.confidence or 0.0


def _accepted_lines(headers: Mapping[str, str]) -> str:
    """The type of JSON lines that the client wants its answer in; empty: it takes one object of JSON."""
    wanted = headers.get("accept", "").split(",")[0].split(";")[0].strip().lower()
    return wanted if wanted in JSON_LINES else ""


def _decode(body: bytes) -> list[dict[str, Any]]:
    try:
        return msgspec.json.decode(body, type=_Request).offers
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f'expected {{"offers": [{{"title": …}}, …]}}: {_one_line(error)}') from None


def _decode_lines(body: bytes) -> list[dict[str, Any]]:
    offers = []
    for number, line in enumerate(body.splitlines(), 1):
        if not line.strip():
            continue
        try:
            offers.append(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refusal(
                400, f"line {number}: expected one offer as a JSON object: {_one_line(error)}"
            ) from None
    return offers


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _serve(options: argparse.Namespace) -> None:
    """Load, listen, answer until told to end; the parent hears of it on ``--report-fd``."""

    def report(listening: Listening) -> None:
        os.write(options.report_fd, msgspec.json.encode(listening))

    try:
        predictor = Predictor.load(options.model)
        predictor.predict(
            [{"title": "the first inference allocates, the first request shall not wait for it"}]
        )
        listener = bound_socket(options.host, options.port)
    except InputError as error:
        report(Listening(error=str(error)))
        return
    app = ServingApp(PredictorAnswers(predictor), options.queue, options.timeout)
    listening = Listening(predictor.model_version, predictor.taxonomy_version)
    DrainingServer(app, lambda: report(listening), sys.stdin.fileno()).run(sockets=[listener])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__name__}", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--queue", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    return parser


if __name__ == "__main__":
    _serve(_parser().parse_args())

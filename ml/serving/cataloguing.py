"""A day of clean offers through the endpoint: every offer goes out once and comes back with a category.

Requests overlap, answers are put back in order, finished shards survive a kill. The endpoint has to
serve the very model that the artifact is derived from, or its digest would not say where it comes from.
Where a bulk job has answered already (:mod:`ml.serving.transform_input`), only its answers are put together.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.progress import Bar
from ml.runner import StageContext
from ml.serving.answers import answered_tables
from ml.serving.predictor import PREDICTION_SCHEMA, Prediction, prediction_table
from ml.serving.sent import encoded_offers, in_requests
from ml.serving.variants import TARGET_VARIANT_HEADER
from ml.stages import CataloguedOffersParameters

OFFERS_FILE = "offers.parquet"
CATALOGUED_FILE = "catalogued.parquet"

_SHARD_OFFERS = 10_000
"""What a kill can cost; also a row group of the result."""

_SECONDS_TO_CONNECT = 5.0
_SECONDS_TO_ANSWER = 60.0
_ATTEMPTS = 8
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
"""Pauses double from the first to the longest: about 15 s in all before an offer is given up."""

_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})


class EndpointUnavailableError(Exception):
    """The endpoint answered before, and stopped to; what it answered is kept for the next run."""


class _Answer(msgspec.Struct):
    predictions: list[Prediction]


class _Request(msgspec.Struct, frozen=True):
    """Offers that travel together, in their order."""

    body: bytes
    offer_ids: list[str]


def catalogue_offers(context: StageContext, parameters: CataloguedOffersParameters) -> dict[str, Any]:
    """Stage ``catalogued_offers``: a row of ``PREDICTION_SCHEMA`` per clean offer, in order.

    Returns:
        ``offers``, ``uncatalogued`` (without a category), ``mean_confidence`` (of the others), and of
        this run ``seconds`` and ``offers_per_second``.

    Raises:
        InputError: nothing answers at ``endpoint_url``, or another model version does; or the answers of a
            bulk job are not one for each offer, by this version.
        EndpointUnavailableError: it stopped to answer half way; the next run goes on from there.
    """
    path = context.input("offers") / OFFERS_FILE
    total = pq.read_metadata(path).num_rows
    version = short_version(read_manifest(context.input("compiled_student")).digest)
    started_at = time.monotonic()
    if parameters.prepared:
        done, tables = 0, answered_tables(context, parameters, version)
    else:
        done = _ask_endpoint(context, parameters, path, total, version)
        tables = (pq.read_table(shard, schema=PREDICTION_SCHEMA) for shard in _shards(context.checkpoints))
    written, catalogued, confidence = _write(tables, context.output / CATALOGUED_FILE)
    if written != total:
        raise RuntimeError(f"{total:,} offers went out, {written:,} rows came back")
    seconds = time.monotonic() - started_at
    context.progress.say(f"{total:,} offers catalogued by model {version}")
    return {
        "offers": total,
        "uncatalogued": total - catalogued,
        "mean_confidence": confidence / catalogued if catalogued else 0.0,
        "seconds": round(seconds, 3),
        "offers_per_second": round((total - done) / max(seconds, 1e-9), 1),
    }


def _ask_endpoint(
    context: StageContext, parameters: CataloguedOffersParameters, path: Path, total: int, version: str
) -> int:
    """Have the endpoint answer whatever finished shards lack; returns the offers that these had already."""
    if not parameters.endpoint_url:
        raise InputError("catalogued_offers needs endpoint_url, or prepared and answers of a bulk job")
    _keep_only_shards_of(f"{version} {read_manifest(context.input('offers')).digest}", context.checkpoints)
    done = _offers_in(_shards(context.checkpoints))
    if done:
        context.progress.say(f"going on after {done:,} offers")
    with context.progress.bar("cataloguing", total, "offers", done) as bar:
        asyncio.run(_send_all(path, context.checkpoints, version, parameters, bar))
    return done


async def _send_all(
    path: Path, checkpoints: Path, version: str, parameters: CataloguedOffersParameters, bar: Bar
) -> None:
    """Write what the shards lack, shard by shard."""
    shards = _shards(checkpoints)
    requests = _requests(path, skip=_offers_in(shards), size=parameters.batch_offers)
    number, tables = len(shards), list[pa.Table]()
    async for predictions in _answers(requests, version, parameters):
        tables.append(prediction_table(predictions))
        bar.update(len(predictions))
        if sum(table.num_rows for table in tables) >= _SHARD_OFFERS:
            _write_shard(checkpoints, number, tables)
            number, tables = number + 1, []
    if tables:
        _write_shard(checkpoints, number, tables)


async def _answers(
    requests: Iterator[_Request], version: str, parameters: CataloguedOffersParameters
) -> AsyncIterator[list[Prediction]]:
    """Predictions of each request, in order, at most ``in_flight`` requests under way."""
    timeout = httpx.Timeout(_SECONDS_TO_ANSWER, connect=_SECONDS_TO_CONNECT)
    limits = httpx.Limits(max_connections=parameters.in_flight)
    async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as client:
        endpoint = _Endpoint(client, parameters, version)
        under_way: deque[asyncio.Task[list[Prediction]]] = deque()
        try:
            for request in requests:
                under_way.append(asyncio.create_task(endpoint.predict(request)))
                if len(under_way) >= parameters.in_flight:
                    yield await under_way.popleft()
            while under_way:
                yield await under_way.popleft()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)


class _Endpoint:
    """An endpoint that has to serve one model version."""

    def __init__(
        self, client: httpx.AsyncClient, parameters: CataloguedOffersParameters, version: str
    ) -> None:
        self._client = client
        self._url = parameters.endpoint_url.rstrip("/")
        self._headers = {"content-type": "application/json"}
        if parameters.variant:
            self._headers[TARGET_VARIANT_HEADER] = parameters.variant
        self._version = version
        self._has_answered = False

    async def predict(self, request: _Request) -> list[Prediction]:
        """Predictions for the offers of ``request``, in their order."""
        response = await self._post(request.body)
        try:
            predictions = msgspec.json.decode(response.content, type=_Answer).predictions
        except msgspec.DecodeError as error:
            raise InputError(
                f"endpoint_url {self._url}: not an answer of this project's endpoint: {error}"
            ) from None
        if [prediction.offer_id for prediction in predictions] != request.offer_ids:
            raise InputError(
                f"endpoint_url {self._url}: {len(predictions)} predictions for {len(request.offer_ids)} "
                "offers, or for others than were sent; something on the way mixes answers up"
            )
        for prediction in predictions:
            if prediction.model_version != self._version:
                raise InputError(
                    f"endpoint_url {self._url} serves model version {prediction.model_version}, expected "
                    f"{self._version}; deploy compiled_student {self._version} first"
                )
        return predictions

    async def _post(self, body: bytes) -> httpx.Response:
        """The answer 200, after as many attempts as are worth it."""
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_pause(attempt))
            try:
                response = await self._client.post(
                    f"{self._url}/invocations", content=body, headers=self._headers
                )
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise InputError(f"endpoint_url {self._url}: {error}; expected http://host:port") from None
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                continue
            self._has_answered = True
            if response.status_code == 200:
                return response
            reason = f"{response.status_code} {response.text[:300]}"
            if response.status_code not in _TRY_AGAIN:
                raise InputError(f"endpoint_url {self._url} refused offers: {reason}")
        if not self._has_answered:
            raise InputError(
                f"endpoint_url {self._url} does not answer ({reason}); start the endpoint or correct the "
                "setting"
            )
        raise EndpointUnavailableError(
            f"endpoint {self._url} failed {_ATTEMPTS} times in a row ({reason}); run again to go on from here"
        )


def _pause(attempt: int) -> float:
    """Seconds before this attempt; spread out, so that clients do not come back together."""
    longest: float = min(_FIRST_PAUSE_SECONDS * 2**attempt, _LONGEST_PAUSE_SECONDS)
    return longest * random.uniform(0.5, 1.0)


def _requests(path: Path, skip: int, size: int) -> Iterator[_Request]:
    """The offers of a Parquet file behind the first ``skip``, ``size`` at a time."""
    for offers in in_requests(encoded_offers(path, skip, max(size, 1024)), size):
        body = b'{"offers":[' + b",".join(offer.json for offer in offers) + b"]}"
        yield _Request(body, [offer.offer_id for offer in offers])


def _shards(checkpoints: Path) -> list[Path]:
    """Finished shards, in order."""
    return sorted(checkpoints.glob("shard-*.parquet"))


def _keep_only_shards_of(origin: str, checkpoints: Path) -> None:
    """Drop what was left here by a run with another model or other offers."""
    path = checkpoints / "origin.txt"
    if not path.exists() or path.read_text() != origin:
        for shard in _shards(checkpoints):
            shard.unlink()
        path.write_text(origin)


def _offers_in(shards: list[Path]) -> int:
    return sum(pq.read_metadata(shard).num_rows for shard in shards)


def _write_shard(checkpoints: Path, number: int, tables: list[pa.Table]) -> None:
    path = checkpoints / f"shard-{number:06d}.parquet"
    partial = path.with_suffix(".partial")
    pq.write_table(pa.concat_tables(tables), partial, compression="zstd")
    partial.rename(path)


def _write(tables: Iterable[pa.Table], output: Path) -> tuple[int, int, float]:
    """Write all tables as one file; returns rows, those with a category, and the sum of their confidence."""
    written, catalogued, confidence = 0, 0, 0.0
    with pq.ParquetWriter(output, PREDICTION_SCHEMA, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)
            written += table.num_rows
            catalogued += table.num_rows - table["category_id"].null_count
            confidence += pc.sum(table["confidence"]).as_py() or 0.0
    return written, catalogued, confidence

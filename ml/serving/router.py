"""``python -m ml route``: one port for several models side by side, by weight, with or without a shadow.

It steps in only while a version is tried out, models share the requests or one sees copies; a model that
serves alone has its port to itself, at no cost. So the router is started and ended like a server
(:mod:`ml.serving.server`): it binds the port when every model answers, beside those who are there already,
drains on SIGTERM, and the servers behind it, on ports of their own, end when it does, however it went.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import msgspec
import uvloop

from ml.cores import available_cores
from ml.errors import InputError
from ml.serving.app import Answer, DrainingServer, Refusal, ServingApp
from ml.serving.routing import Question, RoutePlan, RouterState, VariantState, listening_socket
from ml.serving.server import DEFAULT_QUEUE, DEFAULT_TIMEOUT_SECONDS, ServerState, bound_socket
from ml.serving.shares import Shares
from ml.serving.upstream import Mirror, Upstream, UpstreamGoneError, start_all
from ml.serving.variants import INVOKED_VARIANT_HEADER, TARGET_VARIANT_HEADER

_HOST = "127.0.0.1"
_SECONDS_TO_KEEP_A_CONNECTION = 3.0
"""Idle; the servers close theirs after five, and would lose a request that comes at that moment."""

_SECONDS_FOR_THE_SERVER = 5.0
"""So much later than the server behind it, the router gives up a request itself."""


def main(arguments: Sequence[str]) -> None:
    """Route until SIGTERM or SIGINT; then returns when everything under way is answered.

    Raises:
        InputError: a model cannot be loaded, the port cannot be had, or the plan is none.
    """
    options = _options(arguments)
    plan = _read_plan(options.plan)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    with (
        tempfile.TemporaryDirectory(prefix="route-") as folder,
        start_all(plan, options.program, options.workers, options.timeout, Path(folder)) as upstreams,
        bound_socket(_HOST, options.port) as listener,
        listening_socket(options.control) as control,
    ):
        try:
            uvloop.run(_route(options, upstreams, listener, control))
        finally:
            options.control.unlink(missing_ok=True)
            options.state_file.unlink(missing_ok=True)


class Router:
    """Answers each request by one of the models; what stands behind the application of a router."""

    def __init__(self, upstreams: Sequence[Upstream], session: aiohttp.ClientSession) -> None:
        """Share requests by the weights of the plan.

        Args:
            upstreams: The models, of which one at least is no shadow.
            session: By which they are asked.
        """
        self._answering = [upstream for upstream in upstreams if not upstream.variant.is_shadow]
        self._upstreams = upstreams
        self._main = max(self._answering, key=lambda upstream: upstream.variant.weight)
        self._session = session
        self._mirrors = [Mirror(upstream, session) for upstream in upstreams if upstream.variant.is_shadow]
        self._planned = [upstream.variant.weight for upstream in self._answering]
        self._weights, self._shares = self._planned, Shares(self._planned)
        self._back_to_plan: asyncio.TimerHandle | None = None

    async def health(self) -> dict[str, Any]:
        """Of the model with the most weight in the plan."""
        return await self._main.health(self._session)

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Of the variant that was asked for, or whose turn it is; of another one if its server is gone.

        Raises:
            Refusal: there is no such variant, none could be reached, or it broke off.
        """
        wanted = headers.get(TARGET_VARIANT_HEADER)
        upstream = self._named(wanted) if wanted else self._answering[self._shares.next()]
        try:
            answer = await upstream.ask(self._session, body, headers)
        except UpstreamGoneError as gone:
            other = None if wanted else self._instead_of(upstream)
            if other is None:
                raise Refusal(503, f"variant {gone} cannot be reached") from None
            upstream, answer = other, await self._second_answer(other, body, headers)
        for mirror in self._mirrors:
            mirror.offer(body, headers)
        return msgspec.structs.replace(
            answer, headers={**answer.headers, INVOKED_VARIANT_HEADER: upstream.variant.name}
        )

    def close(self) -> None:
        """Send no more copies."""
        for mirror in self._mirrors:
            mirror.close()

    def share(self, weights: Mapping[str, float], seconds: float) -> None:
        """Share requests like this; after ``seconds`` as planned, unless it is told again.

        Raises:
            ValueError: a variant is unknown, or no weight is above 0.
        """
        names = {upstream.variant.name for upstream in self._answering}
        if not weights.keys() <= names or min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise ValueError(f"weights {dict(weights)}: expected some of {', '.join(sorted(names))}, above 0")
        self._set_weights([weights.get(upstream.variant.name, 0.0) for upstream in self._answering])
        if self._back_to_plan is not None:
            self._back_to_plan.cancel()
        self._back_to_plan = asyncio.get_running_loop().call_later(seconds, self._set_weights, self._planned)

    def state(self) -> RouterState:
        """Each variant, and what was seen of it."""
        total = sum(self._weights)
        weights = {
            upstream.variant.name: weight / total
            for upstream, weight in zip(self._answering, self._weights, strict=True)
        }
        dropped = {mirror.name: mirror.dropped for mirror in self._mirrors}
        return RouterState(
            variants=[
                VariantState(
                    name=(name := upstream.variant.name),
                    model_version=upstream.variant.model_version,
                    taxonomy_version=upstream.taxonomy_version,
                    weight=weights.get(name, upstream.variant.weight),
                    is_shadow=upstream.variant.is_shadow,
                    is_up=upstream.is_up,
                    requests=upstream.seen.requests,
                    errors=upstream.seen.errors,
                    p99_milliseconds=upstream.seen.p99_milliseconds(),
                    offers=upstream.seen.offers,
                    low_confidence=upstream.seen.low_confidence,
                    dropped=dropped.get(name, 0),
                )
                for upstream in self._upstreams
            ]
        )

    def _set_weights(self, weights: list[float]) -> None:
        if weights != self._weights:  # told the same again: its block of requests goes on
            self._weights, self._shares = weights, Shares(weights)

    def _named(self, name: str) -> Upstream:
        for upstream in self._answering:
            if upstream.variant.name == name:
                return upstream
        names = ", ".join(upstream.variant.name for upstream in self._answering)
        raise Refusal(400, f"there is no variant {name} here: {names} serve")

    def _instead_of(self, gone: Upstream) -> Upstream | None:
        """Of the others that have a share right now, the one with the largest."""
        others = [
            (weight, upstream)
            for weight, upstream in zip(self._weights, self._answering, strict=True)
            if weight and upstream is not gone
        ]
        return max(others, key=lambda other: other[0])[1] if others else None

    async def _second_answer(self, upstream: Upstream, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            return await upstream.ask(self._session, body, headers)
        except UpstreamGoneError as gone:
            raise Refusal(503, f"variant {gone} cannot be reached, nor the one before it") from None


async def _route(
    options: argparse.Namespace,
    upstreams: Sequence[Upstream],
    listener: socket.socket,
    control: socket.socket,
) -> None:
    """Take requests until told to end, and questions of the owner beside."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_SECONDS_TO_KEEP_A_CONNECTION)
    timeout = aiohttp.ClientTimeout(total=options.timeout + _SECONDS_FOR_THE_SERVER)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        router = Router(upstreams, session)
        queue = DEFAULT_QUEUE * options.workers * len(upstreams)
        app = ServingApp(router, queue, options.timeout + 2 * _SECONDS_FOR_THE_SERVER)
        asked = await asyncio.start_unix_server(lambda *ends: _tell(router, *ends), sock=control)
        # From here on the server notices signals; it passes them on when it has drained.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        async with asked:
            await DrainingServer(app, lambda: _announce(options, upstreams, listener)).serve([listener])


async def _tell(router: Router, question: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
    """Answer one question of the owner."""
    try:
        asked = msgspec.json.decode(await question.readline(), type=Question)
        if asked.weights:
            router.share(asked.weights, asked.seconds)
        state = router.state()
    except (ValueError, msgspec.DecodeError) as error:
        state = RouterState(error=str(error))
    answer.write(msgspec.json.encode(state) + b"\n")
    answer.close()


def _announce(options: argparse.Namespace, upstreams: Sequence[Upstream], listener: socket.socket) -> None:
    """Say that requests are taken; whoever started this process waits for the file."""
    main_one = max(
        (upstream for upstream in upstreams if not upstream.variant.is_shadow),
        key=lambda upstream: upstream.variant.weight,
    )
    state = ServerState(
        pid=os.getpid(),
        url=f"http://{_HOST}:{listener.getsockname()[1]}",
        model=main_one.variant.model,
        model_version=main_one.variant.model_version,
        taxonomy_version=main_one.taxonomy_version,
        workers=[upstream.process.pid for upstream in upstreams],
    )
    shares = ", ".join(f"{upstream.variant.name} {upstream.variant.weight:.0%}" for upstream in upstreams)
    print(f"route: {state.url} for {shares}", file=sys.stderr, flush=True)
    partial = options.state_file.with_name(options.state_file.name + ".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
    partial.rename(options.state_file)


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _read_plan(path: Path) -> RoutePlan:
    try:
        plan = msgspec.json.decode(path.read_bytes(), type=RoutePlan)
    except FileNotFoundError:
        raise InputError(f"--plan {path}: no such file") from None
    except msgspec.DecodeError as error:
        raise InputError(f"--plan {path}: {error}") from None
    if not any(variant.weight > 0 and not variant.is_shadow for variant in plan.variants):
        raise InputError(f"--plan {path}: no variant has a share of the requests; give one a weight above 0")
    return plan


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ml route",
        description="One port of this machine for several compiled models side by side.",
    )
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="JSON: models and weights")
    parser.add_argument("--port", type=int, required=True, help="0: any free one")
    parser.add_argument(
        "--control",
        type=Path,
        required=True,
        metavar="SOCKET",
        help="where its owner asks and steers it",
    )
    parser.add_argument(
        "--state-file", type=Path, required=True, metavar="FILE", help="JSON, written once all answer"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        help="processes of one thread each, per model (one per core)",
    )
    parser.add_argument(
        "--timeout", type=int, default=DEFAULT_TIMEOUT_SECONDS, help="seconds for a model to answer (60)"
    )
    parser.add_argument("--program", default="ml", help="module whose command serve is the server (ml)")
    return parser.parse_args(arguments)

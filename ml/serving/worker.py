"""One serving process: the ASGI application, and a server that takes connections without losing any.

The application answers ``GET /ping`` and ``POST /invocations``. Inference has a thread of its own,
so the event loop stays free for pings; what waits for it is bounded, the rest is told to come back.
The process binds its port only once the model is loaded, beside those who are there already.
Starting, watching and ending such processes is :mod:`ml.serving.server`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import uvicorn

from ml.errors import InputError
from ml.serving.predictor import Prediction, Predictor
from ml.serving.protocol import protocol_with_deadline
from ml.serving.server import Listening, bound_socket

MAX_BODY_BYTES = 6_291_456
"""SageMaker's limit on a request; the endpoint keeps it everywhere, so that clients can rely on it."""

_JSON_LINES = (
    "application/jsonlines",
    "application/x-jsonlines",
    "application/x-ndjson",
    "application/jsonl",
)
_DISCARDED_BYTES = 8 * MAX_BODY_BYTES
"""An unwanted body is read up to here before the refusal: a client that still sends sees no answer."""

_SECONDS_TO_REUSE_A_CONNECTION = 1.0
"""While draining: how long an open connection may bring one more request, answered with ``close``."""

_SECONDS_TO_FINISH = 25
"""While draining: how long requests under way may take. SageMaker kills after 30 s."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Request(msgspec.Struct):
    offers: list[dict[str, Any]]


class _Answer(msgspec.Struct):
    predictions: list[Prediction]


class _Refusal(Exception):
    """The request is not served; status and reason go to the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class ServingApp:
    """ASGI application around one :class:`Predictor`."""

    def __init__(self, predictor: Predictor, queue_size: int = 32, timeout_seconds: float = 60.0) -> None:
        """Wrap ``predictor``.

        Args:
            predictor: What answers; called from one thread only.
            queue_size: Requests at once whose body has arrived; more get 503. Those that still arrive
                hold no place, so that slow clients do not keep others out, but at most as many bytes
                as that many of the largest bodies.
            timeout_seconds: A body that takes longer to arrive gets 408, one that waits longer for
                its answer 503.
        """
        self.is_draining = False
        """Set when the process is to end: every answer then closes its connection."""
        self._predictor = predictor
        self._queue_size = queue_size
        self._timeout_seconds = timeout_seconds
        self._under_way = 0
        self._arrived_bytes = 0
        """Of bodies that are not complete yet."""
        self._inference = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        try:
            status, body = await self._respond(scope, receive)
        except _Refusal as refusal:
            status, body = refusal.status, msgspec.json.encode({"error": str(refusal)})
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if status in {408, 413} or self.is_draining:
            headers.append((b"connection", b"close"))
        if status == 503:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _respond(self, scope: Message, receive: Receive) -> tuple[int, bytes]:
        match scope["method"], scope["path"]:
            case "GET" | "HEAD", "/ping":
                return 200, self._health()
            case "POST", "/invocations":
                return 200, await self._invoke(scope, receive)
            case _, "/ping" | "/invocations":
                raise _Refusal(405, f"{scope['path']} does not take {scope['method']}")
        raise _Refusal(404, f"there is no {scope['path']}; ask GET /ping or POST /invocations")

    def _health(self) -> bytes:
        return msgspec.json.encode(
            {
                "status": "draining" if self.is_draining else "ok",
                "model_version": self._predictor.model_version,
                "taxonomy_version": self._predictor.taxonomy_version,
                "pid": os.getpid(),
            }
        )

    async def _invoke(self, scope: Message, receive: Receive) -> bytes:
        if self._under_way >= self._queue_size:
            await self._discard(receive)
            raise self._busy()
        body = await self._read(receive)
        if self._under_way >= self._queue_size:
            raise self._busy()
        self._under_way += 1
        try:
            return await self._answer(body, _content_type(scope))
        finally:
            self._under_way -= 1

    def _busy(self) -> _Refusal:
        return _Refusal(503, f"{self._queue_size} requests are under way already; try again in a second")

    async def _read(self, receive: Receive) -> bytes:
        chunks, size, is_complete = [], 0, False
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while not is_complete:
                    chunk, is_complete = await _next_chunk(receive)
                    size += len(chunk)
                    self._arrived_bytes += len(chunk)
                    if size > MAX_BODY_BYTES:
                        await self._discard(receive, is_complete)
                        raise _Refusal(
                            413,
                            f"the body is larger than {MAX_BODY_BYTES:,} bytes; send fewer offers at once",
                        )
                    if self._arrived_bytes > self._queue_size * MAX_BODY_BYTES:
                        await self._discard(receive, is_complete)
                        raise self._busy()
                    chunks.append(chunk)
        except TimeoutError:
            raise _Refusal(408, f"the body did not arrive within {self._timeout_seconds:g} s") from None
        finally:
            self._arrived_bytes -= size
        return b"".join(chunks)

    async def _discard(self, receive: Receive, is_complete: bool = False) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_seconds):
                while not is_complete and size <= _DISCARDED_BYTES:
                    chunk, is_complete = await _next_chunk(receive)
                    size += len(chunk)

    async def _answer(self, body: bytes, content_type: str) -> bytes:
        loop = asyncio.get_running_loop()
        answer = loop.run_in_executor(self._inference, self._predict, body, content_type)
        try:
            return await asyncio.wait_for(answer, self._timeout_seconds)
        except TimeoutError:
            raise _Refusal(
                503, f"no answer within {self._timeout_seconds:g} s; send fewer offers at once"
            ) from None

    def _predict(self, body: bytes, content_type: str) -> bytes:
        offers = _decode_lines(body) if content_type in _JSON_LINES else _decode(body)
        return msgspec.json.encode(_Answer(self._predictor.predict(offers)))


def _content_type(scope: Message) -> str:
    for name, value in scope["headers"]:
        if name == b"content-type":
            return str(value.decode("latin-1")).split(";")[0].strip().lower()
    return ""


async def _next_chunk(receive: Receive) -> tuple[bytes, bool]:
    """More of the body, and whether that was all of it."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _Refusal(400, "the client went away")
    return message.get("body", b""), not message.get("more_body", False)


def _decode(body: bytes) -> list[dict[str, Any]]:
    try:
        return msgspec.json.decode(body, type=_Request).offers
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _Refusal(400, f'expected {{"offers": [{{"title": …}}, …]}}: {_one_line(error)}') from None


def _decode_lines(body: bytes) -> list[dict[str, Any]]:
    offers = []
    for number, line in enumerate(body.splitlines(), 1):
        if not line.strip():
            continue
        try:
            offers.append(msgspec.json.decode(line, type=dict[str, Any]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _Refusal(
                400, f"line {number}: expected one offer as a JSON object: {_one_line(error)}"
            ) from None
    return offers


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Server(uvicorn.Server):
    """Says when it listens; ends when its parent does; loses no connection when it ends."""

    def __init__(self, config: uvicorn.Config, app: ServingApp, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), self._parent_is_gone)
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what clients have begun.

        The kernel resets connections that nobody accepted when their listener closes, so they are
        taken first. Open connections may bring one more request: closing them at once would fail
        one that is on its way.
        """
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self._app.is_draining = True
        await self._take_waiting_connections(sockets or [])
        deadline = asyncio.get_running_loop().time() + _SECONDS_TO_REUSE_A_CONNECTION
        while self.server_state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    def _parent_is_gone(self) -> None:
        self.should_exit = True
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())

    async def _take_waiting_connections(self, listeners: list[socket.socket]) -> None:
        waiting = []
        for listener in listeners:
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        for listener in listeners:
            listener.close()
        for connection in waiting:
            connection.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)

    def _protocol(self) -> asyncio.Protocol:
        factory: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = factory(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


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
    app = ServingApp(predictor, options.queue, options.timeout)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol_with_deadline(options.timeout),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )
    listening = Listening(predictor.model_version, predictor.taxonomy_version)
    _Server(config, app, lambda: report(listening)).run(sockets=[listener])


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

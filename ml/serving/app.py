"""The ASGI application of a serving process, and a server that takes connections without losing any.

The application answers ``GET /ping`` and ``POST /invocations``; what waits is bounded, the rest is told to
come back. Behind it stands a model (:mod:`ml.serving.worker`) or a router (:mod:`ml.serving.router`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Protocol

import msgspec
import uvicorn

from ml.serving.protocol import protocol_with_deadline

MAX_BODY_BYTES = 6_291_456
"""SageMaker's limit on a request; the endpoint keeps it everywhere, so that clients can rely on it."""

_DISCARDED_BYTES = 8 * MAX_BODY_BYTES
"""An unwanted body is read up to here before the refusal: a client that still sends sees no answer."""

_SECONDS_TO_REUSE_A_CONNECTION = 1.0
"""While draining: how long an open connection may bring one more request, answered with ``close``."""

_SECONDS_TO_FINISH = 25
"""While draining: how long requests under way may take. SageMaker kills after 30 s."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What goes back to the client."""

    status: int = 200
    body: bytes
    headers: dict[str, str] = {}
    """Beside those that every answer has."""


class Refusal(Exception):
    """The request is not served; status and reason go to the client."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Answerer(Protocol):
    """Who answers behind the application."""

    async def health(self) -> dict[str, Any]:
        """What ``/ping`` says of it.

        Raises:
            Refusal: it cannot answer.
        """

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        """The answer to one request.

        Args:
            body: All of it.
            headers: Those of the request, their names in lower case.

        Raises:
            Refusal: there is none.
        """

    def close(self) -> None:
        """Nothing is asked any more."""


class ServingApp:
    """ASGI application around one :class:`Answerer`."""

    def __init__(self, answerer: Answerer, queue_size: int = 32, timeout_seconds: float = 60.0) -> None:
        """Wrap ``answerer``.

        Args:
            answerer: What answers.
            queue_size: Requests at once whose body has arrived; more get 503. Those that still arrive
                hold no place, so that slow clients do not keep others out, but at most as many bytes
                as that many of the largest bodies.
            timeout_seconds: A body that takes longer to arrive gets 408, one that waits longer for
                its answer 503.
        """
        self.is_draining = False
        """Set when the process is to end: every answer then closes its connection."""
        self._answerer = answerer
        self._queue_size = queue_size
        self.timeout_seconds = timeout_seconds
        self._under_way = 0
        self._arrived_bytes = 0
        """Of bodies that are not complete yet."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        try:
            answer = await self._respond(scope, receive)
        except Refusal as refusal:
            answer = Answer(status=refusal.status, body=msgspec.json.encode({"error": str(refusal)}))
        headers = {"content-type": "application/json", "content-length": str(len(answer.body))}
        if answer.status in {408, 413} or self.is_draining:
            headers["connection"] = "close"
        if answer.status == 503:
            headers["retry-after"] = "1"
        headers |= answer.headers
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
        await send({"type": "http.response.body", "body": answer.body})

    def close(self) -> None:
        """Nothing is asked any more."""
        self._answerer.close()

    async def _respond(self, scope: Message, receive: Receive) -> Answer:
        match scope["method"], scope["path"]:
            case "GET" | "HEAD", "/ping":
                return await self._health()
            case "POST", "/invocations":
                return await self._invoke(scope, receive)
            case _, "/ping" | "/invocations":
                raise Refusal(405, f"{scope['path']} does not take {scope['method']}")
        raise Refusal(404, f"there is no {scope['path']}; ask GET /ping or POST /invocations")

    async def _health(self) -> Answer:
        health = {"status": "draining" if self.is_draining else "ok", **await self._answerer.health()}
        return Answer(body=msgspec.json.encode(health))

    async def _invoke(self, scope: Message, receive: Receive) -> Answer:
        if self._under_way >= self._queue_size:
            await self._discard(receive)
            raise self._busy()
        body = await self._read(receive)
        if self._under_way >= self._queue_size:
            raise self._busy()
        self._under_way += 1
        try:
            return await self._answer(body, _headers(scope))
        finally:
            self._under_way -= 1

    def _busy(self) -> Refusal:
        return Refusal(503, f"{self._queue_size} requests are under way already; try again in a second")

    async def _read(self, receive: Receive) -> bytes:
        chunks, size, is_complete = [], 0, False
        try:
            async with asyncio.timeout(self.timeout_seconds):
                while not is_complete:
                    chunk, is_complete = await _next_chunk(receive)
                    size += len(chunk)
                    self._arrived_bytes += len(chunk)
                    if size > MAX_BODY_BYTES:
                        await self._discard(receive, is_complete)
                        raise Refusal(
                            413,
                            f"the body is larger than {MAX_BODY_BYTES:,} bytes; send fewer offers at once",
                        )
                    if self._arrived_bytes > self._queue_size * MAX_BODY_BYTES:
                        await self._discard(receive, is_complete)
                        raise self._busy()
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self.timeout_seconds:g} s") from None
        finally:
            self._arrived_bytes -= size
        return b"".join(chunks)

    async def _discard(self, receive: Receive, is_complete: bool = False) -> None:
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.timeout_seconds):
                while not is_complete and size <= _DISCARDED_BYTES:
                    chunk, is_complete = await _next_chunk(receive)
                    size += len(chunk)

    async def _answer(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        try:
            return await asyncio.wait_for(self._answerer.answer(body, headers), self.timeout_seconds)
        except TimeoutError:
            raise Refusal(
                503, f"no answer within {self.timeout_seconds:g} s; send fewer offers at once"
            ) from None


def _headers(scope: Message) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def _next_chunk(receive: Receive) -> tuple[bytes, bool]:
    """More of the body, and whether that was all of it."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise Refusal(400, "the client went away")
    return message.get("body", b""), not message.get("more_body", False)


class DrainingServer(uvicorn.Server):
    """Says when it listens; ends when its parent does; loses no connection when it ends."""

    def __init__(self, app: ServingApp, on_listening: Callable[[], None], parent: int | None = None) -> None:
        """Serve ``app``.

        Args:
            app: What it is told when it drains.
            on_listening: Called once connections are taken.
            parent: File descriptor that ends with the process that started this one; None: outlive it.
        """
        super().__init__(_config(app))
        self._app = app
        self._on_listening = on_listening
        self._parent = parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        await super().startup(sockets)
        if self._parent is not None:
            asyncio.get_running_loop().add_reader(self._parent, self._parent_is_gone)
        self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what clients have begun.

        The kernel resets connections that nobody accepted when their listener closes, so they are
        taken first. Open connections may bring one more request: closing them at once would fail
        one that is on its way.
        """
        self._forget_parent()
        self._app.is_draining = True
        await self._take_waiting_connections(sockets or [])
        deadline = asyncio.get_running_loop().time() + _SECONDS_TO_REUSE_A_CONNECTION
        while self.server_state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
        self._app.close()

    def _parent_is_gone(self) -> None:
        self.should_exit = True
        self._forget_parent()

    def _forget_parent(self) -> None:
        if self._parent is not None:
            asyncio.get_running_loop().remove_reader(self._parent)

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


def _config(app: ServingApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=protocol_with_deadline(app.timeout_seconds),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_SECONDS_TO_FINISH,
    )

"""The servers behind a router: one per model, asked over connections of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from ml.errors import InputError
from ml.serving.app import Answer, Refusal
from ml.serving.routing import RoutedVariant, RoutePlan
from ml.serving.seen import Seen
from ml.serving.server import ServerState
from ml.serving.shares import Shares
from ml.serving.variants import TARGET_VARIANT_HEADER

_SECONDS_BETWEEN_LOOKS = 0.05
_SECONDS_TO_DRAIN = 28.0
_SECONDS_PER_PING = 2.0

_MIRRORED_AT_ONCE = 4
_WAITING_COPIES = 64
_WAITING_BYTES = 32 << 20
"""A shadow that falls behind further than this misses requests; nobody waits for it."""

_SHADOW_NICENESS = 10
"""On a machine with work for all its cores the shadow waits, and not those that answer."""

_OF_ONE_CONNECTION = frozenset(
    {
        "connection",
        "content-length",
        "date",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        TARGET_VARIANT_HEADER,
    }
)
"""Headers that are not passed on: they are about the way to the router, or for it."""


class UpstreamGoneError(Exception):
    """No connection could be made: the server has not seen the request."""


class Upstream:
    """One model behind the router: its server process, and what was seen of it."""

    def __init__(self, variant: RoutedVariant, process: subprocess.Popen[bytes], state: ServerState) -> None:
        """Take note of a server that answers.

        Args:
            variant: What it serves.
            process: Its supervisor.
            state: What it says of itself.
        """
        self.variant = variant
        self.process = process
        self.taxonomy_version = state.taxonomy_version
        self.seen = Seen()
        self._url = state.url

    @property
    def is_up(self) -> bool:
        """Whether the server lives."""
        return self.process.poll() is None

    async def health(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        """What its ``/ping`` says.

        Raises:
            Refusal: it does not answer.
        """
        timeout = aiohttp.ClientTimeout(total=_SECONDS_PER_PING)
        try:
            async with session.get(f"{self._url}/ping", timeout=timeout) as response:
                health: dict[str, Any] = msgspec.json.decode(await response.read(), type=dict[str, Any])
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise Refusal(503, f"variant {self.variant.name} does not answer: {error}") from None
        return health

    async def ask(self, session: aiohttp.ClientSession, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Its answer to one request, whatever the status.

        Raises:
            UpstreamGoneError: there is no server.
            Refusal: it broke off, or took too long.
        """
        request = self.seen.begin()
        answer: Answer | None = None
        try:
            async with session.post(
                f"{self._url}/invocations", data=body, headers=_passed_on(headers)
            ) as response:
                answer = Answer(
                    status=response.status,
                    body=await response.read(),
                    headers=_passed_on({name.lower(): value for name, value in response.headers.items()}),
                )
        except aiohttp.ClientConnectorError:
            raise UpstreamGoneError(self.variant.name) from None
        except TimeoutError:
            raise Refusal(504, f"variant {self.variant.name} takes too long; try again") from None
        except aiohttp.ClientError as error:
            raise Refusal(502, f"variant {self.variant.name} broke off ({error}); try again") from None
        finally:
            self.seen.end(request, answer.status if answer else None, answer.headers if answer else None)
        return answer


class Mirror:
    """Sends copies of requests to a shadow, in its own time."""

    def __init__(self, shadow: Upstream, session: aiohttp.ClientSession) -> None:
        """Begin, with an event loop running.

        Args:
            shadow: What sees the copies, and which share of them.
            session: By which it is asked.
        """
        self.dropped = 0
        """Copies that found too many waiting already."""
        self._shadow = shadow
        self._session = session
        self._shares = Shares([shadow.variant.weight, 1.0 - shadow.variant.weight])
        self._waiting: asyncio.Queue[tuple[bytes, Mapping[str, str]]] = asyncio.Queue(_WAITING_COPIES)
        self._waiting_bytes = 0
        self._senders = [asyncio.create_task(self._send()) for _ in range(_MIRRORED_AT_ONCE)]

    @property
    def name(self) -> str:
        """Of the shadow."""
        return self._shadow.variant.name

    def offer(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Take a copy of a request if it falls to the shadow's share, and there is room for it."""
        if self._shares.next() != 0:
            return
        if self._waiting.full() or self._waiting_bytes + len(body) > _WAITING_BYTES:
            self.dropped += 1
            return
        self._waiting_bytes += len(body)
        self._waiting.put_nowait((body, headers))

    def close(self) -> None:
        """What still waits is not sent any more."""
        for sender in self._senders:
            sender.cancel()

    async def _send(self) -> None:
        while True:
            body, headers = await self._waiting.get()
            self._waiting_bytes -= len(body)
            with contextlib.suppress(UpstreamGoneError, Refusal):  # counted as errors of the shadow
                await self._shadow.ask(self._session, body, headers)


@contextmanager
def start_all(
    plan: RoutePlan, program: str, workers: int, timeout_seconds: int, folder: Path
) -> Iterator[list[Upstream]]:
    """A server for each model of the plan; all of them answer, and end with the block.

    Args:
        plan: The models.
        program: Module whose command ``serve`` is the server.
        workers: Of each server.
        timeout_seconds: What each gives a request.
        folder: For what they say of themselves.

    Raises:
        InputError: one of them ended before it answered.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number, variant in enumerate(plan.variants):
            command = [sys.executable, "-m", program, "serve", "--model", variant.model]
            command += ["--port", "0", "--workers", str(workers), "--timeout", str(timeout_seconds)]
            command += ["--state-file", str(folder / f"{number}.json"), "--end-with-stdin"]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            if variant.is_shadow:
                os.setpriority(os.PRIO_PROCESS, processes[-1].pid, _SHADOW_NICENESS)
        yield [
            Upstream(variant, process, _state_of(variant, process, folder / f"{number}.json"))
            for number, (variant, process) in enumerate(zip(plan.variants, processes, strict=True))
        ]
    finally:
        _end(processes)


def _state_of(variant: RoutedVariant, process: subprocess.Popen[bytes], state_file: Path) -> ServerState:
    while not state_file.exists():
        status = process.poll()
        if status is not None:
            raise InputError(
                f"model version {variant.model_version} ended with status {status} before it answered; see "
                "the lines above"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return msgspec.json.decode(state_file.read_bytes(), type=ServerState)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _SECONDS_TO_DRAIN
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in _OF_ONE_CONNECTION}

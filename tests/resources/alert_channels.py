"""Channels that tests listen at: in memory, or across processes at a server that honours idempotency keys."""

from __future__ import annotations

import json
import random
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
from typing_extensions import override

from resources.channels import Channel, Line, Message


class Heard(Channel):
    """Takes every message, and remembers it, unless ``trouble`` raises."""

    def __init__(self, name: str, trouble: Callable[[Message], None] | None = None) -> None:
        super().__init__(name)
        self.messages: list[Message] = []
        self.tries: list[Message] = []
        self.trouble = trouble

    @override
    def send(self, message: Message, seconds: float) -> None:
        self.tries.append(message)
        if self.trouble is not None:
            self.trouble(message)
        self.messages.append(message)

    @override
    def _hand_over(self, message: Message, deadline: object) -> None:
        raise NotImplementedError

    @property
    def lines(self) -> list[Line]:
        return [line for message in self.messages for line in message.lines]

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(line.kind, line.incident) for line in self.lines]


class Posted(Channel):
    """Posts to a :class:`Receiver`, which may be asked by several processes."""

    def __init__(self, name: str, url: str) -> None:
        super().__init__(name)
        self._url = url

    @override
    def send(self, message: Message, seconds: float) -> None:
        body = msgspec.json.encode(message)
        request = urllib.request.Request(self._url, body, {"Idempotency-Key": message.id})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            answer.read()

    @override
    def _hand_over(self, message: Message, deadline: object) -> None:
        raise NotImplementedError


class Receiver:
    """Keeps one message per idempotency key, and answers as badly as networks do."""

    def __init__(self, seed: int) -> None:
        self.messages: dict[str, dict[str, Any]] = {}
        self.requests = 0
        self.changed: list[str] = []
        """Keys that came again with another content."""
        self.lock = threading.Lock()
        self.chance = random.Random(seed)
        self.url = ""

    @property
    def told(self) -> Counter[tuple[str, str, int]]:
        """How often what was told of each incident, over all messages."""
        with self.lock:
            return Counter(
                (line["kind"], line["incident"], line["number"])
                for message in self.messages.values()
                for line in message["lines"]
            )

    def takes(self, key: str, body: dict[str, Any]) -> str:
        """What is done about a request: ``answer``, ``hang up`` or ``refuse``; all but the last keep it."""
        with self.lock:
            self.requests += 1
            fate = self.chance.choices(["answer", "hang up", "refuse"], [8, 1, 1])[0]
            if fate != "refuse" and self.messages.setdefault(key, body) != body:
                self.changed.append(key)
            return fate

    @contextmanager
    def running(self) -> Iterator[Receiver]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fate = receiver.takes(self.headers["Idempotency-Key"], body)
                if fate != "hang up":
                    self.send_response(200 if fate == "answer" else 503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """Whoever asked was killed."""

        server = Server(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}/"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

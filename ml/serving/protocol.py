"""HTTP of a serving process: uvicorn's protocol, which by itself waits for ever for headers to end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def protocol_with_deadline(seconds: float) -> type[asyncio.Protocol]:
    """A protocol that closes a connection whose next request has not got its headers in time.

    Bodies have their own limit (:class:`ml.serving.worker.ServingApp`), and a connection without a request
    under way is closed by uvicorn.

    Args:
        seconds: From the connection, and on a connection that is used again from the first byte, to the end
            of the headers.
    """

    class ProtocolWithDeadline(HttpToolsProtocol):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._start_waiting()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._start_waiting()

        def on_headers_complete(self) -> None:
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _start_waiting(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return ProtocolWithDeadline

"""How news reaches people: the outbox keeps it, the routes say who hears of it, the channels hand it over."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from typing_extensions import override

from resources.alerts import Alerts, ChannelState, Delivery, Incident, News
from resources.failures import input_errors_fail_plainly
from resources.redaction import without_secrets
from resources.settings import variables

if TYPE_CHECKING:
    from resources.alert_routes import Routes
    from resources.channels import Channel, Message
    from resources.outbox import Leased, Outbox

_LONGEST_SEND = 30.0
"""Seconds that a channel has for one message: less than the lease of the outbox."""
_SHORTEST_SEND = 1.0
"""With less time left no message is begun: the next round has all of it."""
_GRACE = 2.0
"""Seconds after which a channel that should have answered is taken to hang."""


class OutboxAlerts(Alerts):
    """The outbox, a database, and the channels that a TOML file names."""

    home: str
    database: str = ""
    """As SQLAlchemy names it; empty: the SQLite file ``outbox.db`` in the home folder."""
    routes: str = ""
    """Path of the file with channels and routes; without one nobody is told, and the outbox shows it all."""
    ui_url: str = "http://localhost:3000"

    @override
    @input_errors_fail_plainly()
    def tell(
        self,
        news: Sequence[News],
        bookmarks: dict[str, str] | None = None,
        expected: dict[str, str | None] | None = None,
    ) -> list[News]:
        return self._outbox().tell(news, bookmarks, self._routes(), expected)

    @override
    @input_errors_fail_plainly()
    def bookmark(self, source: str) -> str | None:
        return self._outbox().bookmark(source)

    @override
    @input_errors_fail_plainly()
    def incidents(self, *, all_of_them: bool = False) -> list[Incident]:
        return self._outbox().incidents(all_of_them)

    @override
    @input_errors_fail_plainly()
    def deliver(self, seconds: float) -> Delivery:
        return deliver(self._outbox(), self._routes(), seconds)

    @override
    @input_errors_fail_plainly()
    def channels(self) -> list[ChannelState]:
        return channel_states(self._outbox(), self._routes())

    @override
    @input_errors_fail_plainly()
    def check(self) -> None:
        self._routes()
        self._outbox().check()

    def _outbox(self) -> Outbox:
        return _outbox_at(self.database or f"sqlite:///{Path(self.home).absolute() / 'outbox.db'}")

    def _routes(self) -> Routes:
        from resources.alert_routes import read_routes

        return read_routes(self.routes, variables(), self.ui_url)


@cache
def _outbox_at(url: str) -> Outbox:
    """One for all resources of the process, so that its tables are looked for once and not at every call."""
    from resources.outbox import Outbox

    return Outbox(url)


def channel_states(outbox: Outbox, routes: Routes) -> list[ChannelState]:
    """The channels of ``routes``, and those that are not in it any more and have something waiting."""
    return [
        state
        if state.channel in routes.channels
        else msgspec.structs.replace(
            state, last_error="not among the channels any more: what waits is sent if it comes back"
        )
        for state in outbox.channels(routes.channels)
    ]


def deliver(outbox: Outbox, routes: Routes, seconds: float) -> Delivery:
    """Queue the reminders and late ends that are due, and send what waits for the channels of ``routes``.

    Each channel has a thread of its own, so that one that is slow or broken holds up no other.
    """
    outbox.remind(routes)
    if not routes.channels:
        return Delivery(sent=(), failed=(), waiting=0)
    rounds = [_Round(outbox, channel, routes, seconds) for channel in routes.channels.values()]
    for one in rounds:
        one.start()
    for one in rounds:
        one.finish()
    for one in rounds:
        if one.error is not None:
            raise one.error
    states = outbox.channels(routes.channels)
    return Delivery(
        sent=tuple(line for one in rounds for line in one.sent),
        failed=tuple(line for one in rounds for line in one.failed),
        waiting=sum(state.waiting for state in states if state.channel in routes.channels),
    )


class _Round:
    """One channel takes what is due for it, one message after the other, until the time is up."""

    def __init__(self, outbox: Outbox, channel: Channel, routes: Routes, seconds: float) -> None:
        self.sent: list[str] = []
        self.failed: list[str] = []
        self.error: Exception | None = None
        """What went wrong with the outbox, not with the channel."""
        self._outbox = outbox
        self._channel = channel
        self._routes = routes
        self._until = time.monotonic() + seconds
        self._in_hand: Leased | None = None
        # A daemon: a channel that never returns must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"alerts to {channel.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Wait until the time is up and no longer.

        A message that is still in a channel's hands then is tried again later; should the channel take it
        after all, the thread says so, and it is not.
        """
        self._thread.join(max(0.0, self._until - time.monotonic()) + _GRACE)
        in_hand = self._in_hand
        if self._thread.is_alive() and in_hand is not None:
            self._not_taken(in_hand, "it did not answer in time")

    def _run(self) -> None:
        try:
            while (left := self._until - time.monotonic()) > _SHORTEST_SEND:
                leased = self._outbox.lease(
                    self._channel.name, self._routes.seconds_between_messages, self._routes.gather_seconds
                )
                if leased is None:
                    return
                self._in_hand = leased
                self._send(leased, min(left, _LONGEST_SEND))
                self._in_hand = None
        except Exception as error:
            self.error = error

    def _send(self, leased: Leased, seconds: float) -> None:
        from resources.channels import ChannelError

        message = msgspec.structs.replace(leased.message, ui_url=self._routes.ui_url)
        try:
            self._channel.send(message, seconds)
        except ChannelError as error:
            self._not_taken(leased, without_secrets(str(error)), error.permanent, error.retry_after)
        except Exception as error:
            # Its type only: its message is of the library that raised it, and may hold address or password.
            self._not_taken(leased, f"{type(error).__name__} in the channel")
        else:
            self._outbox.sent(leased)
            self.sent.append(f"{self._channel.name}: {_first_line(message)}")

    def _not_taken(
        self, leased: Leased, reason: str, permanent: bool = False, retry_after: float | None = None
    ) -> None:
        self._outbox.failed(leased, reason, permanent=permanent, retry_after=retry_after)
        self.failed.append(f"{self._channel.name}: {reason}")


def _first_line(message: Message) -> str:
    line = message.lines[0]
    more = len(message.lines) - 1
    return f"{line.kind}: {line.title}" + (f" (and {more} more)" if more else "")

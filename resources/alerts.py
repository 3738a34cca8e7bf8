"""The door to people: what goes wrong, told once, and told again when it is over.

What is found is *news* about an *incident*. News has an id, so that a tick or a step that is repeated
after a crash tells nobody twice; an incident stays open, however often it is found again, until
it is resolved. How messages reach people is not decided here but by the routes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import dagster as dg
import msgspec

Severity = Literal["WARN", "ERROR", "CRITICAL"]
"""CRITICAL: an error that the system cannot mend by itself, and tried to."""

SEVERITIES: tuple[Severity, ...] = ("WARN", "ERROR", "CRITICAL")
"""From the mildest to the worst."""


class News(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was found out about an incident."""

    id: str
    """Of this finding: equal for equal news, e.g. ``check-evaluation:1234``. Told twice it counts once."""
    incident: str
    """What it is about, e.g. ``check:drift_report:volume_is_usual`` or ``run:process_day:2026-11-04``."""
    state: Literal["failing", "resolved", "notice"]
    """``notice``: told once, neither reminded of nor resolved."""
    severity: Severity = "ERROR"
    title: str = ""
    """One line. Of a resolved incident empty: its own title stands."""
    text: str = ""
    """What happened, what it means and what to do next."""
    asset: str | None = None
    """Key of the asset that it is about."""
    link: str | None = None
    """Path of the page in the UI that shows more, e.g. ``/assets/offers``."""
    run: str | None = None
    """Id of the run in which it was found, if there was one."""
    group: str | None = None
    """Of the asset; routes choose by it."""
    owners: tuple[str, ...] = ()
    """Of the asset; routes choose by them."""
    at: str = ""
    """ISO time (UTC) at which it happened; filled in with now."""
    by_hand: bool = False
    """Whether a person says so: then an end is believed at once, also of what came and went all the time."""


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """What people know as one thing that is wrong, from when it opened until it was resolved."""

    key: str
    number: int
    """1 for the first time that it opened, 2 for the second."""
    state: Literal["open", "resolved", "notice"]
    severity: Severity
    """The worst so far: it only rises while the incident is open."""
    title: str
    text: str
    """Of the newest news."""
    asset: str | None
    link: str | None
    run: str | None
    """Id of the run in which it was found last, if there was one."""
    group: str | None
    owners: tuple[str, ...]
    opened_at: str
    last_at: str
    resolved_at: str | None
    times: int
    """How often it was found."""


class ChannelState(msgspec.Struct, frozen=True, kw_only=True):
    """How a channel is doing."""

    channel: str
    sent: int
    waiting: int
    """Messages that it still has to take."""
    waiting_since: str
    """ISO time (UTC) since which the oldest of them waits, those set aside left out; empty if none does."""
    set_aside: int
    """Messages among them that it refused so often that the others do not wait for them any more."""
    last_error: str
    """Why it did not take the oldest of them; empty if it did, or was not asked yet."""


class Moved(Exception):
    """Somebody else has read on from a bookmark in the meantime: nothing was kept, read again from there."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one round of sending."""

    sent: tuple[str, ...]
    """Channel and first line of every message that was taken."""
    failed: tuple[str, ...]
    """Channel and reason of every message that was not; it is tried again."""
    waiting: int


class Alerts(dg.ConfigurableResource[Any], ABC):
    """Where news goes, and how it reaches people."""

    @abstractmethod
    def tell(
        self,
        news: Sequence[News],
        bookmarks: dict[str, str] | None = None,
        expected: dict[str, str | None] | None = None,
    ) -> list[News]:
        """Keep ``news``, open and resolve its incidents, and queue what people have to be told, in one step.

        Passwords in its texts are blotted out. Once this returns, it survives a crash; if it does not
        return, nothing of it happened.

        Args:
            news: In the order in which it happened.
            bookmarks: How far the sources have been read, kept in the same step.
            expected: Bookmarks from which they were read (None: there was none), compared in the same step.

        Returns:
            Those that open, worsen or resolve an incident, and new notices: what people will hear of.

        Raises:
            Moved: a bookmark is not as expected.
        """

    @abstractmethod
    def bookmark(self, source: str) -> str | None:
        """How far ``source`` has been read, as given to :meth:`tell`."""

    @abstractmethod
    def incidents(self, *, all_of_them: bool = False) -> list[Incident]:
        """Open incidents, or all that were ever kept with the notices, the oldest first."""

    @abstractmethod
    def deliver(self, seconds: float) -> Delivery:
        """Send what is due, for about so long; what a channel does not take is tried again later."""

    @abstractmethod
    def channels(self) -> list[ChannelState]:
        """Every channel that the routes name, and how it is doing."""

    @abstractmethod
    def check(self) -> None:
        """Look whether routes and channels are set up rightly; sends nothing.

        Raises:
            InputError: one line that names file, channel and key.
        """

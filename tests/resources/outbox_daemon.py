"""What a daemon does about alerts, as a process of its own that tests kill."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Event

from resources.alert_routes import Routes
from resources.alerting import deliver
from resources.alerts import Moved, News
from resources.outbox import Outbox
from tests.resources.alert_channels import Posted

INCIDENTS = 100
SPEED = 600.0
"""Seconds of the outbox's clock in one real second: leases end and attempts come again at once."""
_NEWS_PER_TICK = 7


def story() -> list[News]:
    """Every incident opens, is found again, and is resolved, all mixed."""
    steps = []
    for number in range(INCIDENTS):
        for state, at in (
            ("failing", 2 * number),
            ("failing", 2 * number + 15),
            ("resolved", 2 * number + 31),
        ):
            news_id = f"{number}-{at}"
            steps.append((at, number, News(id=news_id, incident=f"check-{number}", state=state, title="red")))
    return [news for _, _, news in sorted(steps, key=lambda step: step[:2])]


def fast_clock() -> float:
    return 1.7e9 + (time.time() % 1e6) * SPEED


def routes_to(url: str) -> Routes:
    names = ("people", "pager")
    channels = {name: Posted(name, url) for name in names}
    return Routes(channels, default=names, seconds_between_messages=5.0, gather_seconds=2.0)


def run_daemon(database: str, receiver: str, works: Event) -> None:
    """Read the story from the bookmark on, tell it and deliver, until all is told and taken."""
    outbox = Outbox(database, clock=fast_clock)
    routes = routes_to(receiver)
    news = story()
    while True:
        told = int(outbox.bookmark("story") or 0)
        works.set()
        some: Sequence[News] = news[told : told + _NEWS_PER_TICK]
        if some:
            with contextlib.suppress(Moved):  # the other daemon was faster
                outbox.tell(
                    some, {"story": str(told + len(some))}, routes, {"story": str(told) if told else None}
                )
        delivery = deliver(outbox, routes, seconds=5)
        if not some and not delivery.waiting:
            return
        time.sleep(0.005)


def open_only(database: str) -> None:
    """Open an outbox that may not be there yet, and tell the same as everybody."""
    Outbox(database).tell([News(id="same", incident="same", state="failing")], {"a": "1"}, Routes())

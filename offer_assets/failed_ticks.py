"""Sensors and schedules that fail, and those that work again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import quote

import dagster as dg
import msgspec

from offer_assets.wording import error_line, iso, sentences
from resources.alerts import News

_TICKS_AT_ONCE = 50
_LOST_TICK_SECONDS = 600.0
"""A tick that is under way for longer was killed."""


def tick_news(
    instance: dg.DagsterInstance,
    bookmark: str | None,
    open_incidents: Collection[str],
    is_mine: Callable[[str], bool],
    *,
    now: float,
    look_back: float,
) -> tuple[list[News], str]:
    """News of the ticks after ``bookmark``, and the bookmark after them.

    Args:
        instance: Whose sensors and schedules.
        bookmark: Of the time before; None: begin ``look_back`` seconds ago.
        open_incidents: Keys of the incidents that are open.
        is_mine: Whether a sensor or schedule is to be looked after, by its name.
        now: Unix time.
        look_back: Seconds.
    """
    kept, read, news = _decode(bookmark), dict[str, float](), list[News]()
    if instance.schedule_storage is None:  # without a daemon there are no ticks
        return [], bookmark or "{}"
    for state in instance.all_instigator_state():
        if not is_mine(state.instigator_name):
            continue
        after = kept.get(state.selector_id)
        newest_first = instance.get_ticks(
            state.instigator_origin_id,
            state.selector_id,
            after=now - look_back if after is None else after,
            limit=_TICKS_AT_ONCE,
        )
        ticks = _finished(list(reversed(newest_first)), now)
        last = ticks[-1].timestamp if ticks else after
        if last is not None:
            read[state.selector_id] = last
        news += _news_of(state, ticks, open_incidents)
    return news, msgspec.json.encode(read).decode()


def _finished(ticks: Sequence[Any], now: float) -> list[Any]:
    """Ticks, oldest first, up to one that is still under way: how that ends is seen the next time."""
    from dagster._core.scheduler.instigation import TickStatus

    finished = list[Any]()
    for place, tick in enumerate(ticks):
        if tick.status != TickStatus.STARTED:
            finished.append(tick)
        elif place == len(ticks) - 1 and now - tick.timestamp < _LOST_TICK_SECONDS:
            break
    return finished


def _news_of(state: Any, ticks: Sequence[Any], open_incidents: Collection[str]) -> list[News]:
    """One failure and one end at most: the last of each."""
    from dagster._core.scheduler.instigation import TickStatus

    kind = "schedule" if state.instigator_type.value == "SCHEDULE" else "sensor"
    incident = f"{kind}:{state.instigator_name}"
    failed = [tick for tick in ticks if tick.status == TickStatus.FAILURE]
    about = {"incident": incident, "link": _page(state, kind)}
    news = list[News]()
    if failed:
        news.append(
            News(
                id=f"tick:{failed[-1].tick_id}@{failed[-1].timestamp:.3f}",
                state="failing",
                title=f"The {kind} {state.instigator_name} failed",
                text=sentences(
                    error_line(failed[-1].tick_data.error),
                    "What it starts or tells waits until it works again.",
                ),
                at=iso(failed[-1].timestamp),
                **about,
            )
        )
    good = ticks and ticks[-1].status != TickStatus.FAILURE
    if good and (failed or incident in open_incidents):
        last = ticks[-1]
        news.append(
            News(
                id=f"tick:{last.tick_id}@{last.timestamp:.3f}:good",
                state="resolved",
                text="It works again.",
                at=iso(last.timestamp),
                **about,
            )
        )
    return news


def _page(state: Any, kind: str) -> str:
    origin = state.origin.repository_origin
    location = quote(origin.code_location_origin.location_name, safe="")
    if origin.repository_name != "__repository__":
        location = f"{quote(origin.repository_name, safe='')}@{location}"
    return f"/locations/{location}/{kind}s/{quote(state.instigator_name, safe='')}"


def _decode(bookmark: str | None) -> dict[str, float]:
    try:
        return msgspec.json.decode(bookmark, type=dict[str, float]) if bookmark else {}
    except msgspec.DecodeError:
        return {}

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
_FAILED_IN_A_ROW = {"sensor": 2, "schedule": 1}
"""Ticks that make an incident: a sensor tries again within minutes, a schedule perhaps in a week."""


class Declared(msgspec.Struct, frozen=True):
    """Sensors and schedules that a code location has; Dagster also keeps those that it had."""

    location: str
    names: frozenset[str]


class _Read(msgspec.Struct, frozen=True, array_like=True):
    at: float
    """Unix time of the last tick that was read."""
    failed: int = 0
    """Ticks in a row that failed, up to it."""


def tick_news(
    instance: dg.DagsterInstance,
    bookmark: str | None,
    open_incidents: Collection[str],
    is_mine: Callable[[str], bool],
    *,
    declared: Declared | None,
    now: float,
    look_back: float,
) -> tuple[list[News], str]:
    """News of the ticks after ``bookmark``, and the bookmark after them.

    Args:
        instance: Whose sensors and schedules.
        bookmark: Of the time before; None: begin ``look_back`` seconds ago.
        open_incidents: Keys of the incidents that are open.
        is_mine: Whether a sensor or schedule is to be looked after, by its name.
        declared: What of its code location there still is; None: all that ever was.
        now: Unix time.
        look_back: Seconds.
    """
    kept, read, news = _decode(bookmark), dict[str, _Read](), list[News]()
    running = set[str]()
    if instance.schedule_storage is None:  # without a daemon there are no ticks
        return [], bookmark or "{}"
    for state in instance.all_instigator_state():
        if not is_mine(state.instigator_name) or not _runs(state, declared):
            continue
        running.add(_incident(state))
        last = kept.get(state.selector_id)
        newest_first = instance.get_ticks(
            state.instigator_origin_id,
            state.selector_id,
            after=now - look_back if last is None else last.at,
            limit=_TICKS_AT_ONCE,
        )
        ticks = _finished(list(reversed(newest_first)), now)
        of_it, failed = _news_of(state, ticks, last.failed if last is not None else 0, open_incidents)
        news += of_it
        if ticks:
            last = _Read(ticks[-1].timestamp, failed)
        if last is not None:
            read[state.selector_id] = last
    for incident in open_incidents:
        kind, _, name = incident.partition(":")
        if kind in _FAILED_IN_A_ROW and is_mine(name) and incident not in running:
            news.append(_does_not_run(incident, now))
    return news, msgspec.json.encode(read).decode()


def _incident(state: Any) -> str:
    return f"{_kind(state)}:{state.instigator_name}"


def _kind(state: Any) -> str:
    return "schedule" if state.instigator_type.value == "SCHEDULE" else "sensor"


def _runs(state: Any, declared: Declared | None) -> bool:
    """Whether it ticks: it was not switched off, and was not removed or renamed."""
    from dagster._core.scheduler.instigation import InstigatorStatus

    if state.status == InstigatorStatus.STOPPED:
        return False
    location = state.origin.repository_origin.code_location_origin.location_name
    return declared is None or declared.location != location or state.instigator_name in declared.names


def _does_not_run(incident: str, now: float) -> News:
    return News(
        id=f"{incident}:off:{now:.3f}",
        incident=incident,
        state="resolved",
        text="It does not run any more: it was switched off, renamed or removed.",
        at=iso(now),
    )


def _finished(ticks: Sequence[Any], now: float) -> list[Any]:
    """Ticks, oldest first, without killed ones, up to one that is under way: that is seen the next time."""
    from dagster._core.scheduler.instigation import TickStatus

    finished = list[Any]()
    for place, tick in enumerate(ticks):
        if tick.status != TickStatus.STARTED:
            finished.append(tick)
        elif place == len(ticks) - 1 and now - tick.timestamp < _LOST_TICK_SECONDS:
            break
    return finished


def _news_of(
    state: Any, ticks: Sequence[Any], in_a_row: int, open_incidents: Collection[str]
) -> tuple[list[News], int]:
    """One failure and one end at most, the last of each; and how many ticks in a row have failed by now."""
    from dagster._core.scheduler.instigation import TickStatus

    kind, incident, failure = _kind(state), _incident(state), None
    for tick in ticks:
        in_a_row = in_a_row + 1 if tick.status == TickStatus.FAILURE else 0
        if in_a_row >= _FAILED_IN_A_ROW[kind]:
            failure = tick
    about = {"incident": incident, "link": _page(state, kind)}
    news = list[News]()
    if failure is not None:
        news.append(
            News(
                id=f"tick:{failure.tick_id}@{failure.timestamp:.3f}",
                state="failing",
                title=f"The {kind} {state.instigator_name} failed",
                text=sentences(
                    error_line(failure.tick_data.error),
                    "What it starts or tells waits until it works again.",
                ),
                at=iso(failure.timestamp),
                **about,
            )
        )
    if ticks and not in_a_row and (failure is not None or incident in open_incidents):
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
    return news, in_a_row


def _page(state: Any, kind: str) -> str:
    origin = state.origin.repository_origin
    location = quote(origin.code_location_origin.location_name, safe="")
    if origin.repository_name != "__repository__":
        location = f"{quote(origin.repository_name, safe='')}@{location}"
    return f"/locations/{location}/{kind}s/{quote(state.instigator_name, safe='')}"


def _decode(bookmark: str | None) -> dict[str, _Read]:
    try:
        return msgspec.json.decode(bookmark, type=dict[str, _Read]) if bookmark else {}
    except msgspec.DecodeError:
        return {}

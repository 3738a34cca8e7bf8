"""What the outcomes of a check mean for its incident: which one opens it, and which one ends it."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Literal

import dagster as dg
import msgspec

from ml.drift.answers import Level
from offer_assets.wording import sentences
from resources.alerts import Severity

State = Literal["failing", "resolved"]

_UNKNOWN: Level = "UNKNOWN"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a check came out, or that it did not."""

    check: dg.AssetCheckKey
    partition: str
    """Empty for a check of the whole asset."""
    at: float
    key: str
    """Of the event that says so."""
    passed: bool
    severity: Severity
    title: str
    text: str
    counts: bool
    """False for the failure of an old day."""
    run: str | None = None
    """Id; a check may also be reported from outside of runs."""


class Slot(msgspec.Struct, frozen=True, array_like=True):
    """The last outcome of a check: for its newest day, or for one partition that is no day."""

    partition: str
    at: float
    failing: bool


Slots = dict[str, dict[str, Slot]]
"""By incident, then by partition; all days share one place, as the newest decides."""


def judge(outcome: Outcome, slots: dict[str, Slot], is_open: bool) -> list[tuple[State, str]]:
    """What an outcome means for the incident of its check, as states and texts.

    The newest day decides. A day that fails after a newer one passed is told, and is over at once; a day
    that passes ends nothing that a newer one began. An outcome that was judged before says nothing. What
    failed before the incident opened belongs to one that is over, and keeps this one from ending no more.

    Args:
        outcome: Of the check.
        slots: The last outcomes of the check; changed.
        is_open: Whether its incident is open.
    """
    if not is_open:
        for failed in [name for name, slot in slots.items() if slot.failing]:
            del slots[failed]
    is_day = day_of(outcome.partition) is not None
    name = "day" if is_day else outcome.partition
    last = slots.get(name)
    was_judged = last is not None and last.partition == outcome.partition and outcome.at <= last.at
    if was_judged or not outcome.counts:
        return []
    if is_day and last is not None and last.partition > outcome.partition:
        return _of_older_day(outcome, last)
    slots[name] = Slot(outcome.partition, outcome.at, not outcome.passed)
    if not outcome.passed:
        return [("failing", outcome.text)]
    if is_open and not any(slot.failing for slot in slots.values()):
        return [("resolved", sentences("It passes again", outcome.text))]
    return []


def _of_older_day(outcome: Outcome, newest: Slot) -> list[tuple[State, str]]:
    if outcome.passed:
        return []
    over: list[tuple[State, str]] = [("resolved", f"It passed for the newer day {newest.partition}.")]
    return [("failing", outcome.text), *([] if newest.failing else over)]


def is_no_answer(evaluation: dg.AssetCheckEvaluation) -> bool:
    """Whether a check passed only because it cannot tell yet, or the day is not over.

    A day that is not over may fail already. That it passes so far ends nothing, and is nothing that a day
    before it could have been mended by.
    """
    if not evaluation.passed:
        return False
    level, complete = (evaluation.metadata.get(name) for name in ("level", "complete"))
    return (level is not None and level.value == _UNKNOWN) or (complete is not None and not complete.value)


def in_order(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Days in their order, however they were run; all else, and each day, by time."""
    return sorted(
        outcomes,
        key=lambda outcome: (outcome.partition if day_of(outcome.partition) else "", outcome.at),
    )


def day_of(partition: str) -> datetime.date | None:
    """The day that a daily partition is of, or None for any other."""
    try:
        day = datetime.date.fromisoformat(partition)
    except ValueError:
        return None
    return day if partition == day.isoformat() else None


def check_incident(check: dg.AssetCheckKey) -> str:
    """Key of the incident that a check is about."""
    return f"check:{check.asset_key.to_user_string()}:{check.name}"


def decode_slots(bookmark: str | None) -> Slots:
    """Slots as they were kept; those that cannot be read are forgotten."""
    try:
        return msgspec.json.decode(bookmark, type=Slots) if bookmark else {}
    except msgspec.DecodeError:
        return {}

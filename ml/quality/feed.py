"""The two questions about the corrections feed itself: whether it lives, and whether these are its offers.

Without them a feed that ends, or whose ids become others, would look like a model nobody has anything to
say against.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ml.drift.answers import Answer, Level
from ml.quality.compared import DecidedDay, Delivery
from ml.quality.questions import CATALOGUED, COMING, FEED_QUESTIONS, LIMITS, Limits

_TITLES = {question.name: question.title for question in FEED_QUESTIONS}
_DEVIATIONS = 3
"""By so many standard deviations a share must be above that of before, beside the least difference."""


def keep_coming(
    decided: Mapping[str, DecidedDay],
    deliveries: Sequence[Delivery],
    newest_day: str,
    limits: Limits = LIMITS,
) -> Answer:
    """Whether the newest decision is as near to the newest catalogued day as it always was."""
    if not decided:
        return _answer(COMING, "UNKNOWN", "no correction has come yet")
    until = max(decided)
    silence = _days_between(until, newest_day)
    usual = usual_silence(list(decided), deliveries, limits)
    beside = (
        f"usually one comes within {_days(usual)}"
        if usual is not None
        else f"too few days have decisions to know how often they come ({len(decided)})"
    )
    limit = limits.usual_silence_unknown_days if usual is None else usual
    distance = f", {_days(silence)} before the newest catalogued day ({newest_day})" if silence > 0 else ""
    return _answer(
        COMING,
        "WARN" if silence > limit + limits.silence_beyond_usual_days else "OK",
        f"the newest decision is of {until}{distance}; {beside}",
    )


def usual_silence(
    decision_days: Sequence[str], deliveries: Sequence[Delivery], limits: Limits = LIMITS
) -> int | None:
    """The longest silence but one of the last months in days, or None with too few days of decisions.

    A silence is a gap between two days of decisions, or how old the newest decision had become when the next
    files came: a feed that comes once a week is silent for a week, though its decisions are of every day. The
    very longest is left out, lest an outage that was makes the next one usual.
    """
    if len(decision_days) < limits.least_decision_days:
        return None
    since = _shifted(max(decision_days), -limits.rhythm_days)
    silences = [
        _days_between(before, after) for before, after in pairwise(sorted(decision_days)) if after >= since
    ]
    known_until = ""
    for delivery in deliveries:
        if known_until and delivery.loaded_on >= since:
            silences.append(_days_between(known_until, delivery.loaded_on))
        known_until = max(known_until, delivery.decided_until)
    ordered = sorted(silences, reverse=True)
    return max(0, ordered[min(1, len(ordered) - 1)]) if ordered else 0


def about_catalogued(decided: Mapping[str, DecidedDay], first_day: str, limits: Limits = LIMITS) -> Answer:
    """Whether the newest decisions are about offers that were catalogued, as those before were."""
    settled = _shifted(first_day, limits.days_to_settle)
    days = [date for date in sorted(decided) if date >= settled]
    recent_days = _recent(days, decided, limits)
    recent = _together(decided, recent_days)
    if recent.decisions < limits.least_decisions:
        return _answer(
            CATALOGUED,
            "UNKNOWN",
            f"too few to tell: {recent.decisions:,} decisions since {settled}, at least "
            f"{limits.least_decisions} are needed",
        )
    before = _together(decided, days[: len(days) - len(recent_days)])
    sentence = (
        f"{_share(recent):.1%} of the {recent.decisions:,} decisions since {recent_days[0]} are about offers "
        "that no catalogued day has"
    )
    if before.decisions:
        sentence += f", {_share(before):.1%} of {before.decisions:,} before"
    return _answer(CATALOGUED, _level(recent, before, limits), sentence)


def _level(recent: DecidedDay, before: DecidedDay, limits: Limits) -> Level:
    now = _share(recent)
    if before.decisions:
        usual = _share(before)
        if recent.unknown == recent.decisions and usual**recent.decisions < limits.error_p:
            return "ERROR"
        both = (recent.unknown + before.unknown) / (recent.decisions + before.decisions)
        chance = _DEVIATIONS * math.sqrt(both * (1 - both) * (1 / recent.decisions + 1 / before.decisions))
        if now - usual > max(limits.more_unknown, chance):
            return "WARN"
    return "WARN" if now > limits.most_unknown else "OK"


def _recent(days: Sequence[str], decided: Mapping[str, DecidedDay], limits: Limits) -> list[str]:
    """The newest week of decisions, and more days where it has too few."""
    if not days:
        return []
    since = _shifted(days[-1], 1 - limits.recent_decision_days)
    recent: list[str] = []
    for day in reversed(days):
        if day < since and _together(decided, recent).decisions >= limits.least_decisions:
            break
        recent.insert(0, day)
    return recent


def _together(decided: Mapping[str, DecidedDay], days: Sequence[str]) -> DecidedDay:
    return DecidedDay(
        decisions=sum(decided[day].decisions for day in days),
        unknown=sum(decided[day].unknown for day in days),
    )


def _share(day: DecidedDay) -> float:
    return day.unknown / day.decisions


def _answer(question: str, level: Level, sentence: str) -> Answer:
    return Answer(
        question=question,
        title=_TITLES[question],
        level=level,
        sentence=sentence,
        series=0 if level == "UNKNOWN" else 1,
        findings=[],
        found=int(level in ("WARN", "ERROR")),
    )


def _days_between(first: str, last: str) -> int:
    return (datetime.date.fromisoformat(last) - datetime.date.fromisoformat(first)).days


def _shifted(day: str, days: int) -> str:
    return (datetime.date.fromisoformat(day) + datetime.timedelta(days=days)).isoformat()


def _days(number: int) -> str:
    return f"{number:,} day{'' if number == 1 else 's'}"

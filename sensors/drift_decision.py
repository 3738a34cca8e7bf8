"""What lasting drift needs now, decided from what is seen and nothing else.

No Dagster and no files here: the sensor ``lasting_drift`` gathers the situation and does what is decided.
Nothing is remembered: the trainings that there were are read from the tags of their runs, so that a
restart changes nothing. The rules:

1. A check *lasts* if it is ERROR on the newest days in a row, of the model that serves.
2. A training for checks that last, with its repetition if it fails, is a *round*. One begins per cool-down.
3. A check has one round. It gets another only after a day on which it is not ERROR, or once a model serves
   that no round trained. Until then, if it lasts all the same, it is *uncured*: people are told.
4. While a run trains, or the newest day of the feed has no report yet, nothing is done.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from ml.drift.answers import Level
from offer_assets import policies
from offer_assets.instance import FEED_TAG

ATTEMPTS = 2
"""Runs of one round, before it is left to people."""

MODEL_TAG = "offer_assets/drift_model"
"""Of a run that drift started: version of the model that served then."""
DAY_TAG = "offer_assets/drift_day"
"""Newest day that was looked at when the round began."""
ROUND_TAG = "offer_assets/drift_round"
ATTEMPT_TAG = "offer_assets/drift_attempt"

Outcome = Literal["open", "succeeded", "waits", "refused", "canceled", "failed"]
"""``waits``: the model that was trained waits for the decision of a person; ``refused``: gate or people let
it not serve, so that another run would do no better."""

_STRONGEST_FIRST: tuple[Outcome, ...] = ("open", "succeeded", "waits", "refused", "canceled", "failed")
"""Several runs are of one round where Dagster, a person or this sensor ran it again: what it came to."""


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """A run that drift started."""

    run_id: str
    model: str
    """That served when it was asked for."""
    checks: tuple[str, ...]
    newest_day: str
    round: int
    attempt: int
    started: datetime.datetime
    outcome: Outcome
    trained: str | None = None
    """Version of the model that it registered."""
    standing: str = ""
    """Of ``waits`` and ``refused``: what became of that model and what to do, without a full stop."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What a check says that looks at several days at once."""

    last_day: str
    level: Level
    good_at: datetime.datetime | None = None
    """When it last was looked at and was not ERROR."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """All that a decision is made of."""

    checks: tuple[str, ...]
    """That may start a training."""
    after_days: int
    cooldown_days: int
    now: datetime.datetime
    feed: str
    model: str | None
    """Version of the model that serves."""
    days: Mapping[str, Mapping[str, Level]]
    """Levels by check, by day (ISO date) that the model catalogued; of a day that is not over, none."""
    windows: Mapping[str, Window] = {}
    """Of checks that look at several days at once, if the model catalogued all of them."""
    trainings: Sequence[Training]
    """Those that drift started, of this feed."""
    open_run: str = ""
    """An unfinished run that trains, in words."""
    newest_day_of_feed: str = ""
    """Empty where it was not looked up."""

    @property
    def newest_day(self) -> str:
        """The newest day that was looked at; empty if none was."""
        return max([*self.days, *(window.last_day for window in self.windows.values())], default="")

    def told(self, check: str) -> list[tuple[str, Level]]:
        """Days on which the check could tell, newest first: others neither make nor break a row."""
        return [
            (day, level)
            for day, levels in sorted(self.days.items(), reverse=True)
            if (level := levels.get(check, "UNKNOWN")) != "UNKNOWN"
        ]

    def lasts(self, check: str) -> bool:
        """Whether the check is ERROR on the newest days in a row."""
        if check in self.windows:
            return self.windows[check].level == "ERROR"
        newest = self.told(check)[: self.after_days]
        return len(newest) == self.after_days and all(level == "ERROR" for _, level in newest)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A training that drift needs."""

    feed: str
    model: str
    checks: tuple[str, ...]
    newest_day: str
    round: int
    attempt: int

    @property
    def run_key(self) -> str:
        """Dagster starts one run per key, however often it is asked for."""
        return f"drift:{self.feed}:{self.model}:{self.round}:{self.attempt}"

    @property
    def tags(self) -> dict[str, str]:
        """Tags by which the run is found again."""
        return {
            MODEL_TAG: self.model,
            policies.DRIFT_CHECKS_TAG: ",".join(self.checks),
            DAY_TAG: self.newest_day,
            ROUND_TAG: str(self.round),
            ATTEMPT_TAG: str(self.attempt),
            FEED_TAG: self.feed,
        }


class Round(msgspec.Struct, frozen=True):
    """A training and its repetitions, oldest first."""

    runs: tuple[Training, ...]

    @property
    def first(self) -> Training:
        """The run with which it began: its day, model and start are those of the round."""
        return self.runs[0]

    @property
    def checks(self) -> set[str]:
        """For which it was."""
        return {check for run in self.runs for check in run.checks}

    @property
    def attempts(self) -> int:
        """Runs that this sensor asked for: whoever else ran one again did so as the same attempt."""
        return max(run.attempt for run in self.runs)

    @property
    def trained(self) -> set[str]:
        """Versions of the models that it registered."""
        return {run.trained for run in self.runs if run.trained is not None}

    @property
    def outcome(self) -> Outcome:
        """What it came to."""
        return min((run.outcome for run in self.runs), key=_STRONGEST_FIRST.index)

    @property
    def may_be_repeated(self) -> bool:
        """Whether it failed and has a run left."""
        return self.outcome == "failed" and self.attempts < ATTEMPTS

    @property
    def standing(self) -> str:
        """What became of the model that it trained, if that does not serve."""
        return next(run.standing for run in self.runs if run.outcome == self.outcome)


class Uncured(msgspec.Struct, frozen=True, kw_only=True):
    """Checks that last in spite of their round."""

    checks: tuple[str, ...]
    round: Round
    reason: str
    """One sentence without its full stop."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now."""

    action: Literal["nothing", "wait", "start", "escalate"]
    """``escalate``: people have to know what is uncured."""
    reason: str
    """One sentence without its full stop."""
    request: Request | None = None
    """Of ``start``."""
    uncured: tuple[Uncured, ...] = ()
    """Of ``escalate``."""


def decide(situation: Situation) -> Decision:
    """The next step, by the rules above."""
    if not situation.checks:
        return Decision(action="nothing", reason="off: OFFER_ASSETS_RETRAIN_ON_DRIFT is not set")
    if situation.model is None:
        return Decision(action="nothing", reason="no model serves yet")
    rounds = _rounds(situation.trainings)
    lasting = tuple(filter(situation.lasts, situation.checks))
    if waiting := _waits_for(situation, rounds, lasting):
        return Decision(action="wait", reason=waiting)
    if not lasting:
        return Decision(action="nothing", reason=_nothing_lasts(situation))
    return _decide_on(lasting, situation, rounds)


def _decide_on(lasting: tuple[str, ...], situation: Situation, rounds: list[Round]) -> Decision:
    """The next step where nothing is under way."""
    had = {check: each for check in lasting if (each := _round_of(check, situation, rounds)) is not None}
    last = rounds[-1] if rounds else None
    if last is not None and last in had.values() and last.may_be_repeated:
        again = tuple(check for check in lasting if had.get(check) == last)
        return _start(situation, again, number=last.first.round, attempt=last.attempts + 1)
    free = tuple(check for check in lasting if check not in had)
    cool_again = last.first.started + datetime.timedelta(days=situation.cooldown_days) if last else None
    if free and (cool_again is None or situation.now >= cool_again):
        return _start(situation, free, number=last.first.round + 1 if last else 1, attempt=1)
    if had:
        return _escalation(situation, had)
    return Decision(
        action="wait",
        reason=f"{_listed(free)} lasts; the next training for drift may start from "
        f"{cool_again:%Y-%m-%d %H:%M} UTC on",
    )


def _rounds(trainings: Sequence[Training]) -> list[Round]:
    in_order = sorted(trainings, key=lambda run: (run.round, run.started))
    return [Round(tuple(runs)) for _, runs in itertools.groupby(in_order, key=lambda run: run.round)]


def _waits_for(situation: Situation, rounds: list[Round], lasting: tuple[str, ...]) -> str:
    """What has to happen before anything else may; empty if nothing."""
    if run := next((run for each in rounds for run in each.runs if run.outcome == "open"), None):
        return f"run {run.run_id[:8]}, which drift started, is not finished"
    if lasting and situation.open_run:
        return f"waiting for the end of {situation.open_run}"
    if lasting and situation.newest_day_of_feed > situation.newest_day:
        # While a backlog is worked off, the newest day that was looked at is history.
        return f"waiting for the report of {situation.newest_day_of_feed}, the newest day of the feed"
    return ""


def _round_of(check: str, situation: Situation, rounds: Sequence[Round]) -> Round | None:
    """The round that the check had and that still counts; None: it may have one."""
    place = max((place for place, each in enumerate(rounds) if check in each.checks), default=None)
    if place is None or _was_good_since(rounds[place], check, situation):
        return None
    return None if _another_served(situation, rounds[place:]) else rounds[place]


def _was_good_since(last: Round, check: str, situation: Situation) -> bool:
    """Whether the check could tell since the round began, and was not ERROR."""
    if check in situation.windows:
        good_at = situation.windows[check].good_at
        return good_at is not None and good_at > last.first.started
    return any(day > last.first.newest_day and level != "ERROR" for day, level in situation.told(check))


def _another_served(situation: Situation, rounds: Sequence[Round]) -> bool:
    """Whether a model serves, or served when a later round began, that none of the rounds trained."""
    known = {rounds[0].first.model}
    for each in rounds:
        if each.first.model not in known:
            return True
        known |= each.trained
    return situation.model not in known


def _start(situation: Situation, checks: tuple[str, ...], *, number: int, attempt: int) -> Decision:
    assert situation.model is not None
    return Decision(
        action="start",
        reason=f"ERROR on {_newest_days(situation)}: {_listed(checks)}"
        + (f"; attempt {attempt}, because the run before failed" if attempt > 1 else ""),
        request=Request(
            feed=situation.feed,
            model=situation.model,
            checks=checks,
            newest_day=situation.newest_day,
            round=number,
            attempt=attempt,
        ),
    )


def _escalation(situation: Situation, had: Mapping[str, Round]) -> Decision:
    """What is uncured; a person who canceled a training knows."""
    uncured = [
        Uncured(
            checks=(checks := tuple(check for check in had if had[check] == each)),
            round=each,
            reason=f"{_listed(checks)} lasts {_in_spite_of(situation, each)}",
        )
        for each in dict.fromkeys(had.values())
    ]
    told = tuple(each for each in uncured if each.round.outcome != "canceled")
    return Decision(
        action="escalate" if told else "nothing",
        reason="; ".join(each.reason for each in uncured),
        uncured=told,
    )


def _in_spite_of(situation: Situation, last: Round) -> str:
    started = f"{last.first.started:%Y-%m-%d}"
    if last.outcome == "canceled":
        run = next(run for run in last.runs if run.outcome == "canceled")
        return f"and a person canceled run {run.run_id[:8]}, which drift had started: it is theirs to go on"
    if last.outcome == "failed":
        return f"and the training for it failed (begun on {started}, runs: {len(last.runs)})"
    if last.outcome in ("waits", "refused"):
        return f"while the model that was trained for it on {started} is not served: {last.standing}"
    if situation.model in last.trained - {last.first.model}:
        return f"with the model that was trained for it on {started} too"
    if situation.model == last.first.model:
        return f"though a model was trained for it on {started}: the same model as before goes on serving"
    return f"though a model was trained for it on {started}, and for other checks since"


def _nothing_lasts(situation: Situation) -> str:
    return (
        f"none of {len(situation.checks)} checks was ERROR on {_newest_days(situation)} with model "
        f"{situation.model}"
    )


def _newest_days(situation: Situation) -> str:
    return (
        f"the newest {situation.after_days} days in a row" if situation.after_days > 1 else "the newest day"
    )


def _listed(checks: tuple[str, ...]) -> str:
    return ", ".join(checks)

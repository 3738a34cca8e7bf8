"""What lasting drift needs now, decided from what is seen and nothing else.

No Dagster and no files here: the sensor ``lasting_drift`` gathers the situation and does what is decided.
Which trainings there were is read from the tags of their runs and not remembered, so that a restart
changes nothing. A training and its repetitions after failures are one *round*.
"""

from __future__ import annotations

import datetime
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

Outcome = Literal["open", "succeeded", "failed", "canceled", "refused"]
"""``refused``: the training came to its end, but gate or people let its model not serve."""


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """A run that drift started."""

    run_id: str
    model: str
    checks: tuple[str, ...]
    newest_day: str
    round: int
    attempt: int
    started: datetime.datetime
    outcome: Outcome


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What a check says that looks at several days at once."""

    first_day: str
    last_day: str
    level: Level


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
    """Levels by check, by day (ISO date) that the model catalogued."""
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


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now."""

    action: Literal["nothing", "wait", "start", "escalate"]
    """``escalate``: people have to know that a training did not cure the drift."""
    reason: str
    """One sentence without its full stop."""
    request: Request | None = None
    """Of ``start``."""
    checks: tuple[str, ...] = ()
    """Of ``escalate``: those that are told."""
    round: Training | None = None
    """Of ``escalate``: the last run of the round that did not help."""


def decide(situation: Situation) -> Decision:
    """The next step. It never leads to two open runs, nor to two rounds within a cool-down."""
    if not situation.checks:
        return Decision(action="nothing", reason="off: OFFER_ASSETS_RETRAIN_ON_DRIFT is not set")
    if situation.model is None:
        return Decision(action="nothing", reason="no model serves yet")
    rounds = _rounds(situation.trainings)
    last, before = (rounds[-1] if rounds else []), (rounds[-2] if len(rounds) > 1 else [])
    # What began a round that came to nothing still counts; otherwise only what was seen since.
    counts_from = before if _outcome(last) == "failed" else last
    lasting = lasting_checks(situation, after=counts_from[0].newest_day if counts_from else "")
    if waiting := _waits_for(situation, last, lasting):
        return Decision(action="wait", reason=waiting)
    if not lasting:
        return Decision(action="nothing", reason=_nothing_lasts(situation, last))
    if last and situation.now < _cool_again(situation, last):
        return _within_cool_down(situation, last, lasting)
    return _start(situation, lasting, round_number=last[0].round + 1 if last else 1, attempt=1)


def lasting_checks(situation: Situation, after: str = "") -> tuple[str, ...]:
    """Checks that were ERROR on the newest days in a row, all of them later than ``after``.

    Days on which a check could not tell are passed over: they neither make nor break a row.
    """
    return tuple(check for check in situation.checks if _lasts(situation, check, after))


def _lasts(situation: Situation, check: str, after: str) -> bool:
    if check in situation.windows:
        window = situation.windows[check]
        return window.level == "ERROR" and window.first_day > after
    told = [
        (day, levels[check])
        for day, levels in sorted(situation.days.items(), reverse=True)
        if levels.get(check, "UNKNOWN") != "UNKNOWN"
    ]
    newest = told[: situation.after_days]
    return len(newest) == situation.after_days and all(
        day > after and level == "ERROR" for day, level in newest
    )


def _waits_for(situation: Situation, last: list[Training], lasting: tuple[str, ...]) -> str:
    """What has to happen before anything else may; empty if nothing."""
    if _outcome(last) == "open":
        return f"run {last[-1].run_id[:8]}, which drift started, is not finished"
    if lasting and situation.open_run:
        return f"waiting for the end of {situation.open_run}"
    if lasting and situation.newest_day_of_feed > situation.newest_day:
        # While a backlog is worked off, the newest day that was looked at is history.
        return f"waiting for the report of {situation.newest_day_of_feed}, the newest day of the feed"
    return ""


def _within_cool_down(situation: Situation, last: list[Training], lasting: tuple[str, ...]) -> Decision:
    """Nothing new is begun: a failed run is repeated, and people are told of what was not cured."""
    outcome, attempt = _outcome(last), max(training.attempt for training in last)
    again = _cool_again(situation, last)
    if outcome == "canceled":
        return Decision(
            action="nothing",
            reason=f"{_listed(lasting)} lasts, but a person canceled run {last[-1].run_id[:8]}, which drift "
            f"had started: the next may start from {again:%Y-%m-%d %H:%M} UTC on",
        )
    if outcome == "failed" and attempt < ATTEMPTS and last[0].model == situation.model:
        return _start(situation, lasting, round_number=last[0].round, attempt=attempt + 1)
    return Decision(
        action="escalate",
        reason=f"{_listed(lasting)} lasts {_in_spite_of(outcome, last, situation)}; the next training for "
        f"drift may start from {again:%Y-%m-%d %H:%M} UTC on",
        checks=lasting,
        round=last[-1],
    )


def _start(situation: Situation, lasting: tuple[str, ...], *, round_number: int, attempt: int) -> Decision:
    assert situation.model is not None
    days = f"{situation.after_days} days" if situation.after_days > 1 else "one day"
    return Decision(
        action="start",
        reason=f"ERROR on the newest {days} in a row: {_listed(lasting)}"
        + (f"; attempt {attempt}, because the run before failed" if attempt > 1 else ""),
        request=Request(
            feed=situation.feed,
            model=situation.model,
            checks=lasting,
            newest_day=situation.newest_day,
            round=round_number,
            attempt=attempt,
        ),
    )


def _rounds(trainings: Sequence[Training]) -> list[list[Training]]:
    """Trainings by round, oldest first in and among them."""
    by_round: dict[int, list[Training]] = {}
    for training in sorted(trainings, key=lambda training: (training.round, training.started)):
        by_round.setdefault(training.round, []).append(training)
    return list(by_round.values())


def _outcome(trainings: list[Training]) -> Outcome | None:
    """How a round ended. Several runs are of one attempt where Dagster or a person ran it again."""
    if not trainings:
        return None
    outcomes = {training.outcome for training in trainings}
    order: tuple[Outcome, ...] = ("open", "succeeded", "refused", "canceled", "failed")
    return next(outcome for outcome in order if outcome in outcomes)


def _cool_again(situation: Situation, trainings: list[Training]) -> datetime.datetime:
    return trainings[0].started + datetime.timedelta(days=situation.cooldown_days)


def _in_spite_of(outcome: Outcome | None, last: list[Training], situation: Situation) -> str:
    started = f"{last[0].started:%Y-%m-%d}"
    if outcome == "failed":
        return f"and the training for it failed (begun on {started}, runs: {len(last)})"
    if outcome == "refused":
        return f"though a model was trained for it on {started}: it was refused and is not served"
    if last[0].model == situation.model:
        return f"though a model was trained for it on {started}: the same model as before goes on serving"
    return f"with the model that was trained for it on {started} too"


def _nothing_lasts(situation: Situation, last: list[Training]) -> str:
    days = f"the newest {situation.after_days} days" if situation.after_days > 1 else "the newest day"
    line = f"none of {len(situation.checks)} checks was ERROR on {days} in a row with model {situation.model}"
    return f"{line} since the training for drift on {last[0].started:%Y-%m-%d}" if last else line


def _listed(checks: tuple[str, ...]) -> str:
    return ", ".join(checks)

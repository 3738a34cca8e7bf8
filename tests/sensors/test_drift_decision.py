"""Lasting drift starts a training once per cool-down, and is told to people instead of looping."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.drift.answers import Level
from sensors.drift_decision import ATTEMPTS, Outcome, Situation, Training, Window, decide

NOON = datetime.datetime(2026, 11, 10, 12, tzinfo=datetime.UTC)
AFTER_DAYS, COOLDOWN_DAYS = 2, 7


def date(day: int) -> str:
    return (NOON + datetime.timedelta(days=day)).date().isoformat()


def days(*levels: Level, first: int = 0) -> dict[str, dict[str, Level]]:
    """One day after the other, each with the level of ``mix``."""
    return {date(first + number): {"mix": level} for number, level in enumerate(levels)}


def situation(found: dict[str, dict[str, Level]], **changes: object) -> Situation:
    usual = Situation(
        checks=("mix", "words"),
        after_days=AFTER_DAYS,
        cooldown_days=COOLDOWN_DAYS,
        now=NOON,
        feed="feed",
        model="old",
        days=found,
        trainings=[],
    )
    return msgspec.structs.replace(usual, **changes)


def training(outcome: Outcome, day: int, *, round: int = 1, attempt: int = 1, model: str = "old") -> Training:
    return Training(
        run_id=f"run-{round}-{attempt}",
        model=model,
        checks=("mix",),
        newest_day=date(day),
        round=round,
        attempt=attempt,
        started=NOON + datetime.timedelta(days=day),
        outcome=outcome,
    )


def at(day: int) -> datetime.datetime:
    return NOON + datetime.timedelta(days=day)


def test_without_checks_or_a_model_nothing_is_decided():
    errors = days("ERROR", "ERROR")
    assert decide(situation(errors, checks=())).reason == "off: OFFER_ASSETS_RETRAIN_ON_DRIFT is not set"
    assert decide(situation(errors, model=None)).reason == "no model serves yet"


@pytest.mark.parametrize(
    "levels",
    [
        (),
        ("ERROR",),
        ("ERROR", "WARN"),
        ("ERROR", "ERROR", "OK"),
        ("ERROR", "UNKNOWN"),
        ("ERROR", "OK", "ERROR"),
    ],
)
def test_drift_that_does_not_last_starts_nothing(levels):
    decision = decide(situation(days(*levels)))
    assert decision.action == "nothing"
    assert "none of 2 checks was ERROR on the newest 2 days in a row with model old" in decision.reason


@pytest.mark.parametrize("levels", [("OK", "ERROR", "ERROR"), ("ERROR", "UNKNOWN", "ERROR", "UNKNOWN")])
def test_drift_that_lasts_starts_one_training_that_names_its_checks(levels):
    decision = decide(situation(days(*levels)))
    assert decision.action == "start"
    assert decision.request.run_key == "drift:feed:old:1:1"
    assert decision.request.tags["offer_assets/drift_checks"] == "mix"
    assert decision.request.tags["offer_assets/drift_day"] == date(len(levels) - 1)


def test_a_check_that_is_not_chosen_starts_nothing():
    assert decide(situation(days("ERROR", "ERROR"), checks=("words",))).action == "nothing"


def test_nothing_is_started_while_a_training_is_open():
    errors = days("ERROR", "ERROR")
    assert decide(situation(errors, open_run="run 1234 of train_and_release")).action == "wait"
    assert decide(situation(errors, trainings=[training("open", 1)], now=at(1))).action == "wait"
    failed_and_repeated = [training("failed", 1), training("open", 1)]
    assert decide(situation(errors, trainings=failed_and_repeated, now=at(1))).action == "wait"


def test_a_backlog_that_is_worked_off_starts_nothing():
    errors = days("ERROR", "ERROR")
    decision = decide(situation(errors, newest_day_of_feed=date(20)))
    assert (decision.action, decision.reason) == (
        "wait",
        f"waiting for the report of {date(20)}, the newest day of the feed",
    )
    assert decide(situation(errors, newest_day_of_feed=date(1))).action == "start"


def test_a_failed_run_is_repeated_once_and_then_told():
    errors = days("ERROR", "ERROR")
    once = decide(situation(errors, trainings=[training("failed", 1)], now=at(1)))
    assert once.request.run_key == "drift:feed:old:1:2"
    twice = [training("failed", 1), training("failed", 1, attempt=2)]
    told = decide(situation(errors, trainings=twice, now=at(1)))
    assert (told.action, told.checks) == ("escalate", ("mix",))
    assert "the training for it failed (begun on 2026-11-11, runs: 2)" in told.reason


def test_a_failed_run_is_not_repeated_once_the_drift_is_over():
    over = days("ERROR", "ERROR", "OK")
    assert decide(situation(over, trainings=[training("failed", 1)], now=at(2))).action == "nothing"


def test_a_failed_run_is_not_repeated_for_another_model():
    errors = days("ERROR", "ERROR", first=2)
    told = decide(situation(errors, trainings=[training("failed", 1)], model="new", now=at(3)))
    assert told.action == "escalate"


def test_a_failed_run_that_somebody_repeated_with_success_was_a_success():
    errors, repeated = days("ERROR", "ERROR"), [training("failed", 1), training("succeeded", 1)]
    assert decide(situation(errors, trainings=repeated, now=at(1))).action == "nothing"


def test_the_cool_down_begins_with_the_first_run_of_a_round():
    first, second = training("failed", 1), training("failed", 1, attempt=2)
    late = msgspec.structs.replace(second, started=at(5))
    decision = decide(situation(days("ERROR", "ERROR"), trainings=[late, first], now=at(8)))
    assert (decision.action, decision.request.run_key) == ("start", "drift:feed:old:2:1")


def test_a_run_that_a_person_canceled_is_theirs_until_the_cool_down_is_over():
    errors, canceled = days("ERROR", "ERROR", "ERROR", "ERROR"), [training("canceled", 1)]
    assert decide(situation(errors, trainings=canceled, now=at(3))).action == "nothing"
    assert decide(situation(errors, trainings=canceled, now=at(8))).request.round == 2


@pytest.mark.parametrize(
    ("outcome", "model", "says"),
    [
        ("succeeded", "new", "with the model that was trained for it on 2026-11-11 too"),
        ("succeeded", "old", "the same model as before goes on serving"),
        ("refused", "old", "it was refused and is not served"),
    ],
)
def test_drift_that_a_training_did_not_cure_is_told_and_not_trained_again(outcome, model, says):
    trained = [training(outcome, 1)]
    before = days("ERROR", "ERROR") if model == "old" else {}
    one_day_later = before | days("ERROR", first=2)
    assert decide(situation(one_day_later, trainings=trained, model=model, now=at(2))).action == "nothing"
    two_days_later = one_day_later | days("ERROR", first=3)
    told = decide(situation(two_days_later, trainings=trained, model=model, now=at(3)))
    assert (told.action, told.checks, told.request) == ("escalate", ("mix",), None)
    assert says in told.reason
    assert "may start from 2026-11-18 12:00 UTC on" in told.reason


def test_after_the_cool_down_drift_that_still_lasts_starts_the_next_round():
    errors = days(*["ERROR"] * 9)
    decision = decide(situation(errors, trainings=[training("refused", 1)], now=at(8)))
    assert (decision.action, decision.request.run_key) == ("start", "drift:feed:old:2:1")


def test_after_the_cool_down_days_from_before_the_last_training_count_no_more():
    decision = decide(situation(days("ERROR", "ERROR"), trainings=[training("refused", 1)], now=at(30)))
    assert decision.action == "nothing"
    assert "since the training for drift on 2026-11-11" in decision.reason


def window(level: Level, first: int) -> dict[str, Window]:
    return {"mix": Window(first_day=date(first), last_day=date(first + 6), level=level)}


def test_a_check_that_looks_at_several_days_counts_at_once():
    assert decide(situation({}, windows=window("WARN", 0))).action == "nothing"
    decision = decide(situation({}, windows=window("ERROR", 0)))
    assert (decision.action, decision.request.newest_day) == ("start", date(6))


def test_after_a_training_such_a_check_counts_when_all_its_days_are_newer():
    trained = [training("refused", 1)]
    early, later = window("ERROR", 1), window("ERROR", 2)
    assert decide(situation({}, windows=early, trainings=trained, now=at(7))).action == "nothing"
    assert decide(situation({}, windows=later, trainings=trained, now=at(7))).action == "escalate"


LEVELS = st.sampled_from(["OK", "WARN", "ERROR", "ERROR", "ERROR", "UNKNOWN"])
ENDINGS = st.sampled_from(["open", "new model", "same model", "refused", "failed", "canceled"])


class Operation:
    """A model at work, day after day, and what drift starts."""

    def __init__(self) -> None:
        self.now = NOON
        self.models = 1
        self.days: dict[str, dict[str, Level]] = {}
        self.trainings: list[Training] = []
        self.keys: set[str] = set()
        self.told: list[tuple[int, str]] = []

    @property
    def model(self) -> str:
        return f"model-{self.models}"

    def new_day(self, mix: Level, words: Level) -> None:
        self.now += datetime.timedelta(days=1)
        self.days[self.now.date().isoformat()] = {"mix": mix, "words": words, "volume": "ERROR"}

    def tick(self) -> None:
        seen = situation(
            self.days,
            now=self.now,
            model=self.model,
            trainings=self.trainings,
            newest_day_of_feed=self.now.date().isoformat() if self.days else "",
        )
        decision = decide(seen)
        assert decide(seen) == decision
        if decision.action == "escalate":
            assert self.trainings, "told that a training did not help, though there was none"
            assert self.trainings[-1].outcome != "open"
            self.told += [(decision.round.round, check) for check in decision.checks]
        if (request := decision.request) is None:
            return
        assert not any(run.outcome == "open" for run in self.trainings), "two open runs"
        assert request.run_key not in self.keys, "a run key that was used before"
        assert all(self.lasts(check) for check in request.checks)
        self.keys.add(request.run_key)
        self.trainings.append(
            Training(
                run_id=f"run-{len(self.trainings)}",
                model=request.model,
                checks=request.checks,
                newest_day=request.newest_day,
                round=request.round,
                attempt=request.attempt,
                started=self.now,
                outcome="open",
            )
        )

    def lasts(self, check: str) -> bool:
        told = [levels[check] for _, levels in sorted(self.days.items()) if levels[check] != "UNKNOWN"]
        return told[-AFTER_DAYS:] == ["ERROR"] * AFTER_DAYS

    def end(self, ending: str) -> None:
        if not self.trainings or self.trainings[-1].outcome != "open" or ending == "open":
            return
        outcome = {"new model": "succeeded", "same model": "succeeded"}.get(ending, ending)
        self.trainings[-1] = msgspec.structs.replace(self.trainings[-1], outcome=outcome)
        if ending == "new model":
            self.models += 1
            self.days = {}

    def rounds(self) -> list[Sequence[Training]]:
        numbers = sorted({run.round for run in self.trainings})
        return [[run for run in self.trainings if run.round == number] for number in numbers]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(LEVELS, LEVELS, st.lists(ENDINGS, min_size=1, max_size=4)), min_size=1, max_size=40)
)
def test_whatever_the_days_bring_no_two_rounds_begin_within_a_cool_down(story):
    operation = Operation()
    for mix, words, endings in story:
        operation.new_day(mix, words)
        for ending in endings:
            operation.tick()
            operation.tick()
            operation.end(ending)
    rounds = operation.rounds()
    begun = [runs[0].started for runs in rounds]
    assert all(
        later - earlier >= datetime.timedelta(days=COOLDOWN_DAYS)
        for earlier, later in itertools.pairwise(begun)
    )
    assert all(len(runs) <= ATTEMPTS for runs in rounds)
    assert all("volume" not in run.checks for run in operation.trainings)


@pytest.mark.parametrize("ending", ["new model", "same model", "refused", "failed"])
def test_drift_that_never_ends_is_told_in_every_round_and_trained_for_once_a_cool_down(ending):
    operation = Operation()
    for _ in range(30):
        operation.new_day("ERROR", "OK")
        for _ in range(3):
            operation.tick()
            operation.end(ending)
    rounds = operation.rounds()
    assert len(rounds) in (4, 5)
    assert {len(runs) for runs in rounds[:-1]} == ({2} if ending == "failed" else {1})
    assert {number for number, _ in operation.told} >= {runs[0].round for runs in rounds[:-1]}

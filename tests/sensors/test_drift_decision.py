"""Lasting drift starts one training, and is told to people instead of starting the next."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from typing import Any

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


def training(
    outcome: Outcome, day: int, *, round: int = 1, attempt: int = 1, model: str = "old", **more: Any
) -> Training:
    usual = Training(
        run_id=f"run-{round}-{attempt}",
        model=model,
        checks=("mix",),
        newest_day=date(day),
        round=round,
        attempt=attempt,
        started=NOON + datetime.timedelta(days=day),
        outcome=outcome,
    )
    return msgspec.structs.replace(usual, **more)


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
    assert (told.action, told.uncured[0].checks) == ("escalate", ("mix",))
    assert "the training for it failed (begun on 2026-11-11, runs: 2)" in told.reason


def test_a_failed_run_is_not_repeated_once_the_drift_is_over():
    over = days("ERROR", "ERROR", "OK")
    assert decide(situation(over, trainings=[training("failed", 1)], now=at(2))).action == "nothing"


def test_a_failed_run_is_not_repeated_for_another_model():
    errors = days("ERROR", "ERROR", first=2)
    decision = decide(situation(errors, trainings=[training("failed", 1)], model="new", now=at(3)))
    assert (decision.action, decision.request) == ("wait", None)
    assert "mix lasts; the next training for drift may start from 2026-11-18 12:00 UTC on" in decision.reason


def test_a_failed_run_that_somebody_repeated_with_success_was_a_success():
    errors, repeated = days("ERROR", "ERROR"), [training("failed", 1), training("succeeded", 1)]
    decision = decide(situation(errors, trainings=repeated, now=at(1)))
    assert (decision.action, decision.uncured[0].round.outcome) == ("escalate", "succeeded")


def test_the_cool_down_begins_with_the_first_run_of_a_round():
    again = days("ERROR", "ERROR", "OK", "ERROR", "ERROR")
    first, second = training("failed", 1), training("failed", 1, attempt=2, started=at(5))
    decision = decide(situation(again, trainings=[second, first], now=at(8)))
    assert (decision.action, decision.request.run_key) == ("start", "drift:feed:old:2:1")


def test_a_run_that_a_person_canceled_is_theirs():
    errors, canceled = days("ERROR", "ERROR", "ERROR", "ERROR"), [training("canceled", 1)]
    for now in (at(3), at(30)):
        decision = decide(situation(errors, trainings=canceled, now=now))
        assert (decision.action, decision.uncured) == ("nothing", ())
        assert "a person canceled run run-1-1" in decision.reason


@pytest.mark.parametrize(
    ("trained", "model", "says"),
    [
        ("new", "new", "with the model that was trained for it on 2026-11-11 too"),
        ("old", "old", "the same model as before goes on serving"),
        ("new", "old", "the same model as before goes on serving"),
    ],
)
@pytest.mark.parametrize("day", [3, 30, 300])
def test_drift_that_a_training_did_not_cure_is_told_and_never_trained_again(trained, model, says, day):
    done = [training("succeeded", 1, trained=trained)]
    errors = days("ERROR", "ERROR", first=day - 1)
    decision = decide(situation(errors, trainings=done, model=model, now=at(day)))
    assert (decision.action, decision.request) == ("escalate", None)
    assert decision.uncured[0].checks == ("mix",)
    assert says in decision.reason


@pytest.mark.parametrize("outcome", ["waits", "refused"])
def test_of_a_model_that_is_not_served_it_says_why(outcome):
    standing = "version 2 (model new) is not what anna wants"
    trained = [training(outcome, 1, trained="new", standing=standing)]
    decision = decide(situation(days("ERROR", "ERROR"), trainings=trained, now=at(1)))
    assert decision.action == "escalate"
    assert decision.reason.endswith(f"is not served: {standing}")
    assert "the same model" not in decision.reason


def test_days_without_an_error_of_its_model_let_a_check_have_another_training():
    cured = days("OK", "ERROR", "ERROR", first=2)
    done = [training("succeeded", 1, trained="new")]
    assert decide(situation(cured, trainings=done, model="new", now=at(4))).action == "wait"
    later = decide(situation(cured, trainings=done, model="new", now=at(8)))
    assert (later.action, later.request.run_key) == ("start", "drift:feed:new:2:1")


@pytest.mark.parametrize("before", [days("OK"), days("UNKNOWN", first=2), days("OK", "ERROR"), {date(2): {}}])
def test_older_days_and_days_that_tell_nothing_do_not(before):
    uncured = before | days("ERROR", "ERROR", first=3)
    done = [training("refused", 1, trained="new", standing="no")]
    assert decide(situation(uncured, trainings=done, now=at(30))).action == "escalate"


def test_a_model_that_people_or_another_job_released_may_be_trained_anew():
    errors, done = days("ERROR", "ERROR", first=20), [training("succeeded", 1, trained="new")]
    decision = decide(situation(errors, trainings=done, model="theirs", now=at(21)))
    assert (decision.action, decision.request.run_key) == ("start", "drift:feed:theirs:2:1")


def test_a_model_that_was_trained_for_another_check_is_not_such_a_model():
    done = [
        training("succeeded", 1, trained="second"),
        training("succeeded", 20, round=2, model="second", checks=("words",), trained="third"),
    ]
    errors = days("ERROR", "ERROR", first=30)
    decision = decide(situation(errors, trainings=done, model="third", now=at(31)))
    assert (decision.action, decision.uncured[0].round.first.round) == ("escalate", 1)
    assert "and for other checks since" in decision.reason
    by_a_person = [done[0], msgspec.structs.replace(done[1], model="theirs")]
    assert decide(situation(errors, trainings=by_a_person, model="third", now=at(31))).action == "start"


def test_another_check_that_lasts_is_trained_for_alone():
    both = {date(day): {"mix": "ERROR", "words": "ERROR"} for day in (8, 9)}
    done = [training("refused", 1, trained="new", standing="no")]
    early = decide(situation(both, trainings=done, now=at(7)))
    assert (early.action, early.uncured[0].checks) == ("escalate", ("mix",))
    assert decide(situation(both, trainings=done, now=at(9))).request.checks == ("words",)


def window(level: Level, good_at: int | None = None) -> dict[str, Window]:
    good = at(good_at) if good_at is not None else None
    return {"mix": Window(last_day=date(6), level=level, good_at=good)}


def test_a_check_that_looks_at_several_days_counts_at_once():
    assert decide(situation({}, windows=window("WARN"))).action == "nothing"
    decision = decide(situation({}, windows=window("ERROR")))
    assert (decision.action, decision.request.newest_day) == ("start", date(6))


def test_after_a_training_such_a_check_has_to_have_been_good_since():
    trained = [training("refused", 7, standing="no")]
    for good_at in (None, 6):
        uncured = situation({}, windows=window("ERROR", good_at), trainings=trained, now=at(30))
        assert decide(uncured).action == "escalate"
    cured = situation({}, windows=window("ERROR", 8), trainings=trained, now=at(30))
    assert decide(cured).action == "start"


LEVELS = st.sampled_from(["OK", "WARN", "ERROR", "ERROR", "ERROR", "UNKNOWN"])
ENDINGS = st.sampled_from(
    ["open", "new model", "same model", "waits", "refused", "failed", "canceled", "released by a person"]
)


class Operation:
    """A model at work, day after day, and what drift starts."""

    def __init__(self) -> None:
        self.now = NOON
        self.models = 1
        self.days: dict[str, dict[str, Level]] = {}
        self.trainings: list[Training] = []
        self.keys: set[str] = set()
        self.told: list[tuple[int, str]] = []
        self.resets = {"mix": 0, "words": 0}
        """Days without an ERROR that could tell, and models that drift did not train."""

    @property
    def model(self) -> str:
        return f"model-{self.models}"

    def new_day(self, mix: Level, words: Level) -> None:
        self.now += datetime.timedelta(days=1)
        self.days[self.now.date().isoformat()] = {"mix": mix, "words": words, "volume": "ERROR"}
        for check, level in (("mix", mix), ("words", words)):
            self.resets[check] += level in ("OK", "WARN")

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
        for each in decision.uncured:
            assert each.round.outcome not in ("open", "canceled")
            assert set(each.checks) <= each.round.checks
            self.told += [(each.round.first.round, check) for check in each.checks]
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
        if ending == "released by a person":
            self.serve_another()
            self.resets = {check: number + 1 for check, number in self.resets.items()}
        elif self.trainings and self.trainings[-1].outcome == "open" and ending != "open":
            self.end_training(ending)

    def end_training(self, ending: str) -> None:
        if ending == "new model":
            self.serve_another()
        ended = {
            "new model": {"outcome": "succeeded", "trained": self.model},
            "same model": {"outcome": "succeeded", "trained": self.model},
            "waits": {"outcome": "waits", "trained": "not served", "standing": "waits"},
            "refused": {"outcome": "refused", "trained": "not served", "standing": "refused"},
        }
        values = ended.get(ending, {"outcome": ending})
        self.trainings[-1] = msgspec.structs.replace(self.trainings[-1], **values)

    def serve_another(self) -> None:
        self.models += 1
        self.days = {}

    def rounds(self) -> list[Sequence[Training]]:
        numbers = sorted({run.round for run in self.trainings})
        return [[run for run in self.trainings if run.round == number] for number in numbers]


STORIES = st.lists(
    st.tuples(LEVELS, LEVELS, st.lists(ENDINGS, min_size=1, max_size=4)), min_size=1, max_size=60
)


@settings(max_examples=300, deadline=None)
@given(STORIES)
def test_whatever_the_days_bring_a_check_has_one_round_more_than_it_was_reset(story):
    operation = Operation()
    for mix, words, endings in story:
        operation.new_day(mix, words)
        for ending in endings:
            operation.tick()
            operation.tick()
            operation.end(ending)
        rounds = operation.rounds()
        for check, resets in operation.resets.items():
            assert sum(check in runs[0].checks for runs in rounds) <= resets + 1
        begun = [runs[0].started for runs in rounds]
        assert all(
            later - earlier >= datetime.timedelta(days=COOLDOWN_DAYS)
            for earlier, later in itertools.pairwise(begun)
        )
        assert all(len(runs) <= ATTEMPTS for runs in rounds)
        assert all("volume" not in run.checks for run in operation.trainings)


@pytest.mark.parametrize("ending", ["new model", "same model", "waits", "refused", "failed", "canceled"])
def test_drift_that_never_ends_is_trained_for_once_and_told(ending):
    operation = Operation()
    for _ in range(120):
        operation.new_day("ERROR", "OK")
        for _ in range(3):
            operation.tick()
            operation.end(ending)
    (runs,) = operation.rounds()
    assert len(runs) == (2 if ending == "failed" else 1)
    assert set(operation.told) == (set() if ending == "canceled" else {(1, "mix")})


def test_drift_that_comes_back_is_trained_for_once_a_cool_down():
    operation = Operation()
    for day in range(70):
        operation.new_day("OK" if day % 3 == 0 else "ERROR", "OK")
        operation.tick()
        operation.end("new model")
    assert 6 <= len(operation.rounds()) <= 70 / COOLDOWN_DAYS + 1

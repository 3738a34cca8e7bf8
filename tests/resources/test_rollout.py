"""The alarms of a roll-out on this machine, without any process."""

from __future__ import annotations

import re

import msgspec
import pytest

from ml.serving.routing import VariantState
from resources.endpoints import RolloutPolicy
from resources.rollout import account_of, alarm_of

POLICY = RolloutPolicy(
    canary_percent=10,
    canary_seconds=60,
    error_percent=1.0,
    p99_milliseconds=2000,
    low_confidence_percent=60.0,
)
GOOD = VariantState(
    name="model-a",
    model_version="a",
    taxonomy_version="t",
    weight=0.1,
    is_shadow=False,
    is_up=True,
    requests=200,
    errors=2,
    p99_milliseconds=1999.0,
    offers=1000,
    low_confidence=600,
    dropped=0,
)


def seen(**changes: object) -> VariantState:
    return msgspec.structs.replace(GOOD, **changes)


def test_a_version_at_its_limits_trips_no_alarm():
    assert alarm_of(GOOD, POLICY) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_up": False}, "its server ended, after 200 requests"),
        ({"errors": 3}, "1.5 % of its 200 requests ended in a server error, more than .*PERCENT=1"),
        ({"p99_milliseconds": 2400.0}, "one in a hundred of its 200 requests takes 2,400 ms .*SECONDS=2000"),
        ({"low_confidence": 700}, "of 70.0 % of its 1,000 offers it is less than half sure, .*PERCENT=60"),
        ({"requests": 5, "errors": 2}, "40.0 % of its 5 requests"),
    ],
)
def test_an_alarm_names_what_was_seen_and_its_limit(changes, said):
    alarm = alarm_of(seen(**changes), POLICY)
    assert alarm is not None
    assert re.match(said, alarm)


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": 4, "errors": 4, "p99_milliseconds": 9000.0},
        {"requests": 50, "errors": 1},
        {"offers": 49, "low_confidence": 49},
        {"requests": 0, "errors": 0, "p99_milliseconds": None, "offers": 0, "low_confidence": 0},
    ],
)
def test_too_little_to_judge_by_trips_no_alarm(changes):
    assert alarm_of(seen(**changes), POLICY) is None


def test_what_was_seen_is_said_when_a_version_is_taken():
    assert account_of(GOOD) == "200 requests, 2 server errors, p99 1,999 ms, unsure of 600 of 1,000 offers"
    assert account_of(seen(requests=3)).endswith("; too few to judge by")
    assert account_of(seen(requests=0)) == "no request came its way, so nothing was seen of it"

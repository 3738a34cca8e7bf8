"""The lock between machines: one holder at a time, whoever is killed, whatever S3 does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ml.errors import InputError
from resources import s3_lease
from resources.s3_lease import LeaseLostError, lease
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in import environment

LOCATION = f"s3://{BUCKET}/production"
LOCK = f"/{BUCKET}/production/locks/release.json"
ROOT = Path(__file__).resolve().parents[2]

PROGRAM = f"""
import time
from resources.aws import AwsAccess
from resources.s3_lease import lease

with lease(AwsAccess(region="eu-central-1"), "{LOCATION}", "release", seconds=2, say=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_lease, "_SECONDS_BETWEEN_LOOKS", 0.05)


def release(seconds: float = 30, **settings: object) -> object:
    return lease(access(), LOCATION, "release", seconds=seconds, **settings)


def holder(url: str) -> subprocess.Popen[str]:
    """Another process that holds the lease until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, **environment(url)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_of_many_threads_one_holds_it_at_a_time(stand_in):
    most: list[int] = []
    present: set[int] = set()

    def enter(number: int) -> None:
        with release():
            present.add(number)
            most.append(len(present))
            time.sleep(0.01)
            present.remove(number)

    with ThreadPoolExecutor(max_workers=6) as pool:
        list(pool.map(enter, range(6)))
    assert most == [1] * 6


def test_it_outlives_its_seconds_while_it_is_held_and_then_goes_to_who_waits(stand_in):
    over = threading.Event()

    def take_it() -> bool:
        with release(say=lambda _: None):
            return over.is_set()

    with ThreadPoolExecutor() as pool:
        with release(seconds=3) as held:
            began = time.monotonic()
            taken = pool.submit(take_it)
            wait_until(lambda: stand_in.calls.count(("s3", f"PUT {LOCK}")) > 5)
            assert time.monotonic() - began > 3
            held.check()
            over.set()
        assert taken.result(30)


def test_a_killed_holder_is_waited_for_until_its_lease_ends(stand_in):
    process = holder(stand_in.url)
    said: list[str] = []
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with release(say=said.append) as held:
        held.check()
    assert len(said) == 1
    assert f"waiting for {LOCATION}/locks/release.json: held by" in said[0]
    assert f"process {process.pid}" in said[0]


def test_who_lost_it_is_told_so(stand_in):
    def hold_for_too_long() -> None:
        with release(seconds=0.4):
            take_away()
            time.sleep(0.5)

    with pytest.raises(LeaseLostError, match=r"locks/release\.json was lost"):
        hold_for_too_long()


def test_the_error_of_the_body_is_the_one_that_is_seen(stand_in):
    def fail(seconds: float) -> None:
        with release(seconds=seconds):
            take_away()
            raise ZeroDivisionError

    for seconds in (0.4, 30):
        with pytest.raises(ZeroDivisionError):
            fail(seconds)


@pytest.mark.parametrize("fault", [{"status": 503, "code": "SlowDown"}, {"status": 500, "after": True}])
def test_it_is_taken_and_given_back_through_errors_and_lost_answers(stand_in, no_pauses, fault):
    stand_in.fail_next(f"s3:PUT {LOCK}", times=2, **fault)
    with release():
        stand_in.fail_next(f"s3:PUT {LOCK}", times=2, **fault)
    with release() as held:
        held.check()


def test_a_renewal_whose_answers_were_all_lost_is_no_loss(stand_in, no_pauses):
    with release(seconds=8) as held:
        stand_in.fail_next(f"s3:PUT {LOCK}", times=8, status=500, code="InternalError", after=True)
        wait_until(lambda: stand_in.calls.count(("s3", f"PUT {LOCK}")) > 10)
        held.check()


def test_who_may_not_write_it_is_told_where(stand_in):
    stand_in.fail_next(f"s3:PUT {LOCK}", code="AccessDenied", status=403)
    with (
        pytest.raises(InputError, match=r"writing s3://.*/locks/release\.json: AccessDenied.*deploy/iam"),
        release(),
    ):
        pass


def test_something_else_in_its_place_is_named(stand_in):
    access().client("s3").put_object(Bucket=BUCKET, Key="production/locks/release.json", Body=b"[]")
    with pytest.raises(InputError, match=r"locks/release\.json is no lease"), release():
        pass


def take_away() -> None:
    """Another one takes the lease by force."""
    content = b'{"holder": "another", "who": "another", "seconds": 0}'
    access().client("s3").put_object(Bucket=BUCKET, Key="production/locks/release.json", Body=content)


def wait_until(true: object) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)

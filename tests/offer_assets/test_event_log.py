"""The event log is read on without a gap and without a repeat, on every storage that Dagster has here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa
from dagster import DagsterEventType, DagsterInstance
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Log
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offer_assets.event_log import Reading, read_events

EVALUATION = DagsterEventType.ASSET_CHECK_EVALUATION
TYPES = (EVALUATION, DagsterEventType.RUN_FAILURE, DagsterEventType.RUN_SUCCESS)
DAY = 86_400.0


@pytest.fixture(params=["ephemeral", "sqlite", "postgresql"])
def instance(request: pytest.FixtureRequest) -> Iterator[DagsterInstance]:
    if request.param == "ephemeral":
        with DagsterInstance.ephemeral() as instance:
            yield instance
    elif request.param == "sqlite":
        with DagsterInstance.local_temp() as instance:
            yield instance
    else:
        url = request.getfixturevalue("postgres_url")
        with dg.instance_for_test(overrides={"storage": {"postgres": {"postgres_url": url}}}) as instance:
            yield instance


@pytest.fixture(scope="module")
def shared_instance() -> Iterator[DagsterInstance]:
    with DagsterInstance.ephemeral() as instance:
        yield instance


def evaluate(instance: DagsterInstance, name: str, *, passed: bool = False) -> None:
    """A check evaluation from outside of runs."""
    instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(asset_key=dg.AssetKey("a"), check_name=name, passed=passed)
    )


def fail_run(instance: DagsterInstance, job: str) -> str:
    run = dg.DagsterRun(job_name=job)
    instance.add_run(run)
    instance.report_run_failed(run, "killed")
    return run.run_id


def read(instance: DagsterInstance, bookmark: str | None = None, **options: Any) -> Reading:
    options = {"now": time.time(), "look_back": DAY, "limit": 500, **options}
    return read_events(instance, TYPES, bookmark, **options)


def names(reading: Reading) -> list[str]:
    """Checks and jobs, in the order in which they were read."""
    events = [event.entry.get_dagster_event() for event in reading.events]
    return [
        event.asset_check_evaluation_data.check_name if event.event_type == EVALUATION else event.job_name
        for event in events
    ]


def rows(instance: DagsterInstance) -> list[tuple[Any, ...]]:
    with instance.event_log_storage.index_connection() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*Log.c).order_by(Log.c.id))]


def remove(instance: DagsterInstance, *ids: int) -> None:
    with instance.event_log_storage.index_connection() as connection:
        connection.execute(sa.delete(Log).where(Log.c.id.in_(ids)))


def put(instance: DagsterInstance, row: tuple[Any, ...], **changes: Any) -> None:
    values = dict(zip(Log.c.keys(), row, strict=True)) | changes
    with instance.event_log_storage.index_connection() as connection:
        connection.execute(sa.insert(Log).values(**values))


def test_events_of_all_kinds_are_read_once_in_their_order(instance: DagsterInstance) -> None:
    evaluate(instance, "first")
    run_id = fail_run(instance, "a_job")
    evaluate(instance, "second", passed=True)
    reading = read(instance)
    assert names(reading) == ["first", "a_job", "second"]
    assert [event.entry.run_id for event in reading.events][1] == run_id
    assert all(abs(event.at - time.time()) < 60 for event in reading.events)
    assert reading.is_all
    again = read(instance, reading.bookmark)
    assert (names(again), again.bookmark) == ([], reading.bookmark)
    evaluate(instance, "third")
    assert names(read(instance, reading.bookmark)) == ["third"]


def test_reading_goes_on_in_portions(instance: DagsterInstance) -> None:
    for number in range(7):
        evaluate(instance, f"check_{number}")
    found, bookmark, is_all = [], None, False
    while not is_all:
        reading = read(instance, bookmark, limit=3)
        assert len(reading.events) <= 3
        found += names(reading)
        bookmark, is_all = reading.bookmark, reading.is_all
    assert found == [f"check_{number}" for number in range(7)]


def test_a_row_that_becomes_visible_late_is_read_late_and_once(instance: DagsterInstance) -> None:
    for name in ("first", "late", "last"):
        evaluate(instance, name)
    late = rows(instance)[1]
    remove(instance, late[0])
    now = time.time()
    reading = read(instance, now=now)
    assert names(reading) == ["first", "last"]
    put(instance, late)
    reading = read(instance, reading.bookmark, now=now + 50)
    assert names(reading) == ["late"]
    for seconds in (60, 120, 300):
        reading = read(instance, reading.bookmark, now=now + seconds)
        assert names(reading) == []


def test_what_was_read_is_forgotten_once_it_is_settled(instance: DagsterInstance) -> None:
    now = time.time()
    for number in range(20):
        evaluate(instance, f"check_{number}")
    reading = read(instance, now=now)
    longest = len(reading.bookmark)
    for seconds in (61, 62):
        reading = read(instance, reading.bookmark, now=now + seconds)
    assert len(reading.bookmark) < longest
    assert '"seen":[]' in reading.bookmark
    assert read(instance, reading.bookmark, now=now + 999).bookmark == reading.bookmark


def test_a_row_that_cannot_be_read_hides_nothing(instance: DagsterInstance) -> None:
    for name in ("first", "broken", "last"):
        evaluate(instance, name)
    first, broken, _ = rows(instance)
    for content in ("{", '{"__class__": "OfTheFuture"}', "[]"):
        remove(instance, broken[0])
        put(instance, broken, event=content)
        reading = read(instance)
        assert names(reading) == ["first", "last"]
        assert reading.unreadable == [first[0] + 1]
        assert read(instance, reading.bookmark).unreadable == []


def test_the_first_look_goes_back_no_further_than_it_should(instance: DagsterInstance) -> None:
    evaluate(instance, "old")
    evaluate(instance, "new")
    now = time.time()
    assert names(read(instance, now=now + 2 * DAY)) == []
    assert names(read(instance, now=now)) == ["old", "new"]
    # What was not read then is not read later either.
    later = read(instance, now=now + 2 * DAY)
    evaluate(instance, "newest")
    assert names(read(instance, later.bookmark, now=now)) == ["newest"]


def test_an_empty_log_is_read_from_its_first_event(instance: DagsterInstance) -> None:
    reading = read(instance)
    assert (reading.events, reading.is_all) == ([], True)
    evaluate(instance, "first")
    assert names(read(instance, reading.bookmark)) == ["first"]


def test_a_bookmark_that_makes_no_sense_is_forgotten(instance: DagsterInstance) -> None:
    evaluate(instance, "first")
    for bookmark in ("", "{", '{"settled": "x"}'):
        assert names(read(instance, bookmark)) == ["first"]


def test_in_a_log_that_was_deleted_nothing_new_is_missed(instance: DagsterInstance) -> None:
    for number in range(5):
        evaluate(instance, f"check_{number}")
    reading = read(instance)
    keys = {event.key for event in reading.events}
    remove(instance, *(row[0] for row in rows(instance)))
    evaluate(instance, "after")
    after = rows(instance)[0]
    remove(instance, after[0])
    # SQLite gives out the same ids again: before the bookmark, at it, and beyond.
    for id in (1, 5, 4711):
        put(instance, after, id=id)
        again = read(instance, reading.bookmark)
        assert names(again) == ["after"]
        assert not {event.key for event in again.events} & keys
        assert names(read(instance, again.bookmark)) == []
        remove(instance, id)


def test_in_a_log_that_was_pruned_reading_goes_on_by_time(instance: DagsterInstance) -> None:
    for name in ("first", "pruned"):
        evaluate(instance, name)
    reading = read(instance)
    remove(instance, rows(instance)[-1][0])
    evaluate(instance, "next")
    again = read(instance, reading.bookmark)
    assert names(again)[-1] == "next"
    # Those of the last minutes come again, and can be told by their keys.
    assert {event.key for event in again.events[:-1]} <= {event.key for event in reading.events}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        # A row is given an id, and becomes visible within the time to settle.
        st.tuples(st.integers(0, 20), st.integers(0, 50)),
        min_size=1,
        max_size=12,
    ),
    looks=st.lists(st.integers(1, 45), min_size=4, max_size=12),
    limit=st.integers(1, 5),
)
def test_whatever_the_order_of_commits_every_row_is_read_exactly_once(
    shared_instance: DagsterInstance, arrivals: list[tuple[int, int]], looks: list[int], limit: int
) -> None:
    shared_instance.wipe()
    evaluate(shared_instance, "template")
    template = rows(shared_instance)[0]
    base = time.time()
    started, visible_at = 0, {}
    for id, (pause, delay) in enumerate(arrivals, start=2):
        started += pause
        visible_at[id] = started + delay
    reading = read(shared_instance, now=base)
    found = [event.id for event in reading.events]
    clock = 0
    for pause in [*looks, *[45] * 12]:
        clock += pause
        for id in [id for id, at in visible_at.items() if at <= clock]:
            del visible_at[id]
            put(shared_instance, template, id=id)
        is_all = False
        while not is_all:
            reading = read(shared_instance, reading.bookmark, now=base + clock, limit=limit)
            found += [event.id for event in reading.events]
            is_all = reading.is_all
    assert sorted(found) == list(range(1, len(arrivals) + 2))

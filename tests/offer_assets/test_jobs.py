"""Schedules: which day is looked at again once it is over."""

from __future__ import annotations

import datetime
from pathlib import Path

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef, reference, write_manifest
from offer_assets.jobs import day_is_over
from resources.artifact_store import FolderArtifactStore

ONE_O_CLOCK = datetime.datetime(2026, 11, 10, 1, tzinfo=datetime.UTC)
YESTERDAY = "2026-11-09"


@pytest.fixture
def store(tmp_path: Path) -> FolderArtifactStore:
    store = FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed")
    make(store, "offer_endpoint")
    return store


def make(store: FolderArtifactStore, pointer: str, **parameters: object) -> ArtifactRef:
    kind = pointer.split("/", maxsplit=1)[0]
    folder = store.destination(kind, pointer.replace("/", "-"))
    folder.mkdir(parents=True)
    write_manifest(
        folder,
        kind=kind,
        key=folder.name,
        inputs={},
        code_version="1",
        code_revision=None,
        parameters=parameters,
        metrics={},
        seconds=0.1,
    )
    made = reference(folder)
    store.write_pointer(pointer, made)
    return made


def asked_for(store: FolderArtifactStore, days_later: int = 0) -> dg.RunRequest | str:
    """The run that the schedule asks for, or why it asks for none."""
    context = dg.build_schedule_context(
        scheduled_execution_time=ONE_O_CLOCK + datetime.timedelta(days=days_later),
        resources={"artifact_store": store},
    )
    answer = day_is_over(context)
    return answer if isinstance(answer, dg.RunRequest) else answer.skip_message


def test_a_day_that_was_looked_at_before_its_end_is_looked_at_again(store):
    make(store, f"offers/{YESTERDAY}")
    make(store, f"drift_report/{YESTERDAY}", complete=False)
    request = asked_for(store)
    assert (request.run_key, request.partition_key) == (YESTERDAY, YESTERDAY)


def test_a_day_that_nobody_has_looked_at_is_looked_at(store):
    make(store, f"offers/{YESTERDAY}")
    assert asked_for(store).partition_key == YESTERDAY


def test_a_day_that_was_looked_at_after_its_end_is_left_alone(store):
    make(store, f"offers/{YESTERDAY}")
    make(store, f"drift_report/{YESTERDAY}", complete=True)
    assert asked_for(store) == f"{YESTERDAY} was looked at after its end"


def test_a_report_that_is_gone_counts_for_nothing(store):
    make(store, f"offers/{YESTERDAY}")
    report = make(store, f"drift_report/{YESTERDAY}", complete=True)
    (Path(report.uri) / "manifest.json").unlink()
    assert asked_for(store).partition_key == YESTERDAY


def take(store: FolderArtifactStore, *days_before_yesterday: int) -> None:
    for days in days_before_yesterday:
        make(store, f"offers/{datetime.date.fromisoformat(YESTERDAY) - datetime.timedelta(days=days)}")


def test_a_feed_that_never_brought_anything_is_not_waited_for(store):
    assert asked_for(store) == f"the feed brought no offers of {YESTERDAY}, and none were expected"


def test_an_outage_of_the_whole_feed_is_noticed_on_each_of_its_days(store):
    take(store, *range(1, 30))
    assert [asked_for(store, days_later=days).partition_key for days in (0, 6, 7, 13, 26)] == [
        "2026-11-09",
        "2026-11-15",
        "2026-11-16",
        "2026-11-22",
        "2026-12-05",
    ]


def test_a_feed_of_workdays_is_not_waited_for_on_sundays(store):
    """Yesterday was a Monday; the feed has each Monday to Friday of the weeks before."""
    take(store, *(7 * week - day for week in range(1, 4) for day in range(5)))
    assert asked_for(store).partition_key == YESTERDAY
    assert "none were expected" in asked_for(store, days_later=6)


def test_a_feed_younger_than_a_week_is_expected_every_day(store):
    take(store, 1, 2)
    assert asked_for(store).partition_key == YESTERDAY


def test_without_an_endpoint_nothing_is_asked_for(tmp_path):
    store = FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed")
    make(store, f"offers/{YESTERDAY}")
    assert asked_for(store) == "there is no endpoint yet to catalogue a day with"

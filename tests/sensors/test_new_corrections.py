"""New corrections or a newer day start one run; the same start none, unless their run failed.

The clock is turned on by an hour and more between two ticks, unless a test says otherwise.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.artifacts import ArtifactRef
from resources.artifact_store import FolderArtifactStore
from resources.corrections_feed import CorrectionsFeed
from sensors import new_corrections as module
from sensors.new_corrections import new_corrections

HEADER = "offer_id,category_id,decided_at\n"
DONE, FAILED = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE

Tick = Callable[..., dg.SensorResult]


@pytest.fixture
def store(tmp_path: Path) -> FolderArtifactStore:
    store = FolderArtifactStore(root=str(tmp_path / "home" / "artifacts"), feed="feed")
    point(store, "taxonomy_change", "t1")
    point(store, "catalogued_offers/2026-11-02", "d2")
    return store


def point(store: FolderArtifactStore, name: str, digest: str, **metrics: int) -> None:
    kind = name.partition("/")[0]
    store.write_pointer(name, ArtifactRef(kind=kind, key=digest, digest=digest, uri="u", metrics=metrics))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "delivered"
    folder.mkdir()
    (folder / "1.csv").write_text(HEADER + "o,a,2026-11-03\n")
    return folder


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def tick(
    tmp_path: Path,
    store: FolderArtifactStore,
    folder: Path,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> Tick:
    """One tick; what it asks for becomes a run that ends as told (``None``: it is never launched)."""
    clock = datetime.datetime(2026, 11, 3, 9, tzinfo=datetime.UTC)
    monkeypatch.setattr(module, "_now", lambda: clock)

    def tick(
        cursor: str | None = None,
        ending: dg.DagsterRunStatus | None = DONE,
        feed: str = str(folder),
        minutes_later: int = 61,
    ) -> dg.SensorResult:
        nonlocal clock
        clock += datetime.timedelta(minutes=minutes_later)
        resources = {
            "corrections_feed": CorrectionsFeed(feed=feed, home=str(tmp_path / "home")),
            "artifact_store": store,
        }
        with dg.build_sensor_context(cursor=cursor, instance=instance, resources=resources) as context:
            result = new_corrections(context)
        assert isinstance(result, dg.SensorResult)
        for request in result.run_requests or []:
            if ending is not None:
                instance.add_run(
                    dg.DagsterRun(
                        job_name=request.job_name or "",
                        run_id=dg.DagsterRun(job_name="any").run_id,
                        status=ending,
                        tags={RUN_KEY_TAG: request.run_key or ""},
                    )
                )
        return result

    return tick


def keys(result: dg.SensorResult) -> list[str | None]:
    return [request.run_key for request in result.run_requests or []]


def reason(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return result.skip_reason.skip_message or ""


def test_the_first_tick_starts_one_run_and_the_next_none(tick):
    first = tick()
    (request,) = first.run_requests or []
    assert request.job_name == "measure_quality"
    assert reason(tick(first.cursor)) == (
        "nothing new: 1 file of corrections and the catalogued days to 2026-11-02 are measured"
    )


def test_new_corrections_a_newer_day_and_another_taxonomy_each_start_a_run(tick, folder, store):
    seen, cursor = set(), None
    for happens in (
        lambda: None,
        lambda: (folder / "2.csv").write_text(HEADER),
        lambda: point(store, "catalogued_offers/2026-11-03", "d3"),
        lambda: point(store, "taxonomy_change", "t2"),
    ):
        happens()
        result = tick(cursor)
        assert len(keys(result)) == 1
        seen.update(keys(result))
        cursor = result.cursor
    assert len(seen) == 4


def test_a_repeated_tick_asks_for_the_same_run(tick):
    """A crash between evaluation and cursor replays the tick; run keys keep it at one."""
    assert keys(tick(ending=None)) == keys(tick("not a cursor", ending=None))


def test_a_run_that_was_never_launched_is_asked_for_again_under_its_key(tick):
    first = tick(ending=None)
    assert keys(tick(first.cursor)) == keys(first)


def test_a_run_under_way_is_waited_for(tick):
    assert reason(tick(tick(ending=dg.DagsterRunStatus.STARTED).cursor)).startswith("a run measures 1 file")


def test_files_that_come_while_a_run_is_open_are_measured_by_one_run_after_it(tick, folder, instance):
    first = tick(ending=dg.DagsterRunStatus.STARTED)
    cursor = first.cursor
    for number in range(5):
        (folder / f"more-{number}.csv").write_text(HEADER + f"o{number},a,2026-11-03\n")
        result = tick(cursor)
        assert "of measure_quality is not finished: " in reason(result)
        cursor = result.cursor
    (run,) = instance.get_runs()
    instance.report_run_canceled(run)
    newest = tick(cursor)
    assert len(keys(newest)) == 1
    assert keys(newest) != keys(first)
    assert reason(tick(newest.cursor)).startswith("nothing new: 6 files")


def test_there_is_one_run_an_hour(tick, folder):
    first = tick()
    (folder / "2.csv").write_text(HEADER)
    early = tick(first.cursor, minutes_later=59)
    assert reason(early) == (
        "one run an hour: 2 files of corrections and the catalogued days to 2026-11-02 are measured from "
        "11:01 UTC on"
    )
    assert len(keys(tick(early.cursor, minutes_later=1))) == 1


def test_a_feed_that_lost_all_its_files_is_no_feed_that_has_none_yet(tick, folder, store):
    (folder / "1.csv").unlink()
    assert reason(tick()) == "the corrections feed has no file yet"
    point(store, "corrections", "c", files=12)
    assert len(keys(tick())) == 1


def test_a_failed_run_is_tried_three_times_and_then_left_to_people(tick, folder):
    result, seen = tick(ending=FAILED), set()
    while keys(result):
        seen.update(keys(result))
        result = tick(result.cursor, ending=FAILED)
    assert len(seen) == 3
    assert reason(result).startswith("gave up after 3 failed runs for 1 file")
    (folder / "2.csv").write_text(HEADER)
    assert len(keys(tick(result.cursor))) == 1


def test_a_canceled_run_is_not_started_again(tick):
    canceled = tick(ending=dg.DagsterRunStatus.CANCELED)
    assert "was canceled: run measure_quality by hand" in reason(tick(canceled.cursor))


def test_where_there_is_nothing_to_measure_the_reason_is_a_sentence(tick, folder, store):
    assert reason(tick(feed="")).startswith("no corrections feed is set: CORRECTIONS_FEED names")
    (folder / "1.csv").unlink()
    assert reason(tick()) == "the corrections feed has no file yet"
    for pointer in Path(store.root).parent.glob("pointers/*/catalogued_offers/*.json"):
        pointer.unlink()
    assert reason(tick()) == "no day is catalogued yet, so corrections say nothing"

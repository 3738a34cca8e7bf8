"""New corrections or a newer day start one run; the same start none, unless their run failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.artifacts import ArtifactRef
from resources.artifact_store import FolderArtifactStore
from resources.corrections_feed import CorrectionsFeed
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


def point(store: FolderArtifactStore, name: str, digest: str) -> None:
    store.write_pointer(name, ArtifactRef(kind=name.partition("/")[0], key=digest, digest=digest, uri="u"))


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
def tick(tmp_path: Path, store: FolderArtifactStore, folder: Path, instance: dg.DagsterInstance) -> Tick:
    """One tick; what it asks for becomes a run that ends as told (``None``: it is never launched)."""

    def tick(
        cursor: str | None = None, ending: dg.DagsterRunStatus | None = DONE, feed: str = str(folder)
    ) -> dg.SensorResult:
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

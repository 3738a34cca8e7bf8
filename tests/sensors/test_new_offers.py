"""New files of a day start one run; the same files start none, unless their run failed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.artifacts import ArtifactRef, reference, write_manifest
from resources.artifact_store import FolderArtifactStore
from resources.environment import resources_for
from resources.settings import Settings
from sensors.new_offers import new_offers

HEADER = "offer_id,shop_id,title,offered_at\n"

Tick = Callable[..., dg.SensorResult]


@pytest.fixture
def feed_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "feed"
    folder.mkdir()
    (folder / "a.csv").write_text(HEADER + "1,s,one,2026-11-02\n2,s,two,2026-11-03\n")
    (tmp_path / "taxonomy.csv").write_text("category_id,parent_id,name\n1,,A\n")
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OFFER_FEED", str(folder / "*.csv"))
    monkeypatch.setenv("CATALOG_TAXONOMY", str(tmp_path / "taxonomy.csv"))
    return folder


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def tick(feed_folder: Path, instance: dg.DagsterInstance) -> Tick:
    """One tick; its requests become runs that end as told (``None``: they are never launched)."""
    take_taxonomy("t1")

    def tick(
        cursor: str | None = None, ending: dg.DagsterRunStatus | None = dg.DagsterRunStatus.SUCCESS
    ) -> dg.SensorResult:
        known = resources_for(Settings.from_environment())
        resources = {name: known[name] for name in ("offer_feed", "artifact_store", "compute")}
        with dg.build_sensor_context(cursor=cursor, instance=instance, resources=resources) as context:
            result = new_offers(context)
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


def artifact_store() -> FolderArtifactStore:
    store = resources_for(Settings.from_environment())["artifact_store"]
    assert isinstance(store, FolderArtifactStore)
    return store


def make(kind: str, key: str, taxonomy: str, **metrics: int) -> ArtifactRef:
    """An artifact that was made with a taxonomy."""
    folder = artifact_store().destination(kind, key)
    folder.mkdir(parents=True)
    write_manifest(
        folder,
        kind=kind,
        key=key,
        inputs={"catalog_taxonomy": taxonomy},
        code_version="1",
        code_revision=None,
        parameters={},
        metrics=metrics,
        seconds=0.0,
    )
    return reference(folder)


def take_taxonomy(version: str) -> None:
    artifact_store().write_pointer("taxonomy_change", make("taxonomy_change", version, version))


def take_offers(day: str, taxonomy: str, unknown: int) -> None:
    artifact_store().write_pointer(
        f"offers/{day}", make("offers", f"{day}-{taxonomy}", taxonomy, unknown_category=unknown)
    )


def deploy_endpoint() -> None:
    store = artifact_store()
    store.write_pointer("offer_endpoint", ArtifactRef(kind="compiled_student", key="k", digest="d", uri="u"))


def days(result: dg.SensorResult) -> list[str | None]:
    return [request.partition_key for request in result.run_requests or []]


def jobs(result: dg.SensorResult) -> set[str | None]:
    return {request.job_name for request in result.run_requests or []}


def reason(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return result.skip_reason.skip_message or ""


def test_without_a_taxonomy_no_day_is_taken(tick: Tick) -> None:
    pointer = next(Path(artifact_store().root).parent.glob("pointers/*/taxonomy_change.json"))
    pointer.unlink()
    assert "the sensor taxonomy_changed adopts it first" in reason(tick())
    take_taxonomy("t2")
    assert len(days(tick())) == 2


def test_the_first_tick_starts_each_day_once(tick: Tick) -> None:
    result = tick()
    assert days(result) == ["2026-11-02", "2026-11-03"]
    assert jobs(result) == {"ingest_day"}
    assert reason(tick(result.cursor)) == "nothing new: all 2 days of the feed were started before"


def test_a_repeated_tick_asks_for_the_same_run_keys(tick: Tick) -> None:
    """A crash between evaluation and cursor replays the tick; run keys keep it at one run."""
    first, second = tick(ending=None), tick("not a cursor", ending=None)
    assert [r.run_key for r in first.run_requests or []] == [r.run_key for r in second.run_requests or []]


def test_a_run_that_was_never_launched_is_asked_for_again_under_its_key(tick: Tick) -> None:
    first = tick(ending=None)
    again = tick(first.cursor)
    assert [r.run_key for r in first.run_requests or []] == [r.run_key for r in again.run_requests or []]


def test_a_new_file_starts_only_its_day(tick: Tick, feed_folder: Path) -> None:
    cursor = tick().cursor
    (feed_folder / "b.csv").write_text(HEADER + "3,s,three,2026-11-03\n")
    assert days(tick(cursor)) == ["2026-11-03"]


def test_a_failed_day_is_run_three_times_in_all_and_then_named(tick: Tick) -> None:
    result = tick(ending=dg.DagsterRunStatus.FAILURE)
    keys = [r.run_key for r in result.run_requests or []]
    for _ in range(2):
        result = tick(result.cursor, ending=dg.DagsterRunStatus.FAILURE)
        keys += [r.run_key for r in result.run_requests or []]
    assert len(keys) == len(set(keys)) == 2 * 3
    result = tick(result.cursor)
    assert "gave up after 3 failed runs on 2026-11-02, 2026-11-03" in reason(result)
    assert "gave up" in reason(tick(result.cursor))


def test_new_files_of_a_day_that_failed_have_attempts_of_their_own(tick: Tick, feed_folder: Path) -> None:
    result = tick(ending=dg.DagsterRunStatus.FAILURE)
    for _ in range(3):
        result = tick(result.cursor, ending=dg.DagsterRunStatus.FAILURE)
    (feed_folder / "b.csv").write_text(HEADER + "3,s,three,2026-11-03\n")
    assert days(tick(result.cursor)) == ["2026-11-03"]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELED])
def test_a_run_under_way_or_canceled_by_a_person_is_not_started_again(
    tick: Tick, status: dg.DagsterRunStatus
) -> None:
    assert "nothing new" in reason(tick(tick(ending=status).cursor))


def test_with_a_live_endpoint_new_offers_are_catalogued_too(tick: Tick) -> None:
    deploy_endpoint()
    assert jobs(tick()) == {"process_day"}


def test_days_from_before_the_first_endpoint_are_catalogued_once_there_is_one(tick: Tick) -> None:
    cursor = tick().cursor
    deploy_endpoint()
    result = tick(cursor)
    assert (days(result), jobs(result)) == (["2026-11-02", "2026-11-03"], {"process_day"})
    assert "nothing new" in reason(tick(result.cursor))


def test_a_long_feed_is_started_in_portions(tick: Tick, feed_folder: Path) -> None:
    rows = [f"{day},s,t,2026-11-{day:02}\n" for day in range(1, 16)]
    (feed_folder / "a.csv").write_text(HEADER + "".join(rows))
    first = tick()
    second = tick(first.cursor)
    assert (len(days(first)), len(days(second))) == (10, 5)


def test_offers_that_are_left_out_are_told(tick: Tick, feed_folder: Path) -> None:
    (feed_folder / "old.csv").write_text(HEADER + "9,s,old,2026-10-02\n")
    assert "1 before 2026-11-01" in reason(tick(tick().cursor))


def test_days_with_unknown_categories_are_taken_again_with_a_newer_taxonomy(tick: Tick) -> None:
    """Once per taxonomy, whatever comes of it; the other days are left alone."""
    cursor = tick().cursor
    take_offers("2026-11-02", "t1", unknown=3)
    take_offers("2026-11-03", "t1", unknown=0)
    assert "nothing new" in reason(tick(cursor))
    keys = set()
    for taxonomy in ("t2", "t3"):
        take_taxonomy(taxonomy)
        result = tick(cursor)
        assert days(result) == ["2026-11-02"]
        keys |= {request.run_key for request in result.run_requests or []}
        take_offers("2026-11-02", taxonomy, unknown=2)
        cursor = result.cursor
        assert "nothing new" in reason(tick(cursor))
        assert days(tick(ending=None)) == ["2026-11-02", "2026-11-03"]  # the cursor is lost: keys as at first
    assert len(keys) == 2


def test_a_day_that_is_taken_again_has_attempts_of_its_own(tick: Tick) -> None:
    cursor = tick().cursor
    take_offers("2026-11-02", "t1", unknown=3)
    take_taxonomy("t2")
    runs = 0
    for _ in range(5):
        result = tick(cursor, ending=dg.DagsterRunStatus.FAILURE)
        runs, cursor = runs + len(days(result)), result.cursor
    assert runs == 3


def test_a_day_whose_run_is_under_way_is_not_taken_again_beside_it(
    tick: Tick, instance: dg.DagsterInstance
) -> None:
    cursor = tick(ending=dg.DagsterRunStatus.STARTED).cursor
    take_offers("2026-11-02", "t1", unknown=3)
    take_taxonomy("t2")
    result = tick(cursor)
    assert "under way" in reason(result)
    for run in instance.get_runs():
        instance.report_run_failed(run)
    assert set(days(tick(result.cursor))) == {"2026-11-02", "2026-11-03"}


def test_offers_that_are_gone_are_no_obstacle(tick: Tick) -> None:
    cursor = tick().cursor
    take_offers("2026-11-02", "t1", unknown=3)
    take_taxonomy("t2")
    shutil.rmtree(artifact_store().destination("offers", "2026-11-02-t1"))
    assert "nothing new" in reason(tick(cursor))

"""New files of a day start one run; the same files start none."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef
from resources.artifact_store import FolderArtifactStore
from resources.environment import resources_for
from resources.offer_feed import OfferFeed
from resources.settings import Settings
from sensors.new_offers import new_offers

HEADER = "offer_id,shop_id,title,offered_at\n"


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


def tick(cursor: str | None = None) -> dg.SensorResult | dg.SkipReason:
    resources = resources_for(Settings.from_environment())
    feed, store = resources["offer_feed"], resources["artifact_store"]
    assert isinstance(feed, OfferFeed)
    context = dg.build_sensor_context(cursor=cursor)
    return new_offers(context, offer_feed=feed, artifact_store=store)


def test_the_first_tick_starts_each_day_once(feed_folder: Path) -> None:
    result = tick()
    assert [request.partition_key for request in result.run_requests] == ["2026-11-02", "2026-11-03"]
    assert {request.job_name for request in result.run_requests} == {"ingest_day"}
    again = tick(result.cursor)
    assert isinstance(again, dg.SkipReason)
    assert "nothing new" in again.skip_message


def test_a_repeated_tick_asks_for_the_same_run_keys(feed_folder: Path) -> None:
    """A crash between evaluation and cursor replays the tick; run keys keep it at one run."""
    assert [r.run_key for r in tick().run_requests] == [r.run_key for r in tick().run_requests]


def test_a_new_file_starts_only_its_day(feed_folder: Path) -> None:
    cursor = tick().cursor
    (feed_folder / "b.csv").write_text(HEADER + "3,s,three,2026-11-03\n")
    result = tick(cursor)
    assert [request.partition_key for request in result.run_requests] == ["2026-11-03"]


def test_with_a_live_endpoint_new_offers_are_catalogued_too(feed_folder: Path) -> None:
    store = resources_for(Settings.from_environment())["artifact_store"]
    assert isinstance(store, FolderArtifactStore)
    store.write_pointer("offer_endpoint", ArtifactRef(kind="compiled_student", key="k", digest="d", uri="u"))
    assert {request.job_name for request in tick().run_requests} == {"process_day"}

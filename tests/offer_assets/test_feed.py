"""A day of offers: what is said where the feed has none."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from offer_assets.feed import feed_assets
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.io_manager import ArtifactRefIOManager
from resources.offer_feed import OfferFeed

FIRST_DAY = "2024-03-01"


def failure_of(folder: Path, day: str, *delivered: str) -> str:
    """What the run says for a day that the feed has no offers of."""
    rows = [f"o{number},s,Kettle,{date}" for number, date in enumerate(delivered)]
    (folder / "offers.csv").write_text("\n".join(["offer_id,shop_id,title,offered_at", *rows, ""]))
    store = FolderArtifactStore(root=str(folder / "home" / "artifacts"), feed="feed")
    raw_offers, _ = feed_assets(dg.DailyPartitionsDefinition(FIRST_DAY))
    result = dg.materialize(
        [raw_offers],
        partition_key=day,
        resources={
            "io_manager": ArtifactRefIOManager(store=store),
            "compute": LocalCompute(store=store),
            "offer_feed": OfferFeed(
                feed=str(folder / "*.csv"), first_day=FIRST_DAY, home=str(folder / "home")
            ),
        },
        raise_on_error=False,
    )
    (failure,) = result.get_step_failure_events()
    return str(failure.step_failure_data.error)


def test_a_silent_day_says_for_how_long_the_feed_has_been_silent(tmp_path):
    said = failure_of(tmp_path, "2024-03-20", "2024-03-01", "2024-03-03", "2024-03-21")
    assert (
        "the feed has no offers of 2024-03-20; 17 days since the last offers (2024-03-03); the newest days "
        "it has: 2024-03-01, 2024-03-03, 2024-03-21"
    ) in said


def test_a_day_before_all_offers_has_no_silence_before_it(tmp_path):
    said = failure_of(tmp_path, "2024-03-01", "2024-03-03")
    assert "the feed has no offers of 2024-03-01; the newest days it has: 2024-03-03" in said

"""Whose home it is: one feed's, from first use on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resources.environment import resources_for
from resources.home import claim_home
from resources.settings import Settings, SettingsError


def of_feed(home: Path, feed: str) -> Settings:
    return Settings(home=home, offer_feed=feed, catalog_taxonomy="s3://b/taxonomy.csv")


def test_the_same_feed_comes_back_whatever_else_changed(tmp_path):
    claim_home(of_feed(tmp_path, "s3://b/offers.csv"))
    claim_home(
        Settings(home=tmp_path, offer_feed="s3://b/offers.csv", catalog_taxonomy="s3://b/newer_taxonomy.csv")
    )
    claim_home(Settings(home=tmp_path / "demo", demo_days=2))
    claim_home(Settings(home=tmp_path / "demo", demo_days=5))


def test_another_feed_is_refused_in_one_line_and_nothing_changes(tmp_path):
    resources_for(Settings(home=tmp_path))
    with pytest.raises(SettingsError) as refused:
        resources_for(of_feed(tmp_path, "s3://b/offers.csv"))
    assert str(refused.value) == (
        f"{tmp_path} holds artifacts of feed demo seed=17 offers_per_day=8000; set OFFER_ASSETS_HOME to "
        "another folder for feed s3://b/offers.csv (or delete it)"
    )
    resources_for(Settings(home=tmp_path))


@pytest.mark.parametrize("changed", [{"demo_seed": 18}, {"demo_offers_per_day": 10}])
def test_another_demo_feed_is_another_feed(tmp_path, changed):
    claim_home(Settings(home=tmp_path))
    with pytest.raises(SettingsError, match="holds artifacts of feed demo seed=17"):
        claim_home(Settings(home=tmp_path, **changed))


def test_of_many_feeds_at_once_one_gets_the_home(tmp_path):
    def claim(number: int) -> bool:
        try:
            claim_home(of_feed(tmp_path, f"s3://b/{number}.csv"))
        except SettingsError:
            return False
        return True

    with ThreadPoolExecutor(max_workers=6) as pool:
        assert sum(pool.map(claim, range(6))) == 1


def test_a_password_in_the_feed_is_neither_kept_nor_told(tmp_path):
    claim_home(of_feed(tmp_path, "https://me:hunter2@host/offers.csv"))
    assert "hunter2" not in (tmp_path / "feed.json").read_text()
    claim_home(of_feed(tmp_path, "https://me:changed@host/offers.csv"))


def test_a_home_that_cannot_be_used_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"^OFFER_ASSETS_HOME=.*file/home cannot be used"):
        claim_home(Settings(home=tmp_path / "file" / "home"))


def test_a_damaged_claim_names_the_file(tmp_path):
    (tmp_path / "feed.json").write_text("{")
    with pytest.raises(SettingsError, match=r"feed\.json cannot be read"):
        claim_home(Settings(home=tmp_path))

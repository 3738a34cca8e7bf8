"""Which days a feed has offers of, and what stays true of a file that was looked at once."""

from __future__ import annotations

import datetime
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from ml.demo.feed import feed_in
from ml.errors import InputError
from ml.feed import reading as ml_feed
from resources import offer_feed as offer_feed_module
from resources.offer_feed import DemoOfferFeed, OfferFeed

HEADER = "offer_id,shop_id,title,offered_at\n"


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The date, which a test can change."""
    today = ["2026-11-10"]
    monkeypatch.setattr(offer_feed_module, "_today", lambda: today[0])
    return today


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "delivered"
    folder.mkdir()
    return folder


@pytest.fixture
def feed(tmp_path: Path, folder: Path) -> OfferFeed:
    return OfferFeed(
        feed=str(folder / "*"),
        first_day="2026-11-01",
        home=str(tmp_path / "home"),
    )


def deliver(folder: Path, name: str, *dates: str) -> Path:
    file = folder / name
    rows = [f"{name}-{number},shop,Title {number},{date}\n" for number, date in enumerate(dates)]
    file.write_text(HEADER + "".join(rows))
    return file


def names_of(feed: OfferFeed, day: str) -> list[str]:
    return [Path(file.uri).name for file in feed.files_of(day)]


def test_days_are_those_of_the_offers_in_order(feed, folder):
    deliver(folder, "b.csv", "2026-11-03", "2026-11-02")
    deliver(folder, "a.csv", "2026-11-02T23:59:00")
    assert feed.days() == ["2026-11-02", "2026-11-03"]
    assert names_of(feed, "2026-11-02") == ["a.csv", "b.csv"]
    assert names_of(feed, "2026-11-03") == ["b.csv"]
    assert names_of(feed, "2026-11-04") == []


def test_undated_offers_stay_on_the_day_of_the_first_look(feed, folder, today):
    deliver(folder, "undated.csv", "", "2026-11-02")
    assert feed.days() == ["2026-11-02", "2026-11-10"]
    today[0] = "2026-11-12"
    assert feed.days() == ["2026-11-02", "2026-11-10"]
    assert feed.files_of("2026-11-10")[0].loaded_on == "2026-11-10"


def test_a_file_that_changed_is_looked_at_again(feed, folder, today):
    deliver(folder, "a.csv", "2026-11-02")
    before = feed.files_of("2026-11-02")[0].fingerprint
    deliver(folder, "a.csv", "2026-11-02", "2026-11-03", "")
    today[0] = "2026-11-12"
    assert feed.days() == ["2026-11-02", "2026-11-03", "2026-11-12"]
    assert feed.files_of("2026-11-02")[0].fingerprint != before


def test_a_file_is_read_once(feed, folder, monkeypatch):
    deliver(folder, "a.csv", "2026-11-02")
    feed.days()

    def read_again(uri: str) -> None:
        raise AssertionError(f"{uri} was read again")

    monkeypatch.setattr(ml_feed, "profile_file", read_again)
    assert feed.days() == ["2026-11-02"]


def test_an_unreadable_file_belongs_to_its_first_day_and_stops_no_other(feed, folder, today):
    deliver(folder, "good.csv", "2026-11-02")
    (folder / "broken.parquet").write_bytes(b"PAR1 but not really")
    assert feed.days() == ["2026-11-02", "2026-11-10"]
    assert names_of(feed, "2026-11-10") == ["broken.parquet"]
    (problem,) = [file.problem for file in feed.files() if file.problem]
    assert "broken.parquet" in problem
    today[0] = "2026-11-12"
    assert names_of(feed, "2026-11-10") == ["broken.parquet"]


def test_a_file_that_was_unreadable_for_a_while_keeps_its_first_day(
    feed, folder, tmp_path, today, monkeypatch
):
    deliver(folder, "a.csv", "")

    def no_network(uri: str) -> None:
        raise InputError(f"{uri} cannot be read: no network")

    with monkeypatch.context() as outage:
        outage.setattr(ml_feed, "profile_file", no_network)
        assert feed.days() == ["2026-11-10"]
    today[0] = "2026-11-12"
    (record,) = (tmp_path / "home" / "feed").glob("*.unreadable.json")
    os.utime(record, (0, 0))
    assert feed.days() == ["2026-11-10"]
    assert [file.problem for file in feed.files()] == [None]


def test_an_unreadable_file_is_left_alone_for_a_while(feed, folder, tmp_path, monkeypatch):
    deliver(folder, "a.csv", "")
    looks = []

    def no_network(uri: str) -> None:
        looks.append(uri)
        raise InputError(f"{uri} cannot be read: no network")

    monkeypatch.setattr(ml_feed, "profile_file", no_network)
    assert [feed.days() for _ in range(3)] == [["2026-11-10"]] * 3
    assert len(looks) == 1
    (record,) = (tmp_path / "home" / "feed").glob("*.unreadable.json")
    os.utime(record, (0, 0))
    assert [feed.days() for _ in range(3)] == [["2026-11-10"]] * 3
    assert len(looks) == 2


def test_offers_without_a_partition_are_counted(feed, folder):
    deliver(folder, "a.csv", "2026-10-01", "2026-10-31", "2026-11-02", "")
    assert feed.left_out() == {"before 2026-11-01": 2}
    deliver(folder, "b.csv", "2026-11-11")
    assert feed.left_out() == {"before 2026-11-01": 2, "after today": 1}
    assert feed.left_out_line() == (
        "offers without a day to be processed on: 2 before 2026-11-01, 1 after today "
        "(OFFER_ASSETS_FIRST_DAY=2026-11-01)"
    )


def test_where_every_offer_has_its_day_there_is_nothing_to_tell(feed, folder):
    deliver(folder, "a.csv", "2026-11-02", "")
    assert feed.left_out() == {}
    assert feed.left_out_line() == ""


def test_an_empty_file_is_missed_on_the_day_it_came(feed, folder):
    deliver(folder, "empty.csv")
    assert feed.days() == ["2026-11-10"]


def test_offers_of_the_future_wait_for_their_day(feed, folder, today):
    deliver(folder, "a.csv", "2026-11-02", "2026-11-11")
    assert feed.days() == ["2026-11-02"]
    today[0] = "2026-11-11"
    assert feed.days() == ["2026-11-02", "2026-11-11"]


def test_a_feed_of_other_days_than_the_partitions_names_the_setting(feed, folder):
    deliver(folder, "old.csv", "2026-10-01", "2026-10-03")
    with pytest.raises(InputError, match="from 2026-10-01 to 2026-10-03, none from OFFER_ASSETS_FIRST_DAY"):
        feed.days()


def test_a_feed_that_leads_nowhere_fails_plainly(feed):
    with pytest.raises(dg.Failure) as failure:
        feed.days()
    assert not failure.value.allow_retries
    assert isinstance(failure.value, InputError)


def test_many_that_look_first_at_once_agree_on_the_day(feed, folder, monkeypatch):
    deliver(folder, "a.csv", "")
    dates = iter([f"2026-11-{number:02}" for number in range(1, 30)])
    looked = lambda: next(dates)  # noqa: E731 (every look on another date: the worst case)
    monkeypatch.setattr(offer_feed_module, "_today", looked)
    with ThreadPoolExecutor(max_workers=6) as pool:
        seen = list(pool.map(lambda _: feed.files()[0].loaded_on, range(6)))
    assert len(set(seen)) == 1


class TestDemo:
    """The embedded feed."""

    @staticmethod
    def demo(home: Path, *, days: int = 2, seed: int = 17) -> DemoOfferFeed:
        return DemoOfferFeed.in_home(
            home, first_day=datetime.date(2026, 11, 1), days=days, offers_per_day=40, seed=seed
        )

    def test_the_demo_feed_appears_when_it_is_asked_for(self, tmp_path):
        feed = self.demo(tmp_path)
        assert feed.days() == ["2026-11-01", "2026-11-02"]
        assert [path.name for path in feed.taxonomy_folder.iterdir()] == ["v1.csv"]

    def test_its_undated_offers_are_of_the_day_of_their_file(self, tmp_path):
        feed = DemoOfferFeed.in_home(
            tmp_path, first_day=datetime.date(2026, 11, 1), days=1, offers_per_day=3000, seed=17
        )
        (file,) = feed.files()
        assert file.undated
        assert feed.days() == ["2026-11-01"]

    def test_asked_again_it_is_the_same(self, tmp_path):
        first = self.demo(tmp_path).files()
        assert self.demo(tmp_path).files() == first

    def test_many_that_ask_first_at_once_get_the_same_feed(self, tmp_path):
        with ThreadPoolExecutor(max_workers=4) as pool:
            seen = list(pool.map(lambda _: self.demo(tmp_path).files(), range(4)))
        assert all(files == seen[0] for files in seen)

    def test_other_settings_need_another_home_and_leave_this_one_as_it_is(self, tmp_path):
        before = self.demo(tmp_path).files()
        with pytest.raises(InputError, match=r"holds the demo feed of seed=17 .* another folder for seed=18"):
            self.demo(tmp_path, seed=18).files()
        assert self.demo(tmp_path).files() == before

    def test_a_drifted_day_follows_the_newest_and_stays(self, tmp_path):
        feed = self.demo(tmp_path)
        assert feed.add_drifted_day() == "2026-11-03"
        assert self.demo(tmp_path).days() == ["2026-11-01", "2026-11-02", "2026-11-03"]
        assert names_of(feed, "2026-11-03") == ["offers-2026-11-03.parquet"]

    def test_a_drifted_day_in_the_future_is_refused(self, tmp_path, today):
        feed = self.demo(tmp_path)
        feed.days()
        today[0] = "2026-11-02"
        with pytest.raises(InputError, match="would be 2026-11-03, in the future"):
            feed.add_drifted_day()

    def test_days_after_a_new_taxonomy_keep_the_labels_of_the_feed(self, tmp_path):
        feed = self.demo(tmp_path)
        feed.add_taxonomy_version()
        feed.add_drifted_day()
        assert feed_in(tmp_path / "demo_feed").taxonomy_version == 1

    def test_a_home_from_before_there_were_versions_gets_its_taxonomy(self, tmp_path):
        files = self.demo(tmp_path).files()
        shutil.rmtree(tmp_path / "demo_feed" / "taxonomy")
        feed = self.demo(tmp_path)
        assert feed.files() == files
        assert (feed.taxonomy_folder / "v1.csv").is_file()

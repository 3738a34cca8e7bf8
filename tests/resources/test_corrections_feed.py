"""Which files of corrections there are, and since when."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from ml.errors import InputError
from resources import corrections_feed as corrections_feed_module
from resources.corrections_feed import CorrectionsFeed, DemoCorrectionsFeed
from resources.offer_feed import DemoOfferFeed


@pytest.fixture(autouse=True)
def today(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The date, which a test can change."""
    today = ["2026-11-10"]
    monkeypatch.setattr(corrections_feed_module, "_today", lambda: today[0])
    return today


def feed(tmp_path: Path, place: str) -> CorrectionsFeed:
    return CorrectionsFeed(feed=place, home=str(tmp_path / "home"))


def test_files_are_listed_with_the_day_of_the_first_look(tmp_path, today):
    (tmp_path / "a.csv").write_text("offer_id,category_id,decided_at\n")
    found = feed(tmp_path, f"{tmp_path}/*.csv")
    (before,) = found.files()
    today[0] = "2026-11-12"
    (tmp_path / "b.jsonl.gz").write_bytes(b"broken")
    assert found.files() == [before]
    assert feed(tmp_path, f"{tmp_path}/*.*").files()[1].loaded_on == "2026-11-12"
    assert before.loaded_on == "2026-11-10"


def test_a_file_that_changed_is_a_file_of_the_day_it_was_changed(tmp_path, today):
    file = tmp_path / "a.csv"
    file.write_text("offer_id,category_id,decided_at\n")
    found = feed(tmp_path, str(file))
    (before,) = found.files()
    today[0] = "2026-11-12"
    file.write_text("offer_id,category_id,decided_at\no,a,2026-11-11\n")
    (after,) = found.files()
    assert before.fingerprint != after.fingerprint
    assert after.loaded_on == "2026-11-12"


def test_no_feed_and_a_feed_without_files_yet_have_none(tmp_path):
    (tmp_path / "empty").mkdir()
    assert not feed(tmp_path, "").is_there
    assert feed(tmp_path, "").files() == []
    assert feed(tmp_path, str(tmp_path / "empty")).files() == []
    assert feed(tmp_path, f"{tmp_path}/empty/*.csv").files() == []


def test_a_feed_that_leads_nowhere_or_to_something_else_is_named(tmp_path):
    (tmp_path / "notes.docx").touch()
    with pytest.raises(InputError, match=r"CORRECTIONS_FEED=.*gone\.csv points nowhere"):
        feed(tmp_path, str(tmp_path / "gone.csv")).files()
    with pytest.raises(InputError, match=r"CORRECTIONS_FEED=.*notes\.docx is of no known format"):
        feed(tmp_path, str(tmp_path / "notes.docx")).files()


@pytest.fixture
def demo(tmp_path: Path) -> DemoOfferFeed:
    return DemoOfferFeed.in_home(
        tmp_path, first_day=datetime.date(2026, 11, 1), days=2, offers_per_day=400, seed=17
    )


def test_the_demo_has_corrections_of_each_of_its_days(demo):
    found = DemoCorrectionsFeed.of(demo)
    assert found.is_there
    assert [(Path(file.uri).name, file.loaded_on) for file in found.files()] == [
        ("corrections-2026-11-01.csv", "2026-11-01"),
        ("corrections-2026-11-02.csv", "2026-11-02"),
    ]


def test_a_further_day_of_the_demo_brings_its_corrections_and_changes_no_others(demo):
    found = DemoCorrectionsFeed.of(demo)
    before = found.files()
    assert demo.add_drifted_day() == "2026-11-03"
    after = found.files()
    assert after[:2] == before
    assert [file.loaded_on for file in after[2:]] == ["2026-11-03"]


def test_a_demo_from_before_there_were_corrections_gets_them(demo):
    files = DemoCorrectionsFeed.of(demo).files()
    contents = [Path(file.uri).read_bytes() for file in files]
    for file in files:
        Path(file.uri).unlink()
    assert [Path(file.uri).read_bytes() for file in DemoCorrectionsFeed.of(demo).files()] == contents

"""Every decision ends in one of two tables, in the categories of today, or with what is wrong with it."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.demo.corrections import OFFERS_LOOKED_AT, write_missing_corrections
from ml.demo.feed import DemoFeed
from ml.errors import InputError
from ml.feed.reading import fingerprint
from ml.progress import Progress
from ml.quality.corrections import REASONS, write_corrections
from ml.runner import StageContext
from ml.stages import CorrectionsParameters, FeedFile
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.transitions import Successor, Transition, Transitions

LOADED_ON = "2026-11-10"
HEADER = "offer_id,category_id,decided_at\n"


def transition(former: str, *to: str, certain: bool, lives_on: bool = False) -> Transition:
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        kind="split" if len(to) > 1 else "merged",
        to=[Successor(category_id=category, share=1 / len(to)) for category in to],
        origin="official",
        confidence=1.0,
        certain=certain,
        since="v2",
        reason="",
        lives_on=lives_on,
    )


class World:
    """A taxonomy that changed on 5 November: ``old`` became ``a``, ``torn`` and ``shrunk`` were divided."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs = 0
        (folder / "taxonomy").mkdir()
        Taxonomy([Category(name, None, name) for name in ("a", "b", "shrunk")]).write(
            folder / "taxonomy" / "taxonomy.parquet"
        )
        Transitions(
            history=["v1", "v2"],
            transitions=[
                transition("old", "a", certain=True),
                transition("shrunk", "shrunk", "b", certain=False, lives_on=True),
                transition("torn", "a", "b", certain=False),
            ],
            adopted_on=["", "2026-11-05"],
        ).write(folder / "taxonomy")

    def file(self, content: str | bytes, name: str = "c.csv", loaded_on: str = LOADED_ON) -> FeedFile:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return FeedFile(uri=str(path), fingerprint=fingerprint(str(path)), loaded_on=loaded_on)

    def run(self, *files: FeedFile) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
        self.runs += 1
        output, checkpoints = (self.folder / f"{kind}{self.runs}" for kind in ("output", "checkpoints"))
        output.mkdir()
        checkpoints.mkdir()
        taxonomy = self.folder / "taxonomy"
        context = StageContext(
            {"catalog_taxonomy": taxonomy, "taxonomy_change": taxonomy}, output, checkpoints, Progress("c")
        )
        metrics = write_corrections(context, CorrectionsParameters(files=list(files)))
        tables = (
            pq.read_table(output / f"{name}.parquet").to_pylist() for name in ("corrections", "quarantine")
        )
        return *tables, metrics


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def reasons_of(world: World, *rows: str) -> list[str]:
    _, quarantined, _ = world.run(world.file(HEADER + "".join(row + "\n" for row in rows)))
    return [row["reason"] for row in quarantined]


def test_a_good_decision_counts_and_says_where_it_came_from(world):
    (row,), quarantined, metrics = world.run(world.file(HEADER + " o1 , a ,2026-11-08T10:00:00+02:00\n"))
    assert quarantined == []
    assert row == {
        "offer_id": "o1",
        "category_id": "a",
        "decided_as": "a",
        "decided_at": datetime.datetime(2026, 11, 8, 8),
        "standing": "newest",
        "source_file": str(world.folder / "c.csv"),
        "source_row": 1,
    }
    assert metrics["decided_from"] == metrics["decided_until"] == "2026-11-08"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",a,2026-11-08", "missing_offer_id"),
        ("o1, ,2026-11-08", "missing_category_id"),
        ("o1,a,", "missing_decided_at"),
        ("o1,a,last week", "invalid_decided_at"),
        ("o1,a,1848-03-18", "invalid_decided_at"),
        ("o1,a,2026-11-12", "decided_in_the_future"),
        ("o1,nowhere,2026-11-08", "unknown_category"),
        ("o1,torn,2026-11-08", "uncertain_category"),
        ("o1,a", "malformed_row"),
        (",nowhere,2027-01-01", "missing_offer_id,decided_in_the_future,unknown_category"),
    ],
)
def test_what_is_wrong_is_quarantined_with_all_reasons(world, row, reason):
    assert reasons_of(world, row) == [reason]
    assert set(reason.split(",")) <= set(REASONS)


def test_a_clock_or_time_zone_a_day_ahead_is_no_future(world):
    assert reasons_of(world, "o1,a,2026-11-11T13:00:00") == []


def test_quarantine_keeps_what_was_delivered(world):
    _, quarantined, _ = world.run(world.file(HEADER + '" o1 ",nowhere, last week\no2;a\n'))
    assert [(row["offer_id"], row["category_id"], row["decided_at"]) for row in quarantined] == [
        (" o1 ", "nowhere", " last week"),
        (None, None, None),
    ]
    assert [row["content"] for row in quarantined] == [None, "o2;a"]


def test_decisions_of_an_earlier_taxonomy_move_where_that_is_certain(world):
    rows, quarantined, metrics = world.run(
        world.file(
            HEADER + "o1,old,2026-11-04\no2,old,2026-11-09\no3,shrunk,2026-11-04\no4,shrunk,2026-11-09\n"
        )
    )
    assert {row["offer_id"]: (row["category_id"], row["decided_as"]) for row in rows} == {
        "o1": ("a", "old"),
        "o2": ("a", "old"),
        "o4": ("shrunk", "shrunk"),
    }
    assert [(row["offer_id"], row["reason"]) for row in quarantined] == [("o3", "uncertain_category")]
    assert metrics["of_earlier_taxonomies"] == 2
    assert metrics["quarantined_by_fault_of_the_feed"] == 0


def test_the_newest_decision_counts_and_the_others_are_marked(world):
    first = world.file(HEADER + "o1,a,2026-11-08\no1,b,2026-11-09T10:00:00\n", "1.csv")
    second = world.file(HEADER + "o1,b,2026-11-09T10:00:00\no2,a,2026-11-01\n", "2.csv")
    rows, _, metrics = world.run(first, second)
    assert [(row["offer_id"], row["category_id"], row["standing"]) for row in rows] == [
        ("o1", "a", "superseded"),
        ("o1", "b", "newest"),
        ("o1", "b", "repeated"),
        ("o2", "a", "newest"),
    ]
    assert (metrics["newest"], metrics["superseded"], metrics["repeated"]) == (2, 1, 1)


def test_of_decisions_of_one_instant_that_contradict_each_other_none_counts(world):
    rows, quarantined, metrics = world.run(
        world.file(
            HEADER + "o1,a,2026-11-07\no1,a,2026-11-08\no1,b,2026-11-08\no2,old,2026-11-08\no2,a,2026-11-08\n"
        )
    )
    assert [(row["offer_id"], row["decided_at"].day, row["standing"]) for row in rows] == [
        ("o1", 7, "newest"),
        ("o2", 8, "newest"),
        ("o2", 8, "repeated"),
    ]
    assert [row["reason"] for row in quarantined] == ["contradiction", "contradiction"]
    assert metrics["contradiction"] == 2


def test_deliveries_are_told_apart_and_the_newest_week_is_counted_by_itself(world):
    files = [
        world.file(HEADER + "o1,a,2026-11-01\no2,a,2026-11-02\n", "1.csv", "2026-11-03"),
        world.file(HEADER + "o3,nowhere,2026-11-08\no4,torn,2026-11-08\n", "2.csv", "2026-11-09"),
        world.file(HEADER + "o5,a,2026-11-10\n,a,2026-11-10\n", "3.csv", "2026-11-15"),
    ]
    _, _, metrics = world.run(*files)
    table = pq.read_table(world.folder / "output1" / "deliveries.parquet").to_pylist()
    assert [tuple(row.values()) for row in table] == [
        ("2026-11-03", 2, 0, 0, "2026-11-02"),
        ("2026-11-09", 2, 2, 1, None),
        ("2026-11-15", 2, 1, 1, "2026-11-10"),
    ]
    assert (metrics["rows"], metrics["quarantined_by_fault_of_the_feed"]) == (6, 2)
    assert (metrics["recent_since"], metrics["recent_rows"]) == ("2026-11-09", 4)
    assert metrics["recent_quarantined_by_fault_of_the_feed"] == 2


def test_a_broken_file_is_named_and_stops_no_other(world):
    broken = world.file(b"PAR1 and no more", "b.parquet")
    rows, _, metrics = world.run(
        broken, world.file("title\nKettle\n", "t.csv"), world.file(HEADER + "o1,a,2026-11-08\n")
    )
    assert len(rows) == 1
    assert metrics["files"] == 1
    assert [line.split(" ")[0].rsplit("/", 1)[1] for line in metrics["unreadable_files"]] == [
        "b.parquet",
        "t.csv",
    ]
    assert "has no column offer_id, category_id, decided_at" in metrics["unreadable_files"][1]


def test_a_file_that_changed_since_it_was_looked_at_is_refused(world):
    file = world.file(HEADER + "o1,a,2026-11-08\n")
    Path(file.uri).write_text(HEADER)
    with pytest.raises(InputError, match=r"c\.csv changed since it was looked at"):
        world.run(file)


def test_all_formats_say_the_same(world):
    line = {"offer_id": "o1", "category_id": "a", "decided_at": "2026-11-08", "by": "Ada"}
    rows, _, metrics = world.run(world.file(json.dumps(line) + "\n", "c.jsonl"))
    assert [row["category_id"] for row in rows] == ["a"]
    assert metrics["ignored_columns"] == ["by"]


def test_without_a_file_there_are_two_empty_tables(world):
    rows, quarantined, metrics = world.run()
    assert (rows, quarantined, metrics["rows"], metrics["decided_until"]) == ([], [], 0, "")


VALUES = st.sampled_from(["", "a", "b", "old", "torn", "shrunk", "nowhere", "\u00e4 \u2028"])
MOMENTS = st.sampled_from(["", "2026-11-04", "2026-11-08", "2026-11-08T10:00:00Z", "2027-01-01", "soon"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["", "o1", "o2"]), VALUES, MOMENTS), max_size=12))
def test_no_decision_is_lost_or_invented(world, rows):
    content = "".join(
        json.dumps(dict(zip(HEADER.strip().split(","), row, strict=True))) + "\n" for row in rows
    )
    good, bad, metrics = world.run(world.file(content, "c.jsonl")) if rows else world.run()
    assert sorted(row["source_row"] for row in [*good, *bad]) == list(range(1, len(rows) + 1))
    assert [tuple(row[name] for name in ("offer_id", "category_id", "decided_at")) for row in bad] == [
        rows[row["source_row"] - 1] for row in bad
    ]
    newest = Counter(row["offer_id"] for row in good if row["standing"] == "newest")
    assert set(newest) == {row["offer_id"] for row in good}
    assert not newest or max(newest.values()) == 1
    for row in good:
        if row["standing"] == "superseded":
            assert any(o["offer_id"] == row["offer_id"] and o["decided_at"] > row["decided_at"] for o in good)
    assert metrics["rows"] == len(rows)


# The demo feed's own corrections

DAYS = [datetime.date(2026, 11, 1) + datetime.timedelta(days=number) for number in range(4)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    for day in DAYS:
        DemoFeed(offers_per_day=2_000).write_day(folder, day, drifted=day == DAYS[2])
    write_missing_corrections(folder)
    return folder


def decisions(folder: Path, day: datetime.date) -> list[list[str]]:
    text = (folder / "corrections" / f"corrections-{day}.csv").read_text()
    return [line.split(",") for line in text.splitlines()[1:]]


def test_the_demo_looks_at_a_few_hundred_offers_of_a_day_and_some_of_them_later(demo):
    offers = {day: set(pq.read_table(demo / f"offers-{day}.parquet")["offer_id"].to_pylist()) for day in DAYS}
    for number, day in enumerate(DAYS):
        rows = [row for row in decisions(demo, day) if len(row) == 3 and row[2].startswith(str(day))]
        known = set().union(*(offers[earlier] for earlier in DAYS[: number + 1]))
        assert sum(row[0] in known for row in rows) >= 0.95 * len(rows)
    delayed = [row for row in decisions(demo, DAYS[3]) if row[0] not in offers[DAYS[3]]]
    assert len(delayed) > 50
    assert len(decisions(demo, DAYS[0])) < len(decisions(demo, DAYS[3])) < 1.5 * OFFERS_LOOKED_AT


def test_the_demos_corrections_are_deterministic_and_written_once(demo, tmp_path):
    for day in DAYS:
        DemoFeed(offers_per_day=2_000).write_day(tmp_path, day, drifted=day == DAYS[2])
        write_missing_corrections(tmp_path)
    for day in DAYS:
        assert decisions(tmp_path, day) == decisions(demo, day)
    assert write_missing_corrections(demo) == []

"""The offer feed: every format gives the same rows, broken rows are kept, broken files are named."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
import random
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.errors import InputError
from ml.feed import rows as feed_rows
from ml.feed.reading import (
    BrokenFileError,
    discover_files,
    fingerprint,
    profile_file,
    read_batches,
    write_raw_offers,
)
from ml.feed.rows import FEED_COLUMN_NAMES, RAW_SCHEMA
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import FeedFile, RawOffersParameters

HEADER = "offer_id,shop_id,title"
OFFERS = [
    {
        "offer_id": "1",
        "shop_id": "s",
        "title": "Kettle",
        "offered_at": "2024-05-01T10:00:00Z",
        "price": "9.90",
    },
    {
        "offer_id": "2",
        "shop_id": "s",
        "title": 'A "big"\nkettle, blue',
        "offered_at": "2024-05-02",
        "price": "",
    },
    {"offer_id": "3", "shop_id": "t", "title": "Wasserkocher für Öl", "offered_at": "", "price": "1,5"},
]


def as_csv(offers: list[dict], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(offers[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(offers)
    return text.getvalue().encode()


def as_json_lines(offers: list[dict]) -> bytes:
    return "".join(json.dumps(offer, ensure_ascii=False) + "\n" for offer in offers).encode()


def as_parquet(offers: list[dict]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(offers), file)
    return file.getvalue()


WRITERS = {".csv": as_csv, ".jsonl": as_json_lines, ".ndjson": as_json_lines, ".json": as_json_lines}
WRITERS[".parquet"] = as_parquet


def rows(path: Path | str, ignored: set[str] | None = None) -> list[dict]:
    batches = list(read_batches(str(path), ignored))
    assert all(batch.schema.equals(RAW_SCHEMA) for batch in batches)
    return pa.Table.from_batches(batches, RAW_SCHEMA).to_pylist()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def feed_file(path: Path, loaded_on: str = "2024-05-01") -> FeedFile:
    return FeedFile(uri=str(path), fingerprint=fingerprint(str(path)), loaded_on=loaded_on)


def load(folder: Path, day: str, *files: FeedFile) -> tuple[list[dict], dict]:
    output, checkpoints = folder / "output", folder / "checkpoints"
    output.mkdir()
    checkpoints.mkdir(exist_ok=True)
    context = StageContext({}, output, checkpoints, Progress("raw_offers"))
    metrics = write_raw_offers(context, RawOffersParameters(files=list(files), day=day))
    assert list(checkpoints.iterdir()) == []
    return pq.read_table(output / "offers.parquet").to_pylist(), metrics


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("extension", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, extension, compressed):
    content = WRITERS[extension](OFFERS)
    name = f"offers{extension}{'.gz' * compressed}"
    path = write(tmp_path, name, gzip.compress(content) if compressed else content)
    found = rows(path)
    assert [{name: row[name] for name in OFFERS[0]} for row in found] == OFFERS
    assert [row["source_row"] for row in found] == [1, 2, 3]
    assert {row["source_file"] for row in found} == {str(path)}
    assert {row["problem"] for row in found} == {row["content"] for row in found} == {None}
    assert {row["brand"] for row in found} == {None}
    assert profile_file(str(path)).days == {"2024-05-01": 1, "2024-05-02": 1}
    assert profile_file(str(path)).undated == 1


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_and_a_byte_order_mark_is_skipped(tmp_path, delimiter):
    path = write(tmp_path, "offers.csv", b"\xef\xbb\xbf" + as_csv(OFFERS, delimiter))
    assert [row["title"] for row in rows(path)] == [offer["title"] for offer in OFFERS]


@pytest.mark.parametrize("extension", [".csv", ".jsonl", ".parquet"])
def test_header_names_are_matched_regardless_of_case_and_unknown_columns_are_told(tmp_path, extension):
    content = WRITERS[extension]([{" Offer_ID ": "1", "SHOP_ID": "s", "Title": "t", "Stock": "5"}])
    ignored: set[str] = set()
    (row,) = rows(write(tmp_path, "offers" + extension, content), ignored)
    assert (row["offer_id"], row["shop_id"], row["title"]) == ("1", "s", "t")
    assert ignored == {"stock"}


def test_a_row_with_a_wrong_number_of_fields_keeps_its_line(tmp_path):
    found = rows(write(tmp_path, "o.csv", f"{HEADER}\n1,s,Kettle\n2,s\n\n3,s,Pot,more\n4,s,Pan\n"))
    assert [row["problem"] for row in found] == [None, "malformed_row", "malformed_row", None]
    assert [row["content"] for row in found] == [None, "2,s", "3,s,Pot,more", None]
    assert [row["source_row"] for row in found] == [1, 2, 3, 4]
    assert found[1]["offer_id"] is None


def test_a_quote_that_is_never_closed_costs_one_row_not_the_rest_of_the_file(tmp_path):
    others = "".join(f"{i},s,Pot {i}\n" for i in range(5_000))
    found = rows(write(tmp_path, "o.csv", f'{HEADER}\n1,s,"Kettle\n{others}x,s,27" screen\n'))
    assert len(found) == 5_002
    assert [(row["source_row"], row["content"]) for row in found if row["problem"]] == [(1, '1,s,"Kettle')]
    assert found[-1]["title"] == '27" screen'


def test_bytes_that_are_not_utf_8_are_kept_escaped_and_spoil_only_their_row(tmp_path):
    lines = f"{HEADER},offered_at\n1,s,Küche,2024-05-02\n2,s,plain,\n".encode("latin-1")
    found = rows(write(tmp_path, "o.csv", lines + "3,s,Küche,\n".encode()))
    assert [row["problem"] for row in found] == ["invalid_encoding", None, None]
    assert found[0]["content"] == r"1,s,K\xfcche,2024-05-02"
    assert (found[0]["offer_id"], found[0]["title"]) == ("1", r"K\xfcche")
    assert found[2]["title"] == "Küche"


def test_json_lines_that_are_no_offers_are_kept(tmp_path):
    good = json.dumps(OFFERS[0])
    bad = [
        "{",
        "[1]",
        "7",
        '{"title": "a", "Title": "b"}',
        '{"title": "\\ud800"}',
        good + "}",
        '{"price": NaN}',
    ]
    latin = good.replace("Kettle", "K\xfcche").encode("latin-1")
    broken = '{"title": "K\xfcche"'.encode("latin-1")
    content = b"\n".join([good.encode(), *map(str.encode, bad), latin, b"", broken, good.encode()])
    found = rows(write(tmp_path, "o.jsonl", content))
    assert [row["problem"] for row in found] == [
        None, *["malformed_row"] * len(bad), "invalid_encoding", "malformed_row", None,
    ]  # fmt: skip
    assert [row["content"] for row in found[1 : 1 + len(bad)]] == bad
    assert found[-3]["content"] == good.replace("Kettle", r"K\xfcche")
    assert found[-3]["title"] == r"K\xfcche"
    assert found[-2]["content"] == r'{"title": "K\xfcche"'
    assert [row["source_row"] for row in found] == list(range(1, len(found) + 1))


def test_json_numbers_keep_their_digits_and_nested_values_stay_json(tmp_path):
    line = (
        '{"offer_id": 123456789012345678901234, "shop_id": true, "title": {"en": ["a", 1.10]}, "price":'
        ' 12.90, "brand": null, "gtin": 4006381333931}'
    )
    (row,) = rows(write(tmp_path, "o.jsonl", line))
    assert row["offer_id"] == "123456789012345678901234"
    assert row["shop_id"] == "true"
    assert json.loads(row["title"]) == {"en": ["a", 1.10]}
    assert "1.10" in row["title"]
    assert (row["price"], row["brand"], row["gtin"]) == ("12.90", None, "4006381333931")


def test_parquet_values_of_any_type_become_text(tmp_path):
    moment = datetime.datetime(2024, 5, 1, 23, 30, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "offer_id": pa.array([1, 2], pa.int64()),
            "shop_id": pa.array(["s", "s"]).dictionary_encode(),
            "title": pa.array([b"K\xfcche", b"Kettle"], pa.binary()),
            "gtin": pa.array([4006381333931.0, None]),
            "price": pa.array([Decimal("9.90"), None]),
            "description": pa.array([["a", "b"], None]),
            "offered_at": pa.array([moment, None], pa.timestamp("ns", "Europe/Berlin")),
            "category_id": pa.array([12.5, float("nan")]),
        }
    )
    pq.write_table(table, tmp_path / "o.parquet")
    first, second = rows(tmp_path / "o.parquet")
    assert (first["offer_id"], first["shop_id"], first["gtin"]) == ("1", "s", "4006381333931")
    assert (first["price"], first["description"], first["category_id"]) == ("9.90", '["a", "b"]', "12.5")
    assert first["problem"] == "invalid_encoding"
    assert first["title"] == r"K\xfcche"
    assert r"K\\xfcche" in first["content"]
    assert (second["title"], second["problem"], second["price"]) == ("Kettle", None, None)
    assert profile_file(str(tmp_path / "o.parquet")).days == {"2024-05-01": 1}


def test_batches_are_bounded_in_rows_and_bytes_and_numbered_through(tmp_path, monkeypatch):
    monkeypatch.setattr(feed_rows, "BATCH_ROWS", 10)
    monkeypatch.setattr(feed_rows, "BATCH_BYTES", 1_000)
    lines = [f"{i},s,{'x' * (600 if i < 4 else 1)}\n" for i in range(25)]
    batches = list(read_batches(str(write(tmp_path, "o.csv", HEADER + "\n" + "".join(lines)))))
    assert [batch.num_rows for batch in batches] == [2, 2, 10, 10, 1]
    assert [row for batch in batches for row in batch["source_row"].to_pylist()] == list(range(1, 26))


def test_huge_values_in_parquet_make_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("ml.feed.parquet_files.BATCH_BYTES", 10_000)
    titles = [random.Random(row).randbytes(500).hex() for row in range(40)]
    table = pa.table({"offer_id": [str(row) for row in range(40)], "shop_id": ["s"] * 40, "title": titles})
    pq.write_table(table, tmp_path / "o.parquet", row_group_size=25)
    batches = list(read_batches(str(tmp_path / "o.parquet"), skip=3))
    assert all(batch.nbytes < 15_000 for batch in batches)
    assert [title for batch in batches for title in batch["title"].to_pylist()] == titles[3:]
    assert [row for batch in batches for row in batch["source_row"].to_pylist()] == list(range(4, 41))


def truncated(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


RANDOM = random.Random(0)
INCOMPRESSIBLE = [{**OFFERS[0], "offer_id": RANDOM.randbytes(40).hex()} for _ in range(200)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("o.parquet", truncated(as_parquet(OFFERS)), "cannot be read"),
        ("o.parquet", b"", "cannot be read"),
        ("o.csv.gz", truncated(gzip.compress(as_csv(INCOMPRESSIBLE))), "cannot be read"),
        ("o.jsonl.gz", truncated(gzip.compress(as_json_lines(INCOMPRESSIBLE))), "cannot be read"),
        ("o.parquet.gz", truncated(gzip.compress(as_parquet(INCOMPRESSIBLE))), "cannot be read"),
        ("o.csv.gz", as_csv(OFFERS), "cannot be read"),
        ("o.csv", as_csv(OFFERS).decode().encode("utf-16"), "not UTF-8 text"),
        ("o.csv", as_csv(OFFERS).decode().encode("utf-16-le"), "not UTF-8 text"),
        ("o.jsonl", as_json_lines(OFFERS).decode().encode("utf-16"), "not UTF-8 text"),
        ("o.csv", b"", "is empty"),
        ("o.csv", b"\n\n", "is empty"),
        ("o.jsonl", b"", "is empty"),
        ("o.csv", b"offer_id,title\n1,Kettle\n", "has no column shop_id; its columns are offer_id, title"),
        (
            "o.jsonl",
            b'{"offer_id": 1, "name": "x"}\n',
            "has no column shop_id, title; its columns are name, of",
        ),
        (
            "o.parquet",
            as_parquet([{"offer_id": "1"}]),
            "has no column shop_id, title; its columns are offer_id",
        ),
        ("o.csv", b"offer_id,shop_id,title,Title\n1,s,a,b\n", "more than one column title"),
        ("o.parquet", as_parquet([{**OFFERS[0], "TITLE": "x"}]), "more than one column title"),
        ("o.csv", "offer_id,shop_id,title,größe\n".encode("latin-1"), "header line that is not UTF-8"),
        ("o.jsonl", as_csv(OFFERS), "no JSON objects"),
        ("o.json", json.dumps(OFFERS).encode(), "JSON array"),
        ("o.csv", HEADER.encode() + b"\n" + b"x" * feed_rows.MAX_LINE_BYTES, "longer than 16 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_feed_fails_on_one_line_that_names_it(tmp_path, name, content, expected):
    path = write(tmp_path, name, content)
    for use in (rows, lambda path: profile_file(str(path))):
        with pytest.raises(InputError, match=expected) as error:
            use(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_feed_is_a_file_a_folder_a_glob_or_a_uri(tmp_path):
    (tmp_path / "b" / "_temporary").mkdir(parents=True)
    a, b = write(tmp_path, "a.csv", "x"), write(tmp_path / "b", "b.JSONL.gz", "x")
    write(tmp_path / "b" / "_temporary", "part.csv", "x")
    write(tmp_path / "b", ".hidden", "x")
    assert discover_files(str(a)) == [str(a)]
    assert discover_files(str(tmp_path)) == [str(a), str(b)]
    assert discover_files(f"{tmp_path}/*.csv") == [str(a)]
    assert discover_files(f"{tmp_path}/**/*.gz") == [str(b)]
    assert discover_files(f"file://{a}") == [str(a)]
    with fsspec.open("memory://discovered/x.parquet", "wb") as file:
        file.write(as_parquet(OFFERS))
    assert discover_files("memory://discovered/*.parquet") == ["memory:///discovered/x.parquet"]
    assert len(rows("memory://discovered/x.parquet")) == 3
    assert profile_file("memory://discovered/x.parquet").rows == 3


def test_a_folder_may_hold_other_files_beside_the_offers(tmp_path, caplog):
    offers, note = write(tmp_path, "a.csv", "x"), write(tmp_path, "README.txt", "x")
    for _ in range(2):
        assert discover_files(str(tmp_path)) == [str(offers)]
    assert [record.getMessage() for record in caplog.records] == [
        f"left out 1 files of no offer format: {note}"
    ]
    for named in (str(note), f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"README\.txt is of no known format"):
            discover_files(named)


def test_a_feed_that_points_nowhere_fails_naming_the_setting(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path, "notes.txt", "x")
    for feed, expected in {
        str(tmp_path / "absent.csv"): "points nowhere",
        f"{tmp_path}/*.parquet": "matches no file",
        str(tmp_path / "empty"): "is a folder without files",
        str(tmp_path): r"notes\.txt is of no known format, expected \.parquet, \.csv",
        "nosuch://bucket/x.csv": "cannot be looked at",
        " ": "is empty",
    }.items():
        with pytest.raises(InputError, match=expected) as error:
            discover_files(feed)
        assert str(error.value).startswith("OFFER_FEED")


def test_the_fingerprint_changes_with_the_file(tmp_path):
    path = write(tmp_path, "o.csv", "a")
    os.utime(path, ns=(1, 1))
    before = fingerprint(str(path))
    assert fingerprint(str(path)) == before
    os.utime(path, ns=(1, 2_000_000_000))
    assert fingerprint(str(path)) != before
    with pytest.raises(InputError, match=r"absent\.csv"):
        fingerprint(str(tmp_path / "absent.csv"))


@pytest.mark.parametrize(
    ("offered_at", "day"),
    [
        ("2024-05-02", "2024-05-02"),
        (" 2024-05-02T23:59:59.999999Z ", "2024-05-02"),
        ("2024-05-02T23:30:00-02:00", "2024-05-03"),
        ("2024-05-03 01:00:00+0200", "2024-05-02"),
        ("2024-05-02 10:00", "2024-05-02"),
        ("2024-02-30", None),
        ("02.05.2024", None),
        ("1714608000", None),
        ("infinity", None),
        ("epoch", None),
        ("0001-01-01", None),
        ("1970-01-01", None),
        ("tomorrow", None),
        ("", None),
    ],
)
def test_the_day_of_an_offer_is_its_date_in_utc(tmp_path, offered_at, day):
    path = write(tmp_path, "o.csv", as_csv([{**OFFERS[0], "offered_at": offered_at}]))
    profile = profile_file(str(path))
    assert (profile.days, profile.undated) == (({day: 1}, 0) if day else ({}, 1))


def test_days_together_hold_every_row_once_and_undated_rows_go_to_the_day_of_loading(tmp_path):
    undated = [{**OFFERS[0], "offer_id": f"u{i}", "offered_at": value} for i, value in enumerate(["", "?"])]
    early = write(tmp_path, "a.csv", as_csv([*OFFERS, *undated]) + b"broken\n")
    late = write(tmp_path, "b.jsonl", as_json_lines([{**OFFERS[1], "stock": 5}]))
    files = feed_file(early, "2024-05-01"), feed_file(late, "2024-05-02")
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first, first_metrics = load(tmp_path / "1", "2024-05-01", *files)
    second, second_metrics = load(tmp_path / "2", "2024-05-02", *files)
    assert [(Path(r["source_file"]).name, r["source_row"]) for r in first] == [
        ("a.csv", 1), ("a.csv", 3), ("a.csv", 4), ("a.csv", 5), ("a.csv", 6),
    ]  # fmt: skip
    assert [(Path(r["source_file"]).name, r["source_row"]) for r in second] == [("a.csv", 2), ("b.jsonl", 1)]
    assert first[-1]["content"] == "broken"
    assert first_metrics["malformed"] == 1
    assert first_metrics["undated"] == 4
    assert (second_metrics["rows"], second_metrics["rows_of_all_days"], second_metrics["undated"]) == (
        2,
        7,
        0,
    )
    assert second_metrics["ignored_columns"] == ["stock"]


def test_a_file_that_cannot_be_read_contributes_nothing_and_the_others_still_load(tmp_path):
    good = write(tmp_path, "good.csv", as_csv(OFFERS[:1]))
    bad = write(tmp_path, "bad.csv.gz", truncated(gzip.compress(as_csv(INCOMPRESSIBLE))))
    found, metrics = load(tmp_path, "2024-05-01", feed_file(bad), feed_file(good))
    assert [row["offer_id"] for row in found] == ["1"]
    assert metrics["files"] == 1
    (reason,) = metrics["unreadable_files"]
    assert str(bad) in reason


class BreakingFile(io.BytesIO):
    """A file on a network that is gone after the first bytes."""

    def __init__(self, content: bytes, error: Exception) -> None:
        super().__init__(content)
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 0:
            raise self._error
        return super().read(min(size, 100) if size and size > 0 else 100)


@pytest.mark.parametrize("extension", [".csv", ".csv.gz", ".jsonl", ".parquet", ".parquet.gz"])
@pytest.mark.parametrize("error", [OSError(5, "connection lost"), RuntimeError("connection lost")], ids=repr)
def test_a_file_that_cannot_be_fetched_fails_the_stage_instead_of_being_left_out(
    tmp_path, monkeypatch, extension, error
):
    good = write(tmp_path, "good.csv", as_csv(OFFERS[:1]))
    content = WRITERS[extension.removesuffix(".gz")](INCOMPRESSIBLE)
    far = write(tmp_path, f"far{extension}", gzip.compress(content) if extension.endswith(".gz") else content)
    fetch = fsspec.open

    class Opener:
        def __init__(self, uri: str, mode: str) -> None:
            self._uri, self._mode = uri, mode

        def open(self):
            if self._uri == str(far):
                return BreakingFile(far.read_bytes(), error)
            return fetch(self._uri, self._mode).open()

    monkeypatch.setattr(fsspec, "open", Opener)
    with pytest.raises(InputError, match=rf"far{extension}.*connection lost.*run again") as raised:
        load(tmp_path, "2024-05-01", feed_file(good), feed_file(far))
    assert not isinstance(raised.value, BrokenFileError)


def test_a_file_that_is_gone_fails_the_stage(tmp_path):
    good, gone = write(tmp_path, "good.csv", as_csv(OFFERS[:1])), tmp_path / "gone.csv"
    with pytest.raises(InputError, match=r"gone\.csv: there is no such file"):
        load(
            tmp_path,
            "2024-05-01",
            feed_file(good),
            FeedFile(uri=str(gone), fingerprint="", loaded_on="2024-05-01"),
        )


def test_a_feed_without_any_readable_offer_fails(tmp_path):
    bad = write(tmp_path, "bad.parquet", b"PAR1")
    header = write(tmp_path, "header.csv", HEADER + "\n")
    other = write(tmp_path, "other.csv", as_csv(OFFERS[1:2]))
    for number, (files, expected) in enumerate(
        [
            ([bad], r"bad\.parquet cannot be read"),
            ([header], "the feed is empty: .*header.csv holds no offers"),
            ([other], "none of the 1 offers is of 2024-05-01"),
            ([], "no files for 2024-05-01"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        with pytest.raises(InputError, match=expected):
            load(tmp_path / str(number), "2024-05-01", *map(feed_file, files))


def test_a_file_that_changed_since_it_was_looked_at_is_refused(tmp_path):
    path = write(tmp_path, "o.csv", as_csv(OFFERS[:1]))
    stale = FeedFile(uri=str(path), fingerprint="0" * 16, loaded_on="2024-05-01")
    with pytest.raises(InputError, match="changed since it was looked at"):
        load(tmp_path, "2024-05-01", stale)


def test_the_same_feed_gives_the_same_bytes(tmp_path):
    path = write(tmp_path, "o.csv", as_csv(OFFERS[:1] * 500))
    contents = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        load(tmp_path / name, "2024-05-01", feed_file(path))
        contents.append((tmp_path / name / "output" / "offers.parquet").read_bytes())
    assert contents[0] == contents[1]


def test_raw_columns_are_those_of_a_feed_and_where_a_row_came_from():
    assert RAW_SCHEMA.names == [*FEED_COLUMN_NAMES, "source_file", "source_row", "problem", "content"]

"""Offers: nothing is lost between raw, clean and quarantined, and one text whoever asks."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ml import offers
from ml.feed.reading import write_raw_offers
from ml.feed.rows import FEED_COLUMN_NAMES
from ml.offers import (
    CLEAN_SCHEMA,
    FEED_COLUMNS,
    REASONS,
    offer_text,
    offer_texts,
    price_sql,
    title_of,
    write_offers,
)
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import FeedFile, OffersParameters, RawOffersParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.transitions import Successor, Transition, Transitions

DAY = "2024-05-01"
GOOD = {
    "offer_id": "1",
    "shop_id": "s",
    "title": "Kettle",
    "country": "AT",
    "language": "de",
    "description": "Boils water.",
    "brand": "Acme",
    "gtin": "04006381333931",
    "product_id": "p",
    "price": "9.90",
    "currency": "EUR",
    "shop_category": "Home > Kettles",
    "url": "https://s.example/1",
    "offered_at": "2024-05-01T10:00:00+02:00",
    "category_id": "kettles",
}
KETTLES = Taxonomy([Category("kettles", None, "Kettles")])


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(FEED_COLUMN_NAMES), lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    schema = pa.schema([(name, pa.string()) for name in FEED_COLUMN_NAMES])
    pq.write_table(pa.Table.from_pylist(rows, schema), file)
    return file.getvalue()


WRITERS = {"csv": as_csv, "jsonl": as_json_lines, "parquet": as_parquet}


class Day:
    """A day taken through both stages in a folder."""

    def __init__(
        self,
        folder: Path,
        name: str,
        content: bytes,
        parameters: OffersParameters | None = None,
        taxonomy: Taxonomy = KETTLES,
        transitions: Transitions | None = None,
    ) -> None:
        path = folder / name
        path.write_bytes(content)
        tree = self._folder(folder, "taxonomy")
        taxonomy.write(tree / "taxonomy.parquet")
        raw, output = self._folder(folder, "raw"), self._folder(folder, "clean")
        file = FeedFile(uri=str(path), fingerprint="", loaded_on=DAY)
        write_raw_offers(self._context(folder, raw), RawOffersParameters(files=[file], day=DAY))
        inputs = {"raw_offers": raw, "catalog_taxonomy": tree}
        if transitions:
            inputs["taxonomy_change"] = self._folder(folder, "change")
            transitions.write(inputs["taxonomy_change"])
        self.metrics = write_offers(self._context(folder, output, inputs), parameters or OffersParameters())
        self.raw = pq.read_table(raw / "offers.parquet")
        self.clean_path = output / "offers.parquet"
        self.clean = pq.read_table(self.clean_path)
        self.quarantine = pq.read_table(output / "quarantine.parquet")

    @staticmethod
    def _folder(folder: Path, name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    @staticmethod
    def _context(folder: Path, output: Path, inputs: dict[str, Path] | None = None) -> StageContext:
        return StageContext(inputs or {}, output, folder, Progress("offers"))


def one_day(folder: Path, rows: list[dict], **parameters: int) -> Day:
    return Day(folder, "feed.jsonl", as_json_lines(rows), OffersParameters(**parameters))


def test_a_good_offer_comes_out_typed_trimmed_and_with_codes_in_one_case(tmp_path):
    spaced = {name: f"\u00a0 {value}\u3000\n" for name, value in GOOD.items()}
    spaced |= {"country": "at", "language": "de_AT", "currency": "eur", "brand": " ", "url": ""}
    day = one_day(tmp_path, [spaced])
    assert day.clean.schema.equals(CLEAN_SCHEMA)
    (offer,) = day.clean.to_pylist()
    moment = offer.pop("offered_at")
    assert moment.isoformat() == "2024-05-01T08:00:00"
    del (expected := {**GOOD, "price": 9.9, "brand": None, "url": None})["offered_at"]
    assert offer == expected
    assert day.metrics == {
        "raw": 1,
        "clean": 1,
        "quarantined": 0,
        "labelled": 1,
        "retired_labels": 0,
        "undated": 0,
        "replacement_characters": 0,
        **dict.fromkeys(REASONS, 0),
    }


def test_optional_columns_may_be_null(tmp_path):
    (offer,) = one_day(tmp_path, [{"offer_id": "1", "shop_id": "s", "title": "t"}]).clean.to_pylist()
    assert {name for name, value in offer.items() if value is not None} == {"offer_id", "shop_id", "title"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"offer_id": None}, "missing_offer_id"),
        ({"offer_id": " "}, "missing_offer_id"),
        ({"shop_id": ""}, "missing_shop_id"),
        ({"title": "\t\u00a0"}, "empty_title"),
        ({"title": None}, "empty_title"),
        ({"title": "x" * 100_000}, "title_too_long"),
        ({"title": "Ket\x00tle"}, "control_characters"),
        ({"title": "Kettle\x1f"}, "control_characters"),
        ({"description": "a\x85b"}, "control_characters"),
        ({"shop_id": "s\x7f"}, "control_characters"),
        ({"price": "on request"}, "invalid_price"),
        ({"price": "-1"}, "invalid_price"),
        ({"price": "1,299"}, "invalid_price"),
        ({"price": "nan"}, "invalid_price"),
        ({"price": "1e999"}, "invalid_price"),
        ({"currency": "€"}, "invalid_currency"),
        ({"country": "Austria"}, "invalid_country"),
        ({"country": "A1"}, "invalid_country"),
        ({"language": "d"}, "invalid_language"),
        ({"language": "Deutsch!"}, "invalid_language"),
        ({"offered_at": "01.05.2024"}, "invalid_offered_at"),
        ({"offered_at": "2024-02-30"}, "invalid_offered_at"),
        ({"category_id": "Kettles"}, "unknown_category"),
        (
            {"offer_id": "", "title": "", "price": "x", "category_id": "y"},
            "missing_offer_id,empty_title,invalid_price,unknown_category",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_offer_that_is_not_acceptable_goes_to_quarantine_as_delivered(tmp_path, change, reason):
    bad = {**GOOD, **change}
    day = one_day(tmp_path, [{**GOOD, "offer_id": "good"}, bad])
    (row,) = day.quarantine.to_pylist()
    assert row["reason"] == reason
    assert {name: row[name] for name in GOOD} == bad
    assert (Path(row["source_file"]).name, row["source_row"]) == ("feed.jsonl", 2)
    assert day.clean["offer_id"].to_pylist() == ["good"]
    assert {name: day.metrics[name] for name in REASONS} == {
        name: int(name in reason.split(",")) for name in REASONS
    }


def test_a_malformed_row_keeps_its_line_and_has_no_other_reason(tmp_path):
    day = Day(tmp_path, "feed.csv", as_csv([GOOD]) + b'2,"s,\n')
    (row,) = day.quarantine.to_pylist()
    assert (row["reason"], row["content"], row["source_row"]) == ("malformed_row", '2,"s,', 2)


def test_a_wrongly_encoded_row_keeps_its_bytes_escaped(tmp_path):
    latin = as_csv([{**GOOD, "title": "Küche", "price": "x"}]).decode().encode("latin-1")
    (row,) = Day(tmp_path, "feed.csv", latin).quarantine.to_pylist()
    assert row["reason"] == "invalid_encoding,invalid_price"
    assert r"K\xfcche" in row["content"]


def test_the_first_acceptable_offer_of_an_id_stays(tmp_path):
    rows = [
        {**GOOD, "price": "x"},
        {**GOOD, "title": "first"},
        {**GOOD, "offer_id": "2"},
        {**GOOD, "title": "second"},
        {**GOOD, "offer_id": " 1 ", "title": ""},
        {**GOOD, "offer_id": "3", "title": ""},
        {**GOOD, "offer_id": "3", "title": ""},
    ]
    day = one_day(tmp_path, rows)
    assert day.clean.select(["offer_id", "title"]).to_pylist() == [
        {"offer_id": "1", "title": "first"},
        {"offer_id": "2", "title": "Kettle"},
    ]
    assert list(zip(*day.quarantine.select(["source_row", "reason"]).to_pydict().values(), strict=True)) == [
        (1, "invalid_price"),
        (4, "duplicate_offer_id"),
        (5, "empty_title,duplicate_offer_id"),
        (6, "empty_title"),
        (7, "empty_title"),
    ]


def test_a_label_of_an_earlier_taxonomy_is_accepted_as_it_is(tmp_path):
    def transition(former: str, *to: str) -> Transition:
        return Transition(
            from_id=former,
            from_name=former,
            from_path=former,
            kind="split" if to else "removed",
            to=[Successor(category_id=category, share=1 / len(to)) for category in to],
            origin="official",
            confidence=1.0,
            certain=False,
            since="v2",
            reason="",
        )

    labels = ["kettles", "teapots", "samovars", "teapots", None, "never one"]
    rows = [{**GOOD, "offer_id": str(number), "category_id": label} for number, label in enumerate(labels)]
    transitions = Transitions(
        history=["v1", "v2"],
        transitions=[
            transition("teapots", "kettles"),
            transition("samovars"),
            transition("kettles", "kettles"),
        ],
    )
    day = Day(tmp_path, "offers.csv", as_csv(rows), transitions=transitions)
    assert day.clean["category_id"].to_pylist() == labels[:5]
    assert day.metrics["unknown_category"] == 1
    assert day.metrics["labelled"] == 4
    assert day.metrics["retired_labels"] == 3


def test_the_limit_of_titles_can_be_set(tmp_path):
    rows = [{**GOOD, "title": "äöüß"}, {**GOOD, "offer_id": "2", "title": "äöüßä"}]
    day = one_day(tmp_path, rows, max_title_characters=4)
    assert day.clean["title"].to_pylist() == ["äöüß"]
    assert day.metrics["title_too_long"] == 1


def test_replacement_characters_stay_and_are_counted(tmp_path):
    day = one_day(tmp_path, [{**GOOD, "title": "K\ufffdche"}, {**GOOD, "offer_id": "2"}])
    assert (day.metrics["clean"], day.metrics["replacement_characters"]) == (2, 1)


def test_a_day_without_any_acceptable_offer_still_gives_both_tables(tmp_path):
    day = one_day(tmp_path, [{**GOOD, "title": ""}])
    assert day.clean.schema.equals(CLEAN_SCHEMA)
    assert (day.clean.num_rows, day.quarantine.num_rows) == (0, 1)


def test_order_is_kept_and_the_same_day_gives_the_same_bytes(tmp_path):
    rows = [
        {**GOOD, "offer_id": str(i % 2_500), "title": "" if i % 7 == 0 else f"Kettle {i}"}
        for i in range(3_000)
    ]
    contents = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        day = one_day(tmp_path / name, rows)
        contents.append(day.clean_path.read_bytes())
    assert contents[0] == contents[1]
    titles = [int(title.split()[1]) for title in day.clean["title"].to_pylist()]
    assert titles == sorted(titles)
    assert day.quarantine["source_row"].to_pylist() == sorted(day.quarantine["source_row"].to_pylist())


@pytest.mark.parametrize(
    ("text", "price"),
    [
        ("0", 0.0),
        ("12", 12.0),
        ("12.99", 12.99),
        ("12.", 12.0),
        (".5", 0.5),
        ("+3", 3.0),
        ("1e2", 100.0),
        ("1.299", 1.299),
        ("12,9", 12.9),
        ("12,99", 12.99),
        ("12,9900", 12.99),
        ("0,999", 0.999),
        ("1.299,00", 1299.0),
        ("1,299.00", 1299.0),
        ("1.234.567", 1234567.0),
        ("1,234,567", 1234567.0),
        ("1 299,00", 1299.0),
        ("1\u00a0299", 1299.0),
        ("1'299.50", 1299.5),
        ("1’299.50", 1299.5),
        ("1,299", None),
        ("1.29,00", None),
        ("1,29.00", None),
        ("12 99", None),
        ("1_000", None),
        ("12.99 EUR", None),
        ("inf", None),
        ("0x10", None),
        ("٣", None),
        ("", None),
        (",", None),
        (".", None),
    ],
)
def test_a_price_is_read_if_it_can_be_read_in_one_way_only(text, price):
    ((found,),) = duckdb.sql(
        f"SELECT {price_sql('text')} FROM (SELECT $text AS text)", params={"text": text}
    ).fetchall()
    assert found == price


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.one_of(
    st.none(),
    ANY_TEXT,
    st.sampled_from(
        ["1", "2", " 1", "s", "Kettle", "9,90", "nan", "de", "AT", "kettles", "\x00", '"', "\n", DAY]
    ),
)
ROWS = st.lists(
    st.one_of(st.fixed_dictionaries(dict.fromkeys(FEED_COLUMN_NAMES, VALUES)), st.just(GOOD)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("extension", WRITERS)
@settings(max_examples=25, deadline=None)
@given(rows=ROWS)
@example(rows=[{**GOOD, "offered_at": "2024-05-02"}, GOOD, GOOD])
def test_whatever_is_delivered_ends_in_exactly_one_table(extension, rows):
    # Other days are not this test's concern: what has another date gets none.
    rows = [{**row, "offered_at": None if row["offered_at"] != DAY else DAY} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        day = Day(Path(folder), f"feed.{extension}", WRITERS[extension](rows))
    assert day.raw.num_rows == len(rows)
    assert day.raw["source_row"].to_pylist() == list(range(1, len(rows) + 1))
    delivered = [{name: row[name] for name in FEED_COLUMN_NAMES} for row in day.raw.to_pylist()]
    if extension != "csv":  # where null and empty look the same
        assert delivered == rows
    rejected = day.quarantine.to_pylist()
    assert all(row["reason"] and set(row["reason"].split(",")) <= set(REASONS) for row in rejected)
    assert [{name: row[name] for name in FEED_COLUMN_NAMES} for row in rejected] == [
        delivered[row["source_row"] - 1] for row in rejected
    ]
    places = {row["source_row"] for row in rejected}
    assert len(places) == len(rejected)
    accepted = [row for number, row in enumerate(delivered, 1) if number not in places]
    blanks = offers._BLANKS
    for name in ("offer_id", "shop_id", "title"):
        assert day.clean[name].to_pylist() == [row[name].strip(blanks) for row in accepted]
    assert offer_texts(day.clean) == [offer_text(row) for row in accepted]
    ids = day.clean["offer_id"].to_pylist()
    assert len(set(ids)) == len(ids)


def test_the_text_holds_what_tells_the_category_the_most_telling_first():
    text = offer_text(
        {**GOOD, "title": "  Wasser&shy;kocher &amp;\n Kanne ", "description": "<p>1,7 l</p><br/>Stahl"}
    )
    assert text == "Wasser kocher & Kanne | Acme | Home > Kettles | 1,7 l Stahl"


def test_what_the_title_says_is_not_said_again():
    offer = {
        "title": "ACME Kettle",
        "brand": "Acme",
        "shop_category": "Home > Acme kettle",
        "description": "acme KETTLE",
    }
    assert offer_text(offer) == "ACME Kettle | Home"


@pytest.mark.parametrize("title", ["Boots | Size 42 | Shop", "Boots &#124; Size 42|Shop", "Boots"])
def test_the_title_can_be_told_from_the_rest_of_the_text(title):
    text = offer_text({"title": title, "shop_category": "Shoes | Boots", "description": "a|b"})
    assert title_of(text) == offer_text({"title": title})
    assert text.count(" | ") == 2


@pytest.mark.parametrize("offer", [{}, {"title": None}, {"title": " \x00 ", "brand": ""}])
def test_an_offer_without_words_has_an_empty_text(offer):
    assert offer_text(offer) == ""


def test_long_fields_leave_room_for_the_others():
    offer = {name: f"{name} " * 10_000 for name in ("title", "brand", "shop_category", "description")}
    offer["shop_category"] = "start " + "deeper > " * 100 + "Kettles"
    text = offer_text(offer)
    title, brand, shop_category, description = text.split(" | ")
    assert len(text) <= 400
    assert len(title) <= 200
    assert brand.startswith("brand")
    assert shop_category.endswith("Kettles")
    assert description.startswith("description")


def test_a_title_without_spaces_is_cut_all_the_same():
    assert offer_text({"title": "漢" * 1_000}) == "漢" * 200


MARKUP = st.one_of(
    ANY_TEXT,
    st.lists(st.sampled_from(["&amp;", "&", "amp;", "<b>", "e\u0301", " ", "\u200b", "x"])).map("".join),
)
TEXT_OFFERS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(["title", "brand", "shop_category", "description"], st.one_of(st.none(), MARKUP)),
)


@given(st.lists(TEXT_OFFERS, max_size=8))
def test_the_text_of_a_table_is_that_of_its_rows(rows):
    columns = sorted({name for row in rows for name in row})
    table = pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in columns})
    texts = [offer_text(row) for row in rows]
    if columns:
        assert offer_texts(table) == texts
    assert all(text == " ".join(text.split()) and len(text) <= 400 for text in texts)


def test_columns_of_the_clean_table_are_those_of_the_feed():
    assert CLEAN_SCHEMA.names == list(FEED_COLUMN_NAMES)
    assert [column.name for column in FEED_COLUMNS if column.needed] == ["offer_id", "shop_id", "title"]
    assert all(column.description.endswith(".") for column in FEED_COLUMNS)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "taxonomy", "raw", "reasons"),
    [
        ("gpc", "gpc/2018", 13_012, {}),
        ("gpc", "pricerunner", 13_012, {"unknown_category": 13_012}),
        ("groceries", "groceries", 6_524, {"missing_shop_id": 4_287, "control_characters": 14}),
        ("pricerunner", "pricerunner", 35_311, {}),
    ],
)
def test_real_data_offers_pass_with_their_own_taxonomy(tmp_path, real_data, name, taxonomy, raw, reasons):
    tree = Taxonomy.read_csv(str(real_data / "taxonomy" / f"{taxonomy}.csv"))
    content = (real_data / "offers" / f"{name}.parquet").read_bytes()
    day = Day(tmp_path, f"{name}.parquet", content, taxonomy=tree)
    assert day.metrics["raw"] == raw == day.metrics["clean"] + day.metrics["quarantined"]
    assert {reason: day.metrics[reason] for reason in REASONS if day.metrics[reason]} == reasons
    assert day.metrics["labelled"] == day.metrics["clean"]
    assert all(offer_texts(day.clean))

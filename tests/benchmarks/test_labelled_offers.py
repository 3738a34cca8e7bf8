import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.labelled_offers import (
    STAND_IN_SHOP,
    divide,
    duplicate_share,
    only_languages,
    read_labelled_offers,
    with_labels,
    without_languages,
)
from benchmarks.one_model import distinct, numbered
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA


def offers_of(rows):
    return pa.table(
        {name: [row.get(name) for row in rows] for name in CLEAN_SCHEMA.names}, schema=CLEAN_SCHEMA
    )


few = st.sampled_from
rows_of_offers = st.lists(
    st.fixed_dictionaries(
        {
            "shop_id": few(["a", "b", "c", "d", "e"]),
            "product_id": few([None, "p1", "p2", "p3", " p3 ", "p4"]),
            "gtin": few([None, "0012", "12", "34", "56"]),
            "title": few(["Red shoe", "red  SHOE ", "Blue car", "Green tea", "Tin"]),
            "category_id": few(["1", "2"]),
        }
    ),
    min_size=1,
    max_size=25,
).map(lambda rows: [{**row, "offer_id": f"o{number}"} for number, row in enumerate(rows)])


def keys_of(table):
    """What makes two offers one product, in a reading of its own."""
    return {
        key
        for row in table.to_pylist()
        for key in (
            ("product", (row["product_id"] or "").strip()),
            ("gtin", (row["gtin"] or "").lstrip("0")),
            ("title", " ".join(row["title"].split()).lower()),
        )
        if key[1]
    }


@settings(max_examples=15, deadline=None)
@given(rows=rows_of_offers, share=few([0.2, 0.5, 0.8]), seed=st.integers(0, 5))
@pytest.mark.parametrize("by", ["shop", "product"])
def test_no_product_and_no_shop_is_on_both_sides(by, rows, share, seed):
    divided = divide(offers_of(rows), by, share, seed)
    train, test = divided.train, divided.test
    assert not keys_of(train) & keys_of(test)
    if by == "shop":
        assert not set(train["shop_id"].to_pylist()) & set(test["shop_id"].to_pylist())
    else:  # nothing is left out
        assert train.num_rows + test.num_rows == len(rows)


@settings(max_examples=8, deadline=None)
@given(rows=rows_of_offers, order=st.randoms(use_true_random=False))
@pytest.mark.parametrize("by", ["shop", "product", "offer"])
def test_a_split_does_not_depend_on_the_order_of_the_offers(by, rows, order):
    shuffled = list(rows)
    order.shuffle(shuffled)
    one, other = (divide(offers_of(some), by, 0.5, 1) for some in (rows, shuffled))
    assert set(one.test["offer_id"].to_pylist()) == set(other.test["offer_id"].to_pylist())
    assert set(one.train["offer_id"].to_pylist()) == set(other.train["offer_id"].to_pylist())


def test_the_share_held_out_is_about_the_one_asked_for():
    rows = [
        {"offer_id": str(n), "shop_id": str(n), "title": f"title {n}", "category_id": "1"}
        for n in range(2_000)
    ]
    for by in ("shop", "product", "offer"):
        assert divide(offers_of(rows), by, 0.2, 3).test.num_rows == pytest.approx(400, abs=70)


def test_offers_without_a_shop_get_one_of_their_own_and_the_notes_say_so(tmp_path):
    path = tmp_path / "feed.parquet"
    columns = {
        "offer_id": ["1", "2", "3", "4"],
        "shop_id": ["s", None, None, "s"],
        "title": ["a", "b", "c", None],
        "category_id": ["x", "x", "y", "y"],
        "something": [1, 2, 3, 4],
    }
    pq.write_table(pa.table(columns), path)
    found = read_labelled_offers(path)
    assert found.table.schema == CLEAN_SCHEMA
    assert found.table["shop_id"].to_pylist() == ["s", f"{STAND_IN_SHOP}2", f"{STAND_IN_SHOP}3"]
    assert any("1 offers without label or title" in note for note in found.notes)
    assert any("2 of 3 offers name no shop" in note for note in found.notes)


def test_a_feed_without_labels_is_refused_by_name(tmp_path):
    path = tmp_path / "feed.parquet"
    pq.write_table(pa.table({"offer_id": ["1"], "title": ["a"]}), path)
    with pytest.raises(InputError, match="category_id"):
        read_labelled_offers(path)


def test_a_language_is_on_one_side_only():
    rows = [
        {"offer_id": str(n), "title": "t", "language": language, "category_id": "1"}
        for n, language in enumerate(["de", "fr", None, "de"])
    ]
    table = offers_of(rows)
    assert only_languages(table, ["de"])["offer_id"].to_pylist() == ["0", "3"]
    assert without_languages(table, ["de"])["offer_id"].to_pylist() == ["1", "2"]


def test_labels_are_put_to_offers_by_id_and_text_is_no_price():
    offers = pa.table({"offer_id": ["1", "2"], "title": ["a", "b"], "price": ["12,99", "x"]})
    table = with_labels(offers, {"1": "x", "2": "y"})
    assert table["category_id"].to_pylist() == ["x", "y"]
    assert table["price"].null_count == 2


def test_duplicates_are_counted_and_never_measured():
    table = offers_of(
        [{"offer_id": str(n), "title": title} for n, title in enumerate(["red", "red", "blue", " red "])]
    )
    assert duplicate_share(table) == 0.5
    once = distinct(table.to_pylist())
    assert [offer["offer_id"] for offer in once] == ["0", "2"]
    assert len({offer["title"] for offer in itertools.islice(numbered(once), 100)}) == 100

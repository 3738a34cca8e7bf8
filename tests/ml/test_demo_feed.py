from __future__ import annotations

import csv
import datetime
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.__main__ import main as ml_main
from ml.demo import offers as demo_offers
from ml.demo.catalog import Category, categories, kinds, mapping_csv
from ml.demo.dirt import DIRT, HUGE_TITLE_BYTES
from ml.demo.feed import DemoFeed, days_in, feed_in, main
from ml.demo.products import KindTables
from ml.demo.words import BAD_DATES, BAD_PRICES, CONTROL_CHARACTERS, COUNTRIES, LANGUAGES, UNKNOWN_CATEGORIES
from ml.errors import InputError
from ml.offers import FEED_COLUMNS
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.releases import list_releases, read_release
from resources.settings import Settings

DAY = datetime.date(2026, 11, 1)
NEXT_DAY = datetime.date(2026, 11, 2)


def offers_of(
    feed: DemoFeed, day: datetime.date = DAY, *, drifted: bool = False
) -> dict[str, list[str | None]]:
    return pa.concat_tables(feed.chunks(day, drifted=drifted)).to_pydict()


@pytest.fixture(scope="module")
def day() -> dict[str, list[str | None]]:
    """A day of the default size: every promise about shares holds for it."""
    return offers_of(DemoFeed())


@pytest.fixture(scope="module")
def drifted_day() -> dict[str, list[str | None]]:
    return offers_of(DemoFeed(), drifted=True)


def test_the_same_seed_size_and_day_give_the_same_bytes(tmp_path: Path) -> None:
    first = DemoFeed(offers_per_day=800).write_day(tmp_path / "first", DAY)
    again = DemoFeed(offers_per_day=800).write_day(tmp_path / "again", DAY)
    other_day = DemoFeed(offers_per_day=800).write_day(tmp_path / "first", NEXT_DAY)
    other_seed = DemoFeed(seed=18, offers_per_day=800).write_day(tmp_path / "other", DAY)

    assert first.name == "offers-2026-11-01.parquet"
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other_day.read_bytes()
    assert first.read_bytes() != other_seed.read_bytes()


def test_a_file_holds_every_column_of_the_feed_as_text_and_nothing_else_is_left_behind(
    tmp_path: Path,
) -> None:
    path = DemoFeed(offers_per_day=300).write_day(tmp_path, DAY)

    schema = pq.read_schema(path)
    assert schema.names == [column.name for column in FEED_COLUMNS]
    assert set(schema.types) == {pa.string()}
    assert pq.read_metadata(path).num_rows == 300
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_while_writing_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_offers, "add_dirt", lambda *_, **__: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        DemoFeed(offers_per_day=300).write_day(tmp_path, DAY)

    assert list(tmp_path.iterdir()) == []


def test_a_chunk_depends_on_nothing_but_the_feed_the_day_and_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_offers, "CHUNK_OFFERS", 300)
    maker = demo_offers.OfferMaker(seed=17, offers_per_day=1_000, taxonomy_version=1)
    in_order = [maker.chunk(DAY, number, drifted=False) for number in range(4)]

    alone = demo_offers.OfferMaker(seed=17, offers_per_day=1_000, taxonomy_version=1)
    assert [len(chunk) for chunk in in_order] == [300, 300, 300, 100]
    assert alone.chunk(DAY, 2, drifted=False).equals(in_order[2])


def test_a_far_chunk_of_a_huge_feed_is_made_on_its_own() -> None:
    huge = demo_offers.OfferMaker(seed=17, offers_per_day=100_000_100, taxonomy_version=1)

    last = huge.chunk(DAY, 2_000, drifted=False)

    assert len(last) == 100
    assert len(set(last["offer_id"].to_pylist())) > 95


def test_the_taxonomy_has_three_levels_and_more_than_300_leaves_named_in_every_language() -> None:
    nodes = categories(1)
    parents = {node.parent_id for node in nodes}
    leaves = [node for node in nodes if node.category_id not in parents]

    assert {depth(node, nodes) for node in leaves} == {3}
    assert len(leaves) >= 300
    assert all(len(node.names) == len(LANGUAGES) and all(node.names) for node in nodes)


@pytest.mark.parametrize("version", [1, 2])
def test_each_taxonomy_version_is_a_valid_tree_with_all_labels(tmp_path: Path, version: int) -> None:
    taxonomy = Taxonomy.read_csv(DemoFeed().write_taxonomy(tmp_path, version))

    labels = {kind.labels[version - 1] for kind in kinds()} - {None}
    assert labels == set(taxonomy.leaves)
    assert taxonomy.levels == 3


def test_the_next_taxonomy_adds_splits_merges_moves_renames_and_removes() -> None:
    before = {node.category_id: node for node in categories(1)}
    after = {node.category_id: node for node in categories(2)}
    labels = [kind.labels for kind in kinds()]
    followers = {old: {new for former, new in labels if former == old} for old, _ in labels}
    origins = {new: {old for old, later in labels if later == new} for _, new in labels if new}
    common = before.keys() & after.keys()

    assert any(new not in before and origins[new] <= common for new in origins)  # added
    assert any(len(news) == 2 and not news & before.keys() for news in followers.values())  # split
    assert any(len(olds) == 2 for olds in origins.values())  # merged
    assert any(before[key].parent_id != after[key].parent_id for key in common)  # moved
    assert any(before[key].names != after[key].names for key in common)  # renamed
    assert any(news == {None} for news in followers.values())  # removed


def test_labels_follow_the_taxonomy_version_and_all_else_stays() -> None:
    old = offers_of(DemoFeed(offers_per_day=6_000))
    new = offers_of(DemoFeed(offers_per_day=6_000, taxonomy_version=2))

    known = {node.category_id for node in categories(2)} | set(UNKNOWN_CATEGORIES) | {None}
    assert set(new.pop("category_id")) <= known
    assert set(old.pop("category_id")) - known
    assert old == new


def test_200_shops_sell_in_six_countries_and_languages(day: dict[str, list[str | None]]) -> None:
    shops = demo_offers.OfferMaker(17, 1_000, 1).shops
    assert len(shops.ids[:200].unique()) == 200
    assert set(COUNTRIES) <= set(day["country"])
    assert set(LANGUAGES) <= set(day["language"])
    assert len(set(day["shop_id"])) > 150


def test_shops_word_the_category_of_a_product_in_their_own_way(day: dict[str, list[str | None]]) -> None:
    texts: dict[str, set[str | None]] = {}
    for category, text in zip(day["category_id"], day["shop_category"], strict=True):
        texts.setdefault(category or "", set()).add(text)

    assert sum(len(wordings) > 7 for wordings in texts.values()) > 50
    assert 0.05 < share_of(day["shop_category"], None) < 0.4


def test_a_tenth_of_the_categories_holds_most_of_the_offers(day: dict[str, list[str | None]]) -> None:
    weights = sorted(KindTables().weights, reverse=True)
    assert sum(weights[: len(weights) // 10]) > 0.4

    sizes = sorted(Counter(label for label in day["category_id"] if label).values(), reverse=True)
    assert sum(sizes[:40]) > 0.4 * sum(sizes)  # people label the rare ones more eagerly
    assert sizes[0] > 20 * sizes[-1]


def test_the_same_product_is_offered_by_many_shops_under_different_titles(
    day: dict[str, list[str | None]],
) -> None:
    shops: dict[str, set[str | None]] = {}
    titles: dict[str, set[str | None]] = {}
    gtins: dict[str, set[str]] = {}
    for product, shop, title, gtin in zip(
        day["product_id"], day["shop_id"], day["title"], day["gtin"], strict=True
    ):
        if product:
            shops.setdefault(product, set()).add(shop)
            titles.setdefault(product, set()).add(title)
            gtins.setdefault(product, set()).update([gtin] if gtin else [])

    assert sum(len(offering) >= 5 for offering in shops.values()) > 100
    assert max(len(wordings) for wordings in titles.values()) >= 8
    assert max(len(numbers) for numbers in gtins.values()) == 1


def test_gtins_have_a_valid_check_digit_and_belong_to_nobody(day: dict[str, list[str | None]]) -> None:
    for gtin in {gtin for gtin in day["gtin"] if gtin}:
        weighted = sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(gtin))
        assert len(gtin) == 13
        assert gtin.startswith("29")
        assert weighted % 10 == 0


def test_most_offers_are_unlabelled(day: dict[str, list[str | None]]) -> None:
    assert 0.68 < share_of(day["category_id"], None) < 0.76


def test_many_titles_do_not_name_the_product(day: dict[str, list[str | None]]) -> None:
    nouns = [name.lower() for kind in kinds() for names in kind.names for name in names]
    silent = [
        title for title in day["title"][:1500] if title and not any(noun in title.lower() for noun in nouns)
    ]

    assert 0.05 < len(silent) / 1500 < 0.4


def test_products_and_offers_come_back_the_next_day_and_some_are_new(
    day: dict[str, list[str | None]],
) -> None:
    following = offers_of(DemoFeed(), NEXT_DAY)

    known_products = share_known(following["product_id"], day["product_id"])
    known_offers = share_known(following["offer_id"], day["offer_id"])
    assert 0.5 < known_products < 0.95
    assert 0.1 < known_offers < 0.5


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("title", ["", "   ", None]),
        ("price", [*BAD_PRICES, "-1.00"]),
        ("offered_at", list(BAD_DATES)),
        ("category_id", list(UNKNOWN_CATEGORIES)),
        ("shop_id", ["", None]),
        ("offer_id", ["", None]),
        ("currency", ["€"]),
        ("country", ["Germany"]),
        ("language", ["deutsch!"]),
    ],
)
def test_a_day_has_values_that_cannot_be_accepted(
    day: dict[str, list[str | None]], column: str, values: list[str | None]
) -> None:
    bad = sum(value in values for value in day[column])

    assert bad >= 1
    assert column in ("country", "language") or bad < 0.02 * len(day[column])


def test_a_day_has_odd_titles(day: dict[str, list[str | None]]) -> None:
    titles = [title for title in day["title"] if title]

    assert max(len(title.encode()) for title in titles) >= HUGE_TITLE_BYTES
    assert any(title.endswith(CONTROL_CHARACTERS) for title in titles)
    assert any("fÃ¼r" in title for title in titles)
    assert any("&amp;" in title for title in titles)
    assert any("<b>" in title for title in titles)


def test_some_offer_ids_are_delivered_twice(day: dict[str, list[str | None]]) -> None:
    repeated = [count for key, count in Counter(day["offer_id"]).items() if key and count > 1]

    assert 3 < len(repeated) < 0.01 * len(day["offer_id"])


def test_only_a_small_part_of_the_offers_is_spoiled() -> None:
    assert sum(share for _, _, share, _ in DIRT) < 0.03


def test_offers_of_a_day_are_seen_on_that_day(day: dict[str, list[str | None]]) -> None:
    on_the_day = sum((seen or "").startswith("2026-11-01T") for seen in day["offered_at"])

    assert on_the_day > 0.99 * len(day["offered_at"])


def test_on_a_drifted_day_a_country_is_missing_and_new_shops_are_large(
    day: dict[str, list[str | None]], drifted_day: dict[str, list[str | None]]
) -> None:
    assert "IT" in day["country"]
    assert "IT" not in drifted_day["country"]
    known = {shop.as_py() for shop in demo_offers.OfferMaker(17, 1_000, 1).shops.ids[:200]} | {None, ""}
    new = [shop for shop in drifted_day["shop_id"] if shop not in known]
    assert 0.3 < len(new) / len(drifted_day["shop_id"]) < 0.4
    assert set(day["shop_id"]) <= known
    assert min(Counter(new).values()) > 0.02 * len(drifted_day["shop_id"])


def test_on_a_drifted_day_prices_are_higher_and_words_are_new(
    day: dict[str, list[str | None]], drifted_day: dict[str, list[str | None]]
) -> None:
    assert median_price(drifted_day) > 1.2 * median_price(day)
    assert not any("Black Week" in (title or "") for title in day["title"])
    assert sum("Black Week" in (title or "") for title in drifted_day["title"]) > 200


def test_the_command_writes_a_taxonomy_and_days_and_keeps_those_that_exist(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), "--days", "2", "--offers-per-day", "200"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    main(["--output", str(tmp_path), "--days", "3", "--offers-per-day", "200"])

    assert days_in(tmp_path) == [DAY, NEXT_DAY, datetime.date(2026, 11, 3)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (tmp_path / "taxonomy" / "v1.csv") in before


def test_next_day_continues_the_feed_with_its_own_settings(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), "--days", "1", "--offers-per-day", "250", "--seed", "5"])
    main(["--output", str(tmp_path), "--next-day"])
    main(["--output", str(tmp_path), "--next-day", "--drifted", "--taxonomy-version", "2"])

    assert days_in(tmp_path) == [DAY, NEXT_DAY, datetime.date(2026, 11, 3)]
    assert feed_in(tmp_path) == DemoFeed(seed=5, offers_per_day=250, taxonomy_version=2)
    second = pq.read_table(tmp_path / "offers-2026-11-02.parquet")
    third = pq.read_table(tmp_path / "offers-2026-11-03.parquet")
    assert second.equals(pa.concat_tables(DemoFeed(seed=5, offers_per_day=250).chunks(NEXT_DAY)))
    assert "IT" in second["country"].to_pylist()
    assert "IT" not in third["country"].to_pylist()
    newest = list_releases(str(tmp_path / "taxonomy"))[-1]
    taxonomy, mapping = read_release(newest.files, newest.source)
    assert newest.name == "v2"
    assert len(taxonomy) == len(categories(2))
    assert mapping


def test_the_official_mapping_says_where_offers_of_merged_and_split_categories_are() -> None:
    header, *rows = csv.reader(mapping_csv(2).splitlines())
    leads_to: dict[str, set[str]] = {}
    for former_id, current_id in rows:
        leads_to.setdefault(former_id, set()).add(current_id)
    before, after = ({node.category_id for node in categories(version)} for version in (1, 2))
    removed = before - after - leads_to.keys()

    assert header == ["from_id", "to_id"]
    assert leads_to.keys() <= before
    assert set.union(*leads_to.values()) <= after
    assert mapping_csv(1) == ""
    # The labels that the offers of both versions carry agree with it.
    for former, current in leads_to.items():
        assert {kind.labels[1] for kind in kinds() if kind.labels[0] == former} == current
    for kind in kinds():
        old, new = kind.labels
        assert new in leads_to.get(old or "", {old}) or (new is None and old in removed)


def test_only_the_last_day_drifts(tmp_path: Path) -> None:
    main(["--output", str(tmp_path), "--days", "2", "--offers-per-day", "300", "--drifted"])

    first, last = (pq.read_table(path)["country"].to_pylist() for path in sorted(tmp_path.glob("offers-*")))
    assert "IT" in first
    assert "IT" not in last


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ml_main(["demo-feed", "--output", str(tmp_path), "--next-day"]) == 2
    assert "write some without --next-day first" in capsys.readouterr().err


def test_a_folder_of_another_feed_cannot_be_continued(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["x"]}), tmp_path / "offers-2026-11-01.parquet")
    with pytest.raises(InputError, match="was not written by the demo feed"):
        main(["--output", str(tmp_path), "--next-day"])

    (tmp_path / "offers-2026-11-01.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is not a Parquet file"):
        main(["--output", str(tmp_path), "--next-day"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--offers-per-day", "0", "at least 1 offer per day"),
        ("--taxonomy-version", "3", "no taxonomy version 3"),
        ("--days", "0", "--days 0"),
    ],
)
def test_an_option_out_of_range_is_named(tmp_path: Path, option: str, value: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(["--output", str(tmp_path), option, value])


def depth(node: Category, nodes: tuple[Category, ...]) -> int:
    parents = {other.category_id: other.parent_id for other in nodes}
    levels, current = 1, node.category_id
    while parents[current]:
        levels, current = levels + 1, parents[current]
    return levels


def share_of(values: list[str | None], wanted: str | None) -> float:
    return sum(value == wanted for value in values) / len(values)


def share_known(values: list[str | None], known: list[str | None]) -> float:
    before = set(known)
    return sum(value in before for value in values) / len(values)


def median_price(offers: dict[str, list[str | None]]) -> float:
    prices = sorted(
        float(price) for price in offers["price"] if price and price.replace(".", "", 1).isdigit()
    )
    return prices[len(prices) // 2]


def test_the_command_line_and_the_settings_agree_on_the_size_of_a_day():
    assert Settings.model_fields["demo_offers_per_day"].default == DemoFeed.offers_per_day == 8_000

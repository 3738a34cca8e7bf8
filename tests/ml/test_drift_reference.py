import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.drift.answers import SERIES_SCHEMA
from ml.drift.frame import Frame
from ml.drift.measures import MISSING, NEW, OTHER, Bins, Names
from ml.drift.questions import QUESTIONS, TITLES_WITH_WORD, VOLUME
from ml.drift.sample import sampled_offers, write_trained
from ml.drift.totals import totals_of
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA
from tests.ml.drift_world import DriftWorld, days_before, offers_of, write_day


@pytest.fixture
def world(tmp_path, monkeypatch):
    return DriftWorld(tmp_path, monkeypatch)


def test_the_newest_days_are_the_reference(world):
    days = {day: offers_of(120, place) for place, day in enumerate(days_before(5))}
    folder, metrics = world.reference(days, days=3)
    newest = list(days)[-3:]
    assert Frame.load(folder).reference_days == newest
    assert (metrics["days"], metrics["first_day"], metrics["last_day"]) == (3, newest[0], newest[-1])
    assert metrics["offers"] == metrics["offers_looked_at"] == 360
    assert metrics["weekdays_allowed_for"] is False
    series = pq.read_table(folder / "series.parquet")
    assert series.schema.equals(SERIES_SCHEMA)
    assert set(series["day"].to_pylist()) == set(newest)
    assert set(series["question"].to_pylist()) == {question.name for question in QUESTIONS}
    assert metrics["series"] * 3 == pytest.approx(len(series), rel=0.02)


def test_each_day_gives_a_share_of_the_offers_that_are_looked_at_and_all_are_counted(world):
    days = {day: offers_of(300, place) for place, day in enumerate(days_before(4))}
    folder, metrics = world.reference(days, offers_per_day=200, max_offers=400)
    assert (metrics["offers"], metrics["offers_looked_at"]) == (1200, 400)
    series = pq.read_table(folder / "series.parquet").to_pandas()
    volume = series[(series["measure"] == "offers") & (series["segment"] == "") & (series["group"] == "")]
    assert set(volume["question"]) == {VOLUME}
    assert volume["value"].tolist() == [300.0] * 4
    length = series[
        (series["measure"] == "title length") & (series["segment"] == "") & (series["group"] == "")
    ]
    assert length["offers"].tolist() == [100.0] * 4


def test_a_run_that_was_killed_goes_on_with_the_day_that_it_was_at(world, monkeypatch):
    days = {day: offers_of(150, place) for place, day in enumerate(days_before(3))}
    asked, predict = [], world.models.predict

    def dies(offers):
        asked.append(len(offers))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return predict(offers)

    monkeypatch.setattr(world.models, "predict", dies)
    with pytest.raises(KeyboardInterrupt):
        world.reference(days)
    _, metrics = world.reference(days)
    assert metrics["offers_looked_at"] == 450
    assert asked == [150, 150, 150, 150]


def test_the_same_days_give_the_same_files(world):
    days = {day: offers_of(200, place) for place, day in enumerate(days_before(3))}
    one, _ = world.reference(days)
    other, _ = world.reference(days, name="again")
    for path in one.iterdir():
        if path.name != "manifest.json":
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_days_without_any_offer_are_refused(world):
    empty = offers_of(1, 0).iloc[:0]
    with pytest.raises(InputError, match="none of the 2 days of the reference has an offer"):
        world.reference(dict.fromkeys(days_before(2), empty))


def test_a_day_without_offers_among_others_is_counted_as_such(world):
    days = {day: offers_of(200, place) for place, day in enumerate(days_before(3))}
    days[list(days)[1]] = offers_of(1, 0).iloc[:0]
    folder, metrics = world.reference(days)
    assert metrics["offers"] == 400
    series = pq.read_table(folder / "series.parquet").to_pandas()
    volume = series[(series["measure"] == "offers") & (series["segment"] == "") & (series["group"] == "")]
    assert set(volume["question"]) == {VOLUME}
    assert volume["value"].tolist() == [200.0, 0.0, 200.0]


def test_what_the_model_learned_from_is_known_by_offer_and_by_product(tmp_path):
    rows = offers_of(8, 1)
    rows["title"] = [f"title {place}" for place in range(8)]
    rows.loc[1, "product_id"] = rows.loc[2, "product_id"] = "p"
    rows.loc[3, "gtin"], rows.loc[4, "gtin"] = "00401", "401"
    rows.loc[5, "title"], rows.loc[6, "title"] = "Same  Title", "same title"
    sample = tmp_path / "sample"
    sample.mkdir()
    for name, learned in (("labelled", rows.iloc[[0, 1]]), ("unlabelled", rows.iloc[[3, 5]])):
        table = pa.Table.from_pandas(learned[CLEAN_SCHEMA.names], CLEAN_SCHEMA, preserve_index=False)
        pq.write_table(table, sample / f"{name}.parquet")
    write_trained(sample, tmp_path / "trained.parquet")
    day = write_day(tmp_path / "day", rows)
    offers = sampled_offers(day, "2026-01-01", 100, 17, tmp_path / "trained.parquet").to_pandas()
    trained = dict(zip(offers["offer_id"], offers["trained"], strict=True))
    assert [trained[name] for name in rows["offer_id"]] == [True] * 7 + [False]


def test_a_sample_is_uniform_its_own_on_each_day_and_never_depends_on_the_order(tmp_path):
    rows = offers_of(2000, 1)
    (tmp_path / "trained").mkdir()
    pq.write_table(pa.table({"key": pa.array([], pa.string())}), tmp_path / "trained.parquet")
    one, other = (
        write_day(tmp_path / name, shown)
        for name, shown in (("one", rows), ("other", rows.sample(frac=1, random_state=1)))
    )

    def ids(folder, day, number):
        table = sampled_offers(folder, day, number, 17, tmp_path / "trained.parquet")
        return table["offer_id"].to_pylist()

    monday, tuesday = ids(one, "2026-01-05", 400), ids(one, "2026-01-06", 400)
    assert monday == ids(other, "2026-01-05", 400)
    assert monday == ids(one, "2026-01-05", 500)[:400]
    assert 40 <= len(set(monday) & set(tuesday)) <= 120  # 80 by chance
    places = [int(name.split("-")[1]) for name in monday]
    assert 900 < np.mean(places) < 1100


def test_totals_are_exact(tmp_path):
    rows = offers_of(1000, 1)
    rows.loc[:49, "country"] = None
    folder = write_day(tmp_path / "day", rows, ["invalid_price", "invalid_price,empty_title"])
    totals = totals_of(folder, "2026-01-01", True, ["shop0", "nowhere"])
    assert totals.offers == 1000
    assert totals.delivered == 1002
    assert totals.by_country == {**rows["country"].value_counts().to_dict(), MISSING: 50}
    assert sum(totals.by_shop.values()) == 1000
    assert totals.by_shop["shop0"] == (rows["shop_id"] == "shop0").sum()
    assert totals.quarantined == {"empty_title": 1, "invalid_price": 2}
    is_french = rows["country"] == "FR"
    assert totals.missing["brand"]["FR"] == rows.loc[is_french, "brand"].isna().sum()
    assert totals.missing["gtin"] == totals.by_country
    assert "category_id" not in totals.missing


def test_small_shops_are_counted_together_unless_asked_for(tmp_path):
    rows = offers_of(1500, 1)
    rows["shop_id"] = [f"tiny{place}" for place in range(1500)]
    folder = write_day(tmp_path / "day", rows)
    totals = totals_of(folder, "2026-01-01", True, ["tiny1499"])
    assert len(totals.by_shop) <= 202
    assert totals.by_shop["tiny1499"] == 1
    assert totals.by_shop[OTHER] + sum(n for name, n in totals.by_shop.items() if name != OTHER) == 1500


# Segments


def test_numbers_are_cut_at_deciles_and_frequent_values_stand_alone():
    values = np.array([0.0] * 50 + [place + 0.5 for place in range(50)] + [np.nan])
    bins = Bins.at_deciles(values, "pieces")
    labels = [
        None if code < 0 else bins.labels[code]
        for code in bins.codes(np.array([0.0, -1.0, 0.2, 1000.0, np.nan]))
    ]
    assert labels[0] == "0 pieces"
    assert labels[1] == "below 0 pieces"
    assert labels[2].startswith("above 0 to ")
    assert labels[3].endswith("and more pieces")
    assert labels[4] is None


def test_whole_numbers_are_cut_between_whole_numbers():
    bins = Bins.at_deciles(np.repeat(np.arange(3, 9), [5, 30, 30, 30, 3, 2]).astype(float), "words")
    assert bins.labels == ["below 4 words", "4 words", "5 words", "6 words", "7 and more words"]


@given(st.lists(st.floats(-1e6, 1e6) | st.integers(-5, 5).map(float), max_size=60), st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_number_is_in_one_bin_and_bins_are_in_order(values, whole):
    numbers = np.round(np.array(values, dtype=np.float64)) if whole else np.array(values, dtype=np.float64)
    bins = Bins.at_deciles(numbers, "")
    codes = bins.codes(np.sort(numbers))
    assert len(bins.labels) == len(bins.edges) + 1
    assert ((codes >= 0) & (codes < len(bins.labels))).all()
    assert (np.diff(codes) >= 0).all()


def test_names_are_new_by_how_many_days_have_them():
    values = np.array(["big"] * 6 + ["once", "twice", "twice", None], dtype=object)
    names = Names.of(values, np.array([0, 1] * 3 + [0, 0, 1, 1]), least_share=0.5, most=10)
    assert names.named == ["big"]
    asked = np.array(["big", "once", "twice", "never", None], dtype=object)
    assert names.novelty(asked, of_reference=True).tolist() == [0, 1, 0, 1, 0]
    assert names.novelty(asked, of_reference=False).tolist() == [0, 0.5, 0, 1, 0]


def test_common_words_are_followed_by_language(world):
    days = {day: offers_of(400, place) for place, day in enumerate(days_before(2))}
    folder, _ = world.reference(days)
    series = pq.read_table(folder / "series.parquet").to_pandas()
    words = series[series["measure"] == TITLES_WITH_WORD]
    assert set(words["group"]) == {f"language {code}" for code in ("de", "fr", "it", "nl", "pl")}
    assert 150 <= len(words) / 2 <= 260
    german = words[words["group"] == "language de"]
    assert german["segment"].str.startswith("de").all()
    assert NEW not in set(words["segment"])

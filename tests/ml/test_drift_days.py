"""The simulated days that monitoring is measured on are what they are said to be."""

from __future__ import annotations

import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.drift_days import ALTERATIONS, FIRST_DAY, KINDS, STRENGTHS, TRUNCATED_TO, Drift, Pool, World
from benchmarks.drift_trust import Answers, Episode, Outcome, UsualDays, drift_rows, usual_rows
from ml.demo.feed import DemoFeed
from ml.demo.words import COUNTRIES
from ml.drift.totals import totals_of
from ml.offers import CLEAN_FILE, CLEAN_SCHEMA, QUARANTINE_FILE

_KINDS = {kind.name: kind for kind in KINDS}


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Offers of the demo feed that are as good as clean, answered by someone who knows."""
    (feed,) = DemoFeed(seed=3, offers_per_day=12_000).chunks(datetime.date(2026, 11, 1))
    is_clean = pc.and_(pc.is_valid(feed["title"]), pc.less(pc.utf8_length(feed["title"]), 200))
    offers = feed.filter(is_clean).to_pandas().dropna(subset=["offer_id", "shop_id"])
    is_country = offers["country"].isin(COUNTRIES) | offers["country"].isna()
    offers = offers[is_country].drop_duplicates("offer_id").reset_index(drop=True)
    offers["price"] = pd.to_numeric(offers["price"], errors="coerce").abs()
    labels = offers["category_id"].dropna().to_numpy(dtype=object)
    answers = np.random.default_rng(0).choice(labels, len(offers))
    offers = offers.assign(
        category_id=answers,
        category_path=answers,
        confidence=0.9,
        fast_category_id=answers,
        student_category_id=answers,
        tier="student",
        needs_review=False,
        trained=False,
        taxonomy_known=True,
        true_top=[category[:2] for category in answers],
    )
    shops = offers["shop_id"].value_counts().index[3:5]
    altered = {name: pd.DataFrame(alter(offers)) for name, alter in ALTERATIONS.items()}
    return Pool(offers, offers["shop_id"].isin(shops).to_numpy(), altered, {"empty_title": 0.01})


@pytest.fixture(scope="module")
def world(pool: Pool) -> World:
    return World(pool, seed=5, days=60, sampled=1_500)


def drift_of(pool: Pool, kind: str, strength: str) -> Drift:
    return Drift.draw(pool, _KINDS[kind], strength, np.random.default_rng(2))


def test_a_day_comes_out_the_same_in_any_order(pool: Pool, world: World) -> None:
    first = world.day(9)
    world.day(3)
    again = World(pool, seed=5, days=60, sampled=1_500).day(9)

    assert first.day == again.day == (FIRST_DAY + datetime.timedelta(days=9)).isoformat()
    assert first.totals == again.totals
    pd.testing.assert_frame_equal(first.rows, again.rows)


def test_usual_days_differ_by_more_than_the_draw(world: World) -> None:
    days = [world.day(number).totals.by_shop for number in range(56)]
    largest = max(days[0], key=days[0].__getitem__)
    counts = np.array([day[largest] for day in days], dtype=float)

    variation = counts.std() / counts.mean()
    assert 0.15 < variation < 0.45
    assert variation > 2 / np.sqrt(counts.mean())


def test_no_new_shop_sells_on_a_usual_day(pool: Pool, world: World) -> None:
    new = set(pool.offers["shop_id"][pool.newcomer])
    assert not new & set(world.day(0).totals.by_shop)


def test_totals_are_those_that_are_counted_in_files(pool: Pool, world: World, tmp_path) -> None:
    day = world.day(4, drift_of(pool, "new_shop", "strong"))
    delivered = pool.offers.iloc[day.delivered]
    columns = {
        name: pa.array(
            [None if pd.isna(value) else value for value in delivered[name]]
            if name not in ("category_id", "offered_at")
            else [None] * len(delivered),
            CLEAN_SCHEMA.field(name).type,
        )
        for name in CLEAN_SCHEMA.names
    }
    pq.write_table(pa.table(columns), tmp_path / CLEAN_FILE)
    reasons = [reason for reason, rows in day.totals.quarantined.items() for _ in range(rows)]
    pq.write_table(pa.table({"reason": pa.array(reasons, pa.string())}), tmp_path / QUARANTINE_FILE)

    counted = totals_of(tmp_path, day.day, complete=True, shops=list(day.totals.by_shop))

    assert counted.by_country == day.totals.by_country
    assert counted.by_shop == day.totals.by_shop
    assert (counted.offers, counted.delivered) == (day.totals.offers, day.totals.delivered)
    assert counted.quarantined == {reason: rows for reason, rows in day.totals.quarantined.items() if rows}
    for column in day.totals.missing.keys() - {"offered_at"}:
        assert counted.missing[column] == day.totals.missing[column], column


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", _KINDS)
def test_drift_is_as_strong_as_it_says(pool: Pool, world: World, kind: str, strength: str) -> None:
    drift, usual = drift_of(pool, kind, strength), world.day(20)
    day = world.day(20, drift)
    amount = _KINDS[kind].amounts[STRENGTHS.index(strength)]
    hit = drift.affected[day.delivered].mean()
    before = drift.affected[usual.delivered].mean()

    if kind == "language_missing":
        left = drift.affected[day.delivered].sum() / drift.affected[usual.delivered].sum()
        assert left == pytest.approx(1 - amount, abs=0.12)
    elif kind == "category_shift":
        assert hit / (1 - hit) == pytest.approx(amount * before / (1 - before), rel=0.25)
    else:
        # Shops are more active on some days than on others.
        assert hit == pytest.approx(amount, rel=0.5)


def test_only_what_is_affected_is_changed(pool: Pool, world: World) -> None:
    usual = world.day(20)
    for kind, changed in (
        ("price_unit", {"price"}),
        ("stale_taxonomy", {"taxonomy_known"}),
        ("truncated", {"title"}),
        ("wording", {"title"}),
        ("encoding", {"title", "brand", "description", "shop_category"}),
    ):
        drift = drift_of(pool, kind, "medium")
        day = world.day(20, drift)
        assert day.rows["offer_id"].tolist() == usual.rows["offer_id"].tolist()
        affected = set(pool.offers["offer_id"][drift.affected])
        for column in day.rows.columns:
            old, new = usual.rows[column], day.rows[column]
            differs = ~((old == new) | (old.isna() & new.isna()))
            assert not differs.any() or column in changed, (kind, column)
            assert set(day.rows["offer_id"][differs]) <= affected


def test_titles_are_cut_and_letters_damaged(pool: Pool, world: World) -> None:
    cut = world.day(7, drift_of(pool, "truncated", "strong")).rows["title"]
    assert cut.str.len().max() <= TRUNCATED_TO

    damaged = pool.altered["encoding"]["title"]
    had_none = pool.offers["title"].map(str.isascii)
    assert (damaged[had_none] == pool.offers["title"][had_none]).all()
    assert damaged[~had_none].str.contains("\ufffd|Ã|Â|â").all()


def test_an_episode_is_caught_on_the_first_day_of_a_fitting_error() -> None:
    ok, other = Answers({"prices_are_usual": "WARN"}, {}), Answers({"volume_is_usual": "ERROR"}, {})
    caught = Answers({"prices_are_usual": "ERROR"}, {"prices_are_usual": "ERROR price over usual: …"})
    nothing, price = frozenset[str](), frozenset({"price"})
    outcome = Outcome()
    outcome.usual["usual", 28].columns += [frozenset({"price", "brand"}), frozenset({"brand"})]
    outcome.episodes["price_unit", "weak"] = [
        Episode([ok, other, caught], [nothing, price, price]),
        Episode([ok, ok, ok], [nothing] * 3),
    ]

    (row,) = drift_rows(outcome)

    assert (row["error_caught"], row["error_mean_delay"]) == (0.5, 2.0)
    assert (row["warn_or_error_caught"], row["warn_or_error_mean_delay"]) == (1.0, 0.0)
    assert (row["evidently_fitting_column_caught"], row["evidently_fitting_column_mean_delay"]) == (0.5, 1.0)
    assert row["evidently_dataset_caught"] == 0.0
    assert row["evidently_fitting_column_on_usual_days"] == 0.5
    assert row["episodes_with_error_of_other_questions"] == {"volume_is_usual": 1}


def test_usual_days_are_counted_once_however_much_was_found() -> None:
    answers = [
        Answers({"prices_are_usual": "ERROR", "volume_is_usual": "ERROR"}, {}),
        Answers({"prices_are_usual": "OK", "volume_is_usual": "WARN"}, {}),
    ]
    outcome = Outcome(usual={("usual", 28): UsualDays(answers, [frozenset({"brand"}), frozenset("abcde")])})

    (row,) = usual_rows(outcome)

    assert (row["any_error"], row["any_warn_or_error"]) == (1, 2)
    assert (row["evidently_dataset"], row["evidently_any_column"]) == (1, 2)

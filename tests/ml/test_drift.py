import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ml.drift.report
from ml.drift.columns import MISSING, NEW, OTHER, name_segments, number_segments
from ml.drift.report import chance_distance, write_drift_report
from ml.offers import CLEAN_SCHEMA
from ml.progress import Progress
from ml.runner import StageContext
from ml.serving.predictor import Prediction
from ml.stages import DriftParameters

COUNTRIES = ["DE", "AT", "FR", "IT", "NL", "PL"]
CURRENCIES = {"PL": "PLN"}
CATEGORIES = [f"Top {n % 6} > Leaf {n}" for n in range(40)]
WORDS = [f"word{n}" for n in range(300)]


def offers_of(number, seed, prefix="o"):
    """Offers of a believable day: 80 shops of power-law size, six countries, prices by category."""
    random = np.random.default_rng(seed)
    shop_weights = 1 / np.arange(1, 81)
    category_weights = 1 / np.arange(1, 41)
    rows = []
    for index in range(number):
        country = str(random.choice(COUNTRIES, p=[0.3, 0.1, 0.2, 0.15, 0.1, 0.15]))
        category = int(random.choice(40, p=category_weights / category_weights.sum()))
        rows.append(
            {
                "offer_id": f"{prefix}{seed}-{index}",
                "shop_id": f"shop{random.choice(80, p=shop_weights / shop_weights.sum())}",
                "title": " ".join(random.choice(WORDS, size=random.integers(3, 9))),
                "country": country,
                "language": country.lower(),
                "brand": "brand" if random.random() < 0.6 else None,
                "shop_category": "Things" if random.random() < 0.7 else None,
                "price": float(np.exp(category % 7 + random.normal(0, 0.5)))
                if random.random() < 0.95
                else None,
                "currency": CURRENCIES.get(country, "EUR"),
                "category_path": CATEGORIES[category],
                "confidence": float(random.beta(6, 2)),
            }
        )
    return rows


class OraclePredictor:
    """Stands in for the compiled model: answers what the offers were made with."""

    def __init__(self, rows):
        self.by_id = {row["offer_id"]: row for row in rows}

    def predict(self, offers):
        return [
            Prediction(
                offer_id=offer["offer_id"],
                category_id="c",
                category_path=self.by_id[offer["offer_id"]]["category_path"],
                confidence=self.by_id[offer["offer_id"]]["confidence"],
                model_version="m",
                taxonomy_version="t",
            )
            for offer in offers
        ]


def write_offers(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [{name: row.get(name) for name in CLEAN_SCHEMA.names} for row in rows]
    pq.write_table(pa.Table.from_pylist(known, CLEAN_SCHEMA), path)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Runs the stage on two sets of offers; returns metrics, report and the output folder."""

    def run(reference, current, trained=(), **parameters):
        monkeypatch.setattr(
            ml.drift.report.Predictor,
            "load",
            staticmethod(lambda folder, threads=1: OraclePredictor(reference)),
        )
        sample = tmp_path / "training_sample"
        write_offers(reference, sample / "reference.parquet")
        write_offers(trained, sample / "labelled.parquet")
        write_offers([], sample / "unlabelled.parquet")
        write_offers(current, tmp_path / "offers" / "offers.parquet")
        catalogued = tmp_path / "catalogued_offers"
        catalogued.mkdir()
        answers = {
            name: [row[name] for row in current] for name in ("offer_id", "category_path", "confidence")
        }
        types = [pa.string(), pa.string(), pa.float64()]
        columns = [pa.array(values, kind) for values, kind in zip(answers.values(), types, strict=True)]
        pq.write_table(pa.table(columns, names=list(answers)), catalogued / "catalogued.parquet")
        names = ("training_sample", "offers", "catalogued_offers", "compiled_student")
        output = tmp_path / "output"
        output.mkdir()
        context = StageContext({n: tmp_path / n for n in names}, output, tmp_path, Progress("test"))
        metrics = write_drift_report(context, DriftParameters(day="2026-01-05", **parameters))
        return metrics, msgspec.json.decode((output / "drift.json").read_bytes()), output

    return run


def drifted(answer):
    return {column["name"] for column in answer["columns"] if column["drifted"]}


def sentence_of(answer, name):
    return next(column["sentence"] for column in answer["columns"] if column["name"] == name)


REFERENCE = offers_of(1500, seed=1)


def test_a_normal_day_has_not_drifted_and_the_report_is_there(report):
    metrics, answer, output = report(REFERENCE, offers_of(1200, seed=2))
    assert drifted(answer) == set()
    assert metrics["drifted_columns"] == 0
    assert metrics["sufficient"] is True
    assert metrics["offers"] == 1200
    assert metrics["reference_offers"] == 1500
    assert metrics["columns"] == len(answer["columns"]) == 13
    assert metrics["sentence"] == "No column drifted on 2026-01-05 (1,200 offers against 1,500)."
    assert b"<html" in (output / "report.html").read_bytes()[:2000]


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_a_small_normal_day_has_not_drifted(report, seed):
    _, answer, _ = report(REFERENCE, offers_of(130, seed=seed))
    assert drifted(answer) == set()


def test_a_day_that_is_part_of_the_reference_has_not_drifted(report):
    metrics, answer, _ = report(REFERENCE, REFERENCE[:700])
    assert drifted(answer) == set()
    assert metrics["distance_unknown_words"] < 0.05


def test_a_missing_country_has_drifted_and_is_named(report):
    current = [row for row in offers_of(1200, seed=3) if row["country"] != "FR"]
    metrics, answer, _ = report(REFERENCE, current)
    assert drifted(answer) == {"country", "language"}
    assert metrics["drifted_columns"] == 2
    assert "country: FR 19.7% → 0.0% of offers" in sentence_of(answer, "country")
    assert "country: FR" in metrics["sentence"]


def test_prices_that_rose_by_a_half_have_drifted_though_prices_span_orders_of_magnitude(report):
    current = [{**row, "price": row["price"] and row["price"] * 1.5} for row in offers_of(1200, seed=4)]
    _, answer, _ = report(REFERENCE, current)
    assert drifted(answer) == {"price"}
    assert "median 1.04 → 1.68 times the usual" in sentence_of(answer, "price")


def test_prices_that_rose_in_one_country_are_traced_to_it(report):
    current = [
        {**row, "price": row["price"] and row["price"] * (4 if row["country"] == "DE" else 1)}
        for row in offers_of(1200, seed=5)
    ]
    _, answer, _ = report(REFERENCE, current)
    assert drifted(answer) == {"price"}
    assert "most in country DE" in sentence_of(answer, "price")


def test_a_new_big_shop_has_drifted_and_is_named(report):
    current = [
        {**row, "shop_id": "newcomer"} if index % 7 == 0 else row
        for index, row in enumerate(offers_of(1200, seed=6))
    ]
    _, answer, _ = report(REFERENCE, current)
    assert drifted(answer) == {"shop"}
    assert "shop: newcomer 0.0% → 14.3% of offers" in sentence_of(answer, "shop")


def test_many_small_new_shops_have_drifted_though_none_is_large(report):
    current = [
        {**row, "shop_id": f"new{index % 120}"} if index % 5 == 0 else row
        for index, row in enumerate(offers_of(1200, seed=7))
    ]
    _, answer, _ = report(REFERENCE, current)
    assert drifted(answer) == {"shop"}
    assert f"{NEW} 0.1% → 20.4% of offers" in sentence_of(answer, "shop")


def test_new_wording_has_drifted(report):
    current = [{**row, "title": row["title"].replace("word1", "mot")} for row in offers_of(1200, seed=8)]
    _, answer, _ = report(REFERENCE, current)
    assert "unknown_words" in drifted(answer)


def test_confidence_that_fell_has_drifted(report):
    current = [{**row, "confidence": row["confidence"] * 0.7} for row in offers_of(1200, seed=9)]
    _, answer, _ = report(REFERENCE, current)
    assert drifted(answer) == {"confidence"}


def test_the_confidence_of_offers_that_were_trained_on_is_left_out(report):
    trained = REFERENCE[:900]
    reference = [{**row, "confidence": 0.999} for row in trained] + REFERENCE[900:]
    metrics, answer, _ = report(reference, offers_of(1200, seed=10), trained=trained)
    assert drifted(answer) == set()
    assert metrics["distance_confidence"] < 0.2


def test_where_all_were_trained_on_confidence_is_not_compared(report):
    metrics, answer, _ = report(REFERENCE, offers_of(300, seed=2), trained=REFERENCE)
    assert "distance_confidence" not in metrics
    assert "not compared" in sentence_of(answer, "confidence")


def test_columns_without_variation_or_without_any_value_are_no_crash(report):
    def plain(row):
        return {**row, "country": None, "language": "de", "price": None, "brand": None, "title": "one"}

    metrics, answer, _ = report(
        [plain(row) for row in REFERENCE[:300]], [plain(row) for row in offers_of(300, seed=2)]
    )
    assert drifted(answer) == set()
    assert metrics["distance_country"] == 0.0
    assert metrics["distance_price"] == 0.0


@pytest.mark.parametrize("side", ["reference", "current"])
def test_values_that_only_one_side_has_are_drift_and_no_crash(report, side):
    def emptied(rows):
        return [{**row, "country": None, "price": None, "currency": None} for row in rows]

    reference, current = REFERENCE[:400], offers_of(400, seed=2)
    if side == "reference":
        reference = emptied(reference)
    else:
        current = emptied(current)
    _, answer, _ = report(reference, current)
    assert {"country", "price_given"} <= drifted(answer)


@pytest.mark.parametrize(("reference", "current"), [(1500, 99), (99, 300), (0, 300), (300, 0)])
def test_too_few_offers_give_no_verdict(report, reference, current):
    metrics, answer, output = report(REFERENCE[:reference], offers_of(current, seed=2))
    assert metrics["sufficient"] is False
    assert metrics["drifted_columns"] == 0
    assert metrics["share_drifted"] == 0.0
    assert answer["sentence"].startswith(f"No verdict on 2026-01-05: {current} offers")
    assert "No verdict" in (output / "report.html").read_text(encoding="utf-8")


def test_only_a_sample_of_a_large_day_is_looked_at(report):
    metrics, _, _ = report(REFERENCE, offers_of(900, seed=2), max_offers=200)
    assert metrics["offers"] == 200


def test_distances_are_population_stability_indices(report):
    current = [row for row in offers_of(1200, seed=3) if row["country"] != "FR" or row["title"] < "word2"]
    metrics, _, _ = report(REFERENCE, current)
    shares = [
        np.array([sum(row["country"] == country for row in rows) / len(rows) for country in COUNTRIES])
        for rows in (REFERENCE, current)
    ]
    expected = float(np.sum((shares[0] - shares[1]) * np.log(shares[0] / shares[1])))
    assert metrics["distance_country"] == pytest.approx(expected, abs=1e-6)


def test_chance_stays_below_the_distance_that_is_allowed_for_it():
    random = np.random.default_rng(0)
    shares = np.full(10, 0.1)
    allowed = chance_distance(10, 400, 150)
    beyond = 0
    for _ in range(500):
        one, other = random.multinomial(400, shares) / 400, random.multinomial(150, shares) / 150
        one, other = np.maximum(one, 1e-4), np.maximum(other, 1e-4)
        beyond += np.sum((one - other) * np.log(one / other)) > allowed
    assert beyond <= 5
    assert chance_distance(1, 400, 150) == 0.0


def test_names_are_joined_unless_frequent_and_unknown_ones_stand_apart():
    reference = ["big"] * 60 + ["small"] * 3 + [None] * 10 + [f"single{n}" for n in range(927)]
    current = ["big"] * 50 + ["newcomer"] * 40 + ["small"] * 2 + [f"unseen{n}" for n in range(908)]
    before, after = name_segments(reference, current)
    assert (before[0], before[60], before[63], before[73]) == ("big", OTHER, MISSING, NEW)
    assert (after[0], after[50], after[90], after[92]) == ("big", "newcomer", OTHER, NEW)


def test_numbers_are_cut_at_deciles_and_frequent_values_stand_alone():
    reference = np.array([0.0] * 50 + list(range(1, 51)) + [np.nan])
    before, after = number_segments(reference, np.array([0.0, -1.0, 0.2, 1000.0, np.nan]))
    assert before[0] == after[0] == "01: 0"
    assert after[1] == "00: below 0"
    assert after[2] == "02: above 0 to 0.5"
    assert after[3] == "07: 40.1 and more"
    assert before[-1] == after[-1] == MISSING
    assert max(before.count(segment) for segment in set(before[50:-1])) <= 11

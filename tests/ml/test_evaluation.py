import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import f1_score
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel

import ml.evaluation.stage
from ml.artifacts import short_version
from ml.errors import InputError
from ml.evaluation.comparison import Comparison
from ml.evaluation.gate import (
    GateLimits,
    no_segment_is_worse_than_production,
    student_is_close_to_teacher,
    student_is_not_worse_than_production,
)
from ml.evaluation.plots import comparisons
from ml.evaluation.stage import evaluate_student
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.ensemble import EnsembleWeights, Teacher
from ml.offers import CLEAN_SCHEMA, TEXT_VERSION
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import EvaluationParameters
from ml.taxonomy import Category, Taxonomy
from ml.taxonomy_change.change import CHANGE_FILE, TaxonomyChange, changed_since
from ml.taxonomy_change.diff import TaxonomyDiff
from ml.taxonomy_change.transitions import Successor, Transition, Transitions
from tests.ml.sampling_workshop import Workshop

PARENTS = {"home": "", "lamp": "home", "sofa": "home", "garden": "", "hose": "garden", "gift": ""}
LABELS = ["gift", "hose", "lamp", "sofa"]
PNG = b"\x89PNG\r\n"


class Scripted:
    """A model that answers each text as its folder's ``answers.json`` says, with confidence 0.9."""

    loaded: ClassVar[list[str]] = []

    def __init__(self, folder: Path):
        self.labels, self.answers = json.loads((folder / "answers.json").read_text())
        self.loaded.append(folder.name)

    @classmethod
    def load(cls, folder, *_):
        return cls(folder)

    def predict_probabilities(self, texts, *_):
        probabilities = np.full((len(texts), len(self.labels)), 0.1 / (len(self.labels) - 1), np.float32)
        for row, text in enumerate(texts):
            probabilities[row, self.labels.index(self.answers.get(text, self.labels[0]))] = 0.9
        return probabilities

    deep_probabilities = predict_probabilities


class Bench:
    """Inputs of the stage in a folder; runs it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.inputs: dict[str, Path] = {}
        self.rows: list[dict] = []
        source = folder / "taxonomy.csv"
        lines = [f"{category},{parent},{category.title()}" for category, parent in PARENTS.items()]
        source.write_text("category_id,parent_id,name\n" + "\n".join(lines) + "\n", encoding="utf-8")
        taxonomy = self.add("catalog_taxonomy")
        Taxonomy.read_csv(str(source)).write(taxonomy / "taxonomy.parquet")

    def add(self, name):
        self.inputs[name] = self.folder / name
        self.inputs[name].mkdir()
        return self.inputs[name]

    def evaluation_set(self, truth):
        self.rows = [
            {
                "offer_id": f"o{number:03}",
                "shop_id": "s",
                "title": f"title {number}",
                "country": ["DE", "AT", None][number % 3],
                "product_id": f"p{number // 2}",
                "category_id": category,
                "text": f"text {number}",
            }
            for number, category in enumerate(truth)
        ]
        schema = CLEAN_SCHEMA.append(pa.field("text", pa.string()))
        table = pa.Table.from_pylist(self.rows, schema)
        pq.write_table(table, self.add("evaluation_set") / "offers.parquet")

    def model(self, name, predicted, labels=LABELS):
        answers = {row["text"]: category for row, category in zip(self.rows, predicted, strict=True)}
        (self.add(name) / "answers.json").write_text(json.dumps([labels, answers]))
        return self.inputs[name]

    def run(self, **parameters):
        output, checkpoints = self.folder / "output", self.folder / "checkpoints"
        output.mkdir(exist_ok=True)
        checkpoints.mkdir(exist_ok=True)
        context = StageContext(self.inputs, output, checkpoints, Progress("test"))
        metrics = evaluate_student(context, EvaluationParameters(bootstrap=50, **parameters))
        return metrics, json.loads((output / "evaluation.json").read_text()), output


OLD, NEW = "0" * 64, "1" * 64
TRUTH = ["lamp"] * 30 + ["sofa"] * 20 + ["hose"] * 8 + ["gift"] * 2
STUDENT = ["lamp"] * 28 + ["sofa"] * 2 + ["sofa"] * 20 + ["lamp"] * 4 + ["hose"] * 4 + ["gift", "sofa"]
TEACHER = ["lamp"] * 29 + ["sofa"] * 21 + ["hose"] * 8 + ["gift"] * 2
FAST = ["lamp"] * 60


@pytest.fixture
def bench(tmp_path, monkeypatch):
    for name in ("Classifier", "Teacher", "FastModel", "Predictor"):
        monkeypatch.setattr(ml.evaluation.stage, name, Scripted)
    monkeypatch.setattr(Scripted, "loaded", [])
    bench = Bench(tmp_path)
    bench.evaluation_set(TRUTH)
    bench.model("student_checkpoint", STUDENT)
    bench.model("teacher_checkpoint", TEACHER)
    bench.model("fast_checkpoint", FAST)
    return bench


def tree(without=()):
    return Taxonomy([Category(c, PARENTS[c] or None, c.title()) for c in PARENTS if c not in without])


def add_production(bench, predicted, labels=LABELS, text_version=TEXT_VERSION, without=()):
    """A version in production, which knows the taxonomy of today ``without`` some categories."""
    folder = bench.model("production_model", predicted, labels)
    facts = {"text_version": text_version, "taxonomy_version": short_version(OLD)}
    (folder / "model.json").write_text(json.dumps(facts))
    tree(without).write(folder / "taxonomy.parquet")


def transition(former, *to, since=NEW):
    return Transition(
        from_id=former,
        from_name=former,
        from_path=former,
        kind="replaced" if len(to) == 1 else "split",
        to=[Successor(category_id=name, share=share) for name, share in to],
        origin="inferred",
        confidence=0.9,
        certain=len(to) == 1,
        since=since,
        reason="",
        lives_on=any(name == former for name, _ in to),
    )


def add_change(bench, added=(), transitions=(), earlier=()):
    """The last step of the taxonomy: ``added`` ids, its transitions, and those of steps before it."""
    folder = bench.add("taxonomy_change")
    Transitions(history=[OLD, NEW], transitions=[*earlier, *transitions]).write(folder)
    step = {transition.from_id: transition for transition in transitions}
    old, new = tree(added), tree()
    change = TaxonomyChange(
        from_version=short_version(OLD),
        to_version=short_version(NEW),
        diff=TaxonomyDiff.between(old, new),
        transitions=list(transitions),
        impact=[],
        few_labelled=[],
        changed=changed_since(old, new, step),
    )
    (folder / CHANGE_FILE).write_bytes(msgspec.json.encode(change))


def test_the_flat_figures_are_those_of_scikit_learn(bench):
    metrics, _, _ = bench.run()
    assert metrics["offers"] == 60
    assert metrics["categories"] == 4
    for name, predicted in (("student", STUDENT), ("teacher", TEACHER), ("fast", FAST)):
        for average in ("weighted", "macro"):
            expected = f1_score(TRUTH, predicted, average=average, zero_division=0)
            assert metrics[f"{name}_{average}_f1"] == pytest.approx(expected, abs=1e-6)
        right = np.mean([a == b for a, b in zip(TRUTH, predicted, strict=True)])
        assert metrics[f"{name}_accuracy"] == pytest.approx(right, abs=1e-6)
        assert metrics[f"{name}_ece"] == pytest.approx(abs(0.9 - right), abs=1e-6)
        assert metrics[f"{name}_offers_per_second"] > 0
    share = metrics["student_weighted_f1"] / metrics["teacher_weighted_f1"]
    assert metrics["student_share_of_teacher"] == pytest.approx(share, abs=1e-5)
    assert "student_minus_production" not in metrics


def test_levels_score_ancestors_and_their_mean_is_the_leading_figure(bench):
    metrics, evaluation, _ = bench.run()
    roots = {"lamp": "home", "sofa": "home", "hose": "garden", "gift": "gift"}
    expected = f1_score(
        [roots[c] for c in TRUTH], [roots[c] for c in STUDENT], average="weighted", zero_division=0
    )
    assert metrics["student_weighted_f1_level_1"] == pytest.approx(expected, abs=1e-6)
    assert metrics["student_weighted_f1_level_2"] == metrics["student_weighted_f1"]
    mean = (metrics["student_weighted_f1_level_1"] + metrics["student_weighted_f1_level_2"]) / 2
    assert metrics["student_mean_weighted_f1"] == pytest.approx(mean, abs=1e-6)
    assert len(evaluation["models"]["student"]["levels"]) == 2


def test_tables_name_the_best_and_worst_categories_and_what_they_are_taken_for(bench):
    _, evaluation, _ = bench.run()
    worst = evaluation["worst_categories"]
    assert [row["category_id"] for row in worst] == ["hose", "lamp", "sofa"]  # two gifts are too few
    assert worst[0]["path"] == "Garden > Hose"
    assert worst[0]["recall"] == 0.5
    assert worst[0]["mostly_taken_for"] == "Home > Lamp"
    assert [row["category_id"] for row in evaluation["best_categories"]] == ["sofa", "lamp", "hose"]


def test_countries_are_scored_apart_and_offers_without_one_are_not_lost(bench):
    _, evaluation, _ = bench.run()
    countries = evaluation["models"]["student"]["countries"]
    assert {name: row["offers"] for name, row in countries.items()} == {"DE": 20, "AT": 20, "unknown": 20}


def test_predictions_hold_one_row_per_offer_in_order(bench):
    add_production(bench, TEACHER)
    _, _, output = bench.run()
    table = pq.read_table(output / "predictions.parquet")
    assert table["offer_id"].to_pylist() == [row["offer_id"] for row in bench.rows]
    assert table["category_id"].to_pylist() == TRUTH
    assert table["student_category_id"].to_pylist() == STUDENT
    assert table["production_category_id"].to_pylist() == TEACHER
    assert table["fast_confidence"].to_pylist() == pytest.approx([0.9] * 60)


def test_pictures_are_written_with_bands_and_curves_where_there_is_something_to_draw(bench):
    assert {path.name for path in bench.run()[2].glob("*.png")} == {"reliability.png", "countries.png"}
    sample = bench.add("training_sample")
    labelled = {"category_id": ["lamp"] * 150 + ["sofa"] * 20 + ["gift"], "split": ["train"] * 171}
    labelled["label_source"] = ["human"] * 171
    pq.write_table(pa.table(labelled), sample / "labelled.parquet")
    curve = [{"step": 10 * n, "epoch": n, "loss": 3 / n, "validation_loss": 2 / n} for n in (1, 2, 3)]
    (bench.inputs["student_checkpoint"] / "learning_curve.json").write_text(json.dumps(curve))
    _, evaluation, output = bench.run()
    bands = {band["band"]: band for band in evaluation["models"]["student"]["size_bands"]}
    assert {name: band["offers"] for name, band in bands.items()} == {
        "0": 8,
        "1-9": 2,
        "10-99": 20,
        "100+": 30,
    }
    pictures = {path.name: path.read_bytes() for path in output.glob("*.png")}
    assert set(pictures) == {"reliability.png", "countries.png", "size_bands.png", "learning_curves.png"}
    assert all(content.startswith(PNG) for content in pictures.values())


def test_the_student_is_compared_with_production_and_the_gate_reads_the_result(bench):
    add_production(bench, TEACHER)
    metrics, _, _ = bench.run()
    difference = metrics["production_weighted_f1"] - metrics["student_weighted_f1"]
    assert metrics["student_minus_production"] == pytest.approx(-difference, abs=1e-5)
    assert metrics["student_minus_production_low"] < metrics["student_minus_production"]
    assert metrics["student_minus_production"] < metrics["student_minus_production_high"]
    assert not student_is_not_worse_than_production(metrics, GateLimits()).passed
    assert metrics["student_minus_teacher_high"] < 0
    assert not student_is_close_to_teacher(metrics, GateLimits(min_share_of_teacher=0.99)).passed
    assert student_is_close_to_teacher(metrics, GateLimits(min_share_of_teacher=0.85)).passed


def test_a_category_that_production_does_not_know_or_that_is_gone_counts_as_a_mistake(bench):
    old = ["retired" if category == "hose" else category for category in TRUTH]
    add_production(bench, old, labels=["gift", "lamp", "retired", "sofa"])
    metrics, _, _ = bench.run()
    assert metrics["production_unknown_labels"] == 8
    assert metrics["production_accuracy"] == pytest.approx(52 / 60, abs=1e-6)
    assert metrics["student_unknown_labels"] == 0


def test_answers_of_an_older_taxonomy_count_as_where_they_most_likely_belong_today(bench):
    names = {"lamp": "light", "sofa": "sofa", "hose": "outdoor", "gift": "gift"}
    add_production(bench, [names[c] for c in TEACHER], labels=["gift", "light", "outdoor", "sofa"])
    add_change(
        bench,
        transitions=[
            transition("light", ("lamp", 1.0)),
            transition("outdoor", ("hose", 0.7), ("gift", 0.3)),
            transition("sofa", ("lamp", 0.6), ("sofa", 0.4), since=OLD),  # from before production was trained
        ],
    )
    metrics, _, output = bench.run()
    assert pq.read_table(output / "predictions.parquet")["production_category_id"].to_pylist() == TEACHER
    assert metrics["production_weighted_f1"] == metrics["teacher_weighted_f1"]
    assert metrics["production_unknown_labels"] == 0


def offers_by_change(evaluation):
    return {name: row["offers"] for name, row in evaluation["models"]["student"]["changes"].items()}


def test_without_production_quality_is_told_apart_by_the_last_change(bench):
    add_change(bench, added=["hose"])
    metrics, evaluation, _ = bench.run()
    assert offers_by_change(evaluation) == {"unchanged": 52, "new": 8}
    rows = [n for n, c in enumerate(TRUTH) if c != "hose"]
    expected = f1_score(
        [TRUTH[n] for n in rows], [STUDENT[n] for n in rows], average="weighted", zero_division=0
    )
    assert metrics["student_weighted_f1_unchanged"] == pytest.approx(expected, abs=1e-6)
    assert "student_weighted_f1_weak_categories" not in metrics


def test_with_production_quality_is_told_apart_by_what_changed_since_its_taxonomy(bench):
    """Two steps lie between: gift came with the last one, hose and what became of sofa with one before."""
    add_production(
        bench,
        ["sofa" if c in ("hose", "gift") else c for c in TRUTH],
        labels=["lamp", "sofa"],
        without=["hose", "gift"],
    )
    moved = transition("sofa", ("sofa", 0.7), ("hose", 0.3))
    add_change(bench, added=["gift"], earlier=[moved])
    metrics, evaluation, _ = bench.run()
    assert offers_by_change(evaluation) == {"unchanged": 30, "new": 10, "changed": 20}
    assert metrics["production_weighted_f1_new"] == 0.0
    assert metrics["teacher_weighted_f1_unchanged"] > 0.9


def test_production_that_cannot_be_compared_has_no_say_in_what_changed(bench):
    add_production(bench, TEACHER, text_version="0", without=["lamp"])
    add_change(bench, added=["hose"])
    _, evaluation, _ = bench.run()
    assert offers_by_change(evaluation) == {"unchanged": 52, "new": 8}


def test_weakly_labelled_categories_of_a_sample_have_a_figure_of_their_own(bench, tmp_path):
    """``few`` has some labels of people and many weak ones, ``new`` weak ones only, the others none."""
    workshop = Workshop(tmp_path / "workshop", ["a", "b", "few", "new"])

    def offers(start, number, category=None):
        return [
            {"offer_id": f"o{n}", "shop_id": "s", "title": f"title {n}", "category_id": category}
            for n in range(start, start + number)
        ]

    day = "2026-01-01"
    feed = {day: [*offers(0, 40, "a"), *offers(100, 40, "b"), *offers(200, 12, "few"), *offers(300, 80)]}
    weak = [
        {
            "offer_id": f"o{n}",
            "delivered_on": day,
            "category_id": "few" if n % 2 else "new",
            "confidence": 0.8,
            "similarity": 0.5,
        }
        for n in range(300, 380)
    ]
    evaluation_set, _ = workshop.evaluation_set(feed, share=0.4)
    sample, counts = workshop.training_sample(feed, evaluation_set, weak=weak, evaluation_share=0.4)
    assert counts["categories_with_weak_labels_only"] == 1
    bench.rows = pq.read_table(evaluation_set / "offers.parquet").to_pylist()
    truth = [row["category_id"] for row in bench.rows]
    few = truth.count("few")
    assert few > 1
    bench.inputs = {
        "catalog_taxonomy": workshop.taxonomy,
        "evaluation_set": evaluation_set,
        "training_sample": sample,
    }
    place = tmp_path / "models"
    place.mkdir()
    bench.folder = place
    labels = ["a", "b", "few", "new"]
    bench.model("teacher_checkpoint", truth, labels)
    for name in ("student_checkpoint", "fast_checkpoint"):
        bench.model(name, ["a" if c == "few" else c for c in truth], labels)
    metrics, evaluation, _ = bench.run()
    assert evaluation["models"]["student"]["weak_categories"]["offers"] == few
    assert metrics["student_weighted_f1_weak_categories"] == 0.0
    assert metrics["teacher_weighted_f1_weak_categories"] == 1.0
    assert metrics["weak_categories_not_measured"] == 1


def test_the_student_is_compared_with_production_segment_by_segment(bench):
    add_production(bench, ["lamp" if c == "sofa" else c for c in TEACHER], without=["sofa"])
    add_change(bench, added=["sofa"])
    metrics, evaluation, output = bench.run(min_segment_offers=10)
    found = {(c["group"], c["segment"]): c for c in metrics["comparisons"]}
    assert {place: c["offers"] for place, c in found.items()} == {
        ("overall", "all offers"): 60,
        ("country", "AT"): 20,
        ("country", "DE"): 20,
        ("country", "unknown"): 20,
        ("top_level", "Home"): 50,  # Garden has 8 offers, Gift 2
        ("change", "new"): 20,
        ("change", "unchanged"): 40,
    }
    assert found["overall", "all offers"]["difference"] == metrics["student_minus_production"]
    assert found["change", "new"]["difference"] == pytest.approx(
        metrics["student_weighted_f1_new"] - metrics["production_weighted_f1_new"], abs=1e-5
    )
    assert len(evaluation["comparisons"]) == 7
    assert metrics["segments_too_small"] == 2
    assert (output / "comparisons.png").read_bytes().startswith(PNG)
    assert no_segment_is_worse_than_production(metrics, GateLimits()).passed


def test_a_segment_that_holds_all_offers_and_one_that_is_small_are_not_compared_on_their_own(bench):
    add_production(bench, TEACHER)
    add_change(bench)
    metrics, _, _ = bench.run()
    assert [(c["group"], c["segment"]) for c in metrics["comparisons"]] == [
        ("overall", "all offers"),
        ("top_level", "Home"),
    ]
    overall = metrics["comparisons"][0]
    assert overall["low"] == metrics["student_minus_production_low"]
    assert metrics["segments_too_small"] == 5  # three countries, two top levels


def test_a_segment_of_many_offers_but_few_products_is_too_small(bench):
    """Sofas: 20 offers, but only one product."""
    path = bench.inputs["evaluation_set"] / "offers.parquet"
    table = pq.read_table(path)
    products = ["sofa" if row["category_id"] == "sofa" else row["offer_id"] for row in bench.rows]
    place = table.schema.get_field_index("product_id")
    pq.write_table(table.set_column(place, "product_id", pa.array(products)), path)
    add_production(bench, TEACHER, without=["sofa"])
    add_change(bench)
    metrics, _, _ = bench.run(min_segment_offers=10)
    compared = {(c["group"], c["segment"]) for c in metrics["comparisons"]}
    assert ("change", "unchanged") in compared
    assert ("change", "new") not in compared
    assert metrics["segments_too_small"] == 3  # new, and two top levels


def test_without_production_there_is_nothing_to_compare(bench):
    metrics, evaluation, output = bench.run()
    assert "comparisons" not in metrics
    assert evaluation["comparisons"] == []
    assert not (output / "comparisons.png").exists()


def test_roots_of_one_name_are_told_apart_by_their_ids():
    taxonomy = Taxonomy(
        [Category("1", None, "Home"), Category("2", None, "Home"), Category("3", "2", "Sofa")]
    )
    found = ml.evaluation.stage._top_levels(np.array(["1", "3", "gone"]), taxonomy)
    assert found.tolist() == ["Home (1)", "Home (2)", "gone"]


def test_the_picture_of_many_segments_shows_the_worst():
    rows = [
        Comparison(group="country", segment=f"S{n}", offers=50, difference=n / 100, low=-0.1, high=n / 50)
        for n in range(60)
    ]
    assert comparisons(rows).startswith(PNG)


def test_production_that_reads_another_text_is_left_out_and_said_so(bench):
    add_production(bench, TEACHER, text_version="0")
    metrics, evaluation, _ = bench.run()
    assert "student_minus_production" not in metrics
    assert "production_model" not in Scripted.loaded
    assert metrics["production_not_comparable"].startswith("it reads offer text version 0")
    assert evaluation["production_not_comparable"] == metrics["production_not_comparable"]
    assert not student_is_not_worse_than_production(metrics, GateLimits()).passed


def test_a_killed_run_asks_only_the_models_that_had_not_answered(bench, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(ml.evaluation.stage, "FastModel", SimpleNamespace(load=killed))
        with pytest.raises(KeyboardInterrupt):
            bench.run()
    assert Scripted.loaded == ["student_checkpoint", "teacher_checkpoint"]
    metrics, _, _ = bench.run()
    assert Scripted.loaded == ["student_checkpoint", "teacher_checkpoint", "fast_checkpoint"]
    assert metrics["student_weighted_f1"] > 0


def test_the_same_inputs_give_the_same_figures(bench):
    add_production(bench, TEACHER)
    first, second = bench.run()[0], bench.run()[0]
    assert first == second


def test_an_empty_evaluation_set_is_an_input_error(tmp_path):
    bench = Bench(tmp_path)
    bench.evaluation_set([])
    with pytest.raises(InputError, match=r"offers\.parquet holds no offers"):
        bench.run()


def test_a_stored_classifier_is_loaded_and_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(ml.evaluation.stage, "FastModel", Scripted)
    bench = Bench(tmp_path)
    bench.evaluation_set(TRUTH)
    bench.model("fast_checkpoint", FAST)
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "text", *map(str, range(60))]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t", max_tokens=8)
    model = Classifier(BertModel(config), torch.nn.Linear(8, 4), tokenizer, LABELS, settings)
    model.save(bench.add("student_checkpoint"))
    Teacher(model, None, EnsembleWeights(encoder=1.0)).save(bench.add("teacher_checkpoint"))
    metrics, _, output = bench.run(batch_size=7)
    probabilities = Classifier.load(bench.inputs["student_checkpoint"]).predict_probabilities(
        [row["text"] for row in bench.rows]
    )
    expected = [LABELS[index] for index in probabilities.argmax(axis=1)]
    assert pq.read_table(output / "predictions.parquet")["student_category_id"].to_pylist() == expected
    assert metrics["student_minus_teacher"] == 0.0
    assert metrics["student_share_of_teacher"] == 1.0

"""The explained mistakes of a real, small student."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import read_manifest, write_manifest
from ml.errors import InputError
from ml.explanation.mistakes import Mistake
from ml.learning.encoder import Classifier
from ml.offers import offer_text
from ml.runner import StageSpec, run_stage
from tests.ml.compiled_models import PRODUCTS, TITLES, seal

LABELS = [category for category in PRODUCTS for _ in range(5)]
WRONG = {3: "tent", 21: "sofa", 40: "phone"}
"""Labels of the evaluation set that nobody would give: rows → category."""


@pytest.fixture(scope="module")
def world(compiled_root, tmp_path_factory) -> dict[str, str]:
    """Folders of what the stage reads, by input."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("training_sample", "evaluation_set", "student_evaluation"):
        (folder / name).mkdir()
    nothing = pa.nulls(len(TITLES), pa.string())
    ids = [f"o{row}" for row in range(len(TITLES))]
    texts = [offer_text({"title": title}) for title in TITLES]
    sample = {"offer_id": ids, "shop_id": ["s"] * len(ids), "category_id": LABELS, "text": texts}
    sample["split"] = ["train"] * len(ids)
    pq.write_table(pa.table(sample), folder / "training_sample" / "labelled.parquet")
    seal(folder / "training_sample", "training_sample")

    labels = [WRONG.get(row, label) for row, label in enumerate(LABELS)]
    offers = {"offer_id": ids, "title": TITLES, "brand": nothing, "shop_category": nothing}
    offers |= {"description": nothing, "category_id": labels}
    pq.write_table(pa.table(offers), folder / "evaluation_set" / "offers.parquet")
    seal(folder / "evaluation_set", "evaluation_set")

    student = Classifier.load(compiled_root / "student")
    probabilities = student.predict_probabilities(texts)
    predictions = {
        "offer_id": ids,
        "category_id": labels,
        "student_category_id": [student.labels[place] for place in probabilities.argmax(axis=1)],
        "student_confidence": probabilities.max(axis=1),
    }
    _write_evaluation(
        folder / "student_evaluation", predictions, read_manifest(compiled_root / "student").digest
    )
    inputs = ("training_sample", "evaluation_set", "student_evaluation")
    return {
        "student_checkpoint": str(compiled_root / "student"),
        **{name: str(folder / name) for name in inputs},
    }


def _write_evaluation(folder: Path, predictions: dict, student: str) -> None:
    pq.write_table(pa.table(predictions), folder / "predictions.parquet")
    write_manifest(
        folder,
        kind="student_evaluation",
        key="0" * 32,
        inputs={"student_checkpoint": student},
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={},
        seconds=0.0,
    )


def _explain(inputs: dict[str, str], output: Path, **parameters: int):
    return run_stage(
        StageSpec(
            stage="mistakes_explained",
            inputs=inputs,
            parameters=parameters,
            output=str(output),
            workspace=str(output.with_name(output.name + ".work")),
        )
    )


def test_the_surest_mistakes_come_first_with_their_labelled_twins(world, tmp_path):
    made = _explain(world, tmp_path / "out", similar=4)
    mistakes = msgspec.json.decode((tmp_path / "out" / "mistakes.json").read_bytes(), type=list[Mistake])
    predictions = pq.read_table(Path(world["student_evaluation"]) / "predictions.parquet").to_pylist()
    wrong = [row for row in predictions if row["category_id"] != row["student_category_id"]]
    wrong.sort(key=lambda row: -row["student_confidence"])
    assert [m.explanation.offer_id for m in mistakes] == [row["offer_id"] for row in wrong][:12]
    assert set(WRONG) <= {int(row["offer_id"][1:]) for row in wrong}
    assert made.metrics["mistakes"] == len(wrong)
    for mistake in mistakes:
        row = next(row for row in wrong if row["offer_id"] == mistake.explanation.offer_id)
        assert mistake.labelled == row["category_id"]
        assert mistake.explanation.category_id == row["student_category_id"]
        assert mistake.explanation.similar[0].offer_id == row["offer_id"]
    agreeing = sum(mistake.explanation.agreeing for mistake in mistakes)
    assert made.metrics["similar_as_predicted"] == pytest.approx(agreeing / (4 * len(mistakes)), abs=1e-6)
    assert made.metrics["similar_as_predicted"] > made.metrics["similar_as_labelled"]


def test_page_and_markdown_show_each_mistake(world, tmp_path):
    _explain(world, tmp_path / "out", mistakes=2)
    page = (tmp_path / "out" / "mistakes.html").read_text()
    assert page.count("<section>") == page.count(", labelled <b>") == 2
    markdown = (tmp_path / "out" / "mistakes.md").read_text()
    assert markdown.count("taken for **") == markdown.count("| similarity |") == 2


def test_an_evaluation_of_another_student_is_refused(world, tmp_path):
    predictions = pq.read_table(Path(world["student_evaluation"]) / "predictions.parquet").to_pydict()
    other = tmp_path / "evaluation"
    other.mkdir()
    _write_evaluation(other, predictions, "f" * 64)
    with pytest.raises(InputError, match=r"measured student ffffffffffff, .*materialize student_evaluation"):
        _explain(world | {"student_evaluation": str(other)}, tmp_path / "out")


def test_an_evaluation_on_other_offers_is_refused(world, tmp_path):
    other = tmp_path / "set"
    other.mkdir()
    offers = pq.read_table(Path(world["evaluation_set"]) / "offers.parquet").slice(1)
    pq.write_table(offers, other / "offers.parquet")
    seal(other, "evaluation_set")
    with pytest.raises(InputError, match="made on other offers than evaluation_set holds"):
        _explain(world | {"evaluation_set": str(other)}, tmp_path / "out")

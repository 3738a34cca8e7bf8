from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ml.errors import InputError
from ml.learning.calibration import softmax
from ml.learning.encoder import Classifier
from ml.learning.ensemble import Teacher
from ml.learning.labelling import LABELS_SCHEMA, TeacherLabels, check_same_offers, read_teacher_labels
from tests.ml.tiny_models import TINY_TEACHER, distillation_inputs, make, tiny_encoder, tiny_inputs

TEACHER_EPOCHS = {"epochs": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distillation_inputs(tmp_path_factory.mktemp("distillation"))


def label(inputs: dict[str, Path], output: Path, **parameters: int | str) -> tuple[Path, dict[str, object]]:
    chosen = {name: inputs[name] for name in ("teacher_checkpoint", "training_sample")}
    # In full precision, as what is expected is computed: bfloat16 has but 8 bits for a logit.
    given = {"shard_offers": 20, "precision": "float32", **parameters}
    folder, reference = make("teacher_labels", chosen, given, output)
    return folder, reference.metrics


def sample_texts(inputs: dict[str, Path], source: str) -> list[str]:
    return pq.read_table(inputs["training_sample"] / f"{source}.parquet")["text"].to_pylist()


def test_every_offer_is_labelled_once_in_the_order_of_the_sample(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder, metrics = label(inputs, tmp_path / "labels")
    assert [path.name for path in sorted(folder.glob("*.parquet"))] == [
        f"labels-{number:05d}.parquet" for number in range(6)
    ]
    assert pq.read_schema(folder / "labels-00000.parquet").equals(LABELS_SCHEMA)
    for source, count in (("labelled", 64), ("unlabelled", 24)):
        expected = pq.read_table(inputs["training_sample"] / f"{source}.parquet")["offer_id"].to_pylist()
        for model in ("teacher", "encoder"):
            assert read_teacher_labels(folder, source, model).offer_ids == expected
        assert metrics[source] == count
    teacher_labels = json.loads((inputs["teacher_checkpoint"] / "labels.json").read_text())
    assert json.loads((folder / "labels.json").read_text()) == teacher_labels


def test_top_logits_and_tail_add_up_to_the_teachers_calibrated_probabilities(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder, metrics = label(inputs, tmp_path / "labels", top_k=2)
    teacher = Teacher.load(inputs["teacher_checkpoint"])
    assert teacher.encoder.settings.temperature != 1.0
    for source in ("labelled", "unlabelled"):
        expected = teacher.predict_probabilities(sample_texts(inputs, source))
        labels = read_teacher_labels(folder, source)
        outcomes = np.concatenate([labels.top_logits, labels.tail_logsumexp[:, None]], axis=1)
        found = softmax(outcomes)
        kept = np.take_along_axis(expected, labels.top_indices, axis=1)
        np.testing.assert_allclose(found[:, :2], kept, atol=1e-4)
        np.testing.assert_allclose(found[:, 2], 1 - kept.sum(axis=1), atol=1e-4)
        np.testing.assert_allclose(labels.confidence, expected.max(axis=1), atol=1e-4)
        assert (np.diff(labels.top_logits, axis=1) <= 0).all()
        assert metrics[f"mean_confidence_{source}"] == pytest.approx(expected.max(axis=1).mean(), abs=1e-4)


def test_the_encoders_own_word_is_calibrated_and_without_the_linear_model(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder, _ = label(inputs, tmp_path / "labels", top_k=4)
    teacher = Teacher.load(inputs["teacher_checkpoint"])
    assert teacher.linear
    for source in ("labelled", "unlabelled"):
        expected = teacher.encoder.predict_probabilities(sample_texts(inputs, source))
        labels = read_teacher_labels(folder, source, "encoder")
        given = np.take_along_axis(expected, labels.top_indices, axis=1)
        np.testing.assert_allclose(labels.probabilities, given, atol=1e-4)
        whole = read_teacher_labels(folder, source)
        assert np.abs(whole.confidence - labels.confidence).max() > 1e-3


def test_keeping_all_classes_leaves_nothing_in_the_tail(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder, metrics = label(inputs, tmp_path / "labels", top_k=16)
    labels = read_teacher_labels(folder, "labelled")
    assert metrics["top_k"] == labels.top_indices.shape[1] == 4
    assert np.isneginf(labels.tail_logsumexp).all()
    assert np.isfinite(labels.confidence).all()


def test_accuracy_is_that_of_the_validation_offers(inputs: dict[str, Path], tmp_path: Path) -> None:
    _, metrics = label(inputs, tmp_path / "labels")
    manifest = json.loads((inputs["teacher_checkpoint"] / "manifest.json").read_text())
    assert metrics["validation_accuracy"] == manifest["metrics"]["validation_accuracy"]


def test_a_killed_run_goes_on_after_its_last_finished_shard(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = label(inputs, tmp_path / "expected")
    original = Classifier.predict_logits
    labelled: list[int] = []

    class Killed(BaseException):
        pass

    def predict(self: Classifier, texts: list[str], batch_size: int = 64) -> np.ndarray:
        if len(labelled) == 3:
            raise Killed
        labelled.append(len(texts))
        return original(self, texts, batch_size)

    monkeypatch.setattr(Classifier, "predict_logits", predict)
    with pytest.raises(Killed):
        label(inputs, tmp_path / "labels")
    labelled[:] = [0]  # allows two more shards, then one
    with pytest.raises(Killed):
        label(inputs, tmp_path / "labels")
    labelled.clear()
    folder, _ = label(inputs, tmp_path / "labels")
    assert labelled == [4]
    for path in expected.glob("labels*"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_labels_of_another_sample_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    labels = read_teacher_labels(inputs["teacher_labels"], "labelled")
    with pytest.raises(
        InputError, match=r"teacher_labels \(64 offers\) were not made of the training_sample"
    ):
        check_same_offers(labels, ["other"], tmp_path)


def test_of_no_offers_there_is_no_confidence() -> None:
    nothing = TeacherLabels(
        [], np.empty((0, 0), np.int64), np.empty((0, 0), np.float32), np.empty(0, np.float32)
    )
    assert nothing.confidence.shape == (0,)
    one = TeacherLabels(
        ["a"], np.array([[1, 0]]), np.zeros((1, 2), np.float32), np.array([-np.inf], np.float32)
    )
    assert one.confidence.tolist() == [0.5]


def test_a_sample_without_unlabelled_offers_is_labelled_too(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path, unlabelled=0)
    parameters = TINY_TEACHER | TEACHER_EPOCHS | {"encoder": str(tiny_encoder(tmp_path / "encoder"))}
    teacher, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "teacher")
    folder, metrics = label(inputs | {"teacher_checkpoint": teacher}, tmp_path / "labels")
    assert read_teacher_labels(folder, "unlabelled").offer_ids == []
    assert metrics["unlabelled"] == 0

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from ml.artifacts import verify
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.learning.labelling import LABELS_SCHEMA, TeacherLabels
from ml.learning.student import DistillationLoss, DistillationSet
from ml.learning.training_data import LabelledTexts
from ml.stages import StudentParameters
from tests.ml.tiny_models import distillation_inputs, make, seal, tiny_encoder, tiny_inputs

TINY_STUDENT: dict[str, Any] = {
    "layers": 2,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "head_learning_rate": 1e-2,
    "max_tokens": 12,
}


def loss_of(data: DistillationSet, **changes: float) -> DistillationLoss:
    return DistillationLoss(data, StudentParameters(**changes), CPU)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return distillation_inputs(tmp_path_factory.mktemp("distillation"))


def test_the_student_says_what_the_teacher_says_with_fewer_layers(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder, reference = make("student_checkpoint", inputs, TINY_STUDENT, tmp_path / "student")
    metrics = reference.metrics
    assert metrics["validation_agreement_with_teacher"] >= 0.9
    assert metrics["validation_accuracy"] >= 0.9
    assert (metrics["labelled_rows"], metrics["unlabelled_rows"], metrics["rows"]) == (48, 24, 72)
    student, teacher = Classifier.load(folder), Classifier.load(inputs["teacher_checkpoint"])
    assert student.encoder.config.num_hidden_layers == 2
    assert student.labels == teacher.labels
    assert student.settings.max_tokens == 12
    assert student.parameter_count == metrics["parameters"] < teacher.parameter_count
    texts = pq.read_table(inputs["training_sample"] / "unlabelled.parquet")["text"].to_pylist()
    agreement = (
        student.predict_logits(texts).argmax(axis=1) == teacher.predict_logits(texts).argmax(axis=1)
    ).mean()
    assert agreement >= 0.9
    curve = json.loads((folder / "learning_curve.json").read_text())
    assert [point for point in curve if "validation_agreement_with_teacher" in point][-1]["epoch"] == 4
    verify(folder)


def test_a_student_of_another_encoder_starts_from_centroids(inputs: dict[str, Path], tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", kind="xlm-r", layers=3)
    parameters = TINY_STUDENT | {"encoder": str(encoder), "learning_rate": 1e-9, "head_learning_rate": 1e-9}
    folder, reference = make("student_checkpoint", inputs, parameters, tmp_path / "student")
    assert Classifier.load(folder).encoder.config.model_type == "xlm-roberta"
    assert reference.metrics["validation_accuracy"] > 0.6  # chance is 0.25, and nothing was learned since


def test_without_unlabelled_offers_the_student_learns_from_labelled_ones(tmp_path: Path) -> None:
    inputs = distillation_inputs(tmp_path / "full")
    small = tiny_inputs(tmp_path / "small", unlabelled=0)
    labels, _ = make(
        "teacher_labels",
        {"teacher_checkpoint": inputs["teacher_checkpoint"], "training_sample": small["training_sample"]},
        {},
        tmp_path / "labels",
    )
    chosen = inputs | small | {"teacher_labels": labels}
    _, reference = make("student_checkpoint", chosen, TINY_STUDENT, tmp_path / "student")
    assert reference.metrics["unlabelled_rows"] == 0
    assert reference.metrics["validation_accuracy"] >= 0.9


def test_it_learns_the_word_that_it_is_told_to_learn(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Here the encoder alone would say one category for every offer."""
    labels = tmp_path / "labels"
    shutil.copytree(inputs["teacher_labels"], labels)
    for path in labels.glob("labels-*.parquet"):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            if row["model"] == "encoder":
                row |= {"top_indices": [0, 1], "top_logits": [9.0, 0.0], "tail_logsumexp": 0.0}
        pq.write_table(pa.Table.from_pylist(rows, LABELS_SCHEMA), path)
    seal(labels, "teacher_labels")
    texts = pq.read_table(inputs["training_sample"] / "unlabelled.parquet")["text"].to_pylist()
    said = {}
    for model in ("encoder", "teacher"):
        parameters = TINY_STUDENT | {"label_weight": 0.0, "distilled_from": model}
        folder, _ = make(
            "student_checkpoint", inputs | {"teacher_labels": labels}, parameters, tmp_path / model
        )
        said[model] = set(Classifier.load(folder).predict_logits(texts).argmax(axis=1).tolist())
    assert said["encoder"] == {0}
    assert len(said["teacher"]) > 1


def test_labels_of_another_sample_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    shutil.copytree(inputs["training_sample"], sample)
    table = pq.read_table(sample / "unlabelled.parquet").slice(1)
    pq.write_table(table, sample / "unlabelled.parquet")
    seal(sample, "training_sample")
    with pytest.raises(InputError, match="were not made of the training_sample"):
        make("student_checkpoint", inputs | {"training_sample": sample}, TINY_STUDENT, tmp_path / "student")


def test_more_layers_than_the_teacher_has_are_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layers 7: the encoder has only 4"):
        make("student_checkpoint", inputs, TINY_STUDENT | {"layers": 7}, tmp_path / "student")


def distillation_set(
    logits: torch.Tensor, top_k: int, targets: list[int], weights: tuple[float, float] = (1.0, 1.0)
) -> DistillationSet:
    top = torch.topk(logits, top_k, dim=1)
    rest = logits.scatter(1, top.indices, -torch.inf)
    teacher = TeacherLabels(
        offer_ids=[],
        top_indices=top.indices.numpy(),
        top_logits=top.values.numpy(),
        tail_logsumexp=torch.logsumexp(rest, dim=1).numpy(),
    )
    return DistillationSet(
        [],
        np.array(targets),
        np.array(weights),
        teacher,
        np.empty(0, np.int64),
        LabelledTexts([], [], np.empty(0)),
    )


ROWS = np.array([0, 1])
CPU = torch.device("cpu")


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_over_top_outcomes_and_the_rest_as_one() -> None:
    teacher, student = random_logits(0), random_logits(1)
    loss = loss_of(distillation_set(teacher, 2, [-1, -1]), temperature=1.0, label_weight=0.3)
    expected = []
    for p, q in zip(teacher.softmax(dim=1), student.softmax(dim=1), strict=True):
        top = p.topk(2).indices
        p_outcomes = torch.cat([p[top], 1 - p[top].sum(keepdim=True, dim=0)])
        q_outcomes = torch.cat([q[top], 1 - q[top].sum(keepdim=True, dim=0)])
        expected.append((p_outcomes * (p_outcomes / q_outcomes).log()).sum())
    torch.testing.assert_close(loss(student, ROWS), torch.stack(expected).mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [2, 6])
def test_the_divergence_is_zero_for_a_student_equal_to_the_teacher(top_k: int, temperature: float) -> None:
    teacher = random_logits(0)
    loss = loss_of(distillation_set(teacher, top_k, [-1, -1]), temperature=temperature, label_weight=0.3)
    student = (teacher + 5.0).requires_grad_()
    value = loss(student, ROWS)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-5)
    assert float(student.grad.abs().max()) == pytest.approx(0.0, abs=1e-5)


def test_keeping_all_classes_is_the_plain_tempered_divergence() -> None:
    teacher, student = random_logits(0), random_logits(1)
    loss = loss_of(distillation_set(teacher, 6, [-1, -1]), temperature=2.0, label_weight=0.3)
    p, q = (teacher / 2).softmax(dim=1), (student / 2).softmax(dim=1)
    torch.testing.assert_close(loss(student, ROWS), 4 * (p * (p / q).log()).sum(dim=1).mean())


def test_labels_weigh_in_on_labelled_offers_only() -> None:
    teacher, student = random_logits(0), random_logits(1)
    without = loss_of(distillation_set(teacher, 2, [-1, -1]), label_weight=0.4)(student, ROWS)
    with_one = loss_of(distillation_set(teacher, 2, [-1, 3]), label_weight=0.4)(student, ROWS)
    cross_entropy = -student.log_softmax(dim=1)[1, 3]
    torch.testing.assert_close(with_one - without, 0.4 * cross_entropy / 2)
    guess = distillation_set(teacher, 2, [-1, 3], weights=(1.0, 0.5))
    with_guess = loss_of(guess, temperature=1.0, label_weight=0.4)(student, ROWS)
    torch.testing.assert_close(with_guess - without, 0.4 * 0.5 * cross_entropy / 2)


def test_labels_of_people_weigh_one_and_then_nothing_differs_to_the_last_bit() -> None:
    teacher, student = random_logits(0), random_logits(1).requires_grad_()
    found = loss_of(distillation_set(teacher, 2, [2, 3]), label_weight=0.4)(student, ROWS)
    divergence = loss_of(distillation_set(teacher, 2, [2, 3]), label_weight=0.0)(student, ROWS)
    plain = functional.cross_entropy(student, torch.tensor([2, 3]), ignore_index=-1, reduction="sum") / 2
    expected = divergence + 0.4 * plain
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(loss, student)[0] for loss in (found, expected)))


def test_the_student_learns_less_from_guesses(inputs: dict[str, Path], tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    shutil.copytree(inputs["training_sample"], sample)
    table = pq.read_table(sample / "labelled.parquet")
    table = table.append_column("label_source", pa.array(["weak"] * len(table)))
    table = table.append_column("label_confidence", pa.array([0.5] * len(table)))
    pq.write_table(table, sample / "labelled.parquet")
    seal(sample, "training_sample")
    alone = TINY_STUDENT | {"epochs": 1, "distillation_weight": 0.0}
    losses = [
        make("student_checkpoint", inputs | chosen, alone, tmp_path / name)[1].metrics["training_loss"]
        for name, chosen in (("people", {}), ("weak", {"training_sample": sample}))
    ]
    assert losses[1] == pytest.approx(losses[0] / 2, rel=0.2)


def test_without_distillation_the_student_learns_from_labels_alone(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    parameters = TINY_STUDENT | {"distillation_weight": 0.0, "label_weight": 1.0}
    _, reference = make("student_checkpoint", inputs, parameters, tmp_path / "alone")
    assert (reference.metrics["labelled_rows"], reference.metrics["unlabelled_rows"]) == (48, 0)
    assert reference.metrics["validation_accuracy"] >= 0.9


def test_without_distillation_the_loss_is_that_of_the_labels() -> None:
    student = torch.randn(2, 6, generator=torch.Generator().manual_seed(3))
    teacher = torch.randn(2, 6, generator=torch.Generator().manual_seed(4))
    loss = loss_of(distillation_set(teacher, 2, [1, 3]), distillation_weight=0.0, label_weight=1.0)
    expected = functional.cross_entropy(student, torch.tensor([1, 3]))
    assert loss(student, ROWS).item() == pytest.approx(expected.item())

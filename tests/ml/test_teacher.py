from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from ml.artifacts import read_manifest, short_version, verify
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.learning.ensemble import Teacher
from ml.learning.hierarchical_loss import HierarchicalLoss, ancestor_groups
from ml.learning.training_data import read_labelled
from ml.taxonomy import Category, Taxonomy
from tests.ml.tiny_models import (
    TINY_TEACHER,
    make,
    offer_rows,
    seal,
    stage_spec,
    tiny_encoder,
    tiny_inputs,
    tiny_taxonomy,
    write_labelled,
)

REPOSITORY = Path(__file__).parents[2]
LABELS = ["atlases", "kettles", "novels", "toasters"]


def test_the_teacher_learns_and_writes_a_whole_classifier_folder(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder")), "instruction": "best "}
    folder, reference = make("teacher_checkpoint", inputs, parameters, tmp_path / "teacher")
    metrics = reference.metrics
    assert metrics["validation_accuracy"] >= 0.9
    assert metrics["rows"] == 48
    assert metrics["categories"] == 4
    assert metrics["linear_weight"] > 0
    assert metrics["validation_rows"] == 16
    assert metrics["size_bytes"] == sum(entry.bytes for entry in verify(folder).files.values())

    teacher = Classifier.load(folder)
    assert teacher.labels == LABELS
    assert teacher.parameter_count == metrics["parameters"]
    assert teacher.settings.instruction == "best "
    assert teacher.taxonomy_version == short_version(read_manifest(inputs["catalog_taxonomy"]).digest)
    held_out = offer_rows(16, 2, "v")
    held_out_texts = [row["text"] for row in held_out]
    truth = [LABELS.index(row["category_id"]) for row in held_out]
    alone = teacher.predict_probabilities(held_out_texts).argmax(axis=1)
    assert np.mean(alone == truth) == metrics["encoder_validation_accuracy"]
    together = Teacher.load(folder)
    assert together.labels == LABELS
    chosen = together.predict_probabilities(held_out_texts).argmax(axis=1)
    assert np.mean(chosen == truth) == metrics["validation_accuracy"]
    assert Taxonomy.load(folder).ids == tiny_taxonomy().ids

    curve = json.loads((folder / "learning_curve.json").read_text())
    assert curve[-1]["step"] == metrics["steps"] == 21
    assert curve[-1]["validation_accuracy"] >= 0.8


def test_kill_9_in_the_middle_of_training_costs_nothing_but_time(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path, train=800)
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder")), "epochs": 2}

    def start(name: str, checkpoint_seconds: float) -> subprocess.Popen[str]:
        spec_path = tmp_path / f"{name}.json"
        spec = stage_spec(
            "teacher_checkpoint",
            inputs,
            parameters | {"checkpoint_seconds": checkpoint_seconds},
            tmp_path / name,
        )
        spec_path.write_bytes(msgspec.json.encode(spec))
        return subprocess.Popen(
            [sys.executable, "-m", "ml", "teacher_checkpoint", "--spec", str(spec_path)],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )

    process = start("killed", checkpoint_seconds=1e-9)
    checkpoints = tmp_path / "killed.work" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*[0-9]")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, output = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (tmp_path / "killed").exists()
    assert list(checkpoints.glob("step-*[0-9]"))

    runs = [start(name, checkpoint_seconds=1000) for name in ("killed", "whole")]
    outputs = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert "resumed from the checkpoint at step" in outputs[0]
    assert "resumed" not in outputs[1]
    assert verify(tmp_path / "killed").digest == verify(tmp_path / "whole").digest
    assert not (tmp_path / "killed.work").exists()


def test_checkpoints_of_other_parameters_are_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tiny_inputs(tmp_path)
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder")), "epochs": 1}
    expected, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "expected")

    def fail(self: Classifier, folder: Path) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            make("teacher_checkpoint", inputs, parameters | {"seed": 6}, tmp_path / "output")
    assert list((tmp_path / "output.work" / "checkpoints").iterdir())
    folder, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "output")
    assert read_manifest(folder).digest == read_manifest(expected).digest


def test_a_validation_category_without_training_offers_counts_as_an_error(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    rows = [row | {"split": "train"} for row in offer_rows(24, 1, "t") if row["category_id"] != "novels"]
    rows += [row | {"split": "validation"} for row in offer_rows(16, 2, "v")]
    write_labelled(inputs["training_sample"], rows)
    seal(inputs["training_sample"], "training_sample")
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder"))}
    folder, reference = make("teacher_checkpoint", inputs, parameters, tmp_path / "teacher")
    assert Classifier.load(folder).labels == ["atlases", "kettles", "toasters"]
    assert reference.metrics["validation_accuracy"] <= 0.75


def test_a_missing_encoder_leaves_no_artifact(tmp_path: Path) -> None:
    parameters = TINY_TEACHER | {"encoder": str(tmp_path / "nothing")}
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        make("teacher_checkpoint", tiny_inputs(tmp_path), parameters, tmp_path / "teacher")
    assert not (tmp_path / "teacher").exists()


def test_ancestors_probability_is_the_sum_over_the_labels_below() -> None:
    loss = HierarchicalLoss(tiny_taxonomy(), LABELS, 0.5, torch.device("cpu"))
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 3])
    p = torch.softmax(logits, dim=1)
    books, home = p[:, 0] + p[:, 2], p[:, 1] + p[:, 3]
    leaf = -torch.stack([p[0, 0], p[1, 1], p[2, 3]]).log().mean()
    root = -torch.stack([books[0], home[1], home[2]]).log().mean()
    torch.testing.assert_close(loss(logits, targets, torch.ones(3)), leaf + 0.5 * root)


def plain_loss(labels: list[str], logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss in which every row counts alike."""
    log_probabilities = functional.log_softmax(logits, dim=1)
    loss = functional.nll_loss(log_probabilities, targets)
    for grouping in ancestor_groups(tiny_taxonomy(), labels):
        group = torch.from_numpy(grouping)
        kept = log_probabilities.masked_fill(group[None, :] != group[targets, None], -torch.inf)
        loss = loss - 0.3 * torch.logsumexp(kept, dim=1).sum() / len(targets)
    return loss


def test_rows_of_people_weigh_one_and_then_nothing_differs_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(37, 4, generator=generator, requires_grad=True)
    targets = torch.randint(4, (37,), generator=generator)
    hierarchy = HierarchicalLoss(tiny_taxonomy(), LABELS, 0.3, torch.device("cpu"))
    found = hierarchy(logits, targets, torch.ones(37))
    expected = plain_loss(LABELS, logits, targets)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert torch.equal(*gradients)


def test_a_row_counts_by_its_weight() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 3])
    hierarchy = HierarchicalLoss(tiny_taxonomy(), LABELS, 0.3, torch.device("cpu"))
    single = [plain_loss(LABELS, logits[row : row + 1], targets[row : row + 1]) for row in range(3)]
    expected = (single[0] + 0.5 * single[1] + 0.25 * single[2]) / 3
    torch.testing.assert_close(hierarchy(logits, targets, torch.tensor([1.0, 0.5, 0.25])), expected)


def with_guesses(sample: Path, source: str, confidence: float) -> None:
    """Say of the first half of the training offers where their labels are from."""
    path = sample / "labelled.parquet"
    table = pq.read_table(path)
    sources = [source if number < 24 else "human" for number in range(len(table))]
    confidences = [confidence if number < 24 else 1.0 for number in range(len(table))]
    table = table.append_column("label_source", pa.array(sources))
    pq.write_table(table.append_column("label_confidence", pa.array(confidences)), path)
    seal(sample, "training_sample")


@pytest.mark.parametrize(("source", "counts"), [("weak", 0.6), ("by_evidence", 0.6), ("migrated", 1.0)])
def test_only_a_guess_counts_by_its_confidence(tmp_path: Path, source: str, counts: float) -> None:
    sample = tiny_inputs(tmp_path)["training_sample"]
    assert read_labelled(sample, "train").weights.tolist() == [1.0] * 48
    with_guesses(sample, source, 0.6)
    assert read_labelled(sample, "train").weights.tolist() == [counts] * 24 + [1.0] * 24


def test_the_teacher_learns_less_from_guesses_and_the_same_without_them(tmp_path: Path) -> None:
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder")), "epochs": 1}
    digests = []
    for name, source in (("plain", None), ("people", "migrated"), ("weak", "weak")):
        inputs = tiny_inputs(tmp_path / name)
        if source:
            with_guesses(inputs["training_sample"], source, 0.5)
        folder, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / name / "teacher")
        digests.append(read_manifest(folder).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_label_above_the_leaves_counts_for_its_own_subtree_and_has_no_loss_below_it() -> None:
    labels = ["home", "kettles", "novels"]
    groups = ancestor_groups(tiny_taxonomy(), labels)
    assert [group.tolist() for group in groups] == [[0, 0, 1]]
    loss = HierarchicalLoss(tiny_taxonomy(), labels, 1.0, torch.device("cpu"))
    logits = torch.tensor([[0.3, -0.2, 1.0]])
    p = torch.softmax(logits, dim=1)[0]
    torch.testing.assert_close(loss(logits, torch.tensor([0]), torch.ones(1)), -p[0].log())
    torch.testing.assert_close(
        loss(logits, torch.tensor([1]), torch.ones(1)), -p[1].log() - (p[0] + p[1]).log()
    )


def test_labels_of_different_depth_have_a_finite_loss_and_gradient() -> None:
    taxonomy = Taxonomy([Category("a", None, "a"), Category("b", "a", "b"), Category("c", "b", "c")])
    loss = HierarchicalLoss(taxonomy, ["a", "b", "c"], 0.3, torch.device("cpu"))
    logits = torch.tensor([[100.0, 0.0, -100.0]] * 3, requires_grad=True)
    value = loss(logits, torch.tensor([0, 1, 2]), torch.ones(3))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_without_an_ensemble_the_encoder_is_the_teacher(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    parameters = TINY_TEACHER | {
        "encoder": str(tiny_encoder(tmp_path / "encoder")),
        "ensemble": False,
        "category_names": False,
        "logit_adjustment": 0.0,
    }
    folder, reference = make("teacher_checkpoint", inputs, parameters, tmp_path / "alone")
    metrics = reference.metrics
    assert not (folder / "linear").exists()
    assert metrics["linear_weight"] == 0
    assert metrics["validation_accuracy"] == metrics["encoder_validation_accuracy"]
    texts = [row["text"] for row in offer_rows(8, 4, "x")]
    probabilities = Classifier.load(folder).predict_probabilities(texts)
    np.testing.assert_allclose(Teacher.load(folder).predict_probabilities(texts), probabilities, atol=2e-3)


def test_adapters_are_part_of_the_weights_in_the_end(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path)
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder")), "ensemble": False}
    whole, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "whole")
    folder, reference = make("teacher_checkpoint", inputs, parameters | {"lora_rank": 4}, tmp_path / "lora")
    names = set(Classifier.load(folder).state_dict())
    assert names == set(Classifier.load(whole).state_dict())
    assert reference.metrics["validation_accuracy"] > 0.4
    again, _ = make("teacher_checkpoint", inputs, parameters | {"lora_rank": 4}, tmp_path / "again")
    assert verify(again).digest == verify(folder).digest


def test_confident_guesses_are_learned_from(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path, unlabelled=200)
    parameters = TINY_TEACHER | {
        "encoder": str(tiny_encoder(tmp_path / "encoder")),
        "ensemble": False,
        "pretraining_epochs": 1,
        "pseudo_label_epochs": 1,
        "pseudo_label_confidence": 0.5,
        "precision": "bfloat16",
    }
    folder, reference = make("teacher_checkpoint", inputs, parameters, tmp_path / "teacher")
    assert 50 < reference.metrics["pseudo_labelled_rows"] <= 200
    assert reference.metrics["rows"] == 48
    assert reference.metrics["validation_accuracy"] >= 0.8
    none, reference = make(
        "teacher_checkpoint", inputs, parameters | {"pseudo_label_epochs": 0}, tmp_path / "none"
    )
    assert reference.metrics["pseudo_labelled_rows"] == 0
    assert verify(none).digest != verify(folder).digest


def test_a_category_without_an_offer_is_found_by_its_name(tmp_path: Path) -> None:
    """No offer of an atlas is labelled; the name alone says what one is."""
    inputs = tiny_inputs(tmp_path, train=96)
    labelled = pq.read_table(inputs["training_sample"] / "labelled.parquet").to_pylist()
    write_labelled(inputs["training_sample"], [row for row in labelled if row["category_id"] != "atlases"])
    seal(inputs["training_sample"], "training_sample")
    parameters = TINY_TEACHER | {"encoder": str(tiny_encoder(tmp_path / "encoder")), "epochs": 6}
    parameters |= {"ensemble": False}
    known, _ = make("teacher_checkpoint", inputs, parameters, tmp_path / "known")
    assert "atlases" not in Teacher.load(known).labels
    folder, reference = make(
        "teacher_checkpoint", inputs, parameters | {"cold_categories": True}, tmp_path / "cold"
    )
    assert reference.metrics["cold_categories"] == 1
    teacher = Teacher.load(folder)
    assert teacher.labels == LABELS
    probabilities = teacher.predict_probabilities(["books atlases", "kettle boil red"])
    assert probabilities[0].argmax() == LABELS.index("atlases")
    assert probabilities[1].argmax() == LABELS.index("kettles")


def test_a_guess_that_falls_on_a_category_without_offers_is_not_learned_from(tmp_path: Path) -> None:
    inputs = tiny_inputs(tmp_path, train=96, unlabelled=200)
    labelled = pq.read_table(inputs["training_sample"] / "labelled.parquet").to_pylist()
    write_labelled(inputs["training_sample"], [row for row in labelled if row["category_id"] != "atlases"])
    seal(inputs["training_sample"], "training_sample")
    parameters = TINY_TEACHER | {
        "encoder": str(tiny_encoder(tmp_path / "encoder")),
        "ensemble": False,
        "epochs": 6,
        "cold_categories": True,
        "cold_loss": 1.0,
        "pseudo_label_epochs": 2,
        "pseudo_label_confidence": 0.1,
    }
    folder, reference = make("teacher_checkpoint", inputs, parameters, tmp_path / "teacher")
    assert 50 < reference.metrics["pseudo_labelled_rows"] < 200
    teacher = Teacher.load(folder)
    assert teacher.labels == LABELS
    known = [label for label in LABELS if label != "atlases"]
    texts = [row["text"] for row in labelled if row["category_id"] in known]
    truth = [row["category_id"] for row in labelled if row["category_id"] in known]
    probabilities = teacher.predict_probabilities(texts)[:, [LABELS.index(label) for label in known]]
    answers = [known[place] for place in probabilities.argmax(axis=1)]
    assert np.mean([given == right for given, right in zip(answers, truth, strict=True)]) > 0.8

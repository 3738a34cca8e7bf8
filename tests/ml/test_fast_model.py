from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import read_manifest, short_version, verify
from ml.errors import InputError
from ml.learning.calibration import softmax
from ml.serving.fast_model import TEXTS_AT_ONCE, FastModel
from tests.ml.tiny_models import WORDS_OF, distillation_inputs, make, offer_rows, seal

STAGE_INPUTS = ("training_sample", "teacher_labels", "catalog_taxonomy")
TEXTS = ["kettle spout", "novel\tchapter cheap", "ünknown wörds 123", "", "globe map " * 40]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = distillation_inputs(tmp_path_factory.mktemp("distillation"))
    return {name: made[name] for name in STAGE_INPUTS}


def make_fast(inputs: dict[str, Path], output: Path, **parameters: Any) -> tuple[Path, dict[str, Any]]:
    folder, reference = make("fast_checkpoint", inputs, {"max_features": 500, **parameters}, output)
    return folder, reference.metrics


def test_the_fast_model_learns_and_writes_a_whole_folder(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder, metrics = make_fast(inputs, tmp_path / "fast")
    assert metrics["validation_accuracy"] >= 0.9
    assert metrics["labelled_rows"] == 48
    assert metrics["features"] <= 2 * 500
    assert metrics["size_bytes"] == sum(entry.bytes for entry in verify(folder).files.values())
    model = FastModel.load(folder)
    assert model.labels == sorted(WORDS_OF)
    assert model.taxonomy_version == short_version(read_manifest(inputs["catalog_taxonomy"]).digest)
    rows = offer_rows(40, 9, "x")
    probabilities = model.predict_probabilities([row["text"] for row in rows])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    chosen = [model.labels[index] for index in probabilities.argmax(axis=1)]
    assert np.mean([a == row["category_id"] for a, row in zip(chosen, rows, strict=True)]) >= 0.9


def test_a_model_read_back_is_exactly_the_one_stored(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = make_fast(inputs, tmp_path / "fast")
    first = FastModel.load(folder)
    (tmp_path / "again").mkdir()
    first.save(tmp_path / "again")
    second = FastModel.load(tmp_path / "again")
    np.testing.assert_array_equal(first.predict_logits(TEXTS), second.predict_logits(TEXTS))
    for name in ("vocabulary.txt", "weights.safetensors", "fast_model.json", "labels.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_the_stored_model_answers_like_the_trained_one_did(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder, metrics = make_fast(inputs, tmp_path / "fast")
    model = FastModel.load(folder)
    rows = offer_rows(16, 2, "v")
    logits = model.predict_logits([row["text"] for row in rows])
    targets = [model.labels.index(row["category_id"]) for row in rows]
    loss = -np.log(softmax(logits / model.settings.temperature)[np.arange(16), targets]).mean()
    assert loss == pytest.approx(metrics["validation_loss"], abs=2e-3)  # weights are stored in half precision


def test_long_inputs_go_through_in_chunks_with_the_same_answers(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    model = FastModel.load(make_fast(inputs, tmp_path / "fast")[0])
    many = TEXTS * (TEXTS_AT_ONCE // len(TEXTS) + 1)
    assert len(many) > TEXTS_AT_ONCE
    expected = np.tile(model.predict_logits(TEXTS), (len(many) // len(TEXTS), 1))
    np.testing.assert_allclose(model.predict_logits(many), expected, atol=1e-6)
    assert model.predict_probabilities([]).shape == (0, len(model.labels))


def test_only_offers_the_teacher_is_sure_of_are_learned_from(inputs: dict[str, Path], tmp_path: Path) -> None:
    counts = [
        make_fast(inputs, tmp_path / str(number), pseudo_label_confidence=threshold)[1][
            "pseudo_labelled_rows"
        ]
        for number, threshold in enumerate((0.0, 0.9, 1.0))
    ]
    assert counts[0] == 24
    assert counts[0] >= counts[1] >= counts[2] == 0


def test_training_again_gives_the_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    digests = {read_manifest(make_fast(inputs, tmp_path / name)[0]).digest for name in ("one", "two")}
    assert len(digests) == 1


def test_a_guess_counts_by_its_confidence_and_people_s_labels_as_before(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    digests = []
    for source in (None, "migrated", "weak"):
        sample = tmp_path / f"sample {source}"
        shutil.copytree(inputs["training_sample"], sample)
        table = pq.read_table(sample / "labelled.parquet")
        if source:
            table = table.append_column("label_source", pa.array([source] * len(table)))
            table = table.append_column("label_confidence", pa.array([0.5] * len(table)))
        pq.write_table(table, sample / "labelled.parquet")
        seal(sample, "training_sample")
        folder, _ = make_fast(inputs | {"training_sample": sample}, tmp_path / f"fast {source}")
        digests.append(read_manifest(folder).digest)
    assert digests[0] == digests[1] != digests[2]


def test_answering_needs_neither_torch_nor_scikit_learn() -> None:
    code = "import sys, ml.serving.fast_model; sys.exit(bool({'torch', 'sklearn'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )


def test_another_text_version_or_a_damaged_folder_is_refused(inputs: dict[str, Path], tmp_path: Path) -> None:
    model = FastModel.load(make_fast(inputs, tmp_path / "fast")[0])
    folder = tmp_path / "changed"
    folder.mkdir()
    model.settings = msgspec.structs.replace(model.settings, text_version="older")
    model.save(folder)
    with pytest.raises(InputError, match="offer text version older"):
        FastModel.load(folder)
    (folder / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="is damaged"):
        FastModel.load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"is not a fast model: .*weights\.safetensors"):
        FastModel.load(folder)

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.artifacts import read_manifest, short_version, verify
from ml.errors import InputError
from ml.learning.calibration import softmax
from ml.learning.fast_model import features_of, of_rank
from ml.offers import TEXT_VERSION
from ml.serving.fast_model import READINGS, TEXTS_AT_ONCE, FastModel, FastModelSettings, Reading
from ml.serving.ngrams import Vocabulary, ngrams_of
from tests.ml.tiny_models import WORDS_OF, distillation_inputs, make, offer_rows, seal

LABELS = ["kettles", "toasters", "novels"]
WORDS = ["tea", "pot", "kettle", "茶", "spout", "größe", "500ml", "x"]
OFFER_TEXTS = st.lists(
    st.lists(st.sampled_from([*WORDS, "unseen", "teapot", "壺", "|", "pot-pot"]), max_size=12).map(" ".join),
    max_size=6,
)
STAGE_INPUTS = ("training_sample", "teacher_labels", "catalog_taxonomy")
TEXTS = ["kettle spout", "novel\tchapter cheap", "ünknown wörds 123", "", "globe map " * 40]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = distillation_inputs(tmp_path_factory.mktemp("distillation"))
    return {name: made[name] for name in STAGE_INPUTS}


def small_reading(seed: int, width: int = len(LABELS)) -> tuple[Reading, np.ndarray]:
    """A reading of random weights, and what each of its features counts."""
    rng = np.random.default_rng(seed)
    pairs = [("tea", "pot"), ("pot", "tea"), ("kettle", "spout")]
    vocabulary = Vocabulary(WORDS, pairs, sorted({ngram for word in WORDS for ngram in ngrams_of(word)}))
    values = rng.uniform(0.5, 3, len(vocabulary)).astype(np.float32)
    vectors = rng.standard_normal((len(vocabulary), width)).astype(np.float16)
    return Reading(vocabulary, vectors, values**2), values


def small_model(table_bytes: int = 2**20) -> FastModel:
    readings = {name: small_reading(seed)[0] for seed, name in enumerate(READINGS)}
    settings = FastModelSettings(text_version=TEXT_VERSION, taxonomy_version="t", temperature=0.5)
    bias = np.array([0.5, -1, 0], dtype=np.float32)
    return FastModel(readings, bias, None, LABELS, settings, table_bytes)


SMALL = small_model()


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


@given(OFFER_TEXTS)
@settings(deadline=None)
def test_what_was_summed_before_is_what_the_ngrams_add_up_to(texts):
    expected = np.tile(SMALL.bias, (len(texts), 1))
    for seed, name in enumerate(READINGS):
        reading, values = small_reading(seed)
        if texts:
            weights = reading.vectors / values[:, None]
            expected += features_of(name, reading.vocabulary, values, texts) @ weights
    np.testing.assert_allclose(SMALL.predict_logits(texts), expected, atol=1e-4)


@given(OFFER_TEXTS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_text_has_the_same_bits_beside_any_others(texts, random):
    alone = {text: small_model().predict_logits([text])[0] for text in texts}
    shuffled = [*texts, *random.sample(texts, len(texts))]
    for model in (small_model(), small_model(table_bytes=1), SMALL):
        for text, logits in zip(shuffled, model.predict_logits(shuffled), strict=True):
            np.testing.assert_array_equal(logits, alone[text])


@given(OFFER_TEXTS)
@settings(deadline=None)
def test_a_projected_model_answers_alike_beside_any_others_too(texts):
    alone = [PROJECTED.predict_logits([text])[0] for text in texts]
    np.testing.assert_array_equal(
        PROJECTED.predict_logits(texts * 40)[: len(texts)], np.reshape(alone, (-1, 3))
    )
    np.testing.assert_array_equal(
        PROJECTED.predict_logits([*texts * 40, *texts])[39 * len(texts) :][: len(texts)],
        np.reshape(alone, (-1, 3)),
    )


def test_a_projection_on_as_many_directions_as_there_are_changes_nothing():
    texts = ["tea pot kettle", "spout x | größe", "500ml kettle spout", "pot"]
    projected = of_rank(SMALL, 3, texts, seed=1)
    np.testing.assert_allclose(projected.predict_logits(texts), SMALL.predict_logits(texts), atol=0.01)
    narrower = of_rank(SMALL, 2, texts, seed=1)
    assert narrower.readings["text"].vectors.shape[1] == 2
    differences = narrower.predict_logits(texts) - SMALL.predict_logits(texts)
    total = SMALL.predict_logits(texts) - SMALL.bias
    singular = np.linalg.svd(total, compute_uv=False)
    assert np.linalg.norm(differences) == pytest.approx(singular[2], abs=0.02)


PROJECTED = of_rank(SMALL, 2, ["tea pot kettle", "spout x", "pot größe"], seed=1)


@given(OFFER_TEXTS.filter(bool), st.sampled_from(LABELS))
@settings(deadline=None)
def test_what_the_words_say_adds_up_to_the_margin(texts, label):
    for model in (SMALL, PROJECTED):
        column = LABELS.index(label)
        for text, logits in zip(texts, model.predict_logits(texts), strict=True):
            contributions = model.word_contributions(text, label)
            assert len(dict(contributions)) == len(contributions)
            total = sum(part for _, part in contributions)
            assert total == pytest.approx(logits[column] - model.bias[column], abs=1e-4)


def test_the_word_that_says_most_is_the_one_of_the_category(inputs: dict[str, Path], tmp_path: Path) -> None:
    model = FastModel.load(make_fast(inputs, tmp_path / "fast")[0])
    parts = model.word_contributions("cheap Kettle red | offer", "kettles")
    assert [word for word, _ in parts] == ["cheap", "kettle", "red", "offer"]
    assert max(parts, key=lambda part: part[1])[0] == "kettle"
    with pytest.raises(InputError, match="has no category 'boats'"):
        model.word_contributions("kettle", "boats")


def test_memory_does_not_grow_with_the_words_that_were_met() -> None:
    rows = 600
    model = small_model(table_bytes=rows * 4 * len(LABELS))
    for start in range(0, 20_000, 100):
        model.predict_logits([f"word{number} | other{number}" for number in range(start, start + 100)])
        for table in model._tables.values():
            assert table._vectors.shape == (rows, len(LABELS))
            assert 0 < table._used <= rows
    many = " ".join(f"w{number}" for number in range(3 * rows))  # one text that needs more than there is
    np.testing.assert_array_equal(model.predict_logits([many]), SMALL.predict_logits([many]))
    model.predict_logits(["tea"])
    model.predict_logits(["tea pot " * 2, "unseen"])
    assert all(len(table._vectors) == rows for table in model._tables.values())


def test_probabilities_are_the_calibrated_margins() -> None:
    texts = ["tea pot", "kettle | x"]
    expected = softmax(SMALL.predict_logits(texts) / SMALL.settings.temperature)
    np.testing.assert_allclose(SMALL.predict_probabilities(texts), expected, atol=1e-6)


def test_rare_categories_gain_by_balance(inputs: dict[str, Path], tmp_path: Path) -> None:
    plain, balanced = (
        FastModel.load(make_fast(inputs, tmp_path / str(balance), class_balance=balance)[0])
        for balance in (0.0, 0.5)
    )
    texts = ["kettle", "map globe"]
    raised = balanced.predict_logits(texts) - plain.predict_logits(texts)
    np.testing.assert_allclose(raised, np.tile(raised[0], (2, 1)), atol=1e-5)
    assert (raised[0] > 0).all()


def test_the_teachers_word_counts_as_much_as_it_is_given(inputs: dict[str, Path], tmp_path: Path) -> None:
    names = ("1.0", "0.5", "0.0")
    logits = [
        FastModel.load(make_fast(inputs, tmp_path / name, label_weight=float(name))[0]).predict_logits(TEXTS)
        for name in names
    ]
    assert not np.array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[1], logits[2])


def test_a_stored_projection_is_read_back(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = make_fast(inputs, tmp_path / "fast", rank=2)
    model = FastModel.load(folder)
    assert model.directions is not None
    assert model.directions.shape == (2, len(model.labels))
    assert model.predict_logits(TEXTS).shape == (len(TEXTS), len(model.labels))


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_was_stored_answers_as_before(tmp_path: Path, order: Literal["C", "F"]) -> None:
    """However its matrices lie in memory: those of a projection lie by columns."""
    model = FastModel(
        {
            name: msgspec.structs.replace(reading, vectors=np.array(reading.vectors, order=order))
            for name, reading in PROJECTED.readings.items()
        },
        PROJECTED.bias,
        np.array(PROJECTED.directions, order=order),
        PROJECTED.labels,
        PROJECTED.settings,
    )
    texts = ["tea pot kettle", "spout x", "pot größe"]
    model.save(tmp_path)
    np.testing.assert_array_equal(
        FastModel.load(tmp_path).predict_logits(texts), PROJECTED.predict_logits(texts)
    )


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    vocabulary = (tmp_path / "vocabulary.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "vocabulary.txt").write_text("\n".join(vocabulary[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match="do not fit each other"):
        FastModel.load(tmp_path)

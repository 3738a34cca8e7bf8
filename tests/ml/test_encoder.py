from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ml.errors import InputError
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.offers import TEXT_VERSION
from tests.ml.tiny_models import WORDS_OF, offer_rows, tiny_encoder

LABELS = sorted(WORDS_OF)
SETTINGS = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t1", max_tokens=16)
TEXTS = ["kettle red", "a very new large blue best cheap paperback novel offer", "map", "toaster slot"]


@pytest.fixture(params=["bert", "xlm-r"])
def classifier(request: pytest.FixtureRequest, tmp_path: Path) -> Classifier:
    encoder = tiny_encoder(tmp_path / "encoder", kind=request.param)
    return Classifier.from_encoder(str(encoder), LABELS, SETTINGS).eval()


def test_a_classifier_read_back_answers_the_same(classifier: Classifier, tmp_path: Path) -> None:
    classifier.with_settings(temperature=1.7, instruction="offer ").save(tmp_path / "saved")
    again = Classifier.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict_logits(TEXTS), classifier.predict_logits(TEXTS))
    assert again.settings == classifier.settings
    assert again.labels == LABELS


def test_probabilities_are_the_tempered_softmax_of_the_logits(classifier: Classifier) -> None:
    classifier.with_settings(temperature=2.0)
    logits = torch.from_numpy(classifier.predict_logits(TEXTS))
    expected = torch.softmax(logits / 2.0, dim=1).numpy()
    np.testing.assert_allclose(classifier.predict_probabilities(TEXTS), expected, atol=1e-6)


def test_answers_do_not_depend_on_batch_neighbours_or_order(classifier: Classifier) -> None:
    together = classifier.predict_logits(TEXTS, batch_size=4)
    alone = np.concatenate([classifier.predict_logits([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(
        classifier.predict_logits(TEXTS[::-1], batch_size=3), together[::-1], atol=1e-5
    )


def test_no_texts_give_no_rows(classifier: Classifier) -> None:
    assert classifier.predict_logits([]).shape == (0, len(LABELS))


def test_pooling_is_the_mean_over_real_tokens(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    classifier = Classifier.from_encoder(str(encoder), LABELS, SETTINGS).eval()
    ids = torch.tensor([classifier.tokenizer.encode("kettle red").ids])
    with torch.no_grad():
        hidden = classifier.encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    mean = hidden[0].mean(dim=0)
    expected = (mean / mean.norm()).numpy()
    np.testing.assert_allclose(classifier.predict_embeddings(["kettle red"])[0], expected, atol=1e-5)


def test_texts_are_cut_to_max_tokens_and_carry_the_instruction(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder")
    classifier = Classifier.from_encoder(str(encoder), LABELS, SETTINGS)
    assert classifier.tokenize(["kettle " * 50]).lengths.tolist() == [16]
    plain = classifier.tokenize(["kettle"]).ids.tolist()
    classifier.with_settings(instruction="best offer ", max_tokens=8)
    prefix = classifier.tokenizer.encode("best offer").ids[1:-1]
    assert classifier.tokenize(["kettle"]).ids.tolist() == [plain[0], *prefix, *plain[1:]]
    assert classifier.tokenize(["kettle " * 50]).lengths.tolist() == [8]


def test_padding_fills_to_a_multiple_of_eight(tmp_path: Path) -> None:
    classifier = Classifier.from_encoder(str(tiny_encoder(tmp_path / "e", kind="xlm-r")), LABELS, SETTINGS)
    tokens = classifier.tokenize(["kettle", "kettle " * 9])
    ids, mask = tokens.padded(np.array([1, 0]), classifier.pad_id)
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(dim=1).tolist() == [11, 3]
    assert (ids[mask == 0] == 1).all()
    assert ids[1, :3].tolist() == tokens.ids[:3].tolist()


def test_an_initialised_head_knows_categories_before_any_training(classifier: Classifier) -> None:
    rows = offer_rows(40, 1, "x")
    texts = [row["text"] for row in rows]
    classifier.initialise_head(texts, [row["category_id"] for row in rows], LABELS)
    held_out = offer_rows(40, 2, "y")
    chosen = classifier.predict_logits([row["text"] for row in held_out]).argmax(axis=1)
    right = np.mean(
        [LABELS[index] == row["category_id"] for index, row in zip(chosen, held_out, strict=True)]
    )
    assert right > 0.6  # chance is 0.25


def test_a_category_without_texts_starts_from_its_name(classifier: Classifier) -> None:
    classifier.initialise_head(["kettle boil"], ["kettles"], LABELS)
    assert LABELS[classifier.predict_logits(["atlases"])[0].argmax()] == "atlases"


@pytest.mark.parametrize("kind", ["bert", "xlm-r"])
def test_kept_layers_are_spread_evenly(kind: str, tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path / "encoder", kind=kind, layers=6)
    full = Classifier.from_encoder(str(encoder), LABELS, SETTINGS)
    reduced = full.keep_layers(3)
    weights, kept = full.encoder.state_dict(), reduced.encoder.state_dict()
    name = "encoder.layer.{}.output.dense.weight"
    for new, old in enumerate((0, 2, 5)):
        assert torch.equal(kept[name.format(new)], weights[name.format(old)])
    assert name.format(3) not in kept
    reduced.save(tmp_path / "saved")
    again = Classifier.load(tmp_path / "saved")
    assert again.encoder.config.num_hidden_layers == 3
    np.testing.assert_array_equal(again.predict_logits(TEXTS), reduced.eval().predict_logits(TEXTS))
    assert full.encoder.config.num_hidden_layers == 6


def test_more_layers_than_there_are_is_refused(classifier: Classifier) -> None:
    with pytest.raises(InputError, match="layers 9: the encoder has only 4"):
        classifier.keep_layers(9)


def test_more_tokens_than_the_encoder_takes_are_refused(tmp_path: Path) -> None:
    settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t", max_tokens=40)
    Classifier.from_encoder(str(tiny_encoder(tmp_path / "bert")), LABELS, settings)
    with pytest.raises(InputError, match="takes at most 38"):
        Classifier.from_encoder(str(tiny_encoder(tmp_path / "x", kind="xlm-r")), LABELS, settings)


def test_another_text_version_is_refused(classifier: Classifier, tmp_path: Path) -> None:
    classifier.with_settings(text_version="older").save(tmp_path / "saved")
    with pytest.raises(InputError, match="offer text version older"):
        Classifier.load(tmp_path / "saved")


def test_a_damaged_classifier_folder_is_refused_naming_it(classifier: Classifier, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    classifier.save(saved)
    (saved / "labels.json").write_text(json.dumps(LABELS[:2]))
    with pytest.raises(InputError, match=r"head\.safetensors does not fit labels\.json"):
        Classifier.load(saved)
    (saved / "head.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="is damaged"):
        Classifier.load(saved)
    (saved / "head.safetensors").unlink()
    with pytest.raises(InputError, match=r"is not a classifier: .*head\.safetensors"):
        Classifier.load(saved)

"""One vector per text: behind the last layer, or before it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ml.errors import InputError
from ml.learning.encoder import Classifier, ClassifierSettings, plain_attention
from ml.learning.pooling import MEAN, QUERY, PooledLayer, in_company, layer_stack
from ml.offers import TEXT_VERSION
from ml.serving.onnx_export import export
from ml.serving.tracing import StaticClassifier
from tests.ml.tiny_models import tiny_encoder

LABELS = ["atlases", "cameras", "kettles", "tents"]
SETTINGS = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="1", max_tokens=16)
TEXTS = ["kettle red", "camera", "atlas of the world in red", "tent tent tent tent tent tent tent tent"]


def a_classifier(folder: Path, kind: str = "bert", layers: int = 2) -> Classifier:
    torch.manual_seed(5)
    encoder = tiny_encoder(folder, kind=kind, layers=layers)
    classifier = Classifier.from_encoder(str(encoder), LABELS, SETTINGS).eval()
    with torch.no_grad():  # fresh weights are so small that layers do next to nothing
        for name, weights in classifier.encoder.named_parameters():
            weights.mul_(10 if "layer" in name and weights.ndim == 2 else 1)
    return classifier


def by_hand(classifier: Classifier, text: str) -> torch.Tensor:
    """The vector of one text: the last layer on all tokens and, as one more token, their mean, which asks."""
    *first, last = layer_stack(classifier.encoder)
    ids = torch.tensor([classifier.tokenizer.encode(text).ids])
    hidden = classifier.encoder.embeddings(input_ids=ids)
    for layer in first:
        hidden = layer(hidden)
    mean = hidden.mean(dim=1, keepdim=True)
    tokens = hidden.shape[1]
    with_mean = torch.cat([hidden, mean], dim=1)
    # Nobody attends to the mean, so that it asks and does not answer.
    mask = torch.ones(1, 1, tokens + 1, tokens + 1, dtype=torch.bool)
    mask[..., -1] = False
    vector = last(with_mean, mask)[0, -1]
    return vector / vector.norm()


@pytest.mark.parametrize("kind", ["bert", "xlm-r"])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_mean_of_the_tokens_asks_the_last_layer(kind: str, layers: int, tmp_path: Path) -> None:
    classifier = a_classifier(tmp_path / "encoder", kind, layers)
    with torch.no_grad():
        expected = torch.stack([by_hand(classifier, text) for text in TEXTS])
    found = classifier.with_pooling(QUERY).predict_embeddings(TEXTS, batch_size=4)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    behind = a_classifier(tmp_path / "again", kind, layers).predict_embeddings(TEXTS)
    assert np.abs(found - behind).max() > 0.01


@pytest.mark.parametrize("kind", ["bert", "xlm-r"])
def test_padding_and_neighbours_do_not_matter(kind: str, tmp_path: Path) -> None:
    classifier = a_classifier(tmp_path / "encoder", kind).with_pooling(QUERY)
    alone = np.concatenate([classifier.predict_logits([text]) for text in TEXTS])
    np.testing.assert_allclose(classifier.predict_logits(TEXTS, batch_size=4), alone, atol=1e-5)
    with plain_attention(classifier.encoder):  # as in training and for accelerators
        np.testing.assert_allclose(classifier.predict_logits(TEXTS, batch_size=4), alone, atol=1e-5)


def test_it_is_stored_as_any_encoder_and_read_back(tmp_path: Path) -> None:
    classifier = a_classifier(tmp_path / "encoder")
    names = set(classifier.encoder.state_dict())
    classifier.with_pooling(QUERY).save(tmp_path / "saved")
    assert set(classifier.encoder.state_dict()) == names
    again = Classifier.load(tmp_path / "saved")
    assert again.settings.pooling == QUERY
    np.testing.assert_array_equal(again.predict_logits(TEXTS), classifier.predict_logits(TEXTS))
    fewer = again.keep_layers(1)
    assert isinstance(layer_stack(fewer.encoder)[-1], PooledLayer)
    assert fewer.predict_logits(TEXTS).shape == (4, 4)


def test_all_of_the_last_layer_learns(tmp_path: Path) -> None:
    classifier = a_classifier(tmp_path / "encoder").with_pooling(QUERY).train()
    ids, mask = classifier.tokenize(TEXTS).padded(np.arange(4), classifier.pad_id)
    classifier(ids, mask).square().sum().backward()
    assert {name for name, each in classifier.named_parameters() if each.grad is None} == set()


def test_compiled_forms_answer_like_the_original(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    classifier = a_classifier(tmp_path / "encoder").with_pooling(QUERY)
    session = onnxruntime.InferenceSession(
        export(classifier).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    layer = layer_stack(classifier.encoder)[-1]
    assert isinstance(layer, PooledLayer)
    assert not layer.has_company
    static = StaticClassifier(classifier).eval()
    for text in TEXTS:
        ids = np.array([classifier.tokenizer.encode(text).ids])
        expected = classifier.predict_logits([text])
        np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, atol=1e-4)
        padded = np.pad(ids, ((0, 1), (0, 16 - ids.shape[1]))).astype(np.int32)
        mask = np.pad(np.ones_like(ids), ((0, 1), (0, 16 - ids.shape[1]))).astype(np.int32)
        with torch.no_grad(), plain_attention(classifier.encoder):
            answered = static(torch.from_numpy(padded), torch.from_numpy(mask)).numpy()
        np.testing.assert_allclose(answered[:1], expected, atol=1e-4)
        assert np.isfinite(answered).all()


def test_company_changes_no_answer(tmp_path: Path) -> None:
    classifier = a_classifier(tmp_path / "encoder").with_pooling(QUERY)
    before = classifier.predict_logits(TEXTS)
    with in_company(classifier.encoder):
        np.testing.assert_allclose(classifier.predict_logits(TEXTS), before, atol=1e-6)


def test_layers_that_are_built_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    folder = tiny_encoder(tmp_path / "encoder")
    DistilBertModel(
        DistilBertConfig(vocab_size=400, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    ).save_pretrained(folder)
    classifier = Classifier.from_encoder(str(folder), LABELS, SETTINGS)
    with pytest.raises(
        InputError, match=r"pooling 'query' needs layers built like BERT's.*DistilBertModel.*'mean'"
    ):
        classifier.with_pooling(QUERY)
    assert classifier.with_pooling(MEAN).settings.pooling == MEAN


def test_a_way_that_does_not_exist_is_refused_by_file(tmp_path: Path) -> None:
    a_classifier(tmp_path / "encoder").save(tmp_path / "saved")
    path = tmp_path / "saved" / "classifier.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pooling": "first"}))
    with pytest.raises(InputError, match=r"classifier\.json: pooling 'first', expected one of mean, query"):
        Classifier.load(tmp_path / "saved")


def test_what_was_trained_to_pool_early_does_not_stop(tmp_path: Path) -> None:
    classifier = a_classifier(tmp_path / "encoder").with_pooling(QUERY)
    with pytest.raises(InputError, match="was trained with 'query'"):
        classifier.with_pooling(MEAN)


def test_a_mask_of_another_form_is_not_misread(tmp_path: Path) -> None:
    layer = layer_stack(a_classifier(tmp_path / "encoder").with_pooling(QUERY).encoder)[-1]
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        layer(torch.zeros(2, 3, 32), torch.ones(2, 3))


def test_an_encoder_whose_layers_are_one_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    folder = tiny_encoder(tmp_path / "encoder")
    config = AlbertConfig(
        vocab_size=400, embedding_size=16, hidden_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    AlbertModel(config).save_pretrained(folder)
    classifier = Classifier.from_encoder(str(folder), LABELS, SETTINGS)
    with pytest.raises(InputError, match="AlbertModel has no list of 3 layers"):
        classifier.keep_layers(2)

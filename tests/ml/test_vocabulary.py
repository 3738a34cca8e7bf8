from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel

from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.vocabulary import trim_vocabulary
from ml.offers import TEXT_VERSION
from tests.ml.tiny_tokenizers import unigram, word_piece

TEXTS = ["steel kettle 1.7 l", "novel of the sea", "Kettle | Acme | Home"]
UNSEEN = "toaster atlas Ünüsual"


@pytest.fixture(params=[word_piece, unigram])
def model(request: pytest.FixtureRequest) -> Classifier:
    torch.manual_seed(0)
    tokenizer: Tokenizer = request.param()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    pad_id = tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0
    encoder = BertModel(BertConfig(vocab_size=tokenizer.get_vocab_size(), pad_token_id=pad_id, **sizes))
    encoder.pooler = None
    settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t", max_tokens=24)
    return Classifier(encoder, torch.nn.Linear(32, 2), tokenizer, ["a", "b"], settings).eval()


def test_texts_that_were_seen_are_answered_as_before(model: Classifier) -> None:
    before = model.predict_logits(TEXTS)
    trimmed = trim_vocabulary(model, TEXTS)
    assert trimmed.parameter_count < model.parameter_count
    assert np.array_equal(trimmed.predict_logits(TEXTS), before)
    assert trimmed.encoder.config.vocab_size == trimmed.encoder.get_input_embeddings().num_embeddings
    assert trimmed.encoder.config.vocab_size == trimmed.tokenizer.get_vocab_size()


def test_words_that_were_not_seen_are_spelled(model: Classifier) -> None:
    trimmed = trim_vocabulary(model, TEXTS)
    ids = trimmed.tokenizer.encode("toaster").ids
    pieces = [trimmed.tokenizer.id_to_token(number) for number in ids]
    assert len(pieces) > len(model.tokenizer.encode("toaster").ids)
    letters = "".join(piece.strip("\u2581#") for piece in pieces if piece[:1] not in "[<")
    assert letters == "toaster"
    assert np.isfinite(trimmed.predict_logits([UNSEEN])).all()


def test_the_original_stays_as_it_was(model: Classifier) -> None:
    before, size = model.predict_logits([UNSEEN]), model.parameter_count
    trim_vocabulary(model, TEXTS)
    assert model.parameter_count == size
    assert np.array_equal(model.predict_logits([UNSEEN]), before)


def test_a_trimmed_model_is_stored_and_read(model: Classifier, tmp_path: Path) -> None:
    trimmed = trim_vocabulary(model, TEXTS)
    trimmed.save(tmp_path / "trimmed")
    assert np.array_equal(
        Classifier.load(tmp_path / "trimmed").predict_logits(TEXTS), trimmed.predict_logits(TEXTS)
    )
    again = trim_vocabulary(trimmed, TEXTS)
    assert again.tokenizer.get_vocab_size() == trimmed.tokenizer.get_vocab_size()


def test_a_vocabulary_of_byte_pairs_is_left_whole(model: Classifier) -> None:
    described = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).to_str())
    model.with_tokenizer(Tokenizer.from_str(json.dumps(described)))
    assert trim_vocabulary(model, ["ab"]).parameter_count == model.parameter_count

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from ml.learning.encoder import Classifier, ClassifierSettings
from ml.learning.pretraining import contrastive_loss, pretrain
from ml.learning.training import TrainingArguments
from ml.offers import TEXT_VERSION
from ml.progress import Progress
from ml.stages import Precision
from tests.ml.tiny_models import WORDS_OF, tiny_encoder

PLAN = TrainingArguments(
    epochs=40,
    batch_size=12,
    learning_rate=3e-3,
    head_learning_rate=3e-3,
    token_dropout=0.0,
    precision="float32",
    checkpoint_seconds=1000,
    seed=3,
)
TEXTS = [
    f"{first} {filler} | {second} {filler}"
    for words in WORDS_OF.values()
    for first, second in [(words[0], words[1]), (words[1], words[2]), (words[2], words[0])]
    for filler in ("red", "blue")
]


@pytest.fixture
def model(tmp_path: Path) -> Classifier:
    settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t", max_tokens=12)
    return Classifier.from_encoder(str(tiny_encoder(tmp_path / "encoder", layers=2)), ["a", "b"], settings)


def loss(model: Classifier) -> float:
    """Of the vectors themselves, without the projection that they are trained through."""
    titles, others = zip(*(text.split(" | ") for text in TEXTS), strict=True)
    first, second = (torch.from_numpy(model.predict_embeddings(some)) for some in (titles, others))
    return contrastive_loss(first, second).item()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_encoder_learns_to_find_the_rest_of_an_offer_by_its_title(
    model: Classifier, tmp_path: Path, precision: Precision
) -> None:
    before, head, labels = loss(model), model.head.weight.clone(), model.labels
    plan = msgspec.structs.replace(PLAN, precision=precision)
    pretrain(model, TEXTS, plan, tmp_path / "checkpoints", Progress("test"))
    assert loss(model) < before - 0.3
    assert torch.equal(model.head.weight, head)
    assert model.labels == labels


def test_a_finished_pretraining_is_not_done_again(model: Classifier, tmp_path: Path) -> None:
    pretrain(model, TEXTS, PLAN, tmp_path / "checkpoints", Progress("test"))
    settings = ClassifierSettings(text_version=TEXT_VERSION, taxonomy_version="t", max_tokens=12)
    again = Classifier.from_encoder(str(tmp_path / "encoder"), ["a", "b"], settings)
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    pretrain(again, TEXTS, PLAN, tmp_path / "checkpoints", Progress("test"))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == checkpoints
    assert np.array_equal(again.predict_embeddings(TEXTS), model.predict_embeddings(TEXTS))


def test_offers_with_nothing_but_a_title_can_be_pretrained_on(model: Classifier, tmp_path: Path) -> None:
    before = model.predict_embeddings(TEXTS)
    pretrain(model, [*WORDS_OF, *WORDS_OF], PLAN, tmp_path / "checkpoints", Progress("test"))
    assert not np.array_equal(model.predict_embeddings(TEXTS), before)


def test_the_loss_is_least_where_every_row_is_nearest_to_its_own() -> None:
    rows = torch.eye(4)
    assert contrastive_loss(rows, 3 * rows).item() < 1e-6
    assert contrastive_loss(rows, rows.roll(1, dims=0)).item() > 10
    assert contrastive_loss(rows, rows.flip(0)).item() == pytest.approx(
        contrastive_loss(rows.flip(0), rows).item()
    )

"""Further pretraining on a feed's own offers, with or without labels.

What a shop says in the title and what it says in the other fields are two views of one product. The encoder
learns to find the one by the other among a batch of offers (contrastive learning with the others as
negatives: van den Oord et al. 2018; as in sentence encoders, Gao et al. 2021: an offer with nothing but a
title is its own pair, told apart by dropout). It is trained through a projection that is thrown away
afterwards (Chen et al. 2020). So it gets used to the words of the trade before it sees a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ml.learning.encoder import Classifier
from ml.learning.training import TrainingArguments, train
from ml.offers import title_of
from ml.progress import Progress

_SCALE = 20.0
"""Cosines are multiplied by this before the softmax; the inverse of the usual temperature 0.05."""


def pretrain(
    model: Classifier, texts: Sequence[str], plan: TrainingArguments, checkpoints: Path, progress: Progress
) -> None:
    """Train the encoder of ``model`` in place, from its last checkpoint if there is one.

    Args:
        model: On the device to train on; its output layer is left alone.
        texts: Offer texts, (n,); of equal titles the first counts.
        plan: Epochs, rates and so on.
        checkpoints: Folder that survives a kill, used for nothing else.
        progress: Where to report.
    """
    titles, others = _views(texts)
    progress.say(f"pretraining on {len(titles):,} distinct offers")
    head, labels = model.head, model.labels
    model.with_head(_identity(model), labels)
    first, second = model.tokenize(titles), model.tokenize(others)

    def batch_loss(embeddings: Tensor, rows: NDArray[np.int64]) -> Tensor:
        ids, mask = second.padded(rows, model.pad_id)
        return contrastive_loss(embeddings, model(ids.to(model.device), mask.to(model.device)).float())

    train(
        model,
        first,
        batch_loss=batch_loss,
        validate=dict,
        initialise=lambda: None,
        plan=plan,
        checkpoints=checkpoints,
        progress=progress,
    )
    model.with_head(head, labels)


def contrastive_loss(first: Tensor, second: Tensor) -> Tensor:
    """Mean cross-entropy of finding row ``i`` of the one in row ``i`` of the other, both ways.

    Args:
        first: Vectors of any length, (rows, hidden).
        second: Of the same offers, (rows, hidden).
    """
    cosines = functional.normalize(first, dim=-1) @ functional.normalize(second, dim=-1).T
    own = torch.arange(len(first), device=first.device)
    logits = _SCALE * cosines
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def pretraining_plan(plan: TrainingArguments, epochs: int) -> TrainingArguments:
    """The training's own plan for so many epochs of pretraining."""
    return msgspec.structs.replace(plan, epochs=epochs, head_learning_rate=plan.learning_rate)


def _views(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Title of each distinct offer, and what else is said of it; the title again where that is nothing."""
    text_of: dict[str, str] = {}
    for text in texts:
        text_of.setdefault(title_of(text), text)
    titles = list(text_of)
    others = [text_of[title][len(title) :].lstrip(" |") or title for title in titles]
    return titles, others


def _identity(model: Classifier) -> nn.Linear:
    width = model.head.in_features
    projection = nn.Linear(width, width, device=model.device)
    with torch.no_grad():
        projection.weight.copy_(torch.eye(width))
        projection.bias.zero_()
    return projection

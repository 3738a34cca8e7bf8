"""Probabilities that mean what they say, and the figures a model is watched by while it learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from ml.evaluation.metrics import scores

LOG_TEMPERATURE_BOUNDS = (float(np.log(0.05)), float(np.log(20.0)))


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Logarithms of probabilities, float32 (rows, classes), of logits of the same shape."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result.astype(np.float32, copy=False)


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float32]:
    """Probabilities, float32 (rows, classes), of logits of the same shape."""
    result: NDArray[np.float32] = np.exp(log_softmax(logits))
    return result


def targets_of(labels: Sequence[str], categories: Sequence[str]) -> NDArray[np.int64]:
    """Row of each category in ``labels``, int64 (n,); -1 for one that is not among them."""
    row_of = {label: row for row, label in enumerate(labels)}
    return np.fromiter((row_of.get(category, -1) for category in categories), np.int64, len(categories))


def fit_temperature(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> float:
    """Temperature that makes ``softmax(logits / temperature)`` most likely on held-out rows.

    Args:
        logits: (rows, classes).
        targets: (rows,); rows of unknown class (-1) are left out.

    Returns:
        A number in [0.05, 20]; 1 if no row has a known class.
    """
    known = targets >= 0
    if not known.any():
        return 1.0
    logits, targets = logits[known], targets[known]

    def mean_loss(log_temperature: float) -> float:
        return _mean_loss(logits / np.exp(log_temperature), targets)

    best = minimize_scalar(mean_loss, bounds=LOG_TEMPERATURE_BOUNDS, method="bounded")
    return float(np.exp(best.x))


def validation_figures(
    logits: NDArray[np.floating], labels: Sequence[str], categories: Sequence[str]
) -> dict[str, float]:
    """Mean loss, accuracy and weighted F1 of logits (rows, classes) against ``categories`` (rows,).

    A category that the model does not know counts as an error; it has no part in the loss, which is
    absent where there is nothing to compute it from.
    """
    targets = targets_of(labels, categories)
    known = targets >= 0
    figures = {"loss": _mean_loss(logits[known], targets[known])} if known.any() else {}
    found = scores(np.array(categories, dtype=str), np.array(labels, dtype=str)[logits.argmax(axis=1)])
    return figures | {"accuracy": found.accuracy, "weighted_f1": found.weighted_f1}


def _mean_loss(logits: NDArray[np.floating], targets: NDArray[np.int64]) -> float:
    return float(-log_softmax(logits)[np.arange(len(targets)), targets].mean())

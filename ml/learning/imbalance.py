"""Rare categories: how much the output layer should lean away from the frequent ones.

Post-hoc logit adjustment (Menon et al. 2021, "Long-tail learning via logit adjustment"): a model that was
trained with cross-entropy has learned the categories' shares too; subtracting ``tau`` times their logarithms
takes them back. With ``tau`` 1 the balanced error is minimised, with 0 the plain one; which is worth it is
chosen on validation offers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Candidates for ``tau``."""
_SPARE_WEIGHTED_F1 = 0.002
"""Weighted F1 that may be given up for a better macro F1."""


def log_shares(targets: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Logarithm of each class's share of the training rows, (classes,); one row is added to each.

    Args:
        targets: Class of every training row, (rows,).
        classes: Number of classes.
    """
    counts = np.bincount(targets, minlength=classes) + 1.0
    result: NDArray[np.float32] = np.log(counts / counts.sum()).astype(np.float32)
    return result


def choose_strength(
    logits: NDArray[np.floating], targets: NDArray[np.int64], shares: NDArray[np.float32]
) -> float:
    """The ``tau`` with the best macro F1 of those that cost next to no weighted F1.

    Args:
        logits: Of validation rows, (rows, classes).
        targets: Their classes, (rows,); -1 for a class that the model does not know counts as a mistake.
        shares: See :func:`log_shares`.

    Returns:
        One of :data:`STRENGTHS`; 0 where there is nothing to choose by.
    """
    if not len(targets):
        return 0.0
    figures = {tau: _f1(targets, (logits - tau * shares).argmax(axis=1)) for tau in STRENGTHS}
    best_weighted = max(weighted for weighted, _ in figures.values())
    good = {
        t: macro for t, (weighted, macro) in figures.items() if weighted >= best_weighted - _SPARE_WEIGHTED_F1
    }
    return max(good, key=lambda tau: (good[tau], -tau))


def _f1(targets: NDArray[np.int64], predicted: NDArray[np.int64]) -> tuple[float, float]:
    """Weighted and macro F1."""
    weighted = f1_score(targets, predicted, average="weighted", zero_division=0)
    return float(weighted), float(f1_score(targets, predicted, average="macro", zero_division=0))

"""Rare categories: how much the output layer should lean away from the frequent ones.

Post-hoc logit adjustment (Menon et al. 2021, "Long-tail learning via logit adjustment"): a model that was
trained with cross-entropy has learned the categories' shares too; subtracting ``tau`` times their logarithms
takes them back. With ``tau`` 1 the balanced error is minimised, with 0 the plain one; which is worth it is
chosen on validation offers. They have only a few of each rare category, so that by chance some ``tau`` looks
better than none: nothing is adjusted unless resampled validation offers agree that it helps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ml.evaluation.metrics import scores

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Candidates for ``tau``."""
_SPARE_WEIGHTED_F1 = 0.002
"""Weighted F1 that may be given up for a better macro F1."""
_CONFIDENCE = 0.95
"""Share of the resamples whose macro F1 has to be better with the adjustment than without."""
_RESAMPLES = 500


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
    """The ``tau`` with the best macro F1 of those that cost next to no weighted F1; 0 if that may be chance.

    Args:
        logits: Of validation rows, (rows, classes).
        targets: Their classes, (rows,); -1 for a class that the model does not know counts as a mistake.
        shares: See :func:`log_shares`.

    Returns:
        One of :data:`STRENGTHS`; 0 where there is nothing to choose by.
    """
    if not len(targets):
        return 0.0
    predicted = {tau: (logits - tau * shares).argmax(axis=1) for tau in STRENGTHS}
    figures = {tau: scores(targets, guesses) for tau, guesses in predicted.items()}
    least = figures[0.0].weighted_f1 - _SPARE_WEIGHTED_F1
    good = {tau: found.macro_f1 for tau, found in figures.items() if found.weighted_f1 >= least}
    best = max(good, key=lambda tau: (good[tau], -tau))
    if best == 0.0:
        return best
    gains = _macro_f1_gains(targets, predicted[0.0], predicted[best], len(shares))
    return best if np.mean(gains > 0) >= _CONFIDENCE else 0.0


def _macro_f1_gains(
    targets: NDArray[np.int64], before: NDArray[np.int64], after: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """Macro F1 after minus before, of resamples of the rows (paired bootstrap), (resamples,)."""
    rng = np.random.default_rng(0)
    targets = np.where(targets < 0, classes, targets)

    def macro_f1(rows: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
        truth, guess = targets[rows], predicted[rows]
        right = np.bincount(truth[truth == guess], minlength=classes + 1)
        counted = np.bincount(truth, minlength=classes + 1) + np.bincount(guess, minlength=classes + 1)
        return float(np.mean(2 * right[counted > 0] / counted[counted > 0]))

    drawn = (rng.integers(len(targets), size=len(targets)) for _ in range(_RESAMPLES))
    return np.array([macro_f1(rows, after) - macro_f1(rows, before) for rows in drawn])

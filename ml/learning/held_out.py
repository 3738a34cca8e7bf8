"""What candidates are compared by: quality on the training sample's validation offers, over all levels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ml.evaluation.metrics import scores, scores_by_level
from ml.taxonomy import Taxonomy


def held_out_scores(
    values: NDArray[np.floating], labels: Sequence[str], categories: Sequence[str], taxonomy: Taxonomy
) -> dict[str, float]:
    """Figures of the most likely categories against the right ones, as the evaluation defines them.

    Args:
        values: Logits or probabilities, (offers, classes).
        labels: Category id of each class.
        categories: Category id of each offer.
        taxonomy: Holds both.

    Returns:
        ``mean_weighted_f1`` (weighted F1, mean over the levels), ``weighted_f1``, ``macro_f1`` and
        ``accuracy``, each in [0, 1].
    """
    truth = np.array(list(categories))
    predicted = np.array(list(labels))[values.argmax(axis=1)]
    overall = scores(truth, predicted)
    levels = scores_by_level(truth, predicted, taxonomy.ancestor_at, taxonomy.levels)
    return {
        "mean_weighted_f1": float(np.mean([level.weighted_f1 for level in levels])),
        "weighted_f1": overall.weighted_f1,
        "macro_f1": overall.macro_f1,
        "accuracy": overall.accuracy,
    }

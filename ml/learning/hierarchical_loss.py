"""The loss of a classifier whose categories are nodes of a tree."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ml.taxonomy import Taxonomy


class HierarchicalLoss:
    """Cross-entropy at the category, plus a weighted one at every level above it.

    A label may itself have children that are labels: its probability then counts for its own subtree
    like theirs does, and rows of it have no loss below its own level.
    """

    def __init__(
        self, taxonomy: Taxonomy, labels: list[str], ancestor_weight: float, device: torch.device
    ) -> None:
        self._ancestor_weight = ancestor_weight
        self._groupings = [
            torch.from_numpy(grouping).to(device) for grouping in ancestor_groups(taxonomy, labels)
        ]
        self._level = torch.tensor([taxonomy.level(label) for label in labels], device=device)

    def __call__(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean over the rows of their ``weights`` (rows,) times their losses.

        Args:
            logits: Shape (rows, classes).
            targets: Class numbers, (rows,).
            weights: What each row counts, (rows,).
        """
        log_probabilities = functional.log_softmax(logits, dim=1)
        # Logarithms are weighed, not losses: so torch adds up rows of weight 1 as if there were no weights.
        loss = functional.nll_loss(log_probabilities * weights[:, None], targets)
        if not self._ancestor_weight:
            return loss
        for level, group_of_class in enumerate(self._groupings, start=1):
            below = self._level[targets] > level
            in_group = group_of_class[None, :] == group_of_class[targets[below], None]
            kept = log_probabilities[below].masked_fill(~in_group, -torch.inf)
            of_ancestors = torch.logsumexp(kept, dim=1) * weights[below]
            loss = loss - self._ancestor_weight * of_ancestors.sum() / len(targets)
        return loss


def ancestor_groups(taxonomy: Taxonomy, labels: list[str]) -> list[NDArray[np.int64]]:
    """Which labels belong together at each level above the deepest label.

    Returns:
        Arrays (classes,), one per level from the root down: the number of the label's ancestor (or
        of the label itself) at that level, -1 where the label lies above the level.
    """
    paths = [taxonomy.ancestors(label) for label in labels]
    groupings = []
    for level in range(1, max(len(path) for path in paths)):
        nodes = [path[level - 1] if len(path) >= level else None for path in paths]
        number = {node: index for index, node in enumerate(dict.fromkeys(nodes)) if node is not None}
        groupings.append(np.array([number.get(node, -1) if node else -1 for node in nodes], dtype=np.int64))
    return groupings

"""Categories that nobody has labelled an offer of, as answers: by their names and paths alone.

In a plain output layer the row of such a category only learns what it is not. Here a row is the sum of what
the category's name says and of what its offers say. The first part is one linear map of the text vectors of
names, the same for all categories (as label embeddings: Frome et al. 2013, "DeViSE"; Akata et al. 2016), so
one without an offer has a row too. Three things make it hold its own beside the others:

* in every step some categories have to do with their names alone. So the map learns to make rows that find
  offers in competition with rows that offers have shaped,
* an offer does not push away categories without offers: that it belongs elsewhere is no news of them,
* what is added to all of them alike is chosen afterwards (calibrated stacking: Chao et al. 2016), as much as
  costs known categories no more than a stated share of accuracy on validation offers.

At the end all of it is rows of a plain output layer again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ml.learning.encoder import INITIAL_SCALE

_SHARE_BY_NAME_ALONE = 0.3
"""Of the categories, in a step; from 0.2 to 0.4 makes no difference."""
_OUT_OF_THE_QUESTION = -1e4
"""Logit of a category that an offer says nothing about; finite, so that no product with zero is undefined."""


class NamedLayer(nn.Linear):
    """An output layer whose rows are made of names and offers; (rows, hidden) to (rows, classes).

    ``weight`` and ``bias`` are the offers' part.
    """

    names: Tensor
    cold: Tensor

    def __init__(self, hidden: int, cold: NDArray[np.bool_], device: torch.device) -> None:
        """Put a layer together; :meth:`start` has to follow.

        Args:
            hidden: Length of a text vector.
            cold: Which classes have no offer, (classes,).
            device: Where to compute.
        """
        super().__init__(hidden, len(cold), device=device)
        self.register_buffer("cold", torch.from_numpy(cold).to(device))
        self.register_buffer("names", torch.zeros(len(cold), hidden, device=device))
        self.row_of_name = nn.Parameter(INITIAL_SCALE * torch.eye(hidden, device=device))
        self.bias_by_name = nn.Parameter(torch.zeros((), device=device))

    def start(self, names: NDArray[np.float32]) -> None:
        """Take what names say out of ``weight``, which has been set to whole rows.

        Args:
            names: Text vectors of the categories' names, (classes, hidden).
        """
        with torch.no_grad():
            self.names.copy_(torch.from_numpy(names))
            self.weight -= self.names @ self.row_of_name
            self.weight[self.cold] = 0.0
            self.bias[self.cold] = 0.0

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits (rows, classes) of text vectors (rows, hidden)."""
        by_name = self.cold
        if self.training:
            drawn = torch.rand(len(self.cold), device=self.cold.device) < _SHARE_BY_NAME_ALONE
            by_name = by_name | drawn
        return functional.linear(vectors, *self._rows(by_name))

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same."""
        plain = nn.Linear(self.in_features, self.out_features, device=self.weight.device)
        with torch.no_grad():
            weight, bias = self._rows(self.cold)
            plain.weight.copy_(weight)
            plain.bias.copy_(bias)
        return plain

    def _rows(self, by_name: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and biases where these categories (classes,) have to do with their names alone."""
        own = torch.where(by_name[:, None], 0.0, self.weight)
        return self.names @ self.row_of_name + own, torch.where(by_name, self.bias_by_name, self.bias)


def cold_among(labels: Sequence[str], categories: Sequence[str]) -> NDArray[np.bool_]:
    """Which ``labels`` are the category of no offer, (labels,)."""
    return ~np.isin(np.array(labels, dtype=str), np.array(categories, dtype=str))


def without_cold(logits: Tensor, offers: Tensor, cold: Tensor) -> Tensor:
    """Logits (rows, classes) in which offers say nothing about categories without offers.

    Args:
        logits: Of a batch.
        offers: Which rows are offers, and not names of categories; (rows,).
        cold: Which classes have no offer, (classes,).
    """
    return logits.masked_fill(offers[:, None] & cold[None, :], _OUT_OF_THE_QUESTION)


def bias_of_cold(
    logits: NDArray[np.floating], targets: NDArray[np.int64], cold: NDArray[np.bool_], most_lost: float
) -> float:
    """The largest number to add to the logits of cold categories that costs the others no more than stated.

    Args:
        logits: Of validation offers, (offers, classes).
        targets: Their categories, (offers,); those of a cold or an unknown (-1) category are left out.
        cold: Which classes have no offer, (classes,).
        most_lost: Accuracy that the offers may lose to cold categories.

    Returns:
        That number, negative if need be; 0 where there is nothing to choose by.
    """
    asked = (targets >= 0) & ~cold[targets]
    of_known = np.where(cold, -np.inf, logits[asked])
    lead = of_known.max(axis=1) - np.where(cold, logits[asked], -np.inf).max(axis=1)
    leads = np.sort(lead[of_known.argmax(axis=1) == targets[asked]])
    if not len(leads) or not cold.any():
        return 0.0
    lost = int(most_lost * int(asked.sum()))
    # A bias just below a lead takes the offers with smaller ones; with room for all, it takes all.
    return float(np.nextafter(leads[lost], -np.inf)) if lost < len(leads) else float(leads[-1]) + 1.0

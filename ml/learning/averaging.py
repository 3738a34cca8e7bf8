"""How much each of two calibrated models has to say where their answers are averaged.

Both the same, unless held-out offers leave no doubt that other shares are right more often. Shares that are
fitted follow chance: what a few hundred offers tell of the difference between 0.3 and 0.5 is less than what a
wrong choice costs, so that the plain average is hard to beat (the "forecast combination puzzle", Stock and
Watson 2004; explained by Smith and Wallis 2009). Likelihood and Brier score have a leaning besides: they are
ruled by how sure a model is when it is wrong, a model of n-grams on words it does not know above all, which
the temperature of the average mends afterwards. On most real feeds they gave it less than was best.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtrc

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EQUAL = 0.5

_CONFIDENCE = 0.99
"""That offers to come are like the held-out ones in this, before the shares are not the same."""


def choose_share(average: Callable[[float], NDArray[np.floating]], targets: NDArray[np.int64]) -> float:
    """The share of one of two models, of :data:`SHARES`; what is left is the other's.

    Args:
        average: Gives the averaged logits of held-out offers, (offers, classes), for a share.
        targets: Their classes, (offers,); offers of unknown class (-1) say nothing.
    """
    return clearly_best(np.array([average(share).argmax(axis=1) == targets for share in SHARES]))


def clearly_best(right: NDArray[np.bool_]) -> float:
    """The share that is right most often, if offers where it and equal ones differ say so; else equal ones.

    They say so by a one-sided sign test. Of shares that are right equally often the one nearest to equal ones
    is meant.

    Args:
        right: Whether the average with each of :data:`SHARES` is right, (shares, offers).
    """
    equal, counts = right[SHARES.index(EQUAL)], right.sum(axis=1).tolist()
    best = max(range(len(SHARES)), key=lambda place: (counts[place], -abs(SHARES[place] - EQUAL)))
    gains, losses = int((right[best] & ~equal).sum()), int((equal & ~right[best]).sum())
    p_value = float(bdtrc(gains - 1, gains + losses, 0.5))
    return SHARES[best] if p_value <= 1 - _CONFIDENCE else EQUAL

"""What each word of an offer did for its category, found by leaving it out.

The method is occlusion: the change of the prediction where one part of the input is missing (Zeiler and
Fergus, "Visualizing and Understanding Convolutional Networks", 2014; for words Li, Monroe and Jurafsky,
"Understanding Neural Networks through Representation Erasure", 2016). It asks nothing of a model but its
probabilities, so a compiled one is explained as it answers. Words that say the same thing twice cover for
each other: either alone seems to matter little.

Effects are changes of the log-odds, log p / (1 - p): the log-probability of a category that a model is
sure of stays 0 whatever word is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[^\s|]\S*")
_SEPARATOR = " | "
_LEAST_PROBABILITY = 1e-30
"""float32 probabilities end in 0; their logarithm must not."""


class Model(Protocol):
    """What is explained: a student, a compiled one, or any other that gives probabilities of texts."""

    @property
    def labels(self) -> Sequence[str]:
        """Category ids, in the order of the output."""

    def predict_probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Calibrated probabilities, (texts, labels)."""


class Word(msgspec.Struct, frozen=True):
    """One word of an offer text, and what it did."""

    word: str
    start: int
    """Its first character in the text, from 0."""
    effect: float
    """Log-odds of the category given the text, minus those given the text without this word (natural
    logarithm); positive: the word speaks for the category."""


class Reading(msgspec.Struct, frozen=True):
    """What a model makes of a text."""

    probabilities: NDArray[np.float32]
    """Of all labels, (labels,)."""
    label: int
    """The one that is explained: its place among the labels."""
    words: list[Word]
    """In the order of the text."""


def read_words(model: Model, text: str, label: str | None = None) -> Reading:
    """What each word of ``text`` does for a category, with one batch of predictions.

    Args:
        model: The model whose answer is explained.
        text: Offer text as ``ml.offers.offer_text`` makes it.
        label: The category; None: the most likely one.

    Raises:
        ValueError: the model has no such label.
    """
    places = [(found.start(), found.end()) for found in _WORD.finditer(text) if _is_word(found.group())]
    shortened = [_without(text, start, end) for start, end in places]
    probabilities = model.predict_probabilities([text, *shortened])
    chosen = int(probabilities[0].argmax()) if label is None else list(model.labels).index(label)
    odds = _log_odds(probabilities, chosen)
    words = [
        Word(text[start:end], start, float(odds[0] - without))
        for (start, end), without in zip(places, odds[1:], strict=True)
    ]
    return Reading(probabilities[0], chosen, words)


def _log_odds(probabilities: NDArray[np.float32], label: int) -> NDArray[np.float64]:
    """Of one label, (texts,). The rest is added up, for one minus a float32 near one is mostly zero."""
    own = probabilities[:, label].astype(np.float64)
    rest = np.delete(probabilities, label, axis=1).astype(np.float64).sum(axis=1)
    odds: NDArray[np.float64] = np.log(own.clip(min=_LEAST_PROBABILITY)) - np.log(
        rest.clip(min=_LEAST_PROBABILITY)
    )
    return odds


def _is_word(text: str) -> bool:
    """False for the signs between the levels of a shop's category."""
    return any(map(str.isalnum, text))


def _without(text: str, start: int, end: int) -> str:
    """``text`` as it would be if its word at ``start`` had not been written."""
    parts = (text[:start] + text[end:]).split(_SEPARATOR.strip())
    fields = [" ".join(part.split()) for part in parts]
    return _SEPARATOR.join(field for field in fields if field)

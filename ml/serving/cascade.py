"""Which of two models answers an offer, and how far down the taxonomy the answer reaches.

The fast model answers what it is sure of. For the rest the student is asked too, and the two words are
weighed into one, the *deep* answer: the fast model's is there anyway, and a linear model and an encoder make
different mistakes. An offer of which the deep answer is not sure gets the deepest category above it that is
sure enough, and is marked for review.

Here is what a compiled model stores of it (``cascade.json``) and the arithmetic on arrays; what is stored is
chosen in :mod:`ml.learning.cascade`. Each row is computed apart from its neighbours, so that an offer has one
answer in any batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from ml.errors import InputError
from ml.taxonomy import Taxonomy

CASCADE_FILE = "cascade.json"
FAST_FOLDER = "fast"
"""Folder of the fast model in a compiled model."""

Tier = Literal["fast", "student"]
FAST: Tier = "fast"
STUDENT: Tier = "student"

OTHER_COUNTRIES = ""
"""Countries without a figure of their own, and offers without a country."""

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

_LEAST_LOG_PROBABILITY = np.float32(np.log(1e-7))
"""Where two models are weighed: of a category that one of them does not know, too."""


class Temperatures(msgspec.Struct, frozen=True, kw_only=True):
    """What logarithms of probabilities are divided by, so that the share of right answers is as promised."""

    overall: float = 1.0
    by_country: dict[str, float] = {}

    def of(self, countries: Sequence[str]) -> Floats:
        """Temperature of each offer, float32 (offers,)."""
        return np.array([self.by_country.get(country, self.overall) for country in countries], np.float32)


class FastThreshold(msgspec.Struct, frozen=True, kw_only=True):
    """From which confidence on the fast model answers the offers of a country, and why from there."""

    confidence: float | None
    """None: not certified from any, all offers go to the student."""
    offers: int
    """Validation offers that it was chosen on."""
    answered: float
    """Share of these that the fast model answers."""
    loss: float
    """Accuracy that was lost on them against the deep answer alone; negative if some was gained."""
    p_value: float | None
    """Of "more than the stated loss is lost"; None where not certified."""


class ReviewThreshold(msgspec.Struct, frozen=True, kw_only=True):
    """Below which confidence an answer is marked for review, and why below that."""

    confidence: float
    certified: bool
    """Whether answers without a mark are as precise as stated, with the stated confidence."""
    offers: int
    """Validation offers that it was chosen on."""
    marked: float
    """Share of these that is marked."""
    precision: float | None
    """Share of right answers among the others; None if there were no others."""


class CascadeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``cascade.json``."""

    max_loss: float
    """Stated loss of accuracy against the deep answer alone."""
    min_precision: float
    """Stated share of right answers among those without a mark."""
    stated_confidence: float
    """Probability with which all thresholds keep what is stated about the loss, and so about the
    precision."""
    fast_weight: float
    """Of the fast model in the deep answer; the student has the rest."""
    fast_temperatures: Temperatures
    """On top of the fast model's own."""
    deep_temperatures: Temperatures
    thresholds: dict[str, FastThreshold]
    """By country; ``""`` for all others."""
    review: ReviewThreshold

    def write(self, folder: Path) -> None:
        """Write ``cascade.json`` into ``folder``."""
        encoded = msgspec.json.encode(self, order="deterministic")
        (folder / CASCADE_FILE).write_bytes(msgspec.json.format(encoded, indent=2))

    @classmethod
    def read(cls, folder: Path) -> CascadeSettings:
        """Read ``cascade.json`` of ``folder``.

        Raises:
            InputError: it is missing or damaged.
        """
        path = folder / CASCADE_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except FileNotFoundError:
            raise InputError(f"{path} is missing; compile the student again") from None
        except msgspec.DecodeError as error:
            raise InputError(f"{path} is damaged: {error}; compile the student again") from None

    def fast_from(self, country: str) -> float:
        """Confidence from which on the fast model answers; infinite where it never does.

        Never below the threshold of review: what the fast model is that unsure of, the student may still
        know.
        """
        threshold = self.thresholds.get(country) or self.thresholds[OTHER_COUNTRIES]
        if threshold.confidence is None:
            return float("inf")
        return max(threshold.confidence, self.review.confidence)


class Cascade:
    """The arithmetic of a cascade; its two models are the caller's."""

    def __init__(
        self,
        settings: CascadeSettings,
        fast_labels: Sequence[str],
        student_labels: Sequence[str],
        taxonomy: Taxonomy,
    ) -> None:
        """Put a cascade together.

        Args:
            settings: What was chosen for these two models.
            fast_labels: Category ids in the order of the fast model's output.
            student_labels: The same of the student.
            taxonomy: Has all of them.
        """
        self.settings = settings
        self.labels = deep_labels(fast_labels, student_labels)
        """Category ids in the order of the deep answer."""
        self._fast_places = places_in(fast_labels, self.labels)
        self._student_places = places_in(student_labels, self.labels)
        self._nodes = _Nodes(self.labels, taxonomy)
        self._countries = {
            *settings.thresholds,
            *settings.fast_temperatures.by_country,
            *settings.deep_temperatures.by_country,
            OTHER_COUNTRIES,
        }
        self._fast_from = {country: settings.fast_from(country) for country in self._countries}

    def country(self, value: Any) -> str:
        """The country of an offer; :data:`OTHER_COUNTRIES` where it makes no difference."""
        country = value.strip().upper() if isinstance(value, str) else OTHER_COUNTRIES
        return country if country in self._countries else OTHER_COUNTRIES

    def fast_probabilities(self, probabilities: Floats, countries: Sequence[str]) -> Floats:
        """The fast model's probabilities, calibrated by country; float32 (offers, its labels)."""
        return _at_temperatures(probabilities, self.settings.fast_temperatures, countries)

    def is_answered_fast(self, probabilities: Floats, countries: Sequence[str]) -> Mask:
        """Which offers the fast model answers, (offers,), by what :meth:`fast_probabilities` gave."""
        needed = np.array([self._fast_from[country] for country in countries], np.float64)
        return np.asarray(probabilities.max(axis=1, initial=0.0) >= needed)

    def deep_probabilities(self, fast: Floats, student: Floats, countries: Sequence[str]) -> Floats:
        """The deep answer, float32 (offers, :attr:`labels`).

        Args:
            fast: Probabilities of :meth:`fast_probabilities`, (offers, its labels).
            student: Calibrated probabilities of the student, (offers, its labels).
            countries: Of each offer, as :meth:`country` gives them.
        """
        settings = self.settings
        logs = blended(
            placed_logs(fast, self._fast_places, len(self.labels)),
            placed_logs(student, self._student_places, len(self.labels)),
            settings.fast_weight,
        )
        return softmax(logs / settings.deep_temperatures.of(countries)[:, None])

    def on_deep_labels(self, fast: Floats) -> Floats:
        """The fast model's probabilities, with a column for each of :attr:`labels`."""
        result = np.zeros((len(fast), len(self.labels)), np.float32)
        result[:, self._fast_places] = fast
        return result

    def needs_review(self, confidence: float) -> bool:
        """Whether a best category of this probability is marked."""
        return confidence < self.settings.review.confidence

    def sure_enough(self, probabilities: Floats) -> tuple[str, float]:
        """The deepest category whose probability reaches the threshold of review, and that probability.

        A category has the sum of all below it. Where not even a root is sure enough, it is the likeliest
        root.

        Args:
            probabilities: Of one offer, (:attr:`labels`,).
        """
        return self._nodes.deepest(probabilities, self.settings.review.confidence)


class _Nodes:
    """All categories at and above the labels."""

    def __init__(self, labels: Sequence[str], taxonomy: Taxonomy) -> None:
        lines = [taxonomy.ancestors(label) for label in labels]
        self._ids = sorted({node for line in lines for node in line}, key=lambda n: (taxonomy.level(n), n))
        place = {node: number for number, node in enumerate(self._ids)}
        rows = [place[node] for line in lines for node in line]
        columns = [number for number, line in enumerate(lines) for _ in line]
        shape = (len(self._ids), len(labels))
        self._below = csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
        self._levels = np.array([taxonomy.level(node) for node in self._ids], np.float64)

    def deepest(self, probabilities: Floats, least: float) -> tuple[str, float]:
        mass = np.minimum(self._below @ probabilities.astype(np.float64), 1.0)
        # By level, then by probability; what is not sure enough only competes among roots.
        rank = np.where(mass >= least, self._levels + mass / 2, np.where(self._levels == 1, mass / 4, -1.0))
        best = int(rank.argmax())
        return self._ids[best], float(mass[best])


def deep_labels(fast_labels: Sequence[str], student_labels: Sequence[str]) -> list[str]:
    """Categories of the deep answer: the student's, then those that only the fast model knows."""
    return list(dict.fromkeys([*student_labels, *fast_labels]))


def placed_logs(probabilities: Floats, places: NDArray[np.int64], classes: int) -> Floats:
    """Logarithms of a model's probabilities, bounded below, float32 (offers, ``classes``).

    Args:
        probabilities: (offers, labels of the model).
        places: Column of each of its labels in the result.
        classes: Columns of the result; those of categories unknown to the model have the bound.
    """
    logs = np.full((len(probabilities), classes), _LEAST_LOG_PROBABILITY, np.float32)
    with np.errstate(divide="ignore"):
        logs[:, places] = np.maximum(np.log(probabilities), _LEAST_LOG_PROBABILITY)
    return logs


def blended(fast_logs: Floats, student_logs: Floats, fast_weight: float) -> Floats:
    """Weighed logarithms of two models (their logarithmic opinion pool but for its norm), float32."""
    weight = np.float32(fast_weight)
    return (np.float32(1) - weight) * student_logs + weight * fast_logs


def softmax(logits: Floats) -> Floats:
    """Probabilities, float32 (rows, classes); each row by itself. Without the SciPy function's import."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def best_labels(probabilities: Floats, number: int) -> NDArray[np.int64]:
    """Columns of the ``number`` largest of each row, largest first, of equals the first; (rows, number)."""
    left = probabilities.copy()
    rows = np.arange(len(left))
    best = np.empty((len(left), min(number, left.shape[1])), np.int64)
    for rank in range(best.shape[1]):
        best[:, rank] = left.argmax(axis=1)
        left[rows, best[:, rank]] = -1.0
    return best


def places_in(labels: Sequence[str], among: Sequence[str]) -> NDArray[np.int64]:
    """Column of each label among others, int64 (labels,)."""
    place: Mapping[str, int] = {label: number for number, label in enumerate(among)}
    return np.array([place[label] for label in labels], np.int64)


def _at_temperatures(probabilities: Floats, temperatures: Temperatures, countries: Sequence[str]) -> Floats:
    if temperatures.overall == 1.0 and not temperatures.by_country:
        return probabilities
    logs = placed_logs(probabilities, np.arange(probabilities.shape[1]), probabilities.shape[1])
    return softmax(logs / temperatures.of(countries)[:, None])

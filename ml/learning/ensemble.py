"""The teacher at work: the encoder, and the linear models that make other mistakes.

A linear model knows which words go with which category, an encoder what words mean. Their logits are added
with two weights that make held-out labels most likely, which calibrates the sum as well. Without a linear
model the one weight is the inverse of a temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ml.errors import InputError
from ml.learning.calibration import LOG_TEMPERATURE_BOUNDS, fit_temperature, log_softmax, softmax
from ml.learning.encoder import Classifier
from ml.serving.fast_model import FastModel

ENSEMBLE_FILE = "ensemble.json"
LINEAR_FOLDER = "linear"


class EnsembleWeights(msgspec.Struct, frozen=True, kw_only=True):
    """``ensemble.json``: what the logits of each part count."""

    encoder: float
    linear: float = 0.0
    """0: there is no linear model."""


class Teacher:
    """A ``teacher_checkpoint`` that answers; its encoder alone can be read as a :class:`Classifier`."""

    def __init__(self, encoder: Classifier, linear: FastModel | None, weights: EnsembleWeights) -> None:
        self.encoder = encoder
        self.linear = linear
        self.weights = weights
        self.labels = encoder.labels

    @classmethod
    def load(cls, folder: Path) -> Teacher:
        """Read the teacher from the folder that its stage wrote.

        Raises:
            InputError: a file is missing or damaged, or the model was trained on offer texts that
                this version makes differently.
        """
        path = folder / ENSEMBLE_FILE
        try:
            weights = msgspec.json.decode(path.read_bytes(), type=EnsembleWeights)
        except FileNotFoundError:
            raise InputError(f"{folder} is not a teacher: {path} is missing") from None
        except msgspec.DecodeError as error:
            raise InputError(f"{path} is damaged: {error}; delete the folder and make it again") from None
        linear = FastModel.load(folder / LINEAR_FOLDER) if weights.linear else None
        return cls(Classifier.load(folder), linear, weights)

    def save(self, folder: Path) -> None:
        """Write the encoder as :meth:`Classifier.save` does, the linear model beside it, and the weights."""
        self.encoder.save(folder)
        if self.linear:
            (folder / LINEAR_FOLDER).mkdir()
            self.linear.save(folder / LINEAR_FOLDER)
        (folder / ENSEMBLE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self.weights), indent=2))

    def predict_logits(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Calibrated logits, float32 (texts, classes), in the order of ``texts``."""
        logits = self.weights.encoder * self.encoder.predict_logits(texts, batch_size)
        if self.linear:
            logits += self.weights.linear * linear_logits(self.linear, self.labels, texts)
        return logits.astype(np.float32, copy=False)

    def predict_probabilities(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes), in the order of ``texts``."""
        return softmax(self.predict_logits(texts, batch_size))


def linear_logits(model: FastModel, labels: Sequence[str], texts: Sequence[str]) -> NDArray[np.float32]:
    """The linear model's logits in the order of ``labels``, float32 (texts, labels).

    A category that it never saw gets the mean of a text's logits: nothing for it, nothing against it.
    """
    known = {label: column for column, label in enumerate(model.labels)}
    of_model = model.predict_logits(texts)
    logits = np.repeat(of_model.mean(axis=1, keepdims=True), len(labels), axis=1)
    here = [place for place, label in enumerate(labels) if label in known]
    logits[:, here] = of_model[:, [known[labels[place]] for place in here]]
    return logits


def fit_weights(
    encoder: NDArray[np.floating], linear: NDArray[np.floating] | None, targets: NDArray[np.int64]
) -> EnsembleWeights:
    """The weights that make the classes of held-out rows most likely.

    Args:
        encoder: Its logits, (rows, classes).
        linear: The linear model's logits, of the same shape; None: there is none.
        targets: (rows,); rows of unknown class (-1) are left out.

    Returns:
        Weights that are not negative, and not larger than what the lowest temperature stands for; 1 for each
        part if no row has a known class.
    """
    largest = 1 / float(np.exp(LOG_TEMPERATURE_BOUNDS[0]))
    known = targets >= 0
    if linear is None:
        return EnsembleWeights(encoder=1 / fit_temperature(encoder, targets))
    if not known.any():
        return EnsembleWeights(encoder=1.0, linear=1.0)
    parts, rows = (encoder[known], linear[known]), np.arange(int(known.sum()))

    def mean_loss(weights: NDArray[np.float64]) -> float:
        logits = weights[0] * parts[0] + weights[1] * parts[1]
        return float(-log_softmax(logits)[rows, targets[known]].mean())

    # Each part alone, calibrated, says about what half of the sum should.
    start = [min(0.5 / fit_temperature(part, targets[known]), largest) for part in parts]
    found = minimize(mean_loss, start, method="Nelder-Mead", bounds=[(0.0, largest)] * 2)
    return EnsembleWeights(encoder=float(found.x[0]), linear=float(found.x[1]))

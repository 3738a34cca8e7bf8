"""The teacher at work: the encoder, and the linear models that make other mistakes.

A linear model knows which words go with which category, an encoder what words mean. Each is calibrated, their
logits are averaged (:mod:`ml.learning.averaging`), and the average is calibrated once more. All that is two
weights. Without a linear model the one weight is the inverse of a temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from ml.errors import InputError
from ml.learning.averaging import choose_share
from ml.learning.calibration import fit_temperature, softmax
from ml.learning.encoder import Classifier
from ml.serving.fast_model import FastModel
from ml.stages import LabellingModel

ENSEMBLE_FILE = "ensemble.json"
LINEAR_FOLDER = "linear"

_LEAST_TEMPERATURE = 0.5
"""Of an average of two calibrated models: it is their sum, what they would say together if they erred
independently of each other. A few held-out rows that are all right must not make it surer than that."""


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
        return self.predict_logits_by_model(texts, batch_size)["teacher"]

    def predict_logits_by_model(
        self, texts: Sequence[str], batch_size: int = 64
    ) -> dict[LabellingModel, NDArray[np.float32]]:
        """Calibrated logits of the whole teacher and of its encoder alone, each float32 (texts, classes)."""
        encoder = self.encoder.predict_logits(texts, batch_size)
        teacher = self.weights.encoder * encoder
        if self.linear:
            teacher += self.weights.linear * linear_logits(self.linear, self.labels, texts)
        return {
            "teacher": teacher.astype(np.float32, copy=False),
            "encoder": (encoder / self.encoder.settings.temperature).astype(np.float32, copy=False),
        }

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
    """The weights of each part's share (:mod:`ml.learning.averaging`) with which the sum is calibrated.

    Args:
        encoder: Its logits of held-out rows, (rows, classes).
        linear: The linear model's logits, of the same shape; None: there is none.
        targets: (rows,); rows of unknown class (-1) are left out.

    Returns:
        Weights that are not negative; 1 for each part if no row has a known class.
    """
    if linear is None:
        return EnsembleWeights(encoder=1 / fit_temperature(encoder, targets))
    known = targets >= 0
    if not known.any():
        return EnsembleWeights(encoder=1.0, linear=1.0)
    targets = targets[known]
    temperatures = [fit_temperature(part[known], targets) for part in (encoder, linear)]
    parts = [part[known] / t for part, t in zip((encoder, linear), temperatures, strict=True)]

    def average(share: float) -> NDArray[np.floating]:
        return (1 - share) * parts[0] + share * parts[1]

    share = choose_share(average, targets)
    temperature = max(fit_temperature(average(share), targets), _LEAST_TEMPERATURE)
    return EnsembleWeights(
        encoder=(1 - share) / (temperatures[0] * temperature), linear=share / (temperatures[1] * temperature)
    )

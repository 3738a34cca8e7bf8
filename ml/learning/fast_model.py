"""Stage ``fast_checkpoint``: the traditional model, n-grams and a linear classifier.

It answers thousands of offers a second where the transformer answers hundreds, and is the baseline
that a transformer has to beat. It learns from the labelled offers and from unlabelled ones
of which the teacher is sure; what a model guessed counts by its confidence. Needs no torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.learning.calibration import fit_temperature, softmax, targets_of, validation_figures
from ml.learning.labelling import check_same_offers, read_teacher_labels
from ml.learning.training_data import read_labelled, read_unlabelled
from ml.offers import TEXT_VERSION, check_text_version
from ml.progress import Progress
from ml.runner import StageContext
from ml.stages import FastModelParameters

_WORD_SHARE = 0.4
"""Share of the features that are words and word pairs; the rest are character n-grams."""
_CHUNK_TEXTS = 2048
_TOLERANCE = 0.2
"""Where the solver stops; tighter takes longer and classifies no better."""


class FastModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``fast_model.json``: everything beside vocabulary and weights that a prediction depends on."""

    text_version: str
    taxonomy_version: str
    temperature: float = 1.0


class Vocabulary(msgspec.Struct, frozen=True):
    """``vocabulary.json``: the n-grams of both kinds, in the order of their features."""

    words: list[str]
    characters: list[str]


class FastModel:
    """TF-IDF of words, word pairs and character n-grams, then one linear function per category."""

    def __init__(
        self,
        vectorisers: tuple[TfidfVectorizer, TfidfVectorizer],
        weights: NDArray[np.float32],
        bias: NDArray[np.float32],
        labels: Sequence[str],
        settings: FastModelSettings,
    ) -> None:
        """Put a model together.

        Args:
            vectorisers: Of words and of characters, fitted.
            weights: (features, classes).
            bias: (classes,).
            labels: Category ids, in the order of the output.
            settings: What to store beside the weights.
        """
        self._vectorisers = vectorisers
        self._weights = weights
        self._bias = bias
        self.labels = list(labels)
        self.settings = settings

    @classmethod
    def load(cls, folder: Path) -> FastModel:
        """Read a model from the folder that :meth:`save` wrote.

        Raises:
            InputError: a file is missing or damaged, or the model was trained on offer texts that
                this version makes differently.
        """
        weights_path = folder / "weights.safetensors"
        try:
            settings = msgspec.json.decode((folder / "fast_model.json").read_bytes(), type=FastModelSettings)
            vocabulary = msgspec.json.decode((folder / "vocabulary.json").read_bytes(), type=Vocabulary)
            labels = msgspec.json.decode((folder / "labels.json").read_bytes(), type=list[str])
            tensors = load_file(weights_path)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is not a fast model: {error.filename or weights_path} is missing"
            ) from None
        except (msgspec.DecodeError, SafetensorError) as error:
            raise InputError(f"{folder} is damaged: {error}; delete the folder and make it again") from None
        check_text_version(folder, settings.text_version)
        vectorisers = _vectorisers(words=vocabulary.words, characters=vocabulary.characters)
        vectorisers[0].idf_ = tensors["idf_words"].astype(np.float64)
        vectorisers[1].idf_ = tensors["idf_characters"].astype(np.float64)
        return cls(vectorisers, tensors["weights"].astype(np.float32), tensors["bias"], labels, settings)

    def save(self, folder: Path) -> None:
        """Write vocabulary, weights (half precision), labels and settings into ``folder``."""
        words, characters = self._vectorisers
        vocabulary = Vocabulary(
            words=list(words.get_feature_names_out()), characters=list(characters.get_feature_names_out())
        )
        (folder / "vocabulary.json").write_bytes(msgspec.json.encode(vocabulary))
        save_file(
            {
                "weights": self._weights.astype(np.float16),
                "bias": self._bias,
                "idf_words": words.idf_.astype(np.float32),
                "idf_characters": characters.idf_.astype(np.float32),
            },
            folder / "weights.safetensors",
        )
        (folder / "labels.json").write_bytes(msgspec.json.encode(self.labels))
        (folder / "fast_model.json").write_bytes(
            msgspec.json.format(msgspec.json.encode(self.settings), indent=2)
        )

    @property
    def taxonomy_version(self) -> str:
        """Version of the taxonomy that the labels come from."""
        return self.settings.taxonomy_version

    def with_temperature(self, temperature: float) -> FastModel:
        """The same model with another temperature."""
        settings = msgspec.structs.replace(self.settings, temperature=temperature)
        return FastModel(self._vectorisers, self._weights, self._bias, self.labels, settings)

    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Margins of every category, float32 (texts, classes)."""
        result = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for start in range(0, len(texts), _CHUNK_TEXTS):
            chunk = texts[start : start + _CHUNK_TEXTS]
            result[start : start + len(chunk)] = _features(self._vectorisers, chunk) @ self._weights
        result += self._bias
        return result

    def predict_probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes)."""
        return softmax(self.predict_logits(texts) / self.settings.temperature)


def train_fast_model(context: StageContext, parameters: FastModelParameters) -> dict[str, Any]:
    """Train, calibrate, write the folder; returns its metrics.

    Raises:
        InputError: the sample has no training or validation offers, or the teacher's labels are not
            of this sample.
    """
    taxonomy_folder, sample = context.input("catalog_taxonomy"), context.input("training_sample")
    training, validation = read_labelled(sample, "train"), read_labelled(sample, "validation")
    pseudo_texts, pseudo_categories, pseudo_weights = _pseudo_labelled(context, parameters)
    labels = sorted({*training.categories, *pseudo_categories})
    texts = training.texts + pseudo_texts
    targets = targets_of(labels, training.categories + pseudo_categories)
    weights = np.concatenate([training.weights, pseudo_weights])
    context.progress.say(
        f"{len(training.texts):,} labelled offers and {len(pseudo_texts):,} labelled by the teacher, "
        f"{len(labels):,} categories"
    )
    vectorisers = _vectorisers(max_features=parameters.max_features)
    for vectoriser in vectorisers:
        vectoriser.fit(texts)
    features = _features(vectorisers, texts)
    context.progress.say(f"{features.shape[1]:,} n-grams, {features.nnz / len(texts):.0f} in an offer")
    coefficients, bias = _fit(features, targets, weights, len(labels), parameters, context.progress)
    settings = FastModelSettings(
        text_version=TEXT_VERSION, taxonomy_version=short_version(read_manifest(taxonomy_folder).digest)
    )
    model = FastModel(vectorisers, coefficients, bias, labels, settings)
    logits = model.predict_logits(validation.texts)
    temperature = fit_temperature(logits, targets_of(labels, validation.categories))
    figures = validation_figures(logits / temperature, labels, validation.categories)
    model.with_temperature(temperature).save(context.output)
    shutil.copyfile(taxonomy_folder / "taxonomy.parquet", context.output / "taxonomy.parquet")
    return {
        "rows": len(texts),
        "labelled_rows": len(training.texts),
        "pseudo_labelled_rows": len(pseudo_texts),
        "categories": len(labels),
        "features": int(features.shape[1]),
        **{f"validation_{name}": round(value, 6) for name, value in figures.items()},
        "validation_rows": len(validation.texts),
        "temperature": round(temperature, 4),
        "size_bytes": sum(path.stat().st_size for path in context.output.iterdir()),
    }


def _pseudo_labelled(
    context: StageContext, parameters: FastModelParameters
) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Unlabelled offers of which the teacher is sure: texts, its categories, its confidence."""
    sample, label_folder = context.input("training_sample"), context.input("teacher_labels")
    unlabelled = read_unlabelled(sample)
    teacher = read_teacher_labels(label_folder, "unlabelled")
    check_same_offers(teacher, unlabelled.offer_ids, sample)
    if not unlabelled.texts or parameters.pseudo_label_confidence >= 1:
        return [], [], np.empty(0)
    teacher_classes = msgspec.json.decode((label_folder / "labels.json").read_bytes(), type=list[str])
    confidence = teacher.confidence
    sure = np.flatnonzero(confidence >= parameters.pseudo_label_confidence)
    categories = [teacher_classes[index] for index in teacher.top_indices[sure, 0]]
    return [unlabelled.texts[row] for row in sure], categories, confidence[sure].astype(np.float64)


def _vectorisers(
    *, max_features: int | None = None, words: list[str] | None = None, characters: list[str] | None = None
) -> tuple[TfidfVectorizer, TfidfVectorizer]:
    """Vectorisers to be fitted with ``max_features``, or with the n-grams of a stored model."""
    of_words = round(max_features * _WORD_SHARE) if max_features else None
    of_characters = max_features - of_words if max_features and of_words else None
    common: dict[str, Any] = {"sublinear_tf": True, "dtype": np.float32}
    return (
        TfidfVectorizer(
            ngram_range=(1, 2),
            token_pattern=r"(?u)\b\w+\b",
            max_features=of_words,
            vocabulary=words,
            **common,
        ),
        TfidfVectorizer(
            analyzer="char_wb",
            ngram_range=(3, 5),
            max_features=of_characters,
            vocabulary=characters,
            **common,
        ),
    )


def _features(
    vectorisers: tuple[TfidfVectorizer, TfidfVectorizer], texts: Sequence[str]
) -> sparse.csr_matrix:
    """Sparse float32 (texts, features): words first, then characters."""
    return sparse.hstack([vectoriser.transform(texts) for vectoriser in vectorisers], format="csr")


def _fit(
    features: sparse.csr_matrix,
    targets: NDArray[np.int64],
    row_weights: NDArray[np.float64],
    classes: int,
    parameters: FastModelParameters,
    progress: Progress,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One support vector machine per category against the rest.

    Returns:
        Weights (features, classes) and bias (classes,), float32.
    """
    weights = np.zeros((features.shape[1], classes), dtype=np.float32)
    bias = np.zeros(classes, dtype=np.float32)
    if classes == 1:
        return weights, bias

    # One after the other: the solver draws from one random generator per process, so threads would make
    # every training a little different, and they gained next to nothing.
    with progress.bar("training", classes, "categories") as bar:
        for row in range(classes):
            machine = LinearSVC(
                C=parameters.regularisation, tol=_TOLERANCE, random_state=parameters.seed, dual=True
            )
            machine.fit(features, targets == row, sample_weight=row_weights)
            weights[:, row], bias[row] = machine.coef_[0], machine.intercept_[0]
            bar.update(1)
    return weights, bias

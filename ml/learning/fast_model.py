"""Stage ``fast_checkpoint``: the traditional model, n-grams and a linear classifier.

It answers tens of thousands of offers a second where the transformer answers hundreds, and is the baseline
that a transformer has to beat. Two sets of support vector machines learn separately, one from titles and one
from whole texts, and a mean of their margins decides: on real offers that is better than either, and better
than one set that sees all features at once. Both learn from the labelled offers and from the teacher's word
on labelled and unlabelled ones. Needs no torch; the model at work is :mod:`ml.serving.fast_model`, and needs
no scikit-learn.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, TypeVar

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import sparse
from sklearn.svm import LinearSVC
from sklearn.utils.extmath import randomized_svd

from ml.artifacts import read_manifest, short_version
from ml.learning.calibration import fit_temperature, targets_of, validation_figures
from ml.learning.labelling import TeacherLabels, check_same_offers, read_teacher_labels
from ml.learning.training_data import read_labelled, read_unlabelled, strings
from ml.offers import TEXT_VERSION
from ml.progress import Progress
from ml.runner import StageContext
from ml.serving.fast_model import (
    READINGS,
    TEXTS_AT_ONCE,
    FastModel,
    FastModelSettings,
    Reading,
    count_pairs,
    count_words,
    places_of,
    words_read,
)
from ml.serving.ngrams import Vocabulary, ngrams_of, read_words
from ml.stages import FastModelParameters

_SHARES = {"words": 0.2, "pairs": 0.3, "characters": 0.5}
"""Of the features, by kind."""
_LEAST_OFFERS = {"words": 1, "pairs": 2, "characters": 2}
"""A feature is kept if so many offers have it."""
_SCALES = {"words": 1.0, "pairs": 0.7, "characters": 0.45}
"""What a feature of each kind counts beside its inverse document frequency."""

_READING_SHARES = {"title": 0.4, "text": 0.6}
"""Of the margins; on real offers of unseen shops anything from 0.3 to 0.4 for titles does as well."""

_PROJECTED_TEXTS = 20_000
_Item = TypeVar("_Item", str, tuple[str, str])

_TOLERANCE = 0.2
"""Where the solver stops; tighter takes longer and classifies no better."""
_CLASSES_AT_ONCE = 32
"""Categories per call of the solver, which copies all features each time."""
_LEAST_PROBABILITY = 0.05
"""A category that the teacher finds less likely is left out."""


class Examples(msgspec.Struct, frozen=True):
    """What is learned from: some texts have several categories, which share their weight."""

    texts: list[str]
    rows: NDArray[np.int64]
    """(examples,): which text."""
    targets: NDArray[np.int64]
    """(examples,): which category."""
    weights: NDArray[np.float64]
    """(examples,): what it counts."""


def train_fast_model(context: StageContext, parameters: FastModelParameters) -> dict[str, Any]:
    """Train, calibrate, write the folder; returns its metrics.

    Raises:
        InputError: the sample has no training or validation offers, or the teacher's labels are not
            of this sample.
    """
    taxonomy_folder, sample = context.input("catalog_taxonomy"), context.input("training_sample")
    examples, labels, counts = _examples(context, parameters)
    validation = read_labelled(sample, "validation")
    context.progress.say(
        f"{counts['labelled_rows']:,} labelled offers and {counts['pseudo_labelled_rows']:,} labelled by the "
        f"teacher, {len(labels):,} categories"
    )
    settings = FastModelSettings(
        text_version=TEXT_VERSION, taxonomy_version=short_version(read_manifest(taxonomy_folder).digest)
    )
    model = fit_fast_model(examples, labels, settings, parameters, context.progress)
    logits = model.predict_logits(validation.texts)
    temperature = fit_temperature(logits, targets_of(labels, validation.categories))
    figures = validation_figures(logits / temperature, labels, validation.categories)
    model.with_temperature(temperature).save(context.output)
    shutil.copyfile(taxonomy_folder / "taxonomy.parquet", context.output / "taxonomy.parquet")
    return {
        "rows": len(examples.texts),
        **counts,
        "categories": len(labels),
        "features": sum(len(reading.vocabulary) for reading in model.readings.values()),
        **{f"validation_{name}": round(value, 6) for name, value in figures.items()},
        "validation_rows": len(validation.texts),
        "temperature": round(temperature, 4),
        "size_bytes": sum(path.stat().st_size for path in context.output.iterdir()),
    }


def fit_fast_model(
    examples: Examples,
    labels: Sequence[str],
    settings: FastModelSettings,
    parameters: FastModelParameters,
    progress: Progress,
) -> FastModel:
    """The model that the examples teach, with the temperature that ``settings`` say."""
    vocabularies: dict[str, Vocabulary] = {}
    values, weights = dict[str, NDArray[np.float32]](), dict[str, NDArray[np.float32]]()
    bias = -parameters.class_balance * _log_shares(examples, len(labels))
    for name in READINGS:
        vocabularies[name], values[name] = _vocabulary(name, examples.texts, parameters.max_features)
        features = features_of(name, vocabularies[name], values[name], examples.texts)
        progress.say(
            f"{name}: {features.shape[1]:,} n-grams, {features.nnz / features.shape[0]:.0f} in an offer"
        )
        weights[name], own_bias = _fit(features, examples, len(labels), parameters, progress)
        weights[name] *= _READING_SHARES[name] * values[name][:, None]
        bias += _READING_SHARES[name] * own_bias
    readings = {
        name: Reading(vocabularies[name], weights[name].astype(np.float16), values[name] ** 2)
        for name in READINGS
    }
    model = FastModel(readings, bias.astype(np.float32), None, labels, settings)
    if not 0 < parameters.rank < len(labels):
        return model
    progress.say(f"margins of {len(labels):,} categories from {parameters.rank:,} directions")
    return of_rank(model, parameters.rank, examples.texts, parameters.seed)


def of_rank(model: FastModel, rank: int, texts: Sequence[str], seed: int) -> FastModel:
    """The same model, its margins projected on the directions in which those of ``texts`` vary most.

    A word's vector then has ``rank`` numbers instead of one per category. The projection is the best one for
    the margins of these texts (Eckart and Young, 1936), found with random vectors (Halko et al., 2011).

    Args:
        model: With a vector per category.
        rank: Fewer than it has categories.
        texts: Offer texts; some thousands are looked at.
        seed: Of the choice and the vectors.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(texts))[:_PROJECTED_TEXTS]
    margins = model.predict_logits([texts[row] for row in chosen]) - model.bias
    _, _, directions = randomized_svd(margins, rank, n_iter=2, random_state=seed)
    readings = {
        name: Reading(reading.vocabulary, _projected(reading.vectors, directions), reading.squares)
        for name, reading in model.readings.items()
    }
    return FastModel(readings, model.bias, directions.astype(np.float32), model.labels, model.settings)


def _projected(
    vectors: NDArray[np.float16], directions: NDArray[np.floating], rows: int = 8192
) -> NDArray[np.float16]:
    """Coordinates (features, rank) of vectors (features, classes), so many rows at once."""
    parts = [
        (vectors[start : start + rows].astype(np.float32) @ directions.T).astype(np.float16)
        for start in range(0, len(vectors), rows)
    ]
    return np.concatenate(parts)


def _log_shares(examples: Examples, classes: int) -> NDArray[np.float64]:
    """Logarithm of each category's share of the examples, (classes,)."""
    counts = np.bincount(examples.targets, examples.weights, minlength=classes)
    result: NDArray[np.float64] = np.log(np.maximum(counts, 1e-9) / counts.sum())
    return result


def features_of(
    reading: str, vocabulary: Vocabulary, values: NDArray[np.float32], texts: Sequence[str]
) -> sparse.csr_matrix:
    """What a linear classifier learns from, float32 (texts, features), rows of length about 1.

    The length that :mod:`ml.serving.fast_model` divides by is that of the words' vectors side by side, as if
    no n-gram occurred in two words: so it is a sum over words too.

    Args:
        reading: Of ``READINGS``.
        vocabulary: Its features.
        values: (features,): what each counts.
        texts: Offer texts.
    """
    chunks = [
        _features_of(reading, vocabulary, values, texts[start : start + TEXTS_AT_ONCE])
        for start in range(0, len(texts), TEXTS_AT_ONCE)
    ]
    return sparse.vstack(chunks, format="csr", dtype=np.float32)


def _features_of(
    reading: str, vocabulary: Vocabulary, values: NDArray[np.float32], texts: Sequence[str]
) -> sparse.csr_matrix:
    words = words_read(reading, read_words(texts))
    counted, pairs = count_words(words, len(texts)), count_pairs(vocabulary, words, len(texts))
    distinct, columns = np.unique(counted.items, return_inverse=True)
    word_features = vocabulary.of_words(words.chosen(places_of(distinct, words.keys))) @ sparse.diags(values)
    in_text = sparse.csr_matrix((counted.weights, columns, counted.ends), (len(texts), len(distinct)))
    pair_features = sparse.csr_matrix(
        (pairs.weights * values[pairs.items], pairs.items, pairs.ends), (len(texts), len(vocabulary))
    )
    squares = in_text.power(2) @ word_features.power(2).sum(axis=1) + pair_features.power(2).sum(axis=1)
    lengths = np.sqrt(np.asarray(squares)).ravel()
    scale = np.divide(1.0, lengths, out=np.ones_like(lengths), where=lengths > 0)
    return (sparse.diags(scale) @ (in_text @ word_features + pair_features)).tocsr()


def _vocabulary(
    reading: str, texts: Sequence[str], max_features: int
) -> tuple[Vocabulary, NDArray[np.float32]]:
    """The most frequent features of a reading, and what each counts."""
    words, pairs, characters = Counter[str](), Counter[tuple[str, str]](), Counter[str]()
    ngrams: dict[str, list[str]] = {}
    for text in _sequences(reading, texts):
        distinct = set(text)
        words.update(distinct)
        pairs.update(set(pairwise(text)))
        for word in distinct - ngrams.keys():
            ngrams[word] = ngrams_of(word)
        characters.update(set().union(*(ngrams[word] for word in distinct)))
    kept_words = _most_frequent(words, "words", max_features)
    kept_pairs = _most_frequent(pairs, "pairs", max_features)
    kept_characters = _most_frequent(characters, "characters", max_features)
    kept: dict[str, list[int]] = {
        "words": list(kept_words.values()),
        "pairs": list(kept_pairs.values()),
        "characters": list(kept_characters.values()),
    }
    values = [
        _SCALES[kind] * (1 + np.log((1 + len(texts)) / (1 + np.array(counts, dtype=np.float64))))
        for kind, counts in kept.items()
    ]
    vocabulary = Vocabulary(list(kept_words), list(kept_pairs), list(kept_characters))
    return vocabulary, np.concatenate(values).astype(np.float32)


def _sequences(reading: str, texts: Sequence[str]) -> Iterator[list[str]]:
    """The words of each text that has any."""
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        words = words_read(reading, read_words(texts[start : start + TEXTS_AT_ONCE]))
        numbered = zip(words.texts.tolist(), words.strings(), strict=True)
        for _, group in groupby(numbered, key=itemgetter(0)):
            yield [word for _, word in group]


def _most_frequent(offers: Counter[_Item], kind: str, max_features: int) -> dict[_Item, int]:
    """Features of a kind with the number of offers that have them; of equally frequent ones the first."""
    enough = [item for item in offers.items() if item[1] >= _LEAST_OFFERS[kind]]
    enough.sort(key=lambda item: (-item[1], item[0]))
    return dict(enough[: round(max_features * _SHARES[kind])])


def _fit(
    features: sparse.csr_matrix,
    examples: Examples,
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

    repeated = features[examples.rows].astype(np.float64)
    # One after the other: the solver draws from one random generator per process, so threads would make
    # every training a little different, and they gained next to nothing.
    with progress.bar("training", classes, "categories") as bar:
        for start in range(0, classes, _CLASSES_AT_ONCE):
            end = min(start + _CLASSES_AT_ONCE, classes)
            is_here = (examples.targets >= start) & (examples.targets < end)
            machine = LinearSVC(
                C=parameters.regularisation, tol=_TOLERANCE, random_state=parameters.seed, dual=True
            )
            machine.fit(repeated, np.where(is_here, examples.targets, -1), sample_weight=examples.weights)
            # Of two categories (or one and the rest) there is one machine, for the second.
            signs = [-1, 1] if len(machine.classes_) == 2 else [1] * len(machine.classes_)
            for number, (target, sign) in enumerate(zip(machine.classes_, signs, strict=True)):
                row = 0 if len(machine.classes_) == 2 else number
                if target >= 0:
                    weights[:, target] = sign * machine.coef_[row]
                    bias[target] = sign * machine.intercept_[row]
            bar.update(end - start)
    return weights, bias


def _examples(
    context: StageContext, parameters: FastModelParameters
) -> tuple[Examples, list[str], dict[str, int]]:
    """What to learn from, the categories, and how many offers are of which kind."""
    sample, label_folder = context.input("training_sample"), context.input("teacher_labels")
    labelled, unlabelled = read_labelled(sample, "train"), read_unlabelled(sample)
    rows = pq.read_table(sample / "labelled.parquet", columns=["offer_id", "split"])
    on_labelled = read_teacher_labels(label_folder, "labelled")
    on_unlabelled = read_teacher_labels(label_folder, "unlabelled")
    check_same_offers(on_labelled, strings(rows["offer_id"]), sample)
    check_same_offers(on_unlabelled, unlabelled.offer_ids, sample)
    teacher_labels = msgspec.json.decode((label_folder / "labels.json").read_bytes(), type=list[str])

    is_training = np.array(strings(rows["split"])) == "train"
    sure = np.flatnonzero(on_unlabelled.confidence >= parameters.pseudo_label_confidence)
    if parameters.pseudo_label_confidence >= 1:
        sure = sure[:0]
    parts = [
        (np.arange(len(labelled.texts)), labelled.categories, labelled.weights * parameters.label_weight),
        _guesses(on_labelled, np.flatnonzero(is_training), teacher_labels, 1 - parameters.label_weight),
        _guesses(on_unlabelled, sure, teacher_labels, 1.0),
    ]
    offsets = (0, 0, len(labelled.texts))
    texts = labelled.texts + [unlabelled.texts[row] for row in sure]
    categories = [category for _, some, _ in parts for category in some]
    labels = sorted(set(categories))
    examples = Examples(
        texts=texts,
        rows=np.concatenate([part[0] + offset for part, offset in zip(parts, offsets, strict=True)]),
        targets=targets_of(labels, categories),
        weights=np.concatenate([part[2] for part in parts]),
    )
    counts = {"labelled_rows": len(labelled.texts), "pseudo_labelled_rows": len(sure)}
    return examples, labels, counts


def _guesses(
    teacher: TeacherLabels, offers: NDArray[np.int64], labels: Sequence[str], weight: float
) -> tuple[NDArray[np.int64], list[str], NDArray[np.float64]]:
    """Every category that the teacher finds likely: which of ``offers``, category, weight."""
    if not weight:
        return np.empty(0, np.int64), [], np.empty(0)
    probabilities = teacher.probabilities[offers].astype(np.float64)
    numbers, ranks = np.nonzero(probabilities >= _LEAST_PROBABILITY)
    categories = [labels[target] for target in teacher.top_indices[offers][numbers, ranks]]
    return numbers, categories, weight * probabilities[numbers, ranks]

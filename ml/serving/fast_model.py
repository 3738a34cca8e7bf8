"""The traditional model at work: n-grams and a linear classifier, tens of thousands of offers a second.

Two readings of an offer's text, its title and all of it, are each a linear function of the features of
:mod:`ml.serving.ngrams`; what they find is added up. The vectors of a word's n-grams are summed once, when
the word is first met, and kept in a table: after that a text costs a look-up and one row per word. The
margins of class ``c`` for a text with distinct words and pairs ``x`` are::

    bias[c] + sum over readings of  sum(t[x] * vector[x][c]) / sqrt(sum(t[x] ** 2 * square[x]))

where ``t`` is 1 for a pair and ``1 + log(n)`` for a word that is there ``n`` times. A text has the same
margins, to the last bit, beside any other texts and whatever was asked before: its sums run in the order of
its words' keys, and a word's in the order of its features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse

from ml.errors import InputError
from ml.offers import check_text_version
from ml.serving.key_table import KeyTable
from ml.serving.ngrams import KEY_BITS, Vocabulary, Words, read_words

_SETTINGS_FILE, _LABELS_FILE = "fast_model.json", "labels.json"
_VOCABULARY_FILE, _WEIGHTS_FILE = "vocabulary.txt", "weights.safetensors"

READINGS = ("title", "text")
"""What is read: the title alone, and everything."""

TABLE_BYTES = 96 * 2**20
"""Of the words of one reading that are remembered, unless one is asked for another bound."""

TEXTS_AT_ONCE = 1 << (63 - KEY_BITS)
"""The number of a text and a key fit into one signed number of 64 bits."""
_COUNT_WEIGHTS = (1 + np.log(np.maximum(np.arange(512), 1))).astype(np.float32)
"""What a word counts by how often a text has it; looked up, so that it always has the same bits."""
_WORDS_AT_ONCE = 4096
"""New words whose vectors are summed at once; bounds the vectors of n-grams in full precision."""
_BLOCK_TEXTS = 64
"""A product of matrices rounds by its shape, so it always has this one."""


class VocabularySize(msgspec.Struct, frozen=True, kw_only=True):
    """How many lines of ``vocabulary.txt`` a reading has, in this order."""

    words: int
    pairs: int
    characters: int


class FastModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``fast_model.json``: everything beside vocabulary and weights that a prediction depends on."""

    text_version: str
    taxonomy_version: str
    temperature: float = 1.0
    vocabulary: dict[str, VocabularySize] = {}
    """By reading; written by :meth:`FastModel.save`."""


class Reading(msgspec.Struct, frozen=True):
    """What one reading knows."""

    vocabulary: Vocabulary
    vectors: NDArray[np.float16]
    """(features, width): what a feature adds to the margins, or to their coordinates."""
    squares: NDArray[np.float32]
    """(features,): what it adds to the square of the text's length."""


class FastModel:
    """Offer texts in, margins and calibrated probabilities out."""

    def __init__(
        self,
        readings: dict[str, Reading],
        bias: NDArray[np.float32],
        directions: NDArray[np.float32] | None,
        labels: Sequence[str],
        settings: FastModelSettings,
        table_bytes: int = TABLE_BYTES,
    ) -> None:
        """Put a model together.

        Args:
            readings: One for each of :data:`READINGS`.
            bias: (classes,).
            directions: (width, classes) that turns sums of vectors into margins; None: they are margins.
            labels: Category ids, in the order of the output.
            settings: What to store beside the weights.
            table_bytes: What the words that are remembered may take, per reading.
        """
        self.labels = list(labels)
        self.settings = settings
        self.readings = readings
        self.bias = bias
        self.directions = directions
        self._tables = {name: _Table(reading, table_bytes) for name, reading in readings.items()}
        self._width = len(bias) if directions is None else len(directions)
        self._lock = Lock()

    @classmethod
    def load(cls, folder: Path, table_bytes: int = TABLE_BYTES) -> FastModel:
        """Read a model from the folder that :meth:`save` wrote.

        Args:
            folder: With the four files.
            table_bytes: What the words that are remembered may take, per reading.

        Raises:
            InputError: a file is missing or damaged, or the model was trained on offer texts that
                this version makes differently.
        """
        weights_path = folder / _WEIGHTS_FILE
        try:
            settings = msgspec.json.decode((folder / _SETTINGS_FILE).read_bytes(), type=FastModelSettings)
            labels = msgspec.json.decode((folder / _LABELS_FILE).read_bytes(), type=list[str])
            lines = (folder / _VOCABULARY_FILE).read_text(encoding="utf-8").split("\n")
            tensors = load_file(weights_path)
            readings = _readings(lines, settings.vocabulary, tensors)
            bias, directions = tensors["bias"], tensors.get("directions")
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is not a fast model: {error.filename or weights_path} is missing"
            ) from None
        except (msgspec.DecodeError, SafetensorError, UnicodeDecodeError, KeyError, ValueError) as error:
            raise InputError(f"{folder} is damaged: {error}; delete the folder and make it again") from None
        check_text_version(folder, settings.text_version)
        return cls(readings, bias, directions, labels, settings, table_bytes)

    def save(self, folder: Path) -> None:
        """Write vocabulary, weights (half precision), labels and settings into ``folder``."""
        tensors: dict[str, NDArray[np.floating]] = {"bias": self.bias}
        if self.directions is not None:
            tensors["directions"] = self.directions
        lines: list[str] = []
        sizes = {}
        for name, reading in self.readings.items():
            known = reading.vocabulary
            pairs = [f"{first} {second}" for first, second in known.pairs]
            lines += known.words + pairs + known.characters
            sizes[name] = VocabularySize(
                words=len(known.words), pairs=len(pairs), characters=len(known.characters)
            )
            tensors[f"{name}.vectors"], tensors[f"{name}.squares"] = reading.vectors, reading.squares
        settings = msgspec.structs.replace(self.settings, vocabulary=sizes)
        (folder / _VOCABULARY_FILE).write_text("\n".join(lines), encoding="utf-8", newline="\n")
        # safetensors writes memory as it lies, also of an array whose columns lie one after the other.
        rows_in_order = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(rows_in_order, folder / _WEIGHTS_FILE)
        (folder / _LABELS_FILE).write_bytes(msgspec.json.encode(self.labels))
        (folder / _SETTINGS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(settings), indent=2))

    @property
    def taxonomy_version(self) -> str:
        """Version of the taxonomy that the labels come from."""
        return self.settings.taxonomy_version

    def with_temperature(self, temperature: float) -> FastModel:
        """The same model with another temperature."""
        settings = msgspec.structs.replace(self.settings, temperature=temperature)
        return FastModel(self.readings, self.bias, self.directions, self.labels, settings)

    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Margins of every category, float32 (texts, classes)."""
        result = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        with self._lock:
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                chunk = texts[start : start + TEXTS_AT_ONCE]
                result[start : start + len(chunk)] = self._margins(chunk)
        result += self.bias
        return result

    def predict_probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes)."""
        result = self.predict_logits(texts)
        for start in range(0, len(texts), TEXTS_AT_ONCE):  # rows that fit into the processor's cache
            rows = result[start : start + TEXTS_AT_ONCE]
            rows -= rows.max(axis=1, keepdims=True)
            rows /= np.float32(self.settings.temperature)
            np.exp(rows, out=rows)
            rows /= rows.sum(axis=1, keepdims=True)
        return result

    def word_contributions(self, text: str, label: str) -> list[tuple[str, float]]:
        """What each word of ``text`` says for ``label``; together its margin without the bias.

        What a pair says is shared by its two words.

        Returns:
            Words (lower case, distinct) in the order of the text, with their parts of the margin.

        Raises:
            InputError: the model has no such label.
        """
        if label not in self.labels:
            raise InputError(f"the fast model has no category {label!r}; it was trained without")
        column = self.labels.index(label)
        direction = None if self.directions is None else self.directions[:, column].astype(np.float64)
        words = read_words([text])
        total: defaultdict[str, float] = defaultdict(float)
        for name, reading in self.readings.items():
            vectors = reading.vectors[:, column] if direction is None else reading.vectors @ direction
            part = words_read(name, words)
            for word, margin in zip(part.strings(), _contributions(reading, part, vectors), strict=True):
                total[word] += margin
        return [(word, total[word]) for word in dict.fromkeys(words.strings())]

    def _margins(self, texts: Sequence[str]) -> NDArray[np.float32]:
        words = read_words(texts)
        sums = np.zeros((len(texts), self._width), dtype=np.float32)
        for name, table in self._tables.items():
            sums += table.sums(words_read(name, words), len(texts))
        return sums if self.directions is None else _product(sums, self.directions)


def words_read(reading: str, words: Words) -> Words:
    """Those of the words that a reading of :data:`READINGS` has."""
    return words.chosen(words.is_title) if reading == "title" else words


class Counts(msgspec.Struct, frozen=True):
    """Distinct items of texts, one text after the other."""

    items: NDArray[np.int64]
    """(items,): keys of words, or features of pairs; ascending within a text."""
    weights: NDArray[np.float32]
    """(items,): what each counts."""
    ends: NDArray[np.int64]
    """(texts + 1,); text ``i`` has ``items[ends[i] : ends[i + 1]]``."""

    @property
    def texts(self) -> NDArray[np.int64]:
        """(items,): number of the text of each."""
        return np.repeat(np.arange(len(self.ends) - 1), np.diff(self.ends))


def count_words(words: Words, texts: int) -> Counts:
    """The distinct words of each of so many texts."""
    return _counts((words.texts << KEY_BITS) | words.keys, KEY_BITS, texts, _COUNT_WEIGHTS)


def count_pairs(vocabulary: Vocabulary, words: Words, texts: int) -> Counts:
    """The distinct known pairs of each of so many texts."""
    features, places = vocabulary.of_pairs(words)
    bits = len(vocabulary).bit_length()
    return _counts((words.texts[places] << bits) | features, bits, texts, np.ones(2, dtype=np.float32))


class _Table:
    """Vectors of the words and pairs that one reading has met, in bounded memory."""

    def __init__(self, reading: Reading, table_bytes: int) -> None:
        self._reading = reading
        self._width = reading.vectors.shape[1]
        self._capacity = max(1, table_bytes // (4 * self._width))
        self._forget(self._capacity)

    def sums(self, words: Words, texts: int) -> NDArray[np.float32]:
        """Sums of the vectors of words and pairs over the length of the text; float32 (texts, width).

        Args:
            words: Of all texts.
            texts: How many these are.
        """
        distinct = count_words(words, texts)
        pairs = count_pairs(self._reading.vocabulary, words, texts)
        rows, pair_rows = self._rows(words, distinct.items, pairs.items)
        sums = self._weighted_sums(rows, distinct) + self._weighted_sums(pair_rows, pairs)
        squares = self._squared_lengths(rows, distinct) + self._squared_lengths(pair_rows, pairs)
        lengths = np.sqrt(squares).astype(np.float32)[:, None]
        np.divide(sums, lengths, out=sums, where=lengths > 0)
        return sums

    def _rows(
        self, words: Words, keys: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Where the vectors of words, by key, and of pairs, by feature, are; new ones are learned."""
        rows, pair_rows = self._row_of_word.find(keys), self._row_of_pair[pairs]
        new, new_pairs = np.unique(keys[rows < 0]), np.unique(pairs[pair_rows < 0])
        if not len(new) and not len(new_pairs):
            return rows, pair_rows
        if self._used + len(new) + len(new_pairs) > self._capacity:
            new, new_pairs = np.unique(keys), np.unique(pairs)
            self._forget(max(self._capacity, len(new) + len(new_pairs)))
        self._learn_words(words.chosen(places_of(new, words.keys)))
        self._learn_pairs(new_pairs)
        return self._row_of_word.find(keys), self._row_of_pair[pairs]

    def _forget(self, rows: int) -> None:
        """Begin again with room for so many."""
        self._used = 0
        self._row_of_word = KeyTable(rows)
        self._row_of_pair = np.full(len(self._reading.vocabulary), -1, dtype=np.int32)
        # Memory is taken page by page, as rows are written.
        self._vectors = np.empty((rows, self._width), dtype=np.float32)
        self._squares = np.empty(rows, dtype=np.float64)

    def _learn_words(self, words: Words) -> None:
        for start in range(0, len(words), _WORDS_AT_ONCE):
            some = words.chosen(np.arange(start, min(start + _WORDS_AT_ONCE, len(words))))
            rows = self._next_rows(len(some))
            self._vectors[rows], self._squares[rows] = _word_vectors(self._reading, some)
            self._row_of_word.insert(some.keys, np.arange(rows.start, rows.stop))

    def _learn_pairs(self, pairs: NDArray[np.int64]) -> None:
        rows = self._next_rows(len(pairs))
        self._vectors[rows], self._squares[rows] = self._reading.vectors[pairs], self._reading.squares[pairs]
        self._row_of_pair[pairs] = np.arange(rows.start, rows.stop)

    def _next_rows(self, count: int) -> slice:
        self._used += count
        return slice(self._used - count, self._used)

    def _weighted_sums(self, rows: NDArray[np.integer], counts: Counts) -> NDArray[np.float32]:
        chosen = sparse.csr_matrix(
            (counts.weights, rows, counts.ends), shape=(len(counts.ends) - 1, len(self._vectors))
        )
        result: NDArray[np.float32] = chosen @ self._vectors
        return result

    def _squared_lengths(self, rows: NDArray[np.integer], counts: Counts) -> NDArray[np.float64]:
        squares = counts.weights.astype(np.float64) ** 2 * self._squares[rows]
        result: NDArray[np.float64] = np.bincount(counts.texts, squares, len(counts.ends) - 1).astype(
            np.float64
        )
        return result


def _counts(places: NDArray[np.int64], bits: int, texts: int, weights: NDArray[np.float32]) -> Counts:
    """Distinct items, of which ``places`` has text and item in the upper and lower ``bits``."""
    places = np.sort(places)
    firsts = np.flatnonzero(np.diff(places, prepend=-1))
    counts = np.minimum(np.diff(firsts, append=len(places)), len(weights) - 1)
    chosen = places[firsts]
    ends = np.zeros(texts + 1, dtype=np.int64)
    np.cumsum(np.bincount(chosen >> bits, minlength=texts), out=ends[1:])
    return Counts(chosen & ((1 << bits) - 1), weights[counts], ends)


def places_of(keys: NDArray[np.int64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    """A place where each of the ascending ``keys`` stands in ``among``."""
    if not len(keys):
        return np.empty(0, dtype=np.int64)
    nearest = np.minimum(np.searchsorted(keys, among), len(keys) - 1)
    matches = np.flatnonzero(keys[nearest] == among)
    places = np.empty(len(keys), dtype=np.int64)
    places[nearest[matches]] = matches
    return places


def _word_vectors(reading: Reading, words: Words) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Vectors (words, width) and squares (words,) of words with their n-grams."""
    brought = reading.vocabulary.of_words(words)
    squares = brought.astype(np.float64).power(2) @ reading.squares.astype(np.float64)
    features, places = np.unique(brought.indices, return_inverse=True)
    compact = sparse.csr_matrix((brought.data, places, brought.indptr), shape=(len(words), len(features)))
    return compact @ reading.vectors[features].astype(np.float32), squares


def _contributions(reading: Reading, words: Words, vectors: NDArray[np.floating]) -> list[float]:
    """What each word of one text adds to a margin, of which ``vectors`` (features,) is the column."""
    weights = vectors.astype(np.float64)
    _, first, counts = np.unique(words.keys, return_index=True, return_counts=True)
    parts = np.zeros(len(words))
    brought = reading.vocabulary.of_words(words.chosen(first)).astype(np.float64)
    times = _COUNT_WEIGHTS[np.minimum(counts, len(_COUNT_WEIGHTS) - 1)].astype(np.float64)
    parts[first] = times * (brought @ weights)
    features, places = reading.vocabulary.of_pairs(words)
    pairs, one = np.unique(features, return_index=True)
    for shift in (0, 1):
        np.add.at(parts, places[one] + shift, weights[pairs] / 2)
    square = times**2 @ (brought.power(2) @ reading.squares.astype(np.float64))
    length = np.sqrt(square + reading.squares[pairs].sum(dtype=np.float64))
    margins: list[float] = (parts / (length or 1.0)).tolist()
    return margins


def _readings(
    lines: list[str], sizes: dict[str, VocabularySize], tensors: dict[str, NDArray[np.floating]]
) -> dict[str, Reading]:
    """What :meth:`FastModel.save` wrote of each reading.

    Raises:
        KeyError: something is missing.
        ValueError: the files do not fit each other.
    """
    readings, start = {}, 0
    for name in READINGS:
        size = sizes[name]
        parts = []
        for count in (size.words, size.pairs, size.characters):
            parts.append(lines[start : start + count])
            start += count
        words, pairs, characters = parts
        vectors, squares = tensors[f"{name}.vectors"], tensors[f"{name}.squares"]
        vocabulary = Vocabulary(words, [_split(pair) for pair in pairs], characters)
        if not len(vocabulary) == size.words + size.pairs + size.characters == len(vectors) == len(squares):
            raise ValueError(f"{_VOCABULARY_FILE} and {_WEIGHTS_FILE} do not fit each other")
        readings[name] = Reading(vocabulary, vectors, squares)
    return readings


def _split(pair: str) -> tuple[str, str]:
    first, _, second = pair.partition(" ")
    return first, second


def _product(rows: NDArray[np.float32], directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """``rows @ directions``, of which no row depends on the others."""
    padded = np.zeros((-(-len(rows) // _BLOCK_TEXTS) * _BLOCK_TEXTS, rows.shape[1]), dtype=np.float32)
    padded[: len(rows)] = rows
    blocks = [
        padded[start : start + _BLOCK_TEXTS] @ directions for start in range(0, len(padded), _BLOCK_TEXTS)
    ]
    return np.concatenate(blocks)[: len(rows)]

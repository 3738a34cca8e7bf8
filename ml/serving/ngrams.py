"""How the fast model reads texts: words, pairs of neighbouring words, characters within words.

Every feature belongs to one word or one pair, never to the text as a whole. So what a word brings along with
its character n-grams is a sum that can be computed once, and a text is a sum over its words and pairs
(:mod:`ml.serving.fast_model`).

* A *word* is a run of letters, digits and marks of any alphabet; case is folded. A Han character is a word
  of its own, for Chinese and Japanese leave no blanks; two of them are a pair.
* A *pair* is two words that follow each other.
* *Characters* are the distinct n-grams of 3 to 5 characters of a word with a blank at both ends.

Texts are read many at a time, as arrays of code points. Words, pairs and n-grams are told apart by their
*keys*, numbers of 54 bits: polynomials in the code points modulo 2**64 (Karp and Rabin, 1987), then mixed.
Different ones may have the same key: the probability that one of a million different words is taken for
one of a million n-grams of the model is about one in ten thousand.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ml.offers import title_of
from ml.serving.key_table import KeyTable

SHORTEST, LONGEST = 3, 5
"""Characters of an n-gram, with the blanks."""

KEY_BITS = 54

_READ_CHARACTERS = 48
"""N-grams are taken of so much of a word; longer runs are keys and links."""

_TABLE_CODES = 0x20000
"""Code points from here on are Han, as far as anybody writes them."""
_HAN = ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
_BLANK = ord(" ")

_BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2**64."""
_INVERSE = pow(_BASE, -1, 2**64)
_MIX, _SECOND_WORD = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)
_HALF, _SPARE_BITS = np.uint64(32), np.uint64(64 - KEY_BITS)


class Words(msgspec.Struct, frozen=True):
    """The words of some texts in their order, one text after the other."""

    codes: NDArray[np.uint32]
    """(characters,): code points of all texts, case folded."""
    starts: NDArray[np.int64]
    """(words,): where each word starts among them."""
    lengths: NDArray[np.int64]
    """(words,): its characters."""
    texts: NDArray[np.int64]
    """(words,): number of its text."""
    is_title: NDArray[np.bool_]
    """(words,): whether it stands in the title."""
    keys: NDArray[np.int64]
    """(words,): equal for equal words."""

    def __len__(self) -> int:
        return len(self.starts)

    def chosen(self, which: NDArray[np.integer] | NDArray[np.bool_]) -> Words:
        """Some of the words."""
        return Words(
            self.codes,
            self.starts[which],
            self.lengths[which],
            self.texts[which],
            self.is_title[which],
            self.keys[which],
        )

    def strings(self) -> list[str]:
        """The words as text."""
        return [
            self.codes[start : start + length].tobytes().decode("utf-32-le", "surrogatepass")
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        ]

    def pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys of the pairs, and of each the place of its first word."""
        first = np.flatnonzero(self.texts[:-1] == self.texts[1:])
        keys = self.keys.view(np.uint64)
        return _mixed(keys[first] * _MIX + keys[first + 1] * _SECOND_WORD), first

    def ngrams(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Keys of the character n-grams, repeated ones too, and of each the place of its word."""
        lengths = np.minimum(self.lengths, _READ_CHARACTERS)
        padded = lengths + 2
        ends = np.cumsum(padded)
        words = np.repeat(np.arange(len(self)), padded)
        within = np.arange(len(words)) - (ends - padded)[words]
        inner = np.flatnonzero((within > 0) & (within < padded[words] - 1))
        codes = np.full(len(words) + LONGEST, _BLANK, dtype=np.uint64)
        codes[inner] = self.codes[(self.starts[words] + within - 1)[inner]]
        left = padded[words] - within  # characters from here to the end of the word
        powers = _powers(_BASE, LONGEST)
        sums = np.zeros(len(words), dtype=np.uint64)
        keys, places = [], []
        for length in range(1, LONGEST + 1):
            sums += codes[length - 1 : length - 1 + len(words)] * powers[length - 1]
            if length >= SHORTEST:
                fits = left >= length
                keys.append(sums[fits])
                places.append(words[fits])
        return _mixed(np.concatenate(keys)), np.concatenate(places)


def read_words(texts: Sequence[str]) -> Words:
    """The words of ``texts``."""
    codes = _code_points("\n".join([*texts, ""]))  # a break behind the last one too: no word ends the array
    if len(codes) and codes.max() >= _TABLE_CODES:
        is_beyond = codes >= _TABLE_CODES
        folded = _folded()[np.where(is_beyond, 0, codes)]
        folded[is_beyond] = codes[is_beyond]
        is_han = _is_han()[np.where(is_beyond, 0, codes)] | is_beyond
    else:
        folded, is_han = _folded()[codes], _is_han()[codes]
    is_inside = folded != 0
    # Between two characters, the first place being that before the first of them.
    goes_on = np.zeros(len(codes) + 1, dtype=bool)
    goes_on[1:-1] = is_inside[:-1] & is_inside[1:] & ~is_han[:-1] & ~is_han[1:]
    starts = np.flatnonzero(is_inside & ~goes_on[:-1])
    ends = np.flatnonzero(is_inside & ~goes_on[1:]) + 1
    lengths = np.fromiter((len(text) + 1 for text in texts), np.int64, len(texts))
    offsets = np.cumsum(lengths) - lengths
    number = np.repeat(
        np.arange(len(texts)), np.diff(np.searchsorted(starts, np.append(offsets, len(codes))))
    )
    titles = offsets + np.fromiter((len(title_of(text)) for text in texts), np.int64, len(texts))
    return Words(
        folded, starts, ends - starts, number, starts < titles[number], _word_keys(folded, starts, ends)
    )


def ngram_keys(ngrams: Sequence[str]) -> NDArray[np.int64]:
    """The key of each character n-gram, as :meth:`Words.ngrams` has them."""
    codes = np.zeros((len(ngrams), LONGEST), dtype=np.uint64)
    for row, ngram in enumerate(ngrams):
        codes[row, : len(ngram)] = [ord(character) for character in ngram]
    return _mixed((codes * _powers(_BASE, LONGEST)).sum(axis=1))


def ngrams_of(word: str) -> list[str]:
    """The distinct character n-grams of a word."""
    padded = f" {word[:_READ_CHARACTERS]} "
    return list(
        dict.fromkeys(
            padded[start : start + length]
            for length in range(SHORTEST, LONGEST + 1)
            for start in range(len(padded) - length + 1)
        )
    )


class Vocabulary:
    """The features that a model knows: words first, then pairs, then characters."""

    def __init__(
        self, words: Sequence[str], pairs: Sequence[tuple[str, str]], characters: Sequence[str]
    ) -> None:
        """Number the features; all are distinct.

        Raises:
            ValueError: one is not a word, a pair or an n-gram, or there is no telling two apart.
        """
        self.words, self.pairs, self.characters = list(words), list(pairs), list(characters)
        split = read_words([*self.words, *(f"{first} {second}" for first, second in self.pairs)])
        is_pair = split.texts >= len(self.words)
        if len(split) != len(self.words) + 2 * len(self.pairs) or is_pair[: len(self.words)].any():
            raise ValueError("a word of the vocabulary is none, or more than one")
        pair_keys, _ = split.pairs()
        keys = (split.keys[: len(self.words)], pair_keys, ngram_keys(self.characters))
        if any(len(np.unique(some)) < len(some) for some in keys):
            raise ValueError("two n-grams of the vocabulary have one key")
        self._words, self._pairs, self._characters = map(_numbered, keys)

    def __len__(self) -> int:
        return len(self.words) + len(self.pairs) + len(self.characters)

    def of_words(self, words: Words) -> sparse.csr_matrix:
        """What each word brings along, 1 in float32 (words, features): itself, and its character n-grams."""
        own = self._words.find(words.keys)
        knows = np.flatnonzero(own >= 0)
        keys, places = words.ngrams()
        features = self._characters.find(keys)
        is_known = features >= 0
        # An n-gram that a word has twice counts once.
        distinct = np.unique(places[is_known] * len(self) + features[is_known])
        places, features = np.divmod(distinct, max(len(self), 1))
        features += len(self.words) + len(self.pairs)
        rows = np.concatenate([knows, places])
        columns = np.concatenate([own[knows], features])[np.argsort(rows, kind="stable")]
        ends = np.zeros(len(words) + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=len(words)), out=ends[1:])
        return sparse.csr_matrix(
            (np.ones(len(columns), dtype=np.float32), columns, ends), shape=(len(words), len(self))
        )

    def of_pairs(self, words: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Known pairs, repeated ones too: the feature of each and the place of its first word."""
        keys, first = words.pairs()
        features = self._pairs.find(keys)
        is_known = features >= 0
        return features[is_known] + len(self.words), first[is_known]


def _numbered(keys: NDArray[np.int64]) -> KeyTable:
    table = KeyTable(len(keys))
    table.insert(keys, np.arange(len(keys)))
    return table


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _word_keys(
    codes: NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Keys of words from sums up to where they start and end."""
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(codes * _powers(_BASE, len(codes)), out=sums[1:])
    return _mixed((sums[ends] - sums[starts]) * _powers(_INVERSE, len(codes))[starts])


def _mixed(sums: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Keys of polynomials: every bit depends on all of theirs, and none is 0."""
    sums = (sums ^ (sums >> _HALF)) * _MIX
    sums = (sums ^ (sums >> _HALF)) * _MIX
    return ((sums >> _SPARE_BITS) | np.uint64(1)).view(np.int64)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """``base`` to the powers 0 to ``count - 1``, modulo 2**64."""
    return _powers_to(base, 1 << max(count - 1, 1).bit_length())[:count]


@lru_cache(maxsize=8)
def _powers_to(base: int, count: int) -> NDArray[np.uint64]:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    result: NDArray[np.uint64] = np.multiply.accumulate(powers)
    return result


@lru_cache(maxsize=1)
def _folded() -> NDArray[np.uint32]:
    """(code points,): what each becomes; 0: it stands between words."""
    result = np.zeros(_TABLE_CODES, dtype=np.uint32)
    for code in range(_TABLE_CODES):
        character = chr(code)
        if character.isalnum() or unicodedata.category(character).startswith("M"):
            folded = character.casefold()
            result[code] = ord(folded if len(folded) == 1 else character.lower()[0])
    return result


@lru_cache(maxsize=1)
def _is_han() -> NDArray[np.bool_]:
    result = np.zeros(_TABLE_CODES, dtype=bool)
    for first, last in _HAN:
        result[first : last + 1] = True
    result &= _folded() != 0
    return result

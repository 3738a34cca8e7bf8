"""The words of titles: which the reference knows, what language they speak, how alike two days are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from scipy import sparse

from ml.drift.measures import Floats, Integers, Objects

_WORD = re.compile(r"\w+")
_UNKNOWN = -1

_LEAST_OF_WORD = 5
"""Offers that a word must have to tell a language: rare words would tell the offer itself."""
_LEAST_LANGUAGE_SHARE, _LEAST_LANGUAGE_OFFERS = 0.01, 30
_LEAST_EVIDENCE = 3.0
"""Nats by which another language must fit better than the declared one, about 20 to 1."""

_FEATURES = 1 << 15
_PASSES = 5


@dataclass(frozen=True)
class Tokens:
    """Words of titles as numbers of a vocabulary; -1 where it does not have them."""

    rows: Integers
    words: Integers
    """The distinct words of title ``rows[i]``, one entry each."""
    last: Integers
    """The last word of each title, -2 where there is none."""
    counts: Floats
    """How many words each title has, repeated ones counted again."""

    @classmethod
    def of(cls, titles: Sequence[str], numbers: dict[str, int], *, learn: bool = False) -> Tokens:
        """Words of ``titles``; with ``learn`` new words get the next numbers."""
        rows, words, last, counts = [], [], [], []
        for row, title in enumerate(titles):
            found = _WORD.findall(title.lower())
            if learn:
                for word in found:
                    numbers.setdefault(word, len(numbers))
            ids = [numbers.get(word, _UNKNOWN) for word in dict.fromkeys(found)]
            rows += [row] * len(ids)
            words += ids
            last.append(numbers.get(found[-1], _UNKNOWN) if found else -2)
            counts.append(len(found))
        return cls(
            np.array(rows, dtype=np.int64),
            np.array(words, dtype=np.int64),
            np.array(last, dtype=np.int64),
            np.array(counts, dtype=np.float64),
        )

    def presence(self, vocabulary: int) -> sparse.csr_matrix:
        """0/1 matrix (titles, words) of the known words."""
        known = self.words >= 0
        values = np.ones(int(known.sum()), dtype=np.float32)
        return sparse.csr_matrix(
            (values, (self.rows[known], self.words[known])), shape=(len(self.last), vocabulary)
        )


class Vocabulary:
    """The words of the reference, how many folds have each, and how often each language has them.

    How often is counted in all folds but one, for a day of the reference and for any other: the fewer
    titles the languages are learned from, the more titles seem to fit another one. A reference of two days
    would else be measured with half of the words that a further day is measured with.
    """

    def __init__(
        self,
        numbers: dict[str, int],
        folds_with: Integers,
        folds: int,
        languages: Sequence[str],
        counts: Floats,
    ) -> None:
        """Put a vocabulary together.

        Args:
            numbers: Its words, numbered from 0.
            folds_with: Of each word, the folds of the reference that have it.
            folds: How many folds there are.
            languages: Declared languages that can be told apart.
            counts: (words, languages) titles of the language that have the word, in all folds but one.
        """
        self.numbers = numbers
        self.folds_with = folds_with
        self.folds = folds
        self.languages = list(languages)
        self.counts = counts
        self._tells_language = counts.sum(axis=1) >= _LEAST_OF_WORD

    @classmethod
    def of(
        cls, titles: Sequence[str], declared: Objects, fold: Integers
    ) -> tuple[dict[int, Vocabulary], Tokens]:
        """The vocabulary of the reference's titles without each of the folds, and their words."""
        numbers: dict[str, int] = {}
        tokens = Tokens.of(titles, numbers, learn=True)
        pairs = np.unique(fold[tokens.rows] * max(len(numbers), 1) + tokens.words)
        folds_with = np.bincount(pairs % max(len(numbers), 1), minlength=len(numbers))
        languages, presence, folds = _languages(declared), tokens.presence(len(numbers)), np.unique(fold)
        vocabularies = {}
        for left_out in folds:
            others = np.flatnonzero(fold != left_out)
            counts = _counts(presence[others], declared[others], languages)
            vocabularies[int(left_out)] = cls(numbers, folds_with, len(folds), languages, counts)
        return vocabularies, tokens

    def unknown(self, tokens: Tokens, *, of_reference: bool) -> tuple[Floats, Floats]:
        """Share of the words of each title that are not in the reference, and whether its last one is.

        NaN where a title has no words.
        """
        # The last place is that of words that the vocabulary does not have (-1).
        weights = np.append((self.folds_with == 1) * (1.0 if of_reference else 1.0 / self.folds), 1.0)
        titles = len(tokens.last)
        known = np.bincount(tokens.rows, weights[tokens.words], titles)
        distinct = np.bincount(tokens.rows, minlength=titles)
        shares = np.divide(known, distinct, out=np.full(titles, np.nan), where=distinct > 0)
        last = np.where(tokens.last == -2, np.nan, weights[np.maximum(tokens.last, -1)])
        return shares, last

    def speaks_another(self, tokens: Tokens, declared: Objects) -> Floats:
        """Whether the words of a title fit another language better than the declared one.

        NaN where the declared language is not one of :attr:`languages`, or is the only one.

        Args:
            tokens: Of the titles.
            declared: Language of each title.
        """
        result = np.full(len(declared), np.nan)
        if len(self.languages) < 2:
            return result
        place = {language: column for column, language in enumerate(self.languages)}
        own = np.array([place.get(language, -1) for language in declared], dtype=np.int64)
        is_known = own >= 0
        counts = self.counts[self._tells_language]
        logs = np.log((counts + 0.5) / (counts.sum(axis=0) + 0.5 * len(counts)))
        presence = tokens.presence(len(self.numbers))[:, self._tells_language]
        scores = presence @ logs
        declared_score = scores[np.arange(len(own)), own]
        result[is_known] = (scores.max(axis=1) - declared_score > _LEAST_EVIDENCE)[is_known]
        return result


def _languages(declared: Objects) -> list[str]:
    values, counts = np.unique([value for value in declared if value is not None], return_counts=True)
    least = max(_LEAST_LANGUAGE_SHARE * len(declared), _LEAST_LANGUAGE_OFFERS)
    return [str(value) for value, count in zip(values, counts, strict=True) if count >= least]


def _counts(presence: sparse.csr_matrix, declared: Objects, languages: Sequence[str]) -> Floats:
    columns = [
        np.asarray(presence[np.flatnonzero(declared == language)].sum(axis=0)).ravel()
        for language in languages
    ]
    counts: Floats = (
        np.stack(columns, axis=1).astype(np.float64) if columns else np.zeros((presence.shape[1], 0))
    )
    return counts


class CommonWord(msgspec.Struct, frozen=True):
    """A word of which the share of titles is followed."""

    language: str
    """Among titles of this declared language; empty: among all."""
    word: str


def common_words(
    presence: sparse.csr_matrix, words: Sequence[str], declared: Objects, most: int
) -> list[CommonWord]:
    """The most common words, of each language if there are several, in proportion to their titles."""
    languages = _languages(declared)
    groups: Mapping[str, Integers] = (
        {language: np.flatnonzero(declared == language) for language in languages}
        if len(languages) > 1
        else {"": np.arange(len(declared))}
    )
    titles = sum(len(rows) for rows in groups.values())
    chosen = []
    for language, rows in groups.items():
        counts = np.asarray(presence[rows].sum(axis=0)).ravel()
        wanted = max(round(most * len(rows) / max(titles, 1)), most // (4 * len(groups)))
        enough = [int(number) for number in np.flatnonzero(counts >= _LEAST_OF_WORD)]
        order = sorted(enough, key=lambda number: (-counts[number], words[number]))
        chosen += [CommonWord(language, words[number]) for number in order[:wanted]]
    return chosen


def telling_apart(ours: Sequence[str], theirs: Sequence[str], seed: int) -> float:
    """How well a small classifier tells two sets of titles apart: area under its ROC curve.

    0.5 is not at all, 1 is always. Each half is judged by a classifier of the other half.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.metrics import roc_auc_score

    vectoriser = HashingVectorizer(
        n_features=_FEATURES, token_pattern=_WORD.pattern, binary=True, alternate_sign=False
    )
    features = vectoriser.transform([*ours, *theirs])
    target = np.repeat([1, 0], [len(ours), len(theirs)])
    half = np.concatenate([np.arange(len(ours)), np.arange(len(theirs))]) % 2
    areas = []
    for judged in (0, 1):
        classifier = SGDClassifier(
            loss="log_loss", alpha=1e-4, max_iter=_PASSES, tol=None, average=True, random_state=seed
        )
        classifier.fit(features[half != judged], target[half != judged])
        scores = classifier.decision_function(features[half == judged])
        areas.append(roc_auc_score(target[half == judged], scores))
    return float(np.mean(areas))

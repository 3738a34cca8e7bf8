"""To which of some categories an offer belongs, where no model has learned all of them.

A category that the teacher knows has a row in its output layer; one that is new, or that stands for less than
when the teacher learned it, has only its names. Cosines to the two are on different scales, so like is
compared with like: where the teacher knows every option, its probabilities decide; else every option is
represented by its names, in all locales, and its path, known or not. A name's evidence is of two kinds.
*Meaning*: the cosine between text and names, standardised by what that name's cosine is on offers at large
(some names are close to everything). *Wording*: how much of the name, by its character n-grams, stands in the
text, which carries over to languages that the encoder never learned. Their weighted sum is the score of an
option in a softmax.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.learning.calibration import log_softmax, softmax
from ml.learning.devices import best_device, use_available_cores
from ml.learning.encoder import Classifier, ClassifierSettings
from ml.offers import TEXT_VERSION
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.transitions import Transitions, certain_moves

MEANING_WEIGHT = 1.5
"""Of a standardised cosine. Maximum likelihood on offers whose categories were hidden from the teacher gave
1.4 (generated, six languages) and 1.5 (GS1 classes of English web shops)."""
WORDING_WEIGHT = 4.0
"""Of the share of the name; see :meth:`Judge.learn_wording`. The same two sets gave 6.7 and 0.9: how much
offers speak in the words of the catalog differs too much for one figure."""
_WORDING_WEIGHTS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
_LEARNED_FROM = 50

_MAX_TOKENS = 32
"""Of an encoder that was not trained here: titles have 20 on average, 40 at most."""
_TEXTS_AT_ONCE = 1_024
_SMALLEST_DEVIATION = 0.02
_SMALLEST_BACKGROUND = 30
_TYPICAL_DEVIATION = 0.1
"""Of a cosine, where there are no offers to measure it on."""
_ANSWERS = 5
_WORDED_ALIKE = 5
_FITTING_MEANING = 2.0
_FITTING_WORDING = 0.5
"""What a name has to reach to be taken for the category of an offer: deviations of its cosine, and share."""


@dataclass(frozen=True)
class Verdict:
    """Answers to questions whether an offer belongs to a category; arrays (questions,)."""

    confidence: NDArray[np.float32]
    """In [0, 1], that it does."""
    similarity: NDArray[np.float32]
    """Cosine of the offer and the category's names."""
    is_best: NDArray[np.bool_]
    """Whether no rival has a higher confidence."""


class Judge:
    """A teacher, or a pretrained encoder, that has read the names of the newest taxonomy."""

    def __init__(
        self,
        model: Classifier,
        taxonomy: Taxonomy,
        *,
        stands_for: Mapping[int, str],
        background: Sequence[str] = (),
    ) -> None:
        """Take a model whose output row ``stands_for`` a category of ``taxonomy``; see :meth:`load`."""
        self._model = model
        self._taxonomy = taxonomy
        self._leaves = frozenset(taxonomy.leaves)
        self._rows: dict[str, list[int]] = defaultdict(list)
        self._category_of_row = dict(stands_for)
        for row, category_id in stands_for.items():
            self._rows[category_id].append(row)
        self._prototypes: dict[str, NDArray[np.float32]] = {}
        enough = len(background) >= _SMALLEST_BACKGROUND
        self._background = model.predict_embeddings(background) if enough else None
        self._wording: _Wording | None = None
        self.wording_weight = WORDING_WEIGHT

    @classmethod
    def load(
        cls,
        taxonomy: Taxonomy,
        *,
        teacher: Path | None = None,
        encoder: str = "packaged-minilm",
        encoder_digest: str = "",
        transitions: Transitions | None = None,
        divided: Collection[str] = (),
        background: Sequence[str] = (),
    ) -> Judge:
        """Read the model.

        Args:
            taxonomy: The newest version.
            teacher: Folder of a ``teacher_checkpoint``.
            encoder: Used without a teacher; see :class:`ml.stages.EncoderChoice`.
            encoder_digest: What the encoder's weights have to be; empty: whatever they are.
            transitions: What happened to categories; what did since the teacher learned them counts.
            divided: Categories that stand for something else from now on; no row speaks for them.
            background: Some hundred offer texts, whatever they are about; fewer than 30 tell nothing.

        Raises:
            InputError: the model cannot be had or read.
        """
        use_available_cores()
        stands_for: dict[int, str] = {}
        if teacher is not None:
            model = Classifier.load(teacher)
            moves = _moves_since(model.taxonomy_version, transitions) if transitions else {}
            for row, label in enumerate(model.labels):
                category_id = moves.get(label, label)
                if category_id in taxonomy and category_id not in divided:
                    stands_for[row] = category_id
        else:
            settings = ClassifierSettings(
                text_version=TEXT_VERSION, taxonomy_version="", max_tokens=_MAX_TOKENS
            )
            model = (
                Classifier.from_encoder(encoder, ["unused"], settings, digest=encoder_digest)
                .to(best_device())
                .eval()
            )
        return cls(model, taxonomy, stands_for=stands_for, background=background)

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> NDArray[np.float32]:
        """Cosines of texts, shape (first, second)."""
        texts = list(dict.fromkeys((*first, *second)))
        row_of = {text: row for row, text in enumerate(texts)}
        embeddings = self._model.predict_embeddings(texts)
        result: NDArray[np.float32] = (
            embeddings[[row_of[text] for text in first]] @ embeddings[[row_of[text] for text in second]].T
        )
        return result

    def learn_wording(self, texts: Sequence[str], categories: Sequence[str]) -> None:
        """Set how much wording counts, by what tells labelled offers from those of sibling categories.

        The weight with the largest likelihood is taken; that of meaning stays, because a teacher tells
        categories apart better that it has learned than those that it will be asked about. With fewer than
        50 offers, or without wording to go by, nothing changes.

        Args:
            texts: Offer texts, (n,).
            categories: Leaf category of each, (n,).
        """
        usable = [row for row, category in enumerate(categories) if self._siblings(category)]
        if len(usable) < _LEARNED_FROM:
            return
        options = {row: [categories[row], *self._siblings(categories[row])] for row in usable}
        self._read_names({option for some in options.values() for option in some})
        worded = self._words().texts([texts[row] for row in usable])
        embeddings = self._model.predict_embeddings([texts[row] for row in usable])
        likelihood = np.zeros(len(_WORDING_WEIGHTS))
        for at, row in enumerate(usable):
            shares = worded.shares(at, options[row])
            meaning = self._scores(embeddings[at], np.zeros_like(shares), options[row])
            for place, weight in enumerate(_WORDING_WEIGHTS):
                likelihood[place] += log_softmax(meaning + np.float32(weight) * shares)[0]
        self.wording_weight = _WORDING_WEIGHTS[int(likelihood.argmax())]

    def decide(self, texts: Sequence[str], options: Sequence[Sequence[str]]) -> list[NDArray[np.float32]]:
        """Confidence in each option of each text; those of a text sum to 1.

        Args:
            texts: Offer texts, (n,).
            options: Category ids of each text, (n,), at least one.
        """
        decided: list[NDArray[np.float32]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            chunk = slice(start, start + _TEXTS_AT_ONCE)
            embeddings = self._model.predict_embeddings(texts[chunk])
            logits = self._teacher_logits(embeddings)
            worded = self._words().texts(texts[chunk])
            self._read_names({option for some in options[chunk] for option in some})
            for row, some in enumerate(options[chunk]):
                if logits is not None and all(option in self._rows for option in some):
                    scores = np.array([self._known_logit(logits[row], option) for option in some])
                else:
                    scores = self._scores(embeddings[row], worded.shares(row, some), some)
                decided.append(softmax(scores.astype(np.float32)))
        return decided

    def decide_among_rivals(
        self,
        texts: Sequence[str],
        questions: Sequence[tuple[int, str]],
        *,
        unknown: Collection[str] = (),
    ) -> Verdict:
        """Whether offers belong to a category, rather than to any other that is plausible for them.

        Rivals of a category are its siblings, what the teacher answers, the categories whose names stand in
        the text most completely, and a name that fits moderately: so an offer that fits none goes nowhere.
        Where the teacher knows the category, it has to agree; the smaller of the two confidences counts.

        Args:
            texts: Offer texts.
            questions: Pairs of a place in ``texts`` and a category id.
            unknown: Categories that are treated as if the teacher did not know them.

        """
        asked: dict[int, list[int]] = defaultdict(list)
        for place, (row, _) in enumerate(questions):
            asked[row].append(place)
        siblings = {category: self._siblings(category) for category in {c for _, c in questions}}
        nothing_fits = MEANING_WEIGHT * _FITTING_MEANING + self.wording_weight * _FITTING_WORDING
        confidence = np.zeros(len(questions), dtype=np.float32)
        cosine = np.zeros(len(questions), dtype=np.float32)
        best = np.zeros(len(questions), dtype=bool)
        rows = sorted(asked)
        for start in range(0, len(rows), _TEXTS_AT_ONCE):
            chunk = rows[start : start + _TEXTS_AT_ONCE]
            chunk_texts = [texts[row] for row in chunk]
            embeddings = self._model.predict_embeddings(chunk_texts)
            logits = self._teacher_logits(embeddings)
            worded = self._words().texts(chunk_texts)
            options_of: dict[int, tuple[str, ...]] = {}
            for at, row in enumerate(chunk):
                shared = [*self._answers(logits[at])] if logits is not None else []
                shared += worded.most_complete(at, _WORDED_ALIKE)
                for place in asked[row]:
                    category = questions[place][1]
                    rivals = dict.fromkeys((category, *siblings[category], *shared))
                    options_of[place] = tuple(rivals)
            self._read_names({option for options in options_of.values() for option in options})
            for at, row in enumerate(chunk):
                for place in asked[row]:
                    options = options_of[place]
                    scores = self._scores(embeddings[at], worded.shares(at, options), options)
                    confidence[place] = softmax(np.append(scores, np.float32(nothing_fits)))[0]
                    best[place] = scores[0] >= max(scores.max(), nothing_fits)
                    if logits is not None and options[0] in self._rows and options[0] not in unknown:
                        known = [self._known_logit(logits[at], o) for o in options if o in self._rows]
                        by_teacher = softmax(np.array(known, dtype=np.float32))
                        confidence[place] = min(confidence[place], by_teacher[0])
                        best[place] &= by_teacher[0] >= by_teacher.max()
                    cosine[place] = embeddings[at] @ self._prototypes[options[0]][:-2]
        return Verdict(confidence, cosine, best)

    def answers(self, texts: Sequence[str], count: int = _ANSWERS) -> list[list[str]]:
        """The teacher's most likely categories of the newest taxonomy, best first; none without a teacher."""
        found: list[list[str]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            logits = self._teacher_logits(
                self._model.predict_embeddings(texts[start : start + _TEXTS_AT_ONCE])
            )
            if logits is None:
                return [[] for _ in texts]
            found += [self._answers(row, count) for row in logits]
        return found

    def _answers(self, logits: NDArray[np.float32], count: int = _ANSWERS) -> list[str]:
        answers: dict[str, None] = {}
        for row in np.argsort(-logits, kind="stable").tolist():
            category = self._category_of_row.get(row)
            if category is not None:
                answers[category] = None
                if len(answers) == count:
                    break
        return list(answers)

    def _siblings(self, category_id: str) -> list[str]:
        parent = self._taxonomy.parent(category_id)
        beside = self._taxonomy.roots if parent is None else self._taxonomy.children(parent)
        return [sibling for sibling in beside if sibling in self._leaves and sibling != category_id]

    def _teacher_logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Calibrated logits (rows, labels) of embeddings, None without a teacher."""
        if not self._rows:
            return None
        weight = self._model.head.weight.detach().float().cpu().numpy()
        bias = self._model.head.bias.detach().float().cpu().numpy()
        logits: NDArray[np.float32] = (embeddings @ weight.T + bias) / self._model.settings.temperature
        return logits

    def _known_logit(self, logits: NDArray[np.float32], category_id: str) -> float:
        """Of a category that several labels of the teacher lead to: of all of them together."""
        return float(np.logaddexp.reduce(logits[self._rows[category_id]]))

    def _scores(
        self, embedding: NDArray[np.float32], shares: NDArray[np.float32], options: Sequence[str]
    ) -> NDArray[np.float32]:
        prototypes = np.stack([self._prototypes[option] for option in options])
        standardised = (prototypes[:, :-2] @ embedding - prototypes[:, -2]) / prototypes[:, -1]
        scores: NDArray[np.float32] = MEANING_WEIGHT * standardised + self.wording_weight * shares
        return scores

    def _read_names(self, categories: set[str]) -> None:
        """Embed names and path of categories: their mean, followed by mean and deviation of its cosine."""
        missing = sorted(categories - self._prototypes.keys())
        for start in range(0, len(missing), _TEXTS_AT_ONCE):
            chunk = missing[start : start + _TEXTS_AT_ONCE]
            names = [names_of(self._taxonomy, category) for category in chunk]
            paths = [self._taxonomy.path(category) for category in chunk]
            embedded = self._model.predict_embeddings([*paths, *(name for some in names for name in some)])
            place = len(chunk)
            for row, (category, some) in enumerate(zip(chunk, names, strict=True)):
                mean = embedded[row] + embedded[place : place + len(some)].mean(axis=0)
                place += len(some)
                mean /= max(float(np.linalg.norm(mean)), 1e-12)
                centre, deviation = 0.0, _TYPICAL_DEVIATION
                if self._background is not None:
                    cosines = self._background @ mean
                    centre, deviation = float(cosines.mean()), float(cosines.std())
                scale = np.array([centre, max(deviation, _SMALLEST_DEVIATION)], dtype=np.float32)
                self._prototypes[category] = np.concatenate([mean, scale])

    def _words(self) -> _Wording:
        if self._wording is None:
            self._wording = _Wording(self._taxonomy)
        return self._wording


def _moves_since(taxonomy_version: str, transitions: Transitions) -> dict[str, str]:
    """What a row of a teacher stands for today, by its label; empty: no single category.

    Only what happened since the teacher's taxonomy counts. A label that was divided or used again since
    means less, or something else, than the row learned, even if its id is still a category.
    """
    # A model knows the short form of the digest; an unknown one counts as older than all.
    learned = transitions.digest_of(taxonomy_version)
    since = transitions.for_labels_of(learned)
    certain = certain_moves(since.values())
    return {former: certain.get(former, "") for former in since}


class _Wording:
    """Character n-grams of all names, and how many of them a text has."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

        self.ids = taxonomy.ids
        self.column = {category_id: column for column, category_id in enumerate(self.ids)}
        leaves = frozenset(taxonomy.leaves)
        self.is_leaf = np.array([category_id in leaves for category_id in self.ids])
        names = [names_of(taxonomy, category_id) for category_id in self.ids]
        self.starts = np.cumsum([0, *(len(some) for some in names)])[:-1]
        settings: dict[str, Any] = {
            "analyzer": "char_wb",
            "ngram_range": (3, 5),
            "preprocessor": folded,
            "dtype": np.float32,
        }
        weighted = TfidfVectorizer(norm="l1", **settings)
        self._names = weighted.fit_transform([name for some in names for name in some]).T.tocsc()
        self._counter = CountVectorizer(binary=True, vocabulary=weighted.vocabulary_, **settings)

    def texts(self, texts: Sequence[str]) -> _WordedTexts:
        """The same texts, ready to be compared."""
        return _WordedTexts(self, self._counter.transform(texts))

    def shares(self, grams: Any) -> NDArray[np.float32]:
        """Of every category (ids,): the share of its most completely found name."""
        found = np.asarray((grams @ self._names).todense(), dtype=np.float32).ravel()
        shares: NDArray[np.float32] = np.maximum.reduceat(found, self.starts)
        return shares


class _WordedTexts:
    """Some texts; one row is looked at after the other, so that nothing of size texts x names is kept."""

    def __init__(self, wording: _Wording, grams: Any) -> None:
        self._wording = wording
        self._grams = grams
        self._row = -1
        self._shares = np.zeros(0, dtype=np.float32)

    def shares(self, row: int, options: Sequence[str]) -> NDArray[np.float32]:
        """Share, in [0, 1], of each option's name that stands in text ``row``."""
        shares = self._of(row)
        return shares[[self._wording.column[option] for option in options]]

    def most_complete(self, row: int, count: int) -> list[str]:
        """Leaf categories of which most stands in text ``row``, best first."""
        shares = np.where(self._wording.is_leaf, self._of(row), 0.0)
        best = np.argsort(-shares, kind="stable")[:count]
        return [self._wording.ids[column] for column in best.tolist() if shares[column] > 0]

    def _of(self, row: int) -> NDArray[np.float32]:
        if row != self._row:
            self._row, self._shares = row, self._wording.shares(self._grams[row])
        return self._shares


def names_of(taxonomy: Taxonomy, category_id: str) -> list[str]:
    """The category's distinct names, that of the tree first."""
    locales = (None, *taxonomy.locales)
    return list(dict.fromkeys(taxonomy.name(category_id, locale) for locale in locales))


def folded(text: str) -> str:
    """``text`` without case and accents."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))

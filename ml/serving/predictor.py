"""The compiled model at work: offers in, predictions out, the same ones wherever it runs.

:class:`Predictor` is the verified artifact: the fast model, the student behind it
(:class:`ml.serving.compiled_model.CompiledModel`) and what decides between them (:mod:`ml.serving.cascade`).
Notebook, bulk classification and endpoint all use this one class: a text has one answer on given hardware,
in any order, beside any others and from any process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ml.artifacts import short_version, verify
from ml.errors import InputError
from ml.offers import is_blank, offer_text
from ml.serving.cascade import FAST, FAST_FOLDER, STUDENT, Cascade, CascadeSettings, Floats, Tier, best_labels
from ml.serving.compiled_model import CompiledModel
from ml.serving.fast_model import FastModel
from ml.stages import SERVABLE
from ml.taxonomy import TAXONOMY_FILE, Taxonomy

TEXT_COLUMNS = ("title", "brand", "shop_category", "description")
"""Columns that have to be text, or absent, for an offer to be classified."""

_ALTERNATIVES = 3
_CACHED_TEXTS = 20_000
_TEXTS_AT_ONCE = 512
"""Bounds the float32 probabilities held at a time."""

_CONFIDENCE_DIGITS = 6


class Alternative(msgspec.Struct, frozen=True):
    """A category that is less likely than the predicted one."""

    category_id: str
    category_path: str
    confidence: float


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The category of one offer; without one, ``problem`` says why."""

    offer_id: str | None
    category_id: str | None
    category_path: str | None
    confidence: float | None
    """Calibrated probability of the category, in [0, 1]; of one with others below it, of all these
    together."""
    tier: Tier | None = None
    """Which model answered: the fast one alone, or the student too."""
    needs_review: bool = False
    """No category is sure enough: this is the deepest one above that is, a person has to choose below it."""
    model_version: str
    taxonomy_version: str
    alternatives: list[Alternative] = []
    """The next most likely categories, best first; of an answer for review the very most likely ones."""
    problem: str | None = None


_COLUMN_TYPES: dict[str, pa.DataType] = {
    "offer_id": pa.string(),
    "category_id": pa.string(),
    "category_path": pa.string(),
    "confidence": pa.float64(),
    "tier": pa.string(),
    "needs_review": pa.bool_(),
    "model_version": pa.string(),
    "taxonomy_version": pa.string(),
}
PREDICTION_SCHEMA = pa.schema(_COLUMN_TYPES)
"""Predictions as a table; one row per offer, in the order of the offers."""


def prediction_table(predictions: Sequence[Prediction]) -> pa.Table:
    """Table of :data:`PREDICTION_SCHEMA`, row ``i`` for prediction ``i``."""
    return pa.table(
        {name: [getattr(prediction, name) for prediction in predictions] for name in PREDICTION_SCHEMA.names},
        schema=PREDICTION_SCHEMA,
    )


class _Answer(msgspec.Struct, frozen=True):
    """What is said of a text offered in a country."""

    category: Alternative
    tier: Tier
    needs_review: bool
    alternatives: list[Alternative]


_Key = tuple[str, str]
"""Text and country of an offer: what an answer depends on."""


class Predictor:
    """A compiled model whose artifact was verified; see :meth:`load`."""

    def __init__(
        self,
        student: CompiledModel,
        fast: FastModel,
        settings: CascadeSettings,
        taxonomy: Taxonomy,
        model_version: str,
    ) -> None:
        unknown = [label for label in [*student.labels, *fast.labels] if label not in taxonomy]
        if unknown:
            raise InputError(
                f"label {unknown[0]!r} of the model ({len(unknown)} in all) is not in its {TAXONOMY_FILE}; "
                "compile the student again"
            )
        self.student = student
        """The student alone, whatever the fast model says."""
        self.cascade = Cascade(settings, fast.labels, student.labels, taxonomy)
        self.labels = self.cascade.labels
        self.model_version = model_version
        self.taxonomy_version = student.settings.taxonomy_version
        self.taxonomy = taxonomy
        self._fast = fast
        self._paths = {label: taxonomy.path(label) for label in self.labels}
        self._answers: OrderedDict[_Key, _Answer] = OrderedDict()
        self._answers_lock = Lock()

    @classmethod
    def load(cls, folder: str | Path, threads: int = 1) -> Predictor:
        """Open a ``compiled_student`` artifact, every file held against its digest.

        Args:
            folder: The artifact.
            threads: Threads per inference; for throughput run several predictors of one thread.

        Raises:
            InputError: it is no such artifact, a file is missing or changed, or it was made for
                another offer text version, or for hardware that is not here.
        """
        folder = Path(folder)
        manifest = verify(folder, kinds=SERVABLE)
        return cls(
            CompiledModel.open(folder, threads),
            FastModel.load(folder / FAST_FOLDER),
            CascadeSettings.read(folder),
            Taxonomy.load(folder / TAXONOMY_FILE),
            short_version(manifest.digest),
        )

    def predict(self, offers: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Category of every offer, in the order of ``offers``.

        An offer that cannot be classified (no title, a title that is not text) gets no category and
        a ``problem``; it does not touch the others. Equal texts are computed once, and remembered.

        Args:
            offers: Columns of the offer feed by name; all but ``title`` may be absent. A ``problem``
                that the reader of the feed found stands.
        """
        problems = [problem_of(offer) for offer in offers]
        keys = [
            None if problem else (offer_text(offer), self.cascade.country(offer.get("country")))
            for offer, problem in zip(offers, problems, strict=True)
        ]
        answers = self._answers_for(dict.fromkeys(key for key in keys if key))
        return [
            self._prediction(offer, problem, answers[key] if key else None)
            for offer, key, problem in zip(offers, keys, problems, strict=True)
        ]

    def predict_probabilities(self, texts: Sequence[str], countries: Sequence[str] = ()) -> Floats:
        """Calibrated probabilities of whichever model answers, float32 (texts, classes), in their order.

        Args:
            texts: Offer texts as ``ml.offers.offer_text`` makes them.
            countries: Country of each; none where it is not known.
        """
        places = [self.cascade.country(country) for country in countries or [""] * len(texts)]
        keys = list(zip(texts, places, strict=True))
        row_of = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        fast, by_fast, deep = self._ask(list(row_of))
        distinct = self.cascade.on_deep_labels(fast)
        distinct[~by_fast] = deep
        return distinct[[row_of[key] for key in keys]]

    def deep_probabilities(self, texts: Sequence[str], countries: Sequence[str] = ()) -> Floats:
        """The deep answer to all, as if the fast model were sure of none; arguments as above."""
        places = [self.cascade.country(country) for country in countries or [""] * len(texts)]
        fast = self.cascade.fast_probabilities(self._fast.predict_probabilities(texts), places)
        return self.cascade.deep_probabilities(fast, self.student.predict_probabilities(texts), places)

    def each_alone(self, texts: Sequence[str]) -> tuple[list[str], list[str]]:
        """The category that the fast model and the one that the student takes for the most likely by itself.

        Args:
            texts: Offer texts as ``ml.offers.offer_text`` makes them.

        Returns:
            A category of each text by the fast model, and one by the student.
        """
        fast, student = self._fast.predict_probabilities(texts), self.student.predict_probabilities(texts)
        return (
            [self._fast.labels[place] for place in fast.argmax(axis=1)],
            [self.student.labels[place] for place in student.argmax(axis=1)],
        )

    def _answers_for(self, keys: Iterable[_Key]) -> dict[_Key, _Answer]:
        """What is said of each of the distinct ``keys``, from memory where they were seen lately."""
        answers: dict[_Key, _Answer] = {}
        unseen = []
        with self._answers_lock:
            for key in keys:
                if key in self._answers:
                    self._answers.move_to_end(key)
                    answers[key] = self._answers[key]
                else:
                    unseen.append(key)
        for start in range(0, len(unseen), _TEXTS_AT_ONCE):
            chunk = unseen[start : start + _TEXTS_AT_ONCE]
            answers |= zip(chunk, self._answered(chunk), strict=True)
        with self._answers_lock:
            self._answers |= {key: answers[key] for key in unseen[-_CACHED_TEXTS:]}
            while len(self._answers) > _CACHED_TEXTS:
                self._answers.popitem(last=False)
        return answers

    def _ask(self, keys: Sequence[_Key]) -> tuple[Floats, NDArray[np.bool_], Floats]:
        """The fast model about all, the student about those of which the fast model is not sure.

        Returns:
            Probabilities of the fast model, (keys, its labels); whether it answers, (keys,); the deep answer
            to the others, (others, :attr:`labels`).
        """
        texts, countries = [text for text, _ in keys], [country for _, country in keys]
        fast = self.cascade.fast_probabilities(self._fast.predict_probabilities(texts), countries)
        by_fast = self.cascade.is_answered_fast(fast, countries)
        unsure = np.flatnonzero(~by_fast)
        student = self.student.predict_probabilities([texts[row] for row in unsure])
        deep = self.cascade.deep_probabilities(fast[unsure], student, [countries[row] for row in unsure])
        return fast, by_fast, deep

    def _answered(self, keys: Sequence[_Key]) -> list[_Answer]:
        """What is said of each of ``keys``, in their order."""
        fast, by_fast, deep = self._ask(keys)
        from_fast = iter(self._ranked(fast[by_fast], self._fast.labels))
        from_deep = zip(self._ranked(deep, self.labels), deep, strict=True)
        return [
            _Answer(best[0], FAST, False, best[1:])
            if is_fast and (best := next(from_fast))
            else self._deep_answer(*next(from_deep))
            for is_fast in by_fast
        ]

    def _deep_answer(self, best: list[Alternative], probabilities: Floats) -> _Answer:
        if not self.cascade.needs_review(float(probabilities.max())):
            return _Answer(best[0], STUDENT, False, best[1:])
        node, probability = self.cascade.sure_enough(probabilities)
        category = Alternative(node, self.taxonomy.path(node), round(probability, _CONFIDENCE_DIGITS))
        return _Answer(category, STUDENT, True, best[:_ALTERNATIVES])

    def _ranked(self, probabilities: Floats, labels: Sequence[str]) -> list[list[Alternative]]:
        """The most likely categories of each row, best first; of equals the first label."""
        best = best_labels(probabilities, 1 + _ALTERNATIVES)
        values = np.take_along_axis(probabilities, best, axis=1)
        return [
            [
                Alternative(labels[place], self._paths[labels[place]], round(value, _CONFIDENCE_DIGITS))
                for place, value in zip(places, row, strict=True)
            ]
            for places, row in zip(best.tolist(), values.tolist(), strict=True)
        ]

    def _prediction(
        self, offer: Mapping[str, Any], problem: str | None, answer: _Answer | None
    ) -> Prediction:
        offer_id = offer.get("offer_id")
        category = answer.category if answer else None
        return Prediction(
            offer_id=None if offer_id is None else str(offer_id),
            category_id=category.category_id if category else None,
            category_path=category.category_path if category else None,
            confidence=category.confidence if category else None,
            tier=answer.tier if answer else None,
            needs_review=answer.needs_review if answer else False,
            model_version=self.model_version,
            taxonomy_version=self.taxonomy_version,
            alternatives=list(answer.alternatives) if answer else [],
            problem=problem,
        )


def problem_of(offer: Mapping[str, Any]) -> str | None:
    """Why this offer cannot be classified, in a few words; None if it can."""
    if isinstance(found_before := offer.get("problem"), str):
        return found_before
    for name in TEXT_COLUMNS:
        value = offer.get(name)
        # NaN, which pandas puts where nothing is, would be read as the word "nan".
        if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
            return f"{name} is {type(value).__name__}, expected text or null"
        if isinstance(value, str) and not _is_unicode(value):
            return f"{name} is not valid Unicode"
    if offer.get("title") is None:
        return "title is missing"
    return "title is empty" if is_blank(offer["title"]) else None


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

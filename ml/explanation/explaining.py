"""Explanations of single offers: category, words, similar labelled offers, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ml.artifacts import read_manifest, short_version, verify
from ml.errors import InputError
from ml.explanation.neighbours import LabelledOffers, SimilarOffer
from ml.explanation.words import Model, Word, read_words
from ml.learning.encoder import Classifier
from ml.offers import offer_text
from ml.progress import Progress
from ml.serving.compiled_model import CompiledModel
from ml.serving.fast_model import FastModel
from ml.serving.predictor import Alternative, problem_of
from ml.stages import SERVABLE
from ml.taxonomy import TAXONOMY_FILE, Taxonomy

_ALTERNATIVES = 3


class LinearModel(Protocol):
    """A model whose margin for a label is a sum over words, such as the fast model's."""

    @property
    def labels(self) -> Sequence[str]:
        """Category ids that it knows."""

    def word_contributions(self, text: str, label: str) -> Sequence[tuple[str, float]]:
        """Words with their exact parts of the margin."""


class SimilarAndPath(SimilarOffer, frozen=True, kw_only=True):
    """A similar offer, with what people call its category."""

    category_path: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Which words and which labelled offers led to a category."""

    offer_id: str | None
    text: str
    """What the model read of the offer."""
    category_id: str
    category_path: str
    confidence: float
    model_version: str
    alternatives: list[Alternative]
    """The other most likely categories, best first."""
    words: list[Word]
    similar: list[SimilarAndPath]
    fast_words: list[tuple[str, float]] = []
    """Parts of the fast model's margin for the category, where one was given that knows it."""

    @property
    def agreeing(self) -> int:
        """Similar offers that are labelled with the explained category."""
        return sum(offer.category_id == self.category_id for offer in self.similar)


class Explainer:
    """Explains the answers of one model over one training sample."""

    def __init__(
        self,
        model: Model,
        model_version: str,
        student: Classifier,
        offers: LabelledOffers,
        taxonomy: Taxonomy,
        fast: LinearModel | None = None,
    ) -> None:
        """Put together what :meth:`load` reads.

        Args:
            model: Whose answers are explained.
            model_version: What to call it.
            student: Its text vectors say which offers are similar.
            offers: Labelled offers with the vectors of this student.
            taxonomy: Has the paths of the categories.
            fast: Its contributions are shown beside; None: they are not.
        """
        self._model = model
        self._model_version = model_version
        self._student = student
        self._offers = offers
        self._taxonomy = taxonomy
        self._fast = fast

    @classmethod
    def load(
        cls,
        student: Path,
        sample: Path,
        index: Path,
        model: Path | None = None,
        fast: Path | None = None,
        progress: Progress | None = None,
    ) -> Explainer:
        """Open student, sample and model.

        Args:
            student: A ``student_checkpoint`` artifact; labelled offers are compared by its text vectors.
            sample: The ``training_sample`` artifact that it learned from.
            index: Folder that keeps these vectors.
            model: The ``compiled_student`` artifact whose student is explained as it was compiled; None: the
                student as it was trained.
            fast: A ``fast_checkpoint`` artifact whose contributions are shown beside; None: they are not.
            progress: Where to report.

        Raises:
            InputError: one of them cannot be used.
        """
        manifest = read_manifest(student)
        classifier = Classifier.load(student)
        offers = LabelledOffers.open(student, classifier, sample, index, progress)
        taxonomy = Taxonomy.load(student / TAXONOMY_FILE)
        linear = FastModel.load(fast) if fast else None
        if model is None:
            return cls(classifier, short_version(manifest.digest), classifier, offers, taxonomy, linear)
        version = short_version(verify(model, kinds=SERVABLE).digest)
        taxonomy = Taxonomy.load(model / TAXONOMY_FILE)
        return cls(CompiledModel.open(model), version, classifier, offers, taxonomy, linear)

    def explain(
        self, offer: Mapping[str, Any], similar: int = 5, category_id: str | None = None
    ) -> Explanation:
        """Why ``offer`` has its category, or what speaks for and against another one.

        Args:
            offer: Columns of the offer feed by name.
            similar: How many labelled offers to show.
            category_id: The category to explain; None: the predicted one.

        Raises:
            InputError: the offer cannot be classified, or the model does not know the category.
        """
        if problem := problem_of(offer):
            raise InputError(f"this offer cannot be classified: {problem}")
        if category_id is not None and category_id not in self._model.labels:
            raise InputError(
                f"category {category_id!r} is none of the {len(self._model.labels)} that the model knows"
            )
        text = offer_text(offer)
        reading = read_words(self._model, text, category_id)
        (vector,) = self._student.predict_embeddings([text])
        offer_id = offer.get("offer_id")
        best = (-reading.probabilities).argsort(kind="stable")[: 1 + _ALTERNATIVES].tolist()
        chosen = self._model.labels[reading.label]
        return Explanation(
            offer_id=None if offer_id is None else str(offer_id),
            text=text,
            category_id=chosen,
            category_path=self.path(chosen),
            confidence=float(reading.probabilities[reading.label]),
            model_version=self._model_version,
            alternatives=[
                Alternative(
                    self._model.labels[place],
                    self.path(self._model.labels[place]),
                    float(reading.probabilities[place]),
                )
                for place in best
                if place != reading.label
            ][:_ALTERNATIVES],
            words=reading.words,
            similar=[
                SimilarAndPath(**msgspec.structs.asdict(found), category_path=self.path(found.category_id))
                for found in self._offers.most_similar(vector, similar)
            ],
            fast_words=self._fast_words(text, chosen),
        )

    def _fast_words(self, text: str, label: str) -> list[tuple[str, float]]:
        if self._fast is None or label not in self._fast.labels:
            return []
        return list(self._fast.word_contributions(text, label))

    def path(self, category_id: str) -> str:
        """What people call a category; the id of one that the taxonomy lacks."""
        return self._taxonomy.path(category_id) if category_id in self._taxonomy else category_id

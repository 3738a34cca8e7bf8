"""The compiled model at work: offers in, predictions out, the same ones wherever it runs.

:class:`Predictor` is the verified artifact around a :class:`ml.serving.compiled_model.CompiledModel`.
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
from ml.offers import offer_text
from ml.serving.compiled_model import CompiledModel
from ml.stages import SERVABLE
from ml.taxonomy import TAXONOMY_FILE, Taxonomy

TEXT_COLUMNS = ("title", "brand", "shop_category", "description")
"""Columns that have to be text, or absent, for an offer to be classified."""

_ALTERNATIVES = 3
_CACHED_TEXTS = 20_000
_TEXTS_AT_ONCE = 256
"""Bounds the float32 logits held at a time."""

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
    """Calibrated probability of the category, in [0, 1]."""
    model_version: str
    taxonomy_version: str
    alternatives: list[Alternative] = []
    """The next most likely categories, best first."""
    problem: str | None = None


_COLUMN_TYPES: dict[str, pa.DataType] = {
    "offer_id": pa.string(),
    "category_id": pa.string(),
    "category_path": pa.string(),
    "confidence": pa.float64(),
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


class Predictor:
    """A compiled model whose artifact was verified; see :meth:`load`."""

    def __init__(self, model: CompiledModel, taxonomy: Taxonomy, model_version: str) -> None:
        unknown = [label for label in model.labels if label not in taxonomy]
        if unknown:
            raise InputError(
                f"label {unknown[0]!r} of the model ({len(unknown)} in all) is not in its {TAXONOMY_FILE}; "
                "compile the student again"
            )
        self.labels = model.labels
        self.model_version = model_version
        self.taxonomy_version = model.settings.taxonomy_version
        self.taxonomy = taxonomy
        self._model = model
        self._paths = [taxonomy.path(label) for label in model.labels]
        self._answers: OrderedDict[str, list[Alternative]] = OrderedDict()
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
        taxonomy = Taxonomy.load(folder / TAXONOMY_FILE)
        return cls(CompiledModel.open(folder, threads), taxonomy, short_version(manifest.digest))

    def predict(self, offers: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Category of every offer, in the order of ``offers``.

        An offer that cannot be classified (no title, a title that is not text) gets no category and
        a ``problem``; it does not touch the others. Equal texts are computed once, and remembered.

        Args:
            offers: Columns of the offer feed by name; all but ``title`` may be absent. A ``problem``
                that the reader of the feed found stands.
        """
        problems = [problem_of(offer) for offer in offers]
        texts = [
            "" if problem else offer_text(offer) for offer, problem in zip(offers, problems, strict=True)
        ]
        answers = self._answers_for(
            dict.fromkeys(t for t, problem in zip(texts, problems, strict=True) if not problem)
        )
        return [
            self._prediction(offer, problem, () if problem else answers[text])
            for offer, text, problem in zip(offers, texts, problems, strict=True)
        ]

    def predict_probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes), in the order of ``texts``.

        Args:
            texts: Offer texts as ``ml.offers.offer_text`` makes them.
        """
        row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        distinct = self._model.predict_probabilities(list(row_of))
        return distinct[[row_of[text] for text in texts]]

    def _answers_for(self, texts: Iterable[str]) -> dict[str, list[Alternative]]:
        """Best categories of each of the distinct ``texts``, from memory where they were seen lately."""
        answers: dict[str, list[Alternative]] = {}
        unseen = []
        with self._answers_lock:
            for text in texts:
                if text in self._answers:
                    self._answers.move_to_end(text)
                    answers[text] = self._answers[text]
                else:
                    unseen.append(text)
        for start in range(0, len(unseen), _TEXTS_AT_ONCE):
            chunk = unseen[start : start + _TEXTS_AT_ONCE]
            ranked = self._ranked(self._model.predict_probabilities(chunk))
            answers |= zip(chunk, ranked, strict=True)
        with self._answers_lock:
            self._answers |= {text: answers[text] for text in unseen[-_CACHED_TEXTS:]}
            while len(self._answers) > _CACHED_TEXTS:
                self._answers.popitem(last=False)
        return answers

    def _ranked(self, probabilities: NDArray[np.float32]) -> list[list[Alternative]]:
        """The most likely categories of each row, best first; of equals the first label."""
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, : 1 + _ALTERNATIVES]
        return [
            [
                Alternative(
                    self.labels[label], self._paths[label], round(float(row[label]), _CONFIDENCE_DIGITS)
                )
                for label in labels
            ]
            for row, labels in zip(probabilities, best.tolist(), strict=True)
        ]

    def _prediction(
        self, offer: Mapping[str, Any], problem: str | None, answer: Sequence[Alternative]
    ) -> Prediction:
        offer_id = offer.get("offer_id")
        return Prediction(
            offer_id=None if offer_id is None else str(offer_id),
            category_id=answer[0].category_id if answer else None,
            category_path=answer[0].category_path if answer else None,
            confidence=answer[0].confidence if answer else None,
            model_version=self.model_version,
            taxonomy_version=self.taxonomy_version,
            alternatives=list(answer[1:]),
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
    return None if offer_text({"title": offer["title"]}) else "title is empty"


def _is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

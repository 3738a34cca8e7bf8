"""The compiled model at work: offers in, predictions out, the same ones wherever it runs.

:class:`CompiledModel` is the ONNX graph with its tokenizer, :class:`Predictor` the verified artifact
around it. Notebook, bulk classification and endpoint all use this one class, on one text at a time:
int8 inference scales activations per tensor, so in a batch the answer for a text would depend on
its neighbours and their padding. Alone, a text has one answer on a given CPU, in any order and from
any process.

That costs little. Three layers of MiniLM, 27 tokens on average, one thread of a shared AVX-512 VNNI
core: about 1,400 texts/s one by one, 1,635 in length-sorted batches of 8, 1,590 in batches of 32; in
batches the best category of 15 % of the texts changed (random output layer, narrow margins).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ml.artifacts import short_version, verify
from ml.errors import InputError
from ml.offers import check_text_version, offer_text
from ml.stages import SERVABLE
from ml.taxonomy import Taxonomy

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
LABELS_FILE = "labels.json"
SETTINGS_FILE = "model.json"
TAXONOMY_FILE = "taxonomy.parquet"

INPUT_NAME = "input_ids"
OUTPUT_NAME = "logits"

TEXT_COLUMNS = ("title", "brand", "shop_category", "description")
"""Columns that have to be text, or absent, for an offer to be classified."""

_ALTERNATIVES = 3
_CACHED_TEXTS = 20_000
_TEXTS_AT_ONCE = 256
"""Bounds the float32 logits held at a time; the graph itself sees one text."""

_CONFIDENCE_DIGITS = 6


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True):
    """``model.json``: everything beside the weights that a prediction depends on."""

    target: str
    text_version: str
    taxonomy_version: str
    max_tokens: int
    instruction: str
    temperature: float


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


class CompiledModel:
    """ONNX graph, tokenizer and labels of a folder; text in, probabilities out."""

    def __init__(self, folder: Path, threads: int = 1) -> None:
        """Open the model in ``folder`` for ``threads`` threads of arithmetic.

        Raises:
            InputError: a file is missing or damaged, the files do not belong together, or the model
                was trained on offer texts that this version makes differently.
        """
        self.settings, self.labels = _read_settings(folder)
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # the Rust side raises plain Exception
            raise InputError(f"{folder / TOKENIZER_FILE} cannot be read: {_one_line(error)}") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.settings.max_tokens)
        self._session = _session(folder / MODEL_FILE, threads)
        classes = self._session.get_outputs()[0].shape[-1]
        if classes != len(self.labels):
            raise InputError(
                f"{folder / LABELS_FILE} has {len(self.labels)} labels, {MODEL_FILE} {classes} outputs; "
                "they must come from one compilation"
            )

    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits, float32 (texts, classes), in the order of ``texts``."""
        logits = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        if not texts:
            return logits
        prompts = [self.settings.instruction + text for text in texts]
        for row, encoding in enumerate(self._tokenizer.encode_batch_fast(prompts)):
            ids = np.array([encoding.ids], dtype=np.int64)
            logits[row] = self._session.run([OUTPUT_NAME], {INPUT_NAME: ids})[0][0]
        return logits

    def predict_probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes), in the order of ``texts``."""
        return _softmax(self.predict_logits(texts) / np.float32(self.settings.temperature))


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
                another target or offer text version.
        """
        folder = Path(folder)
        manifest = verify(folder, kinds=SERVABLE)
        taxonomy = Taxonomy.load(folder / TAXONOMY_FILE)
        return cls(CompiledModel(folder, threads), taxonomy, short_version(manifest.digest))

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


def _read_settings(folder: Path) -> tuple[ModelSettings, list[str]]:
    try:
        settings = msgspec.json.decode((folder / SETTINGS_FILE).read_bytes(), type=ModelSettings)
        labels = msgspec.json.decode((folder / LABELS_FILE).read_bytes(), type=list[str])
    except FileNotFoundError as error:
        raise InputError(f"{folder} is not a compiled model: {error.filename} is missing") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{folder} is damaged: {error}; delete the folder and compile again") from None
    if settings.target != "cpu":
        raise InputError(f"{folder} was compiled for {settings.target}, this predictor runs models for cpu")
    check_text_version(folder, settings.text_version)
    return settings, labels


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise InputError(f"{path} cannot be opened: {_one_line(error)}; compile the student again") from None


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """As ``ml.learning.calibration.softmax``, without the scipy import that a server would pay for."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

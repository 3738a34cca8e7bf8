"""A compiled student as the predictor sees it: text in, logits out, whatever it was compiled for.

:meth:`CompiledModel.open` looks at ``model.json`` and picks the class that runs models of that target;
each imports its own runtime, so that serving one target needs no other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ml.errors import InputError
from ml.offers import check_text_version
from ml.serving.first_tokens import first_tokens, takes_words_apart

CPU = "cpu"
"""ONNX graph, mostly int8, run by ONNX Runtime or OpenVINO."""

NEURON = "neuron"
"""TorchScript around programs for AWS Inferentia 2, one per bucket of lengths."""

TORCHSCRIPT = "torchscript"
"""The same buckets traced for torch on this machine: in full precision, a reference for the others."""

TOKENIZER_FILE = "tokenizer.json"
LABELS_FILE = "labels.json"
SETTINGS_FILE = "model.json"


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """One static shape: texts of at most ``tokens`` tokens, always ``offers`` of them at once."""

    tokens: int
    offers: int
    file: str


class TracedForm(msgspec.Struct, frozen=True, kw_only=True):
    """How a model was traced, and what it takes to run it."""

    buckets: list[Bucket]
    """The shortest first; the last holds every text."""
    pad_id: int
    compiler: str
    versions: dict[str, str]
    """Of the packages that made it, by the name they are distributed under."""
    device_family: str = ""
    """Of the accelerator; empty: none."""


class CpuForm(msgspec.Struct, frozen=True, kw_only=True):
    """Which of the backends a model for ``cpu`` was compiled by, and why."""

    backend: str
    """By its name in :data:`ml.serving.backends.BACKENDS`."""
    runtime: str
    """What executes the graph."""
    batched: bool
    """Whether texts of one length may be computed together: a text's logits are the same bits."""
    cpu_features: list[str]
    """That the CPU had on which the backend was chosen, of those that matter."""
    reason: str
    """Why this one, for people."""


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``model.json``: everything beside the weights that a prediction depends on."""

    target: str
    text_version: str
    taxonomy_version: str
    max_tokens: int
    instruction: str
    temperature: float
    traced: TracedForm | None = None
    """Of the targets that have static shapes."""
    cpu: CpuForm | None = None
    """Of target ``cpu``."""

    def write(self, folder: Path) -> None:
        """Write ``model.json`` into ``folder``."""
        (folder / SETTINGS_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))

    @classmethod
    def read(cls, folder: Path) -> ModelSettings:
        """Read ``model.json`` of ``folder``.

        Raises:
            InputError: it is missing or damaged, or offer texts are made differently by now.
        """
        try:
            settings = msgspec.json.decode((folder / SETTINGS_FILE).read_bytes(), type=cls)
        except FileNotFoundError as error:
            raise _not_there(folder, error) from None
        except msgspec.DecodeError as error:
            raise _damaged(folder, error) from None
        check_text_version(folder, settings.text_version)
        return settings


class CompiledModel(ABC):
    """Graph, tokenizer and labels of a folder; text in, probabilities out."""

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        """Read what every target has.

        Raises:
            InputError: a file is missing or damaged.
        """
        self.settings = settings
        try:
            self.labels = msgspec.json.decode((folder / LABELS_FILE).read_bytes(), type=list[str])
        except FileNotFoundError as error:
            raise _not_there(folder, error) from None
        except msgspec.DecodeError as error:
            raise _damaged(folder, error) from None
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as error:  # the Rust side raises plain Exception
            raise InputError(f"{folder / TOKENIZER_FILE} cannot be read: {one_line(error)}") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(settings.max_tokens)
        self._takes_words_apart = takes_words_apart(self._tokenizer)

    @staticmethod
    def open(folder: Path, threads: int = 1) -> CompiledModel:
        """The model in ``folder``, ready to run with ``threads`` threads of arithmetic.

        Files are not held against digests here: TorchScript is a program, so who opens a folder that
        came from elsewhere verifies it first, as :meth:`ml.serving.predictor.Predictor.load` does.

        Raises:
            InputError: a file is missing or damaged, the files do not belong together, the model was
                trained on offer texts that this version makes differently, or it cannot run here.
        """
        settings = ModelSettings.read(folder)
        if settings.target == CPU:
            from ml.serving.onnx_model import OnnxModel

            return OnnxModel(folder, settings, threads)
        if settings.target in (NEURON, TORCHSCRIPT):
            from ml.serving.bucketed import BucketedModel

            return BucketedModel(folder, settings, threads)
        raise InputError(
            f"{folder} was compiled for {settings.target}, this predictor runs models for {CPU}, {NEURON} "
            f"and {TORCHSCRIPT}"
        )

    @abstractmethod
    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits, float32 (texts, classes), in the order of ``texts``; of a text always the same ones."""

    def predict_probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Calibrated probabilities, float32 (texts, classes), in the order of ``texts``."""
        return _softmax(self.predict_logits(texts) / np.float32(self.settings.temperature))

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with instruction and special tokens, cut to ``max_tokens``."""
        prompts = [self.settings.instruction + text for text in texts]
        if self._takes_words_apart:
            return first_tokens(self._tokenizer, prompts, self.settings.max_tokens)
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(prompts)]

    def _check_classes(self, folder: Path, file: str, classes: int) -> None:
        if classes != len(self.labels):
            raise InputError(
                f"{folder / LABELS_FILE} has {len(self.labels)} labels, {file} {classes} outputs; "
                "they must come from one compilation"
            )


def traced_form(folder: Path, settings: ModelSettings) -> TracedForm:
    """How the model in ``folder`` was traced.

    Raises:
        InputError: its settings do not say, or say what cannot be.
    """
    traced = settings.traced
    if traced is None or not traced.buckets or traced.buckets[-1].tokens < settings.max_tokens:
        raise InputError(
            f"{folder} was compiled for {settings.target}, but {SETTINGS_FILE} names no buckets for texts "
            f"of {settings.max_tokens} tokens; compile the student again"
        )
    return traced


def one_line(error: Exception) -> str:
    """What a library's exception says, fit for the end of a message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _not_there(folder: Path, error: FileNotFoundError) -> InputError:
    return InputError(f"{folder} is not a compiled model: {error.filename} is missing")


def _damaged(folder: Path, error: msgspec.DecodeError) -> InputError:
    return InputError(f"{folder} is damaged: {error}; delete the folder and compile again")


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """As ``ml.learning.calibration.softmax``, without the scipy import that a server would pay for."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities: NDArray[np.float32] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities

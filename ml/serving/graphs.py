"""Graphs that run on a CPU, whatever executes them: token ids in, logits out.

Texts are computed in batches of exactly equal length: no padding, and no mask to tell it from the text. A
graph that is ``batched`` gives a text the same bits alone and in any batch; which graphs do is measured
where they are compiled (:mod:`ml.serving.backends`). The others take one text at a time.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ml.errors import InputError

MODEL_FILE = "model.onnx"
INPUT_NAME = "input_ids"
OUTPUT_NAME = "logits"

ONNX_RUNTIME = "onnxruntime"
OPENVINO = "openvino"

_TOKENS_AT_ONCE = 384
"""In a batch: the widest activations of MiniLM are then still in the second-level cache."""

_ACTIVATION_GROUP = 128
"""Inputs that share a scale, where OpenVINO quantises activations as it runs."""


class Graph(Protocol):
    """An opened graph."""

    classes: int

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits (texts, classes) of token ids (texts, length)."""


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise cannot_be_opened(path, error) from None
        self.classes = int(self._session.get_outputs()[0].shape[-1])

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Graph`."""
        logits: NDArray[np.float32] = self._session.run([OUTPUT_NAME], {INPUT_NAME: ids})[0]
        return logits


class OpenVinoGraph:
    """A graph in OpenVINO, which is installed with the extra ``openvino``."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        if not openvino_is_installed():
            raise InputError(
                f"{path} was compiled for OpenVINO, which is not installed here; install the extra openvino "
                "(pip install 'offer-assets[openvino]'), or compile the student again with backend auto"
            )
        import openvino

        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # bfloat16, the default where the CPU has it, would round differently in batches.
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _ACTIVATION_GROUP,
        }
        try:
            self._request: Any = (
                openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
            )
        except RuntimeError as error:
            raise cannot_be_opened(path, error) from None
        self.classes = int(self._request.model_outputs[0].get_partial_shape()[-1].get_length())

    def run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """See :class:`Graph`."""
        logits: NDArray[np.float32] = self._request.infer({INPUT_NAME: ids}, share_inputs=True)[OUTPUT_NAME]
        return logits


def open_graph(runtime: str, path: Path, threads: int = 1) -> Graph:
    """The graph in ``path``, ready to run.

    Raises:
        InputError: the file is missing or damaged, or the runtime is not installed, or unknown.
    """
    if runtime == ONNX_RUNTIME:
        return OnnxRuntimeGraph(path, threads)
    if runtime == OPENVINO:
        return OpenVinoGraph(path, threads)
    raise InputError(
        f"{path} was compiled for {runtime}, this version runs graphs in {ONNX_RUNTIME} and {OPENVINO}"
    )


def openvino_is_installed() -> bool:
    """Whether the extra ``openvino`` is there; looks, and imports nothing."""
    return importlib.util.find_spec("openvino") is not None


def logits_of(graph: Graph, rows: Sequence[Sequence[int]], batched: bool) -> NDArray[np.float32]:
    """Logits, float32 (texts, classes), in the order of ``rows``, which hold the token ids of each text."""
    logits = np.empty((len(rows), graph.classes), dtype=np.float32)
    for batch in batches([len(row) for row in rows], batched):
        logits[batch] = graph.run(np.array([rows[row] for row in batch], dtype=np.int64))
    return logits


def batches(lengths: Sequence[int], batched: bool) -> Iterator[list[int]]:
    """Rows that are computed together: of one length, each row once, the shortest first.

    A text that has more than :data:`_TOKENS_AT_ONCE` tokens is computed alone.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows_of[length].append(row)
    for length, rows in sorted(rows_of.items()):
        size = max(1, _TOKENS_AT_ONCE // length) if batched else 1
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def cannot_be_opened(path: Path, error: Exception) -> InputError:
    """What a graph that a runtime refuses comes to."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{path} cannot be opened: {reason}; compile the student again")

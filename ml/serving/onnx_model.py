"""A student compiled for ``cpu``: an int8 ONNX graph that takes one text at a time.

int8 inference scales activations per tensor, so in a batch the answer for a text would depend on its
neighbours and their padding. Alone, a text has one answer on a given CPU, in any order and from any
process.

That costs little. Three layers of MiniLM, 27 tokens on average, one thread of a shared AVX-512 VNNI
core: about 1,400 texts/s one by one, 1,635 in length-sorted batches of 8, 1,590 in batches of 32; in
batches the best category of 15 % of the texts changed (random output layer, narrow margins).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from typing_extensions import override

from ml.errors import InputError
from ml.serving.compiled_model import CompiledModel, ModelSettings, one_line

MODEL_FILE = "model.onnx"
INPUT_NAME = "input_ids"
OUTPUT_NAME = "logits"


class OnnxModel(CompiledModel):
    """See the module; opened by :meth:`ml.serving.compiled_model.CompiledModel.open`."""

    def __init__(self, folder: Path, settings: ModelSettings, threads: int = 1) -> None:
        super().__init__(folder, settings)
        self._session = _session(folder / MODEL_FILE, threads)
        self._check_classes(folder, MODEL_FILE, self._session.get_outputs()[0].shape[-1])

    @override
    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        logits = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for row, ids in enumerate(self._token_ids(texts)):
            feed = {INPUT_NAME: np.array([ids], dtype=np.int64)}
            logits[row] = self._session.run([OUTPUT_NAME], feed)[0][0]
        return logits


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        raise InputError(f"{path} cannot be opened: {one_line(error)}; compile the student again") from None

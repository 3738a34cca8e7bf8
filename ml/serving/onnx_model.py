"""A student compiled for ``cpu``: a graph of ONNX Runtime, or of OpenVINO where that was asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from ml.serving.compiled_model import CompiledModel, CpuForm, ModelSettings
from ml.serving.graphs import MODEL_FILE, ONNX_RUNTIME, logits_of, open_graph
from ml.serving.machine import cpu_features

_BEFORE_THERE_WAS_A_CHOICE = CpuForm(
    backend="onnx-int8-tensor", runtime=ONNX_RUNTIME, batched=False, cpu_features=[], reason=""
)
"""What models are whose settings do not say."""

_log = logging.getLogger(__name__)


class OnnxModel(CompiledModel):
    """See the module; opened by :meth:`ml.serving.compiled_model.CompiledModel.open`."""

    def __init__(self, folder: Path, settings: ModelSettings, threads: int = 1) -> None:
        super().__init__(folder, settings)
        form = settings.cpu or _BEFORE_THERE_WAS_A_CHOICE
        self._graph = open_graph(form.runtime, folder / MODEL_FILE, threads)
        self._batched = form.batched
        self._check_classes(folder, MODEL_FILE, self._graph.classes)
        if missing := [name for name in form.cpu_features if name not in cpu_features()]:
            _log.warning(
                "%s: its backend %s was chosen on a CPU with %s, which this one lacks; it runs, maybe "
                "slower, and the last digits of its answers may differ; compile here to choose anew",
                folder,
                form.backend,
                ", ".join(missing),
            )

    @override
    def predict_logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return logits_of(self._graph, self._token_ids(texts), self._batched)

"""The student as an int8 ONNX graph: weights quantised per output channel, activations per text as it runs.

The graph takes one text (see :mod:`ml.serving.onnx_model` for why), so its mask is all ones and there is
nothing to pad.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn

from ml.learning.encoder import Classifier
from ml.serving.onnx_model import INPUT_NAME, MODEL_FILE, OUTPUT_NAME
from ml.serving.quiet import quiet


class _OneText(nn.Module):
    """The classifier on a single text: ids (1, length) in, logits (1, classes) out."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._classifier = classifier

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._classifier(input_ids, torch.ones_like(input_ids))


def export_int8(classifier: Classifier, path: Path) -> None:
    """Write the classifier as an int8 ONNX graph: token ids (1, length) in, logits (1, classes) out.

    Weights keep all 8 bits: products add up exactly on CPUs with VNNI instructions (Intel since
    2019, AMD since 2022), older ones may saturate now and then.

    Args:
        classifier: On the CPU, in evaluation mode.
        path: The file to write; nothing is written beside it.
    """
    ids = torch.full((1, 8), classifier.pad_id, dtype=torch.int64)
    length = torch.export.Dim("length", min=2, max=classifier.settings.max_tokens)
    with quiet(), tempfile.TemporaryDirectory(prefix="export-") as folder:
        program = torch.onnx.export(
            _OneText(classifier),
            (ids,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"input_ids": {1: length}},
            dynamo=True,
            verbose=False,
        )
        raw = program.model_proto
        _strip(raw)
        onnx.save(raw, Path(folder) / MODEL_FILE)
        # The raw export: ONNX Runtime's transformer optimiser finds nothing to fuse in it, and what
        # it writes cannot be quantised.
        quantize_dynamic(Path(folder) / MODEL_FILE, path, per_channel=True, weight_type=QuantType.QInt8)


def _strip(model: onnx.ModelProto) -> None:
    """Drop shapes, which quantisation would contradict, and stack traces, which name this machine."""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""

"""The student as an ONNX graph in full precision: texts of one length in, logits out.

Every row of a batch has the same number of tokens, so there is nothing to pad and no mask. What follows the
encoder is written so that a text's logits have the same bits in every batch: kernels that sum over an axis,
or multiply by a matrix, round differently for one row than for several.
"""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from ml.learning.encoder import Classifier
from ml.learning.pooling import in_company
from ml.serving.graphs import INPUT_NAME, OUTPUT_NAME
from ml.serving.quiet import quiet

OPSET = 23
"""The first that has attention as one operator."""


class _TextsOfOneLength(nn.Module):
    """The classifier on ids (texts, length), none of them padding; logits (texts, classes) out."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self._encoder = classifier.encoder
        self._head = classifier.head

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self._encoder(input_ids=input_ids).last_hidden_state
        # A sum points where the mean does, and has its length taken away; an encoder that pools itself
        # returns one vector, and that is its sum. Products of small matrices, one
        # pair for each text, are computed alike for any number of texts; ReduceMean and ReduceL2 are not.
        ones = torch.ones_like(hidden[:, :, :1]).transpose(1, 2)
        total = torch.bmm(ones, hidden)
        length = torch.bmm(total, total.transpose(1, 2)).sqrt()
        vectors = (total / length).squeeze(1)
        # One row alone would be multiplied by another kernel than several: there are always two.
        logits: Tensor = self._head(torch.cat([vectors, vectors[:1]]))[:-1]
        return logits


def export(classifier: Classifier) -> onnx.ModelProto:
    """The classifier as an ONNX graph: token ids (texts, length) in, logits (texts, classes) out, float32.

    Args:
        classifier: On the CPU, in evaluation mode.
    """
    ids = torch.full((3, 8), classifier.pad_id, dtype=torch.int64)
    texts = torch.export.Dim("texts", min=1, max=1024)
    length = torch.export.Dim("length", min=2, max=classifier.settings.max_tokens)
    with quiet(), in_company(classifier.encoder):
        program = torch.onnx.export(
            _TextsOfOneLength(classifier),
            (ids,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes={"input_ids": {0: texts, 1: length}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    _strip(model)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Drop shapes, which quantisation would contradict, and stack traces, which name this machine."""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""

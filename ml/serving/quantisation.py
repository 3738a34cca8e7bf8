"""A graph's matrix products in int8, in several ways; all else stays in full precision.

Weights get a scale for each output channel (or block); what differs is what shares a scale among the
activations: a row (a token's vector), a block of a row, or a whole tensor. With a scale per row or block a
text's answer does not depend on its neighbours: sums of integers are exact in any order.

Only the products that every token takes part in are quantised, and the vocabulary's table, most of a small
model's bytes, by one scale per token. The output layer, which runs once for a text, stays as it is.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from ml.serving.graph_rewriting import (
    CONTRIB,
    SMALLEST_SCALE,
    Rewrite,
    int8,
    node_of,
    with_int8_vocabulary,
)
from ml.serving.quiet import quiet

_BLOCK = 32
"""Neighbouring inputs that share a scale. With larger blocks ONNX Runtime's kernels depend on the batch."""

_INT8_ARITHMETIC = 4
"""``accuracy_level`` of ONNX Runtime at which activations are int8 too, and not just the weights."""

_GELU_MINIMUM = 0.17
"""Just under no output of GELU: its minimum is -0.16997."""


def quantise_rows(model: onnx.ModelProto) -> onnx.ModelProto:
    """Activations by one scale per row, weights by one per output channel.

    A row is divided by its largest absolute value, after which a constant scale fits every row; so a kernel
    that knows one scale per tensor computes the product, and the result is multiplied by that value. What
    GELU puts out is nearly never negative: it is shifted to fill all 256 steps, and the shift's share in
    the result, a constant, is taken off the bias.
    """
    return _Rows(with_int8_vocabulary(model)).quantised()


def quantise_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Activations and weights by one scale for every 32 neighbouring inputs (ONNX Runtime's MatMulNBits)."""
    with quiet():
        quantiser = MatMulNBitsQuantizer(
            with_int8_vocabulary(model),
            bits=8,
            block_size=_BLOCK,
            is_symmetric=True,
            accuracy_level=_INT8_ARITHMETIC,
            op_types_to_quantize=("MatMul",),
        )
        quantiser.process()
    quantised: onnx.ModelProto = quantiser.model.model
    return quantised


def quantise_tensors(model: onnx.ModelProto) -> onnx.ModelProto:
    """Activations by one scale per tensor, found as the graph runs (ONNX Runtime's dynamic quantisation).

    A text's answer depends on the others of its batch.
    """
    with quiet(), tempfile.TemporaryDirectory(prefix="quantise-") as folder:
        full, quantised = Path(folder) / "full.onnx", Path(folder) / "int8.onnx"
        onnx.save(with_int8_vocabulary(model), full)
        quantize_dynamic(
            full, quantised, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(quantised)


def quantise_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights alone, by one scale per output channel: activations are left to the runtime (OpenVINO)."""
    graph = Rewrite(with_int8_vocabulary(model))
    nodes = []
    for node in graph.nodes:
        if graph.multiplies_weights(node):
            weights, scales = int8(graph.array(node.input[1]))
            name = f"{node.output[0]}_weights"
            nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [graph.constant(f"{name}_int8", weights), graph.constant(f"{name}_scales", scales)],
                    [name],
                    axis=1,
                )
            )
            node.input[1] = name
        nodes.append(node)
    return graph.with_nodes(nodes)


class _Rows(Rewrite):
    """Rewrites a graph as :func:`quantise_rows` says."""

    def quantised(self) -> onnx.ModelProto:
        products = defaultdict(list)
        for node in self.nodes:
            if self.multiplies_weights(node):
                products[node.input[0]].append(node)
        nodes: list[NodeProto] = []
        for node in self.nodes:
            if not self.multiplies_weights(node):
                nodes.append(node)
            elif together := products.pop(node.input[0], None):
                nodes += self._products(node.input[0], together)
        self.model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
        return self.with_nodes(nodes)

    def _products(self, rows: str, together: list[NodeProto]) -> list[NodeProto]:
        """Instead of all products of the same rows (queries, keys, values): a single one in int8."""
        weights, scales = int8(np.concatenate([self.array(node.input[1]) for node in together], axis=1))
        biased = self.bias_of(together[0]) if len(together) == 1 else None
        shifted = biased is not None and self.maker[rows].op_type == "Gelu"
        prefix = f"{rows}_int8"
        nodes = self._shifted_to_int8(rows, prefix) if shifted else self._to_int8(rows, prefix)
        if biased is not None and shifted:
            total, bias = biased
            share = np.float32(_GELU_MINIMUM) * (weights.astype(np.float32) * scales).sum(axis=0)
            less = self.constant(f"{bias}_less_shift", self.array(bias) - share)
            total.input[list(total.input).index(bias)] = less
        steps, zero = ("all_steps", "no_zero") if shifted else ("half_steps", "middle_zero")
        joint = together[0].output[0] if len(together) == 1 else f"{prefix}_joint"
        nodes += [
            node_of(
                "MatMulIntegerToFloat",
                [
                    f"{prefix}_rows",
                    self.constant(f"{prefix}_weights", weights),
                    steps,
                    self.constant(f"{prefix}_scales", scales),
                    zero,
                ],
                f"{prefix}_product",
                domain=CONTRIB,
            ),
            node_of("Mul", [f"{prefix}_product", f"{prefix}_size"], joint),
        ]
        if len(together) > 1:
            widths = np.array([self.array(node.input[1]).shape[1] for node in together], dtype=np.int64)
            parts = [node.output[0] for node in together]
            nodes.append(
                helper.make_node("Split", [joint, self.constant(f"{prefix}_widths", widths)], parts, axis=-1)
            )
        return nodes

    def _to_int8(self, rows: str, prefix: str) -> list[NodeProto]:
        """Rows as uint8 around 128, and their largest absolute values as ``size``."""
        return [
            node_of("Abs", [rows], f"{prefix}_absolute"),
            node_of("ReduceMax", [f"{prefix}_absolute", self._last_axis()], f"{prefix}_largest", keepdims=1),
            node_of("Max", [f"{prefix}_largest", self._floor()], f"{prefix}_size"),
            node_of("Div", [rows, f"{prefix}_size"], f"{prefix}_unit"),
            node_of(
                "QuantizeLinear",
                [
                    f"{prefix}_unit",
                    self.constant("half_steps", np.array(1 / 127, dtype=np.float32)),
                    self.constant("middle_zero", np.array(128, dtype=np.uint8)),
                ],
                f"{prefix}_rows",
            ),
        ]

    def _shifted_to_int8(self, rows: str, prefix: str) -> list[NodeProto]:
        """Rows that are never under the minimum of GELU as uint8 from 0, and their ranges as ``size``."""
        shift = self.constant("gelu_shift", np.array(_GELU_MINIMUM, dtype=np.float32))
        return [
            node_of("Add", [rows, shift], f"{prefix}_shifted"),
            node_of("ReduceMax", [f"{prefix}_shifted", self._last_axis()], f"{prefix}_largest", keepdims=1),
            node_of("Max", [f"{prefix}_largest", self._floor()], f"{prefix}_size"),
            node_of("Div", [f"{prefix}_shifted", f"{prefix}_size"], f"{prefix}_unit"),
            node_of(
                "QuantizeLinear",
                [
                    f"{prefix}_unit",
                    self.constant("all_steps", np.array(1 / 255, dtype=np.float32)),
                    self.constant("no_zero", np.array(0, dtype=np.uint8)),
                ],
                f"{prefix}_rows",
            ),
        ]

    def _last_axis(self) -> str:
        return self.constant("last_axis", np.array([-1], dtype=np.int64))

    def _floor(self) -> str:
        return self.constant("smallest_scale", np.array(SMALLEST_SCALE))

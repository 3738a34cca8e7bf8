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
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from ml.serving.quiet import quiet

_CONTRIB = "com.microsoft"
_BLOCK = 32
"""Neighbouring inputs that share a scale. With larger blocks ONNX Runtime's kernels depend on the batch."""

_INT8_ARITHMETIC = 4
"""``accuracy_level`` of ONNX Runtime at which activations are int8 too, and not just the weights."""

_GELU_MINIMUM = 0.17
"""Just under no output of GELU: its minimum is -0.16997."""

_LARGE_TABLE = 1_000
"""Rows of a table of embeddings that is worth the trouble: a vocabulary, and no positions."""

_SMALLEST_SCALE = np.float32(1e-12)


def quantise_rows(model: onnx.ModelProto) -> onnx.ModelProto:
    """Activations by one scale per row, weights by one per output channel.

    A row is divided by its largest absolute value, after which a constant scale fits every row; so a kernel
    that knows one scale per tensor computes the product, and the result is multiplied by that value. What
    GELU puts out is nearly never negative: it is shifted to fill all 256 steps, and the shift's share in
    the result, a constant, is taken off the bias.
    """
    return _Rows(_with_int8_vocabulary(model)).quantised()


def quantise_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Activations and weights by one scale for every 32 neighbouring inputs (ONNX Runtime's MatMulNBits)."""
    with quiet():
        quantiser = MatMulNBitsQuantizer(
            _with_int8_vocabulary(model),
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
        onnx.save(_with_int8_vocabulary(model), full)
        quantize_dynamic(
            full, quantised, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(quantised)


def quantise_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights alone, by one scale per output channel: activations are left to the runtime (OpenVINO)."""
    graph = _Graph(_with_int8_vocabulary(model))
    nodes = []
    for node in graph.nodes:
        if graph.multiplies_weights(node):
            weights, scales = _int8(graph.array(node.input[1]))
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


class _Graph:
    """A model's graph while it is being rewritten."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self._constants: dict[str, TensorProto] = {each.name: each for each in model.graph.initializer}
        self.maker = {output: node for node in self.nodes for output in node.output}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.users[name].append(node)

    def is_constant(self, name: str) -> bool:
        return name in self._constants

    def array(self, name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = numpy_helper.to_array(self._constants[name])
        return array

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """The name, which stands for the value from now on."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def multiplies_weights(self, node: NodeProto) -> bool:
        """Whether the node is a product of activations by a constant matrix."""
        return node.op_type == "MatMul" and self.is_constant(node.input[1])

    def bias(self, node: NodeProto) -> tuple[str, str] | None:
        """Of a sum, its constant vector and its other operand; None: the node is no such sum."""
        if node.op_type != "Add":
            return None
        for number, name in enumerate(node.input):
            if self.is_constant(name) and self.array(name).ndim == 1:
                return name, node.input[1 - number]
        return None

    def with_nodes(self, nodes: list[NodeProto]) -> onnx.ModelProto:
        """The model with these nodes instead, and the constants that they need."""
        needed = {name for node in nodes for name in node.input}
        graph = self.model.graph
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in needed)
        return self.model


class _Rows(_Graph):
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
        self.model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
        return self.with_nodes(nodes)

    def _products(self, rows: str, together: list[NodeProto]) -> list[NodeProto]:
        """Instead of all products of the same rows (queries, keys, values): a single one in int8."""
        weights, scales = _int8(np.concatenate([self.array(node.input[1]) for node in together], axis=1))
        biased = self._bias_of(together[0]) if len(together) == 1 else None
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
            _node(
                "MatMulIntegerToFloat",
                [
                    f"{prefix}_rows",
                    self.constant(f"{prefix}_weights", weights),
                    steps,
                    self.constant(f"{prefix}_scales", scales),
                    zero,
                ],
                f"{prefix}_product",
                domain=_CONTRIB,
            ),
            _node("Mul", [f"{prefix}_product", f"{prefix}_size"], joint),
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
            _node("Abs", [rows], f"{prefix}_absolute"),
            _node("ReduceMax", [f"{prefix}_absolute", self._last_axis()], f"{prefix}_largest", keepdims=1),
            _node("Max", [f"{prefix}_largest", self._floor()], f"{prefix}_size"),
            _node("Div", [rows, f"{prefix}_size"], f"{prefix}_unit"),
            _node(
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
            _node("Add", [rows, shift], f"{prefix}_shifted"),
            _node("ReduceMax", [f"{prefix}_shifted", self._last_axis()], f"{prefix}_largest", keepdims=1),
            _node("Max", [f"{prefix}_largest", self._floor()], f"{prefix}_size"),
            _node("Div", [f"{prefix}_shifted", f"{prefix}_size"], f"{prefix}_unit"),
            _node(
                "QuantizeLinear",
                [
                    f"{prefix}_unit",
                    self.constant("all_steps", np.array(1 / 255, dtype=np.float32)),
                    self.constant("no_zero", np.array(0, dtype=np.uint8)),
                ],
                f"{prefix}_rows",
            ),
        ]

    def _bias_of(self, product: NodeProto) -> tuple[NodeProto, str] | None:
        """The sum that adds a bias to the product and nothing else uses, with the name of that bias."""
        users = self.users[product.output[0]]
        found = self.bias(users[0]) if len(users) == 1 else None
        return (users[0], found[0]) if found else None

    def _last_axis(self) -> str:
        return self.constant("last_axis", np.array([-1], dtype=np.int64))

    def _floor(self) -> str:
        return self.constant("smallest_scale", np.array(_SMALLEST_SCALE))


def _with_int8_vocabulary(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large tables of embeddings are int8, by one scale per row."""
    graph = _Graph(_copy(model))
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "Gather" or not graph.is_constant(node.input[0]):
            nodes.append(node)
            continue
        table, ids = graph.array(node.input[0]), node.input[1]
        if table.ndim != 2 or len(table) < _LARGE_TABLE or table.dtype != np.float32:
            nodes.append(node)
            continue
        rows, scales = _int8(table.T)
        prefix = f"{node.output[0]}_int8"
        nodes += [
            _node("Gather", [graph.constant(f"{prefix}_table", rows.T.copy()), ids], f"{prefix}_row"),
            _node("Gather", [graph.constant(f"{prefix}_scales", scales[:, None]), ids], f"{prefix}_scale"),
            _node("Cast", [f"{prefix}_row"], f"{prefix}_steps", to=TensorProto.FLOAT),
            _node("Mul", [f"{prefix}_steps", f"{prefix}_scale"], node.output[0]),
        ]
    return graph.with_nodes(nodes)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _int8(weights: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights (inputs, outputs) as int8, and the scale of each output (outputs,)."""
    scales = np.maximum(np.abs(weights).max(axis=0) / 127, _SMALLEST_SCALE).astype(np.float32)
    return np.clip(np.round(weights / scales), -127, 127).astype(np.int8), scales


def _node(operator: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    return helper.make_node(operator, inputs, [output], name=output, **attributes)

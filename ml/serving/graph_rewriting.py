"""Rewriting an ONNX graph: finding its matrix products, and putting other nodes in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""

_LARGE_TABLE = 1_000
"""Rows of a table of embeddings that is worth the trouble: a vocabulary, and no positions."""

SMALLEST_SCALE = np.float32(1e-12)
"""Of what is all zeros."""


class Rewrite:
    """A model's graph while it is being rewritten."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Take a model over; :meth:`with_nodes` gives it back."""
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self._constants: dict[str, TensorProto] = {each.name: each for each in model.graph.initializer}
        self.maker = {output: node for node in self.nodes for output in node.output}
        self.users: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.users[name].append(node)

    def is_constant(self, name: str) -> bool:
        """Whether the name stands for weights."""
        return name in self._constants

    def array(self, name: str) -> NDArray[np.float32]:
        """The weights of that name."""
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

    def bias_of(self, product: NodeProto) -> tuple[NodeProto, str] | None:
        """The sum that adds a bias to the product and nothing else uses, with the name of that bias."""
        users = self.users[product.output[0]]
        found = self.bias(users[0]) if len(users) == 1 else None
        return (users[0], found[0]) if found else None

    def with_nodes(self, nodes: list[NodeProto]) -> onnx.ModelProto:
        """The model with these nodes instead, and the constants that they need."""
        needed = {name for node in nodes for name in node.input}
        graph = self.model.graph
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in needed)
        return self.model


def with_int8_vocabulary(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large tables of embeddings are int8, by one scale per row."""
    graph = Rewrite(_copy_of(model))
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if node.op_type != "Gather" or not graph.is_constant(node.input[0]):
            nodes.append(node)
            continue
        table, ids = graph.array(node.input[0]), node.input[1]
        if table.ndim != 2 or len(table) < _LARGE_TABLE or table.dtype != np.float32:
            nodes.append(node)
            continue
        rows, scales = int8(table.T)
        prefix = f"{node.output[0]}_int8"
        nodes += [
            node_of("Gather", [graph.constant(f"{prefix}_table", rows.T.copy()), ids], f"{prefix}_row"),
            node_of("Gather", [graph.constant(f"{prefix}_scales", scales[:, None]), ids], f"{prefix}_scale"),
            node_of("Cast", [f"{prefix}_row"], f"{prefix}_steps", to=TensorProto.FLOAT),
            node_of("Mul", [f"{prefix}_steps", f"{prefix}_scale"], node.output[0]),
        ]
    return graph.with_nodes(nodes)


def _copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def int8(weights: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights (inputs, outputs) as int8, and the scale of each output (outputs,)."""
    scales = np.maximum(np.abs(weights).max(axis=0) / 127, SMALLEST_SCALE).astype(np.float32)
    return np.clip(np.round(weights / scales), -127, 127).astype(np.int8), scales


def node_of(
    operator: str, inputs: Sequence[str], output: str, *, domain: str = "", **attributes: object
) -> NodeProto:
    """A node with one output, which it is named after."""
    return helper.make_node(operator, list(inputs), [output], name=output, domain=domain, **attributes)

"""Constant scales, chosen on texts: of a network with a giant among its neurons, silent ones, outliers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ml.errors import InputError
from ml.serving.calibrated_quantisation import quantise_calibrated
from ml.serving.graphs import INPUT_NAME, OUTPUT_NAME, OnnxRuntimeGraph

TOKENS, WIDTH, NEURONS, CLASSES = 40, 16, 64, 5
CLOSE = 0.02
"""What a small random network in int8 may be off by."""
TEXTS = [[token, (7 * token + 3) % TOKENS] for token in range(TOKENS)]


def network(giant: float = 1.0, silent: int = 0) -> onnx.ModelProto:
    """Embeddings, two products with bias and a GELU between them; each token's result is an output.

    Args:
        giant: How much larger what one neuron gives is than what the others give, and what it counts.
        silent: Neurons that never say anything.
    """
    random = np.random.default_rng(3)
    first = random.normal(size=(WIDTH, NEURONS)).astype(np.float32)
    second = random.normal(size=(NEURONS, CLASSES)).astype(np.float32)
    first[:, 5] *= giant
    second[5] *= giant
    bias = random.normal(size=NEURONS).astype(np.float32)
    if silent:
        first[:, -silent:], bias[-silent:] = 0, 0
    constants = {
        "table": random.normal(size=(TOKENS, WIDTH)).astype(np.float32),
        "first": first,
        "first_bias": bias,
        "second": second,
        "second_bias": random.normal(size=CLASSES).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", INPUT_NAME], ["vectors"]),
        helper.make_node("MatMul", ["vectors", "first"], ["inner"]),
        helper.make_node("Add", ["inner", "first_bias"], ["inner_sum"]),
        helper.make_node("Gelu", ["inner_sum"], ["gelu"]),
        helper.make_node("MatMul", ["gelu", "second"], ["outer"]),
        helper.make_node("Add", ["outer", "second_bias"], [OUTPUT_NAME]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.INT64, ["texts", "length"])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["texts", "length", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def answers(model: onnx.ModelProto, folder: Path, texts: list[list[int]]) -> np.ndarray:
    onnx.save(model, folder / "model.onnx")
    return OnnxRuntimeGraph(folder / "model.onnx").run(np.array(texts, dtype=np.int64))


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def error(model: onnx.ModelProto, folder: Path, calibration: list[list[int]]) -> float:
    """Of the texts' answers, in shares of what they come to."""
    quantised = quantise_calibrated(model, calibration)
    right, found = answers(model, folder, TEXTS), answers(quantised, folder, TEXTS)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


def test_products_are_int8_and_close(tmp_path: Path) -> None:
    quantised = quantise_calibrated(network(), TEXTS)
    assert operators(quantised).count("MatMulIntegerToFloat") == 2
    assert "MatMul" not in operators(quantised)
    assert "Add" not in operators(quantised)  # the kernel adds the bias
    assert error(network(), tmp_path, TEXTS) < CLOSE


@pytest.mark.parametrize("giant", [10.0, 30.0])
def test_a_giant_is_multiplied_apart_and_coarsens_nothing(giant: float, tmp_path: Path) -> None:
    model = network(giant)
    quantised = quantise_calibrated(model, TEXTS)
    places = [node.input[1] for node in quantised.graph.node if node.op_type == "Gather"][-1]
    constants = {each.name: numpy_helper.to_array(each) for each in quantised.graph.initializer}
    assert constants[places].tolist() == [5]
    others = answers(model, tmp_path, TEXTS) - answers(only_the_giant(model), tmp_path, TEXTS)
    found = answers(quantised, tmp_path, TEXTS) - answers(only_the_giant(quantised), tmp_path, TEXTS)
    assert np.linalg.norm(found - others) < CLOSE * np.linalg.norm(others)


def only_the_giant(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network with all neurons but one switched off where they come together, in either form."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for each in changed.graph.initializer:
        array = numpy_helper.to_array(each).copy()
        if array.shape == (NEURONS, CLASSES):
            array[[row for row in range(NEURONS) if row != 5]] = 0
            each.CopyFrom(numpy_helper.from_array(array, each.name))
    return changed


def test_silent_neurons_do_no_harm_and_may_speak_up(tmp_path: Path) -> None:
    assert error(network(silent=8), tmp_path, TEXTS) < CLOSE
    few = TEXTS[:3]  # whatever these leave out has some range yet
    assert np.isfinite(error(network(), tmp_path, few))


def test_what_exceeds_the_texts_is_cut_off_and_not_wrapped_around(tmp_path: Path) -> None:
    model = network()
    quantised = quantise_calibrated(model, TEXTS)
    for larger in (model, quantised):
        for each in larger.graph.initializer:
            if each.name == "table":
                each.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(each), each.name))
    right, found = answers(model, tmp_path, TEXTS), answers(quantised, tmp_path, TEXTS)
    assert np.corrcoef(right.ravel(), found.ravel())[0, 1] > 0.9
    assert np.linalg.norm(found) < np.linalg.norm(right)


def test_without_texts_there_is_nothing_to_choose_scales_on() -> None:
    with pytest.raises(InputError, match="no offers to choose the scales"):
        quantise_calibrated(network(), [])

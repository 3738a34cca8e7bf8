import numpy as np
import onnx
import pyarrow as pa
import pytest

from ml.errors import InputError
from ml.evaluation.gate import GateLimits
from ml.learning.encoder import Classifier
from ml.learning.pooling import POOLINGS
from ml.progress import Progress
from ml.serving import backends
from ml.serving.backends import BACKENDS, Backend, Candidate, choose, compile_for_cpu
from ml.serving.graphs import (
    MODEL_FILE,
    ONNX_RUNTIME,
    OPENVINO,
    batches,
    logits_of,
    open_graph,
    openvino_is_installed,
)
from tests.ml.compiled_models import PRODUCTS, TITLES

SAMPLE = pa.table({"text": TITLES, "category_id": [category for category in PRODUCTS for _ in range(5)]})
LONGER = [*TITLES, "tent", "led lamp", *(f"{a} with {b}" for a, b in zip(TITLES, TITLES[7:], strict=False))]
SAME_BITS = ["onnx-int8-calibrated", "onnx-int8-rows", "onnx-int8-blocks", "onnx-fp32"]

needs_openvino = pytest.mark.skipif(
    not openvino_is_installed(), reason="OpenVINO is an extra that is not installed here"
)


def candidate(
    name: str, speed: float, same: float = 1.0, loss: float = 0.0, offers: int = 1_000_000, **others: object
) -> Candidate:
    return Candidate(
        backend=name,
        summary="",
        offers=offers,
        same_category=same,
        f1_loss=loss,
        offers_per_second=speed,
        **others,
    )


def test_of_few_offers_a_candidate_is_refused_only_if_chance_does_not_explain_it():
    limits = GateLimits()
    assert candidate("a", 1.0, same=0.994, offers=500).may_keep(limits)
    assert not candidate("a", 1.0, same=0.994, offers=500).keeps(limits)
    assert not candidate("a", 1.0, same=0.994, offers=100_000).may_keep(limits)
    assert not candidate("a", 1.0, same=0.9, offers=500).may_keep(limits)
    assert not candidate("a", 1.0, offers=0).may_keep(limits)


def test_what_keeps_the_limits_on_the_sample_comes_before_what_may_only_keep_them():
    exact = candidate("onnx-int8-rows", 300.0, same=0.996, offers=900)
    doubtful = candidate("onnx-int8-tensor", 500.0, same=0.991, offers=900)
    full = candidate("onnx-fp32", 100.0, offers=900)
    assert choose([exact, doubtful, full], "auto")[0] is exact
    chosen, reason = choose([doubtful, full], "auto")
    assert chosen is doubtful
    assert "may keep" in reason


@pytest.fixture(scope="module", params=POOLINGS)
def classifier(compiled_root, request):
    student = Classifier.load(compiled_root / "student").keep_layers(1).with_pooling(request.param)
    return student.to("cpu").eval()


@pytest.fixture(scope="module")
def rows(classifier):
    tokens = classifier.tokenize(LONGER)
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


@pytest.fixture(scope="module")
def compiled(classifier, tmp_path_factory):
    """Folder and figures of a backend, by its name; made once."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (
                folder,
                compile_for_cpu(
                    classifier, SAMPLE, folder, calibration=TITLES, backend=name, progress=Progress("test")
                ),
            )
        return made[name]

    return of


def test_the_fastest_that_keeps_the_limits_is_chosen():
    found = [
        candidate("onnx-int8-rows", 400.0, same=0.996, loss=0.001),
        candidate("onnx-int8-blocks", 250.0),
        candidate("onnx-int8-tensor", 900.0, same=0.99),
        candidate("onnx-fp32", 100.0),
    ]
    assert choose(found, "auto")[0].backend == "onnx-int8-rows"


@pytest.mark.parametrize("wrong", [{"same": 0.994}, {"loss": 0.0021}, {"problem": "no such kernel"}])
def test_a_fast_but_wrong_candidate_is_refused(wrong):
    found = [
        candidate("onnx-int8-rows", 400.0, **wrong),
        candidate("onnx-int8-blocks", 250.0),
        candidate("onnx-fp32", 100.0),
    ]
    assert choose(found, "auto")[0].backend == "onnx-int8-blocks"


def test_where_nothing_keeps_the_limits_full_precision_is_taken_and_said():
    found = [candidate("onnx-int8-rows", 400.0, same=0.9), candidate("onnx-fp32", 100.0)]
    chosen, reason = choose(found, "auto")
    assert chosen.backend == "onnx-fp32"
    assert "last resort" in reason


def test_full_precision_that_is_faster_is_no_last_resort():
    found = [candidate("onnx-int8-rows", 80.0), candidate("onnx-fp32", 100.0)]
    chosen, reason = choose(found, "auto")
    assert chosen.backend == "onnx-fp32"
    assert reason == "no other that keeps the gate's limits is faster"


def test_a_lead_that_may_be_chance_decides_nothing():
    found = [candidate("onnx-int8-rows", 100.0), candidate("onnx-int8-blocks", 104.0)]
    assert choose(found, "auto")[0].backend == "onnx-int8-rows"


def test_where_nothing_can_be_built_all_problems_are_named():
    found = [candidate("onnx-int8-rows", 0.0, problem="a"), candidate("onnx-fp32", 0.0, problem="b")]
    with pytest.raises(InputError, match="onnx-int8-rows: a; onnx-fp32: b"):
        choose(found, "auto")


def test_a_backend_that_was_asked_for_is_left_to_the_gate():
    chosen, reason = choose([candidate("onnx-int8-tensor", 1.0, same=0.5)], "onnx-int8-tensor")
    assert chosen.backend == "onnx-int8-tensor"
    assert reason == "it was asked for"


def test_an_unknown_backend_is_refused_with_the_names(classifier, tmp_path):
    with pytest.raises(InputError, match=r"'quick' does not exist; there are auto, .*onnx-int8-rows"):
        compile_for_cpu(
            classifier, SAMPLE, tmp_path, calibration=TITLES, backend="quick", progress=Progress("test")
        )


def test_auto_looks_at_openvino_only_where_extras_are_allowed_and_installed(monkeypatch):
    def looked_at(asked_for):
        return {each.runtime for each in backends._candidates(asked_for, BACKENDS)}

    monkeypatch.setattr(backends, "openvino_is_installed", lambda: True)
    assert looked_at("auto") == {ONNX_RUNTIME}
    assert looked_at("auto-with-extras") == {ONNX_RUNTIME, OPENVINO}
    monkeypatch.setattr(backends, "openvino_is_installed", lambda: False)
    assert looked_at("auto-with-extras") == {ONNX_RUNTIME}
    with pytest.raises(InputError, match="install the extra openvino"):
        looked_at("openvino-int8")


def test_a_backend_that_cannot_be_built_leaves_the_others(classifier, tmp_path):
    def refuse(model, texts):
        raise RuntimeError("no such kernel")

    fp32 = next(each for each in BACKENDS if each.is_reference)
    catalogue = (Backend("broken", "never works", refuse), fp32)
    made = compile_for_cpu(
        classifier, SAMPLE, tmp_path, calibration=TITLES, progress=Progress("test"), backends=catalogue
    )
    assert made.form.backend == "onnx-fp32"
    assert made.candidates[0].problem == "no such kernel"
    assert (tmp_path / MODEL_FILE).is_file()
    assert [each["backend"] for each in made.metrics["backend_candidates"]] == ["broken", "onnx-fp32"]


@pytest.mark.parametrize("name", SAME_BITS)
def test_a_text_has_the_same_bits_in_any_batch_and_order(name, compiled, rows):
    folder, made = compiled(name)
    assert made.candidates[0].same_bits
    graph = open_graph(ONNX_RUNTIME, folder / MODEL_FILE)
    alone = logits_of(graph, rows, batched=False)
    random = np.random.default_rng(17)
    for _ in range(8):
        some = random.permutation(len(rows))[: random.integers(1, len(rows) + 1)]
        together = logits_of(graph, [rows[row] for row in some], batched=True)
        np.testing.assert_array_equal(together, alone[some])
    for count in (1, 2, 3, 5, 16, 31):  # of the very same length, where kernels change their blocking
        longest = max(range(len(rows)), key=lambda row: len(rows[row]))
        together = graph.run(np.array([rows[longest]] * count, dtype=np.int64))
        np.testing.assert_array_equal(together, np.repeat(alone[[longest]], count, axis=0))


def test_one_scale_per_tensor_is_found_to_depend_on_the_batch_and_takes_one_text_at_a_time(compiled):
    _, made = compiled("onnx-int8-tensor")
    assert not made.candidates[0].same_bits
    assert not made.form.batched


@pytest.mark.parametrize("name", SAME_BITS[:3])
def test_int8_follows_the_original_closely(name, classifier, compiled, rows):
    folder, made = compiled(name)
    expected = classifier.predict_logits(LONGER)
    logits = logits_of(open_graph(ONNX_RUNTIME, folder / MODEL_FILE), rows, made.form.batched)
    assert np.abs(logits - expected).max() < 0.02 * np.ptp(expected)


def test_full_precision_is_the_original(classifier, compiled, rows):
    folder, _ = compiled("onnx-fp32")
    logits = logits_of(open_graph(ONNX_RUNTIME, folder / MODEL_FILE), rows, batched=True)
    np.testing.assert_allclose(logits, classifier.predict_logits(LONGER), atol=2e-4)


def test_int8_is_a_quarter_of_full_precision(compiled):
    full = compiled("onnx-fp32")[1].candidates[0].size_bytes
    for name in SAME_BITS[:3]:
        assert compiled(name)[1].candidates[0].size_bytes < 0.3 * full


def test_products_of_the_same_rows_are_one(compiled, classifier):
    folder, _ = compiled("onnx-int8-rows")
    operators = [node.op_type for node in onnx.load(folder / MODEL_FILE).graph.node]
    # Queries, keys and values together, and three more; the mean of the tokens asks by itself.
    products = {"mean": 4, "query": 5}[classifier.settings.pooling]
    assert operators.count("MatMulIntegerToFloat") == products


@needs_openvino
def test_openvino_gives_a_text_the_same_bits_in_any_batch(compiled, rows):
    folder, _ = compiled("openvino-int8")
    graph = open_graph(OPENVINO, folder / MODEL_FILE)
    alone = logits_of(graph, rows, batched=False)
    np.testing.assert_array_equal(logits_of(graph, rows, batched=True), alone)


def test_a_model_for_openvino_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("ml.serving.graphs.openvino_is_installed", lambda: False)
    with pytest.raises(InputError, match="install the extra openvino"):
        open_graph(OPENVINO, tmp_path / MODEL_FILE)


def test_a_runtime_of_a_later_version_is_refused(tmp_path):
    with pytest.raises(InputError, match="was compiled for abacus"):
        open_graph("abacus", tmp_path / MODEL_FILE)


def test_batches_are_of_one_length_and_hold_each_row_once():
    lengths = [3, 48, 3, 500, 48, *[48] * 20]
    found = list(batches(lengths, batched=True))
    assert sorted(row for batch in found for row in batch) == list(range(len(lengths)))
    assert all(len({lengths[row] for row in batch}) == 1 for batch in found)
    assert max(len(batch) * lengths[batch[0]] for batch in found if len(batch) > 1) <= 384
    assert [len(batch) for batch in batches(lengths, batched=False)] == [1] * len(lengths)

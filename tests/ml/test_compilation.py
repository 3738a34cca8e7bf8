import shutil
import sys
import types
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ml.artifacts import read_manifest, verify
from ml.errors import InputError
from ml.evaluation.cascade import cascade_pictures
from ml.learning.encoder import Classifier
from ml.runner import run_stage
from ml.serving.compiled_model import CompiledModel, ModelSettings
from ml.serving.machine import cpu_features
from ml.serving.onnx_model import OnnxModel
from tests.ml.compiled_models import PRODUCTS, TITLES, compile_spec, seal


def test_the_settings_say_which_backend_on_which_cpu_and_why(compiled_student):
    form = ModelSettings.read(compiled_student).cpu
    assert form.backend == "onnx-int8-rows"
    assert form.runtime == "onnxruntime"
    assert form.cpu_features == cpu_features()
    assert form.reason == "it was asked for"


def test_a_cpu_that_lacks_what_the_choice_was_made_on_is_said(compiled_student, monkeypatch, caplog):
    expected = CompiledModel.open(compiled_student).predict_logits(TITLES[:3])
    assert caplog.text == ""
    settings = ModelSettings.read(compiled_student)
    form = msgspec.structs.replace(settings.cpu, cpu_features=["avx512_vnni", "amx_int8"])
    monkeypatch.setattr("ml.serving.onnx_model.cpu_features", lambda: ["avx512_vnni"])
    model = OnnxModel(compiled_student, msgspec.structs.replace(settings, cpu=form))
    assert "was chosen on a CPU with amx_int8, which this one lacks" in caplog.text
    np.testing.assert_array_equal(model.predict_logits(TITLES[:3]), expected)


def test_the_compiled_student_agrees_with_the_original_and_is_a_quarter_of_its_size(compiled_student):
    metrics = read_manifest(compiled_student).metrics
    assert metrics["offers"] == len(TITLES)
    assert metrics["same_category"] > 0.98
    assert metrics["weighted_f1_original"] > 0.9
    assert abs(metrics["weighted_f1_compiled"] - metrics["weighted_f1_original"]) < 0.05
    assert 0 < metrics["mean_probability_difference"] <= metrics["max_probability_difference"] < 0.2
    assert metrics["size_bytes"] < metrics["original_size_bytes"] / 3
    assert metrics["backend"] == "onnx-int8-rows"
    assert [each["backend"] for each in metrics["backend_candidates"]] == ["onnx-int8-rows"]
    assert metrics["offers_per_second"] > 0
    assert metrics["original_offers_per_second"] > 0


def test_the_compiled_student_is_a_complete_artifact(compiled_student):
    assert set(verify(compiled_student, kinds=["compiled_student"]).files) == {
        "cascade.json",
        "fast/fast_model.json",
        "fast/labels.json",
        "fast/vocabulary.txt",
        "fast/weights.safetensors",
        "labels.json",
        "model.json",
        "model.onnx",
        "taxonomy.parquet",
        "tokenizer.json",
    }


def test_logits_follow_the_original_for_every_length_of_text(compiled_root, compiled_student):
    texts = ["tent", *TITLES[:3], " ".join(["sofa lamp"] * 40)]
    expected = Classifier.load(compiled_root / "student").predict_logits(texts)
    assert np.abs(CompiledModel.open(compiled_student).predict_logits(texts) - expected).max() < 0.1 * np.ptp(
        expected
    )


def test_compiling_again_gives_the_same_bytes(compiled_root, compiled_student, tmp_path):
    again = run_stage(
        compile_spec(compiled_root, tmp_path / "again", parity_offers=5, backend="onnx-int8-rows")
    )
    assert again.metrics["offers"] == 5
    assert again.digest == read_manifest(compiled_student).digest


def test_the_graph_names_no_file_of_the_machine_that_made_it(compiled_student):
    onnx.checker.check_model(onnx.load(compiled_student / "model.onnx"))
    assert b".py" not in (compiled_student / "model.onnx").read_bytes()


def test_a_taxonomy_the_student_was_not_trained_on_is_refused(compiled_root, tmp_path):
    other = tmp_path / "taxonomy"
    other.mkdir()
    (other / "taxonomy.parquet").write_bytes(
        (compiled_root / "taxonomy" / "taxonomy.parquet").read_bytes() + b"\0"
    )
    seal(other, "catalog_taxonomy")
    spec = compile_spec(compiled_root, tmp_path / "out")
    spec.inputs["catalog_taxonomy"] = str(other)
    with pytest.raises(InputError, match="was trained on taxonomy"):
        run_stage(spec)


def test_a_fast_model_of_another_taxonomy_is_refused(compiled_root, tmp_path):
    fast = shutil.copytree(compiled_root / "fast", tmp_path / "fast")
    settings = msgspec.json.decode((fast / "fast_model.json").read_bytes())
    (fast / "fast_model.json").write_bytes(msgspec.json.encode(settings | {"taxonomy_version": "other"}))
    spec = compile_spec(compiled_root, tmp_path / "out")
    spec.inputs["fast_checkpoint"] = str(seal(fast, "fast_checkpoint"))
    with pytest.raises(InputError, match="fast was trained on taxonomy other"):
        run_stage(spec)


def test_metrics_say_what_the_cascade_costs_and_what_was_chosen(compiled_student):
    metrics = read_manifest(compiled_student).metrics
    assert (metrics["fast_from"], metrics["validation_share_fast"]) == (
        None,
        0.0,
    )  # 120 offers certify nothing
    assert metrics["validation_offers"] == 10 * len(PRODUCTS)
    assert metrics["cascade_offers"] == len(TITLES)
    assert metrics["cascade_loss"] == 0.0
    assert metrics["cascade_accuracy"] == metrics["cascade_student_accuracy"]
    assert 0 <= metrics["cascade_ece"] < 0.5
    pictures = cascade_pictures(metrics)
    assert set(pictures) == {"reliability", "risk_coverage"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_with_a_looser_stated_loss_the_fast_model_answers(compiled_root, tmp_path):
    metrics = run_stage(compile_spec(compiled_root, tmp_path / "out", max_loss=0.2)).metrics
    assert metrics["fast_from"] is not None
    assert metrics["validation_share_fast"] > 0.5
    assert metrics["validation_loss"] <= 0.2


def test_an_empty_evaluation_set_is_refused(compiled_root, tmp_path):
    empty = tmp_path / "evaluation"
    empty.mkdir()
    schema = pa.schema({"text": pa.string(), "category_id": pa.string(), "country": pa.string()})
    pq.write_table(schema.empty_table(), empty / "offers.parquet")
    seal(empty, "evaluation_set")
    spec = compile_spec(compiled_root, tmp_path / "out")
    spec.inputs["evaluation_set"] = str(empty)
    with pytest.raises(InputError, match="has no offers"):
        run_stage(spec)


def test_target_neuron_says_what_it_needs(compiled_root, tmp_path, monkeypatch):
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "")
    with pytest.raises(InputError, match=r"torch_neuronx 2\.9\.x .* torch_neuronx is not installed"):
        run_stage(compile_spec(compiled_root, tmp_path / "out", target="neuron"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("version", "can_trace", "compiler", "said"),
    [
        ("0.0.1", False, "2.27.5334.0", "torch_neuronx 0.0.1 cannot trace"),
        ("2.9.0.2.15.32035", False, "2.27.5334.0", "cannot trace"),
        ("3.0.0", True, "2.27.5334.0", "cannot trace"),
        ("2.9.0.2.15.32035", True, "0.0.1", r"neuronx-cc is 0\.0\.1 \(a placeholder"),
    ],
)
def test_a_placeholder_is_told_from_the_neuron_sdk(
    version, can_trace, compiler, said, compiled_root: Path, tmp_path: Path, monkeypatch
):
    module = types.ModuleType("torch_neuronx")
    module.__spec__ = types.SimpleNamespace(name="torch_neuronx")
    if can_trace:
        module.trace = object()
    monkeypatch.setitem(sys.modules, "torch_neuronx", module)
    monkeypatch.setattr(metadata, "version", {"torch-neuronx": version, "neuronx-cc": compiler}.__getitem__)
    monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "")  # is set by who compiles; gone afterwards
    with pytest.raises(InputError, match=said):
        run_stage(compile_spec(compiled_root, tmp_path / "out", target="neuron"))


def test_an_sdk_is_asked_for_only_where_there_is_one(compiled_root, tmp_path):
    with pytest.raises(InputError, match=r"sdk 2\.9: only target neuron has one, not cpu"):
        run_stage(compile_spec(compiled_root, tmp_path / "out", sdk="2.9"))

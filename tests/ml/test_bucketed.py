"""Static shapes, run by torch on this machine: routing, padding and order."""

import itertools
import os
import shutil
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ml.artifacts import read_manifest, verify
from ml.errors import InputError
from ml.learning.encoder import Classifier
from ml.progress import Progress
from ml.serving.bucketed import BucketedModel, smallest_bucket
from ml.serving.compiled_model import CompiledModel, ModelSettings
from ml.serving.onnx_model import OnnxModel
from ml.serving.predictor import Predictor
from ml.serving.tracing import buckets_for, trace_student
from tests.ml.compiled_models import PRODUCTS, TITLES

LONG = " ".join(["sofa lamp"] * 40)
TEXTS = ["tent", "", *TITLES[:9], LONG, *(" ".join(["bike"] * words) for words in (12, 13, 14, 15, 16, 30))]


@pytest.fixture(scope="module")
def traced(traced_student):
    return CompiledModel.open(traced_student)


@given(max_tokens=st.integers(8, 512), data=st.data())
def test_every_text_has_a_bucket_and_it_is_the_smallest(max_tokens, data):
    buckets = buckets_for(max_tokens)
    lengths = [bucket.tokens for bucket in buckets]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == max_tokens
    assert all(bucket.offers >= 1 for bucket in buckets)
    tokens = data.draw(st.integers(1, max_tokens))
    chosen = smallest_bucket(buckets, tokens)
    assert tokens <= lengths[chosen]
    assert chosen == 0 or tokens > lengths[chosen - 1]


def test_buckets_are_those_of_common_lengths():
    assert [bucket.tokens for bucket in buckets_for(128)] == [16, 32, 64, 128]
    assert [bucket.tokens for bucket in buckets_for(48)] == [16, 32, 48]


def test_compiling_goes_on_with_the_buckets_that_are_missing(compiled_root, tmp_path):
    classifier = Classifier.load(compiled_root / "student").eval()
    checkpoints, asked = tmp_path / "checkpoints", []

    def tracer(module, example):
        asked.append(example[0].shape[1])
        if asked == [16, 32]:
            raise KeyboardInterrupt
        return torch.jit.script(nn.Identity())

    arguments = (classifier, tmp_path, "torchscript", tracer, checkpoints, Progress("test"))
    with pytest.raises(KeyboardInterrupt):
        trace_student(*arguments)
    assert list(tmp_path.glob("*.pt")) == []
    traced = trace_student(*arguments)
    assert asked == [16, 32, 32]
    assert {path.name for path in tmp_path.glob("*.pt")} == {bucket.file for bucket in traced.buckets}
    assert classifier.encoder.config._attn_implementation == "sdpa"


def test_the_traced_student_is_a_complete_artifact_and_says_how_it_was_made(traced_student):
    assert set(verify(traced_student, kinds=["compiled_student"]).files) == {
        "cascade.json",
        "fast/fast_model.json",
        "fast/labels.json",
        "fast/vocabulary.txt",
        "fast/weights.safetensors",
        "labels.json",
        "model-16.pt",
        "model-32.pt",
        "model.json",
        "taxonomy.parquet",
        "tokenizer.json",
    }
    traced = ModelSettings.read(traced_student).traced
    assert [(bucket.tokens, bucket.offers) for bucket in traced.buckets] == [(16, 64), (32, 32)]
    assert (traced.compiler, traced.versions) == ("torch.jit.trace", {"torch": str(torch.__version__)})
    assert traced.device_family == ""


def test_in_full_precision_it_computes_what_the_original_computes(traced, traced_student, compiled_root):
    expected = Classifier.load(compiled_root / "student").predict_logits(TEXTS)
    assert np.abs(traced.predict_logits(TEXTS) - expected).max() < 1e-4 * np.ptp(expected)
    metrics = read_manifest(traced_student).metrics
    assert metrics["same_category"] == 1.0
    assert metrics["max_probability_difference"] < 1e-5


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    order=st.permutations(range(len(TEXTS))),
    cuts=st.lists(st.integers(1, len(TEXTS) - 1), max_size=3),
    other=st.text(min_size=1, max_size=200),
)
def test_a_text_has_one_answer_in_any_order_and_beside_any_others(traced, order, cuts, other):
    alone = _alone(traced)
    for start, end in itertools.pairwise([0, *sorted(set(cuts)), len(TEXTS)]):
        rows = order[start:end]
        found = traced.predict_logits([*(TEXTS[row] for row in rows), other])
        assert found[:-1].tobytes() == alone[rows].tobytes()


def test_more_texts_than_a_batch_holds_come_back_in_their_order(traced):
    many = [TEXTS[number % len(TEXTS)] for number in range(150)]
    expected = _alone(traced)[[number % len(TEXTS) for number in range(150)]]
    assert traced.predict_logits(many).tobytes() == expected.tobytes()
    assert traced.predict_logits([]).shape == (0, len(PRODUCTS))


def test_padding_does_not_matter(traced):
    short, long = traced._buckets
    ids = traced._token_ids(["Bosch kettle 1.7 l"])
    in_short, in_long = traced._run(short, ids), traced._run(long, ids)
    assert np.abs(in_short - in_long).max() < 1e-4 * np.ptp(in_short)


def test_a_fresh_process_and_more_threads_give_the_same_answers(traced, traced_student):
    program = (
        "import sys; from pathlib import Path; from ml.serving.compiled_model import CompiledModel\n"
        "model = CompiledModel.open(Path(sys.argv[1]))\n"
        f"sys.stdout.buffer.write(model.predict_logits({TEXTS!r}).tobytes())"
    )
    answer = subprocess.run([sys.executable, "-c", program, traced_student], capture_output=True, check=True)
    assert answer.stdout == _alone(traced).tobytes()
    threaded = CompiledModel.open(traced_student, threads=2).predict_logits(TEXTS)
    assert np.abs(threaded - _alone(traced)).max() < 1e-4 * np.ptp(threaded)


def test_threads_of_the_process_are_left_as_they_were(traced):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        traced.predict_logits(TEXTS[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_predictor_runs_it_as_any_other(traced_student):
    predictor = Predictor.load(traced_student)
    (prediction,) = predictor.predict([{"offer_id": "1", "title": "Bosch kettle 1 l"}])
    assert (prediction.category_id, prediction.problem) == ("kettle", None)


def test_a_target_is_served_by_its_own_runtime(compiled_student, traced):
    assert isinstance(traced, BucketedModel)
    assert isinstance(CompiledModel.open(compiled_student), OnnxModel)
    program = (
        "import sys; from ml.serving.predictor import Predictor\n"
        "Predictor.load(sys.argv[1]).predict([{'title': 'kettle'}])\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, compiled_student], check=True)


def test_a_changed_program_is_refused_before_it_is_opened(traced_student, tmp_path, monkeypatch):
    folder = shutil.copytree(traced_student, tmp_path / "traced")
    with (folder / "model-16.pt").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xfe")
    opened = []
    monkeypatch.setattr(torch.jit, "load", lambda *path, **_: opened.append(path))
    with pytest.raises(InputError, match=r"model-16\.pt differs from its digest"):
        Predictor.load(folder)
    assert opened == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: _put(folder / "model-16.pt", b"PK"), r"model-16\.pt cannot be opened"),
        (lambda folder: (folder / "model-32.pt").unlink(), r"model-32\.pt cannot be opened"),
        (lambda folder: _change(folder, traced=None), "names no buckets for texts of 32 tokens"),
        (lambda folder: _change(folder, max_tokens=64), "names no buckets for texts of 64 tokens"),
        (
            lambda folder: _change(folder, target="tpu"),
            "compiled for tpu, this predictor runs models for cpu",
        ),
        (
            lambda folder: _put(folder / "labels.json", msgspec.json.encode([*PRODUCTS, "more"])),
            r"13 labels, model-16\.pt 12 outputs",
        ),
    ],
)
def test_a_damaged_model_is_one_clear_line(damage, said, traced_student, tmp_path):
    folder = shutil.copytree(traced_student, tmp_path / "traced", copy_function=os.link)
    damage(folder)
    with pytest.raises(InputError, match=said) as refusal:
        CompiledModel.open(folder)
    assert "\n" not in str(refusal.value)


def _change(folder, **changes):
    content = msgspec.json.decode((folder / "model.json").read_bytes())
    _put(folder / "model.json", msgspec.json.encode(content | changes))


def _put(path, content):
    """In place of a file that another folder has too."""
    path.unlink()
    path.write_bytes(content)


_answers = {}


def _alone(model):
    """Logits of each text, computed with no other beside it."""
    if model not in _answers:
        _answers[model] = np.concatenate([model.predict_logits([text]) for text in TEXTS])
    return _answers[model]

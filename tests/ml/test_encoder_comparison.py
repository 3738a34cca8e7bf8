"""Several encoders side by side, of a few kilobytes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from ml.errors import InputError
from ml.learning import encoder_comparison
from ml.learning.encoder_comparison import EncoderRow, with_front
from ml.learning.encoder_files import split_layers
from ml.learning.held_out import held_out_scores
from ml.progress import Progress
from ml.runner import run_stage
from ml.serving.machine import this_machine
from tests.ml.tiny_models import TINY_TEACHER, make, stage_spec, tiny_encoder, tiny_inputs, tiny_taxonomy

TRAINING = TINY_TEACHER | {"epochs": 2}


class Bench:
    """Inputs, a tiny encoder, and what was said and trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = tiny_inputs(folder)
        self.encoder = str(tiny_encoder(folder / "encoder"))
        self.said: list[str] = []

    def compare(self, *candidates: dict[str, Any], **parameters: Any) -> list[dict[str, Any]]:
        given = {"encoders": list(candidates), "training": TRAINING} | parameters
        spec = stage_spec("encoder_comparison", self.inputs, given, self.folder / "comparison")
        self.reference = run_stage(spec, Progress("comparison", self.said.append))
        return json.loads((self.folder / "comparison" / "encoders.json").read_text())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_encoder_has_its_figures_and_layers_make_candidates_of_one(bench):
    whole, reduced = bench.compare({"encoder": bench.encoder}, {"encoder": bench.encoder, "layers": 1})
    assert (whole["name"], reduced["name"]) == (bench.encoder, f"{bench.encoder}:1")
    for row in (whole, reduced):
        assert 0 <= row["macro_f1"] <= 1
        assert 0.25 < row["mean_weighted_f1"] <= 1
        assert row["texts_per_second"] > 0
        assert row["training_seconds"] > 0
    assert reduced["parameters"] < whole["parameters"]
    assert reduced["size_bytes"] < whole["size_bytes"]
    table = pq.read_table(bench.folder / "comparison" / "encoders.parquet").to_pylist()
    assert table == [whole, reduced]
    plot = (bench.folder / "comparison" / "quality_over_throughput.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    metrics = bench.reference.metrics
    assert metrics["measured"] == 2
    assert metrics["sentence"].startswith("on the front, best first: ")
    assert metrics["best_mean_weighted_f1"] == max(whole["mean_weighted_f1"], reduced["mean_weighted_f1"])


def test_quality_is_the_teachers_own_on_the_same_validation_offers(bench):
    (row,) = bench.compare({"encoder": bench.encoder})
    _, teacher = make(
        "teacher_checkpoint",
        bench.inputs,
        TRAINING | {"encoder": bench.encoder, "ensemble": False},
        bench.folder / "teacher",
    )
    assert row["accuracy"] == teacher.metrics["validation_accuracy"]
    assert row["parameters"] == teacher.metrics["parameters"]


def test_how_long_it_may_take_is_said_before_the_first_training(bench):
    bench.compare({"encoder": bench.encoder}, {"encoder": bench.encoder, "layers": 2})
    (hint,) = [line for line in bench.said if line.startswith("2 encoders to train on 48 offers, 2 passes")]
    assert "minutes" in hint
    assert bench.said.index(hint) < bench.said.index(f"{bench.encoder}: training")


def test_an_encoder_that_cannot_be_loaded_is_a_row_with_its_reason(bench):
    gone, there, too_deep = bench.compare(
        {"encoder": str(bench.folder / "nowhere")},
        {"encoder": bench.encoder},
        {"encoder": bench.encoder, "layers": 9},
    )
    assert "neither a folder nor a hub id" in gone["reason"]
    assert "the encoder has only 4" in too_deep["reason"]
    assert gone["mean_weighted_f1"] is gone["texts_per_second"] is None
    assert (there["reason"], there["on_front"], gone["on_front"]) == ("", True, False)
    assert bench.reference.metrics["left_out"] == 2


def test_it_fails_only_if_no_encoder_works(bench):
    with pytest.raises(InputError, match=r"no encoder could be compared: .*nowhere: .*neither a folder"):
        bench.compare({"encoder": str(bench.folder / "nowhere")})
    assert not (bench.folder / "comparison").exists()


def test_a_comparison_that_was_killed_goes_on_with_the_encoders_that_are_left(bench, monkeypatch):
    trained, train = [], encoder_comparison.train_inside

    def killed_at_the_second(*given: Any) -> Any:
        trained.append(given)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*given)

    candidates = [{"encoder": bench.encoder}, {"encoder": bench.encoder, "layers": 1}]
    monkeypatch.setattr(encoder_comparison, "train_inside", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench.compare(*candidates)
    kept = [*(bench.folder / "comparison.work" / "checkpoints").glob("encoder-*.json")]
    (first,) = [msgspec.json.decode(path.read_bytes()) for path in kept]
    rows = bench.compare(*candidates)
    assert len(trained) == 3
    assert {**first, "on_front": None} == {**rows[0], "on_front": None}
    assert f"{bench.encoder}: measured before, kept" in bench.said
    assert rows[1]["reason"] == ""


def test_another_machine_than_was_asked_for_is_refused(bench):
    with pytest.raises(InputError, match="machine 'a faster one' was asked for"):
        bench.compare({"encoder": bench.encoder}, machine="a faster one")
    assert len(bench.compare({"encoder": bench.encoder}, machine=this_machine().description)) == 1


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"encoder": "x"}, "training names encoder"),
        ({"epoch": 1}, "parameters of teacher_checkpoint: .*epoch"),
    ],
)
def test_wrong_parameters_of_the_training_are_named(bench, training, line):
    with pytest.raises(InputError, match=line):
        bench.compare({"encoder": bench.encoder}, training=training)


def test_the_front_leaves_out_what_has_no_figures():
    rows = [
        EncoderRow(name="good", mean_weighted_f1=0.9, texts_per_second=100.0),
        EncoderRow(name="fast", mean_weighted_f1=0.8, texts_per_second=900.0),
        EncoderRow(name="neither", mean_weighted_f1=0.8, texts_per_second=90.0),
        EncoderRow(name="gone", reason="no such folder"),
    ]
    assert [row.on_front for row in with_front(rows)] == [True, True, False, False]


def test_scores_are_the_mean_over_the_levels():
    labels = ["atlases", "kettles", "novels", "toasters"]
    truth = ["kettles", "kettles", "novels", "atlases"]
    logits = np.zeros((4, 4), dtype=np.float32)
    logits[range(4), [labels.index(name) for name in ("kettles", "toasters", "novels", "atlases")]] = 1
    found = held_out_scores(logits, labels, truth, tiny_taxonomy())
    # level 1: all in the right root; level 2: one kettle is taken for a toaster
    lowest = (2 / 3 * 2 + 1 + 1) / 4
    assert found["weighted_f1"] == pytest.approx(lowest)
    assert found["mean_weighted_f1"] == pytest.approx((1 + lowest) / 2)
    assert found["accuracy"] == 0.75


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("packaged-minilm", ("packaged-minilm", 0)),
        (" packaged-minilm:3", ("packaged-minilm", 3)),
        ("owner/name@v1:12", ("owner/name@v1", 12)),
        ("s3://bucket/encoder", ("s3://bucket/encoder", 0)),
        ("s3://bucket/encoder:2", ("s3://bucket/encoder", 2)),
        ("/models/a b:1", ("/models/a b", 1)),
    ],
)
def test_layers_stand_behind_a_colon(text, expected):
    assert split_layers(text) == expected


@pytest.mark.parametrize("text", ["", ":3", "packaged-minilm:0"])
def test_no_encoder_or_no_layers_is_refused(text):
    with pytest.raises(InputError, match="is no encoder to compare"):
        split_layers(text)

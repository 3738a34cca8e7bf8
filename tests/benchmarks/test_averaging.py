from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import averaging, quality, report
from ml.learning.averaging import SHARES
from ml.learning.encoder import Classifier
from ml.learning.ensemble import EnsembleWeights, Teacher
from ml.offers import CLEAN_SCHEMA
from ml.serving.fast_model import FastModel
from tests.ml.compiled_models import PRODUCTS, TITLES, compiled_root, seal

__all__ = ["compiled_root"]


def judges(rows: int, first: float, second: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihood ratios of two that see the class of each row through noise, and the classes."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(5, size=rows)
    truth = np.eye(5)[targets]
    one, other = (signal * (truth * signal + rng.normal(size=truth.shape)) for signal in (first, second))
    return one.astype(np.float32), other.astype(np.float32), targets


def test_rules_are_held_against_each_other_on_offers_they_did_not_choose_by() -> None:
    found = averaging.compared(*judges(300, 2.0, 2.0, 1), *judges(4_000, 2.0, 2.0, 2))
    right, rules = found["held_out_right"], found["rules"]
    assert list(rules) == ["equal unless clear", "most right", "Brier", "likelihood"]
    assert right[SHARES.index(0.5)] > max(right[0], right[-1]) + 0.03
    assert rules["equal unless clear"]["share"] == 0.5
    for rule in rules.values():
        assert rule["right"] == right[SHARES.index(rule["share"])]
        assert min(right) <= rule["mean_right_of_few"] <= max(right)
    assert rules["equal unless clear"]["mean_right"] >= rules["most right"]["mean_right"]


def test_a_model_that_knows_nothing_is_left_out_by_every_rule() -> None:
    found = averaging.compared(*judges(2_000, 2.5, 0.0, 1), *judges(2_000, 2.5, 0.0, 2))
    assert found["held_out_right"][0] > 0.8
    for rule in found["rules"].values():
        assert rule["right"] > found["held_out_right"][0] - 0.02


def test_both_pairs_of_a_finished_run_from_its_folder_to_table_json_and_picture(
    compiled_root, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    student, fast = Classifier.load(compiled_root / "student"), FastModel.load(compiled_root / "fast")
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    Teacher(student, fast, EnsembleWeights(encoder=1.0, linear=1.0)).save(teacher)
    seal(teacher, "teacher_checkpoint")
    rows = [
        dict.fromkeys(CLEAN_SCHEMA.names)
        | {"offer_id": f"o{number}", "shop_id": "s", "title": title, "category_id": category}
        for number, (title, category) in enumerate(
            zip(TITLES, (category for category in PRODUCTS for _ in range(5)), strict=True)
        )
    ]
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, CLEAN_SCHEMA), held_out / "offers.parquet")
    places = {
        "models": {
            "teacher": str(teacher),
            "student": str(compiled_root / "student"),
            "fast": str(compiled_root / "fast"),
        },
        "evaluation_set": str(held_out),
        "training_sample": str(compiled_root / "sample"),
        "catalog_taxonomy": str(compiled_root / "taxonomy"),
    }
    run = tmp_path / "run"
    run.mkdir()
    (run / quality.MODELS_FILE).write_bytes(msgspec.json.encode(places))
    averaging.main(["tiny", "--models", str(run)])
    figures = msgspec.json.decode((tmp_path / "benchmarks/results/averaging_tiny.json").read_bytes())
    pairs = {row["pair"]: row for row in figures["pairs"]}
    assert list(pairs) == ["encoder and linear model", "student and fast model"]
    for pair in pairs.values():
        assert pair["held_out_offers"] == len(TITLES)
        assert len(pair["held_out_right"]) == len(SHARES)
        assert max(pair["held_out_right"]) > 0.5
    for first in ("encoder", "student"):
        assert (tmp_path / f"benchmarks/results/averaging_tiny_{first}.png").stat().st_size > 1_000
    assert "run: student and fast model" in capsys.readouterr().out


def test_a_run_without_a_teacher_is_refused(tmp_path) -> None:
    (tmp_path / quality.MODELS_FILE).write_bytes(msgspec.json.encode({"models": {}}))
    with pytest.raises(SystemExit, match=r"has no teacher: run benchmarks\.quality without --only"):
        averaging.main(["tiny", "--models", str(tmp_path)])

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import cascade_curve, quality, report
from ml.learning.risk_control import paired_loss_p_value
from ml.offers import CLEAN_SCHEMA, offer_text
from ml.serving.cascade import FAST_FOLDER
from ml.serving.fast_model import FastModel
from tests.ml.compiled_models import PRODUCTS, TITLES, compiled_root

__all__ = ["compiled_root"]


def test_real_cascades_from_the_fast_model_alone_to_the_student_always(
    compiled_root, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(cascade_curve, "SHARES", (0.0, 0.5, 1.0))
    categories = [category for category in PRODUCTS for _ in range(5)]
    rows = [
        dict.fromkeys(CLEAN_SCHEMA.names)
        | {"offer_id": f"o{number}", "shop_id": "s", "title": title, "category_id": category}
        for number, (title, category) in enumerate(zip(TITLES, categories, strict=True))
    ]
    (tmp_path / "held_out").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, CLEAN_SCHEMA), tmp_path / "held_out" / "offers.parquet")
    places = {
        "models": {"cascade": str(compiled_root / "compiled")},
        "evaluation_set": str(tmp_path / "held_out"),
        "training_sample": str(compiled_root / "sample"),
        "catalog_taxonomy": str(compiled_root / "taxonomy"),
    }
    (tmp_path / quality.MODELS_FILE).write_bytes(msgspec.json.encode(places))
    cascade_curve.main(["tiny", "--models", str(tmp_path), "--seconds", "0.2"])
    results = tmp_path / "benchmarks" / "results"
    figures = msgspec.json.decode((results / "cascade_curve_tiny.json").read_bytes())
    rows = {row["model"]: row for row in figures["models"]}
    assert list(rows) == ["as certified", "0%", "50%", "100%"]
    assert rows["100%"]["accuracy_lost"] == 0
    # nothing could be certified of this model, so as it was compiled the student is asked about all
    assert rows["as certified"]["accuracy"] == rows["100%"]["accuracy"]
    fast = FastModel.load(compiled_root / "compiled" / FAST_FOLDER)
    answered = fast.predict_probabilities([offer_text({"title": title}) for title in TITLES]).argmax(axis=1)
    fast_right = sum(fast.labels[given] == truth for given, truth in zip(answered, categories, strict=True))
    assert rows["0%"]["accuracy"] == pytest.approx(fast_right / len(TITLES))
    assert all(row["offers_per_second"] > 0 for row in rows.values())
    assert (
        figures["held_out_offers"] == pq.read_metadata(compiled_root / "evaluation/offers.parquet").num_rows
    )
    assert (results / "cascade_curve_tiny.png").stat().st_size > 1_000
    assert "student asked about" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        quality.MODELS_FILE,
        "held_out",
        "benchmarks",
        "outcomes",
    }


def test_a_folder_without_a_cascade_is_refused(tmp_path):
    (tmp_path / quality.MODELS_FILE).write_bytes(msgspec.json.encode({"models": {}}))
    with pytest.raises(SystemExit, match=r"has no cascade: run benchmarks\.quality without --only"):
        cascade_curve.main(["tiny", "--models", str(tmp_path)])


@pytest.mark.parametrize(("losses", "gains"), [(10, 4), (40, 30), (0, 0)])
def test_so_many_offers_certify_and_fewer_do_not(losses, gains):
    needed = cascade_curve.offers_needed(losses, gains, 2_000, 0.01)
    expected = [round(part * needed / 2_000) for part in (losses, gains)]
    assert paired_loss_p_value(*expected, needed, 0.01, 0.05) <= 0.05
    fewer = round(needed / 1.3)
    expected = [round(part * fewer / 2_000) for part in (losses, gains)]
    assert paired_loss_p_value(*expected, fewer, 0.01, 0.05) > 0.05 or needed == 250


def test_a_loss_above_the_limit_is_never_certified():
    assert cascade_curve.offers_needed(60, 10, 2_000, 0.01) is None

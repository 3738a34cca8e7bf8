import itertools
from types import SimpleNamespace

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import one_model, quality, report, throughput
from ml.errors import InputError
from ml.offers import CLEAN_SCHEMA


def speed_of(rate):
    return one_model.Speed(
        offers_per_second=rate,
        lowest=rate,
        highest=rate,
        offers=10,
        peak_memory_bytes=2_000_000,
        memory_before_bytes=1_000_000,
        load_seconds=0.1,
    )


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A work folder as benchmarks.quality leaves it, and the folder of results."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    places = {"models": {}}
    for name in ("student", "compiled", "fast", "fasttext"):
        folder = tmp_path / "work" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "weights").write_bytes(b"x" * 1_500_000)
        places["models"][name] = str(folder)
    evaluation = tmp_path / "work" / "evaluation_set"
    evaluation.mkdir()
    rows = {name: [None] * 4 for name in CLEAN_SCHEMA.names}
    rows |= {"offer_id": list("1234"), "shop_id": list("abcd"), "title": ["tea", "tea", "car", "shoe"]}
    pq.write_table(pa.table(rows, schema=CLEAN_SCHEMA), evaluation / "offers.parquet")
    places["evaluation_set"] = str(evaluation)
    (tmp_path / "work" / quality.MODELS_FILE).write_bytes(msgspec.json.encode(places))
    return tmp_path / "work", tmp_path / "benchmarks" / "results"


def test_every_model_and_every_curve_is_in_the_result(models, monkeypatch, tmp_path, capsys):
    work, results = models
    tasks = []

    def answered(task, packages=None):
        tasks.append(task)
        if task.model == "fasttext":
            return one_model.Outcome(not_run="package fasttext is not installed (extra benchmarks)")
        return one_model.Outcome(speed=speed_of(100.0 * task.cores))

    monkeypatch.setattr(one_model, "run", answered)
    monkeypatch.setattr(throughput, "available_cores", lambda: 3)
    throughput.main(["--models", str(work), "--work", str(tmp_path / "t"), "--longest", "2000"])
    figures = msgspec.json.decode((results / "throughput.json").read_bytes())
    assert figures["duplicate_share"] == 0.25
    rows = {row["name"]: row for row in figures["models"]}
    assert set(rows) == {"student", "compiled", "fast", "fasttext", "endpoint"}
    assert rows["fast"]["all_cores"]["offers_per_second"] == 300
    assert rows["fast"]["size_bytes"] == 1_500_000
    assert rows["fasttext"]["one_thread"]["not_run"].startswith("package fasttext")
    curves = figures["curves"]
    assert [point["cores"] for point in curves["cores"]] == [1, 2, 3] * 2
    assert {point["categories"] for point in curves["categories"]} == {100, 1_000, 10_000}
    by_offers = [point for point in curves["offers"] if point["model"] == "fast"]
    assert [("not_run" in point, point["offers"]) for point in by_offers] == [
        (False, 10_000),
        (False, 100_000),
        (True, 1_000_000),
    ]
    assert "would take about 56 min" in by_offers[2]["not_run"]
    assert all((results / f"throughput_{curve}.png").exists() for curve in throughput.CURVES)
    assert "package fasttext is not installed" in capsys.readouterr().out
    # a synthetic layer is put on the student in torch, and compiled then
    on_student = {task.folder for task in tasks if task.categories and task.model == "compiled"}
    assert on_student == {str(work / "student")}


def test_a_folder_without_models_is_refused(tmp_path):
    options = SimpleNamespace(models=tmp_path, work=tmp_path)
    with pytest.raises(InputError, match=r"models\.json is missing"):
        throughput.run(options)


def test_a_measured_model_never_sees_a_text_twice():
    seen = []
    answerer = SimpleNamespace(answer=lambda offers: seen.extend(offer["title"] for offer in offers))
    rates, count = one_model.measured(answerer, [{"title": "tea"}, {"title": "car"}], seconds=0.001)
    assert len(rates) == one_model.PASSES
    assert count > 0
    assert len(set(seen)) == len(seen) >= one_model.PASSES * count
    seen.clear()
    one_model.streamed(answerer, [{"title": "tea"}, {"title": "car"}], 20_000)
    assert len(set(seen)) == len(seen) == 20_000 + one_model.WARM_UP_OFFERS


def test_numbers_go_on_for_ever():
    some = itertools.islice(one_model.numbered([{"title": "a"}, {"title": "b"}]), 5)
    assert [offer["title"] for offer in some] == ["a 0", "b 1", "a 2", "b 3", "a 4"]

import msgspec
import pyarrow as pa
import pytest

from benchmarks import choosing, quality, report
from benchmarks.our_models import QUICK, Workshop
from ml.offers import CLEAN_SCHEMA
from tests.ml.compiled_models import PRODUCTS, TAXONOMY_CSV, TITLES


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Work folder as a finished ``benchmarks.quality`` leaves it, of which choosing needs only the data."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    categories = [category for category in PRODUCTS for _ in range(5)]
    offers = pa.Table.from_pylist(
        [
            dict.fromkeys(CLEAN_SCHEMA.names)
            | {"offer_id": f"o{number}", "shop_id": "s", "title": title, "category_id": category}
            for number, (title, category) in enumerate(zip(TITLES, categories, strict=True))
        ],
        CLEAN_SCHEMA,
    )
    (tmp_path / "tree.csv").write_text(TAXONOMY_CSV)
    workshop = Workshop(tmp_path / "work", QUICK)
    places = {
        "catalog_taxonomy": workshop.taxonomy(tmp_path / "tree.csv"),
        "training_sample": workshop.training_sample(offers, "product", 0.3, 1),
        "evaluation_set": workshop.evaluation_set(offers.slice(0, 30), "product", 0.5, 1),
    }
    content = {"models": {}, **{name: str(place) for name, place in places.items()}}
    (tmp_path / "work" / quality.MODELS_FILE).write_bytes(msgspec.json.encode(content))
    return tmp_path / "work"


def test_encoders_are_compared_and_what_a_search_finds_answers_held_out_offers(models, capsys):
    choosing.main(
        [
            "tiny",
            "--models",
            str(models),
            "--quick",
            "--encoders",
            "packaged-minilm:1",
            "nowhere/encoder",
            "--search",
            "fast",
            "--trials",
            "2",
        ]
    )
    results = report.RESULTS
    figures = msgspec.json.decode((results / "choosing_tiny.json").read_bytes())
    one_layer, missing = figures["encoders"]
    assert one_layer["name"] == "packaged-minilm:1"
    assert one_layer["on_front"]
    assert one_layer["texts_per_second"] > 0
    assert "nowhere/encoder" in missing["reason"]
    (search,) = figures["searches"]
    assert search["trials"] == 2
    assert search["validation"]["found"] >= search["validation"]["as_set"]
    # The fast model knows its own training offers by heart, whatever the search found.
    assert search["held_out"]["as_set"]["accuracy"] > 0.5
    assert 0 < search["held_out"]["found"]["mean"] <= 1
    for plot in ("choosing_tiny.png", "choosing_tiny_fast.png"):
        assert (results / plot).stat().st_size > 1_000
    assert "held out: found" in capsys.readouterr().out


def test_nothing_to_choose_is_refused(models):
    with pytest.raises(SystemExit, match="give --encoders or --search"):
        choosing.main(["tiny", "--models", str(models)])


def test_a_folder_without_models_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"finished benchmarks\.quality"):
        choosing.main(["tiny", "--models", str(tmp_path), "--search", "fast"])

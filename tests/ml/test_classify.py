import gzip
import json
import os
import re
import subprocess
import sys

import msgspec
import pyarrow.parquet as pq
import pytest

from ml import __main__ as command_line
from ml.artifacts import ArtifactRef, read_manifest, short_version
from ml.errors import InputError
from ml.serving.classify import OUTPUT_SCHEMA, classify, model_folder
from ml.serving.predictor import Predictor
from tests.ml.compiled_models import TITLES

COLUMNS = [
    *("offer_id", "category_id", "category_path", "confidence", "tier", "needs_review"),
    *("model_version", "taxonomy_version"),
]


@pytest.fixture
def feed(tmp_path):
    path = tmp_path / "feed.csv"
    rows = [f"{number},shop,{title}" for number, title in enumerate(TITLES)]
    path.write_text("offer_id,shop_id,title\n" + "\n".join(rows) + "\n")
    return path


def test_the_documented_columns_come_out_in_the_order_of_the_feed(compiled_student, feed, tmp_path):
    counts = classify(compiled_student, str(feed), tmp_path / "out.parquet", workers=2)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema == OUTPUT_SCHEMA
    assert table.schema.names == [*COLUMNS, "problem"]
    expected = Predictor.load(compiled_student).predict(
        [{"offer_id": str(number), "title": title} for number, title in enumerate(TITLES)]
    )
    assert [tuple(row.values())[:4] for row in table.to_pylist()] == [
        (p.offer_id, p.category_id, p.category_path, p.confidence) for p in expected
    ]
    assert set(table["model_version"].to_pylist()) == {short_version(read_manifest(compiled_student).digest)}
    assert counts == {None: len(TITLES)}


def test_offers_that_cannot_be_classified_stay_with_their_reason(compiled_student, tmp_path):
    feed = tmp_path / "feed.jsonl.gz"
    lines = [
        json.dumps({"offer_id": "1", "shop_id": "s", "title": TITLES[0]}),
        "{broken",
        json.dumps({"offer_id": "3", "shop_id": "s", "title": ""}),
        json.dumps({"offer_id": "4", "shop_id": "s", "title": TITLES[1]}),
    ]
    feed.write_bytes(gzip.compress("\n".join(lines).encode()))
    counts = classify(compiled_student, str(feed), tmp_path / "out.parquet", workers=1)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["problem"].to_pylist()[:2] == [None, "malformed_row"]
    assert table["problem"].to_pylist()[2] in {"title is missing", "title is empty"}
    assert table["offer_id"].to_pylist()[2:] == ["3", "4"]
    assert [category is None for category in table["category_id"].to_pylist()] == [False, True, True, False]
    assert counts[None] == 2
    assert counts.total() == 4


def test_several_files_and_batches_are_one_feed(compiled_student, tmp_path, monkeypatch):
    monkeypatch.setattr("ml.serving.classify._BATCH_OFFERS", 7)
    monkeypatch.setattr("ml.serving.classify._PART_OFFERS", 10)
    monkeypatch.setattr("ml.serving.parts._ROW_GROUP_OFFERS", 20)
    folder = tmp_path / "feed"
    folder.mkdir()
    for part in range(2):
        rows = [f"{part}-{number},shop,{title}" for number, title in enumerate(TITLES)]
        (folder / f"{part}.csv").write_text("offer_id,shop_id,title\n" + "\n".join(rows) + "\n")
    classify(compiled_student, str(folder), tmp_path / "out.parquet", workers=2)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["offer_id"].to_pylist() == [f"{part}-{n}" for part in range(2) for n in range(len(TITLES))]
    assert pq.read_metadata(tmp_path / "out.parquet").num_row_groups > 1


def test_a_feed_that_breaks_off_leaves_the_earlier_result_alone(compiled_student, feed, tmp_path):
    output = tmp_path / "out.parquet"
    output.write_text("the earlier result")
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(gzip.compress(feed.read_bytes() * 200)[:-20])
    with pytest.raises(InputError, match=r"broken\.csv\.gz"):
        classify(compiled_student, str(broken), output, workers=1)
    assert output.read_text() == "the earlier result"
    assert not (tmp_path / "out.parquet.parts").exists()


@pytest.fixture
def moved_home(tmp_path, monkeypatch):
    """A home whose pointer still names the place where the artifact was before."""
    home = tmp_path / "home"
    (home / "pointers" / "demo").mkdir(parents=True)
    ref = ArtifactRef(kind="compiled_student", key="k1", digest="d", uri="/before/k1")
    (home / "pointers" / "demo" / "offer_endpoint.json").write_bytes(msgspec.json.encode(ref))
    monkeypatch.delenv("OFFER_ASSETS_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return home


@pytest.mark.parametrize("where", ["environment", ".env", "default"])
def test_current_is_the_model_deployed_last_even_if_the_home_was_moved(where, moved_home, monkeypatch):
    if where == "environment":
        (moved_home.parent / ".env").write_text("OFFER_ASSETS_HOME=elsewhere\n")
        monkeypatch.setenv("OFFER_ASSETS_HOME", str(moved_home))
    elif where == ".env":
        (moved_home.parent / ".env").write_text("OFFER_ASSETS_HOME=home\n")
    else:
        moved_home.rename(moved_home.with_name(".offer_assets"))
    found = model_folder("current").resolve().relative_to(moved_home.parent)
    assert found.as_posix().split("/", 1)[1] == "artifacts/compiled_student/k1"


@pytest.mark.parametrize(("content", "said"), [(None, "no endpoint was deployed"), ("{", "cannot be read")])
def test_current_without_an_endpoint_says_what_to_do(content, said, moved_home, monkeypatch):
    monkeypatch.setenv("OFFER_ASSETS_HOME", str(moved_home))
    pointer = moved_home / "pointers" / "demo" / "offer_endpoint.json"
    if content is None:
        pointer.unlink()
    else:
        pointer.write_text(content)
    with pytest.raises(InputError, match=said):
        model_folder("current")


@pytest.mark.parametrize(
    ("model", "feed_name", "output", "said"),
    [
        ("nowhere", "feed.csv", "out.parquet", "nowhere is not an artifact"),
        (None, "missing.csv", "out.parquet", "IN=.*missing.csv points nowhere"),
        (None, "feed.csv", "missing/out.parquet", "folder .*missing does not exist"),
        (None, "feed.csv", ".", "is a folder"),
    ],
)
def test_a_wrong_path_is_one_line_and_status_2(
    model, feed_name, output, said, compiled_student, feed, tmp_path, capsys
):
    chosen = str(compiled_student) if model is None else str(tmp_path / model)
    arguments = ["classify", "--model", chosen, "--workers", "1"]
    status = command_line.main([*arguments, str(tmp_path / feed_name), str(tmp_path / output)])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(errors) == 1
    assert re.search(said, errors[0])


def test_the_command_ends_with_counts(compiled_student, feed, tmp_path):
    command = [sys.executable, "-m", "ml", "classify", "--model", str(compiled_student), "--workers", "1"]
    ended = subprocess.run(
        [*command, str(feed), str(tmp_path / "out.parquet")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert f"{len(TITLES)} classified, 0 not" in ended.stderr
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == len(TITLES)

"""Offers for a bulk job, captured answers that spare it some, and what is put together of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import msgspec
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.errors import InputError
from ml.serving import transform_input
from ml.serving.predictor import PREDICTION_SCHEMA, Prediction, Predictor, prediction_table
from ml.serving.sent import JSON_LINES
from tests.ml.bulk import (
    answer_shards,
    captured_line,
    catalogue,
    offers_artifact,
    prepare,
    version_of,
)
from tests.ml.compiled_models import TITLES, seal
from tests.ml.test_serving import serving

OFFERS = [{"offer_id": str(number), "title": f"tent {number}", "brand": None} for number in range(6)]


@pytest.fixture(autouse=True)
def known_revision(monkeypatch):
    monkeypatch.setenv("CODE_REVISION", "a test")


@pytest.fixture
def model(tmp_path) -> Path:
    """An artifact that is named, and never loaded."""
    return _model(tmp_path)


def _model(folder: Path) -> Path:
    (folder / "model").mkdir()
    return seal(folder / "model", "compiled_student")


def _predictions(offers: Sequence[dict[str, Any]], version: str, category: str = "asked") -> list[Prediction]:
    return [
        Prediction(
            offer_id=offer["offer_id"],
            category_id=category,
            category_path=f"All > {category}",
            confidence=0.75,
            model_version=version,
            taxonomy_version="t",
        )
        for offer in offers
    ]


def _shard_lines(prepared: Path) -> list[list[dict]]:
    """Offers of each file, by its name in order."""
    return [
        [json.loads(line) for line in shard.read_bytes().splitlines()]
        for shard in sorted((prepared / "shards").iterdir())
    ]


def _rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / "catalogued.parquet").to_pylist()


@settings(max_examples=20, deadline=None)
@given(
    titles=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=14),
    captured=st.sets(st.integers(0, 13)),
    requests=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    shard_offers=st.integers(1, 6),
)
def test_every_offer_is_in_one_file_or_captured_and_comes_back_once(titles, captured, requests, shard_offers):
    offers = [{"offer_id": str(number), "title": title} for number, title in enumerate(titles)]
    known = [offer for number, offer in enumerate(offers) if number in captured]
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder)
        version = version_of(model)
        (folder / "captured").mkdir()
        with (folder / "captured" / "one.jsonl").open("wb") as file:
            rest = list(known)
            for size in [*requests, len(known)]:
                request, rest = rest[:size], rest[size:]
                # A request that came twice, once to another version, once more with a later answer.
                file.write(captured_line(request, _predictions(request, "another", "foreign")))
                file.write(captured_line(request, _predictions(request, version, "captured")))
                file.write(captured_line(request, _predictions(request, version, "later")))
        table = offers_artifact(folder / "offers", offers)
        made = prepare(
            folder / "prepared", table, model, captured=folder / "captured", shard_offers=shard_offers
        )
        shards = _shard_lines(folder / "prepared")
        asked = [offer for shard in shards for offer in shard]
        assert asked == [offer for offer in offers if offer not in known]
        assert all(len(shard) == shard_offers for shard in shards[:-1])
        assert made.metrics["asked"] + made.metrics["captured"] == made.metrics["offers"] == len(offers)

        answer_shards(folder / "prepared", folder / "answers", lambda some: _predictions(some, version))
        catalogue(folder / "out", table, model, prepared=folder / "prepared", answers=folder / "answers")
        expected = [
            _predictions([offer], version, "captured" if offer in known else "asked")[0] for offer in offers
        ]
        assert pq.read_table(folder / "out" / "catalogued.parquet").equals(prediction_table(expected))


def test_a_bulk_job_gives_what_the_predictor_gives(compiled_student, tmp_path):
    """A real server answers line by line, in requests that end anywhere."""
    offers = [
        {"offer_id": f"ü{number}", "title": TITLES[number % 7], "brand": "Bosch"} for number in range(30)
    ]
    offers.append({"offer_id": "last", "title": "Zelt\u2028für\x85vier", "brand": None})
    table = offers_artifact(tmp_path / "offers", offers)
    prepare(tmp_path / "prepared", table, compiled_student, shard_offers=12)
    (tmp_path / "answers").mkdir()
    with serving(compiled_student, tmp_path / "state.json", "--workers", "1") as server:
        headers = {"content-type": JSON_LINES[0], "accept": JSON_LINES[0]}
        for shard in sorted((tmp_path / "prepared" / "shards").iterdir()):
            lines = shard.read_bytes().splitlines(keepends=True)
            answers = []
            for start in range(0, len(lines), 5):
                body = b"".join(lines[start : start + 5])
                answer = httpx.post(f"{server.url}/invocations", content=body, headers=headers)
                assert answer.headers["content-type"] == JSON_LINES[0]
                answers.append(answer.content)
            (tmp_path / "answers" / f"{shard.name}.out").write_bytes(b"\n".join(answers))
    made = catalogue(
        tmp_path / "out",
        table,
        compiled_student,
        prepared=tmp_path / "prepared",
        answers=tmp_path / "answers",
    )
    expected = Predictor.load(compiled_student).predict(offers)
    assert pq.read_table(tmp_path / "out" / "catalogued.parquet").equals(prediction_table(expected))
    assert made.metrics["offers"] == 31
    assert made.metrics["uncatalogued"] == 0


def test_how_a_day_is_catalogued_is_not_part_of_what_it_is(model, tmp_path):
    table = offers_artifact(tmp_path / "offers", OFFERS)
    prepare(tmp_path / "prepared", table, model)
    answer_shards(
        tmp_path / "prepared", tmp_path / "answers", lambda some: _predictions(some, version_of(model))
    )
    made = catalogue(
        tmp_path / "out", table, model, prepared=tmp_path / "prepared", answers=tmp_path / "answers"
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["parameters"] == {}
    assert set(manifest["inputs"]) == {"offers", "compiled_student"}
    assert made.metrics["offers"] == len(OFFERS)


def test_a_day_without_offers_needs_no_job(model, tmp_path):
    table = offers_artifact(tmp_path / "offers", [])
    made = prepare(tmp_path / "prepared", table, model)
    assert made.metrics["shards"] == 0
    catalogue(tmp_path / "out", table, model, prepared=tmp_path / "prepared")
    assert pq.read_table(tmp_path / "out" / "catalogued.parquet").equals(PREDICTION_SCHEMA.empty_table())


@pytest.mark.parametrize("as_lines", [True, False])
@pytest.mark.parametrize("in_base64", [True, False])
def test_captured_answers_are_read_however_they_were_noted(model, tmp_path, as_lines, in_base64):
    answers = _predictions(OFFERS[:4], version_of(model))
    captured = _captured(tmp_path, captured_line(OFFERS[:4], answers, as_lines=as_lines, in_base64=in_base64))
    table = offers_artifact(tmp_path / "offers", OFFERS)
    made = prepare(tmp_path / "prepared", table, model, captured=captured)
    assert made.metrics["captured"] == 4
    assert [offer["offer_id"] for offer in _shard_lines(tmp_path / "prepared")[0]] == ["4", "5"]


def test_captured_answers_in_another_order_are_told_by_their_ids(model, tmp_path):
    answers = [
        *_predictions(OFFERS[1:2], version_of(model), "one"),
        *_predictions(OFFERS[:1], version_of(model), "zero"),
    ]
    table = offers_artifact(tmp_path / "offers", OFFERS[:2])
    prepare(
        tmp_path / "prepared", table, model, captured=_captured(tmp_path, captured_line(OFFERS[:2], answers))
    )
    catalogue(tmp_path / "out", table, model, prepared=tmp_path / "prepared")
    assert [row["category_id"] for row in _rows(tmp_path / "out")] == ["zero", "one"]


@pytest.mark.parametrize(
    "change", [{"title": "another"}, {"brand": "Bosch"}, {"offer_id": "x"}, {"description": ""}, {"title": 7}]
)
def test_an_answer_to_another_payload_does_not_count(model, tmp_path, change):
    sent = [OFFERS[0] | change]
    captured = _captured(tmp_path, captured_line(sent, _predictions(sent, version_of(model))))
    made = prepare(
        tmp_path / "prepared", offers_artifact(tmp_path / "offers", OFFERS), model, captured=captured
    )
    assert made.metrics["captured"] == 0


def test_what_the_model_does_not_read_makes_no_difference(model, tmp_path):
    sent = [{"price": 7, "title": "tent 0", "offer_id": "0"}]
    captured = _captured(tmp_path, captured_line(sent, _predictions(sent, version_of(model))))
    made = prepare(
        tmp_path / "prepared", offers_artifact(tmp_path / "offers", OFFERS), model, captured=captured
    )
    assert made.metrics["captured"] == 1


def test_an_offer_that_could_not_be_catalogued_is_asked_again(model, tmp_path):
    refused = [
        msgspec.structs.replace(found, category_id=None, problem="title is empty")
        for found in _predictions(OFFERS[:1], version_of(model))
    ]
    captured = _captured(tmp_path, captured_line(OFFERS[:1], refused))
    made = prepare(
        tmp_path / "prepared", offers_artifact(tmp_path / "offers", OFFERS), model, captured=captured
    )
    assert made.metrics["captured"] == 0


def test_answers_by_another_version_do_not_count_and_are_told(model, tmp_path):
    captured = _captured(tmp_path, captured_line(OFFERS[:3], _predictions(OFFERS[:3], "older")))
    said: list[str] = []
    table = offers_artifact(tmp_path / "offers", OFFERS)
    made = prepare(tmp_path / "prepared", table, model, said.append, captured=captured)
    assert made.metrics["captured"] == 0
    assert made.metrics["skipped_captures"] == 0
    assert f"3 captured answers are by other versions than {version_of(model)}" in said


def test_captured_lines_that_cannot_be_read_are_skipped_by_name(model, tmp_path):
    good = captured_line(OFFERS[:1], _predictions(OFFERS[:1], version_of(model)))
    too_few = captured_line(OFFERS[:2], _predictions(OFFERS[:1], version_of(model)))
    of_others = captured_line(OFFERS[:1], _predictions(OFFERS[1:2], version_of(model)))
    failed = json.loads(good)
    failed["captureData"]["endpointOutput"]["data"] = '{"error": "busy"}'
    no_base64 = json.loads(good)
    no_base64["captureData"]["endpointInput"] |= {"encoding": "BASE64", "data": "???"}
    lines = [
        good[:50] + b"\n",
        b'{"a": 1}\n',
        too_few,
        of_others,
        json.dumps(failed).encode() + b"\n",
        json.dumps(no_base64).encode() + b"\n",
        b"\xff\n",
        good,
        good[:-20],
    ]
    said: list[str] = []
    table = offers_artifact(tmp_path / "offers", OFFERS)
    made = prepare(
        tmp_path / "prepared", table, model, said.append, captured=_captured(tmp_path, b"".join(lines))
    )
    assert made.metrics["captured"] == 1
    assert made.metrics["skipped_captures"] == 8
    told = [line for line in said if "is skipped" in line]
    assert [line.split(" is skipped")[0] for line in told] == [
        f"captured main/2026/11/02/10/05-00.jsonl line {number}" for number in (1, 2, 3, 4, 5, 6, 7, 9)
    ]
    assert "1 predictions for 2 offers do not fit" in told[2]
    assert "for other offers" in told[3]


def test_many_damaged_lines_are_told_as_a_number(model, tmp_path):
    said: list[str] = []
    table = offers_artifact(tmp_path / "offers", OFFERS)
    captured = _captured(tmp_path, b"damaged\n" * 50)
    made = prepare(tmp_path / "prepared", table, model, said.append, captured=captured)
    assert made.metrics["skipped_captures"] == 50
    assert sum("is skipped" in line for line in said) == 20
    assert "50 captured lines were skipped in all" in said


def test_what_was_captured_later_changes_nothing_of_what_was_prepared(model, tmp_path):
    table = offers_artifact(tmp_path / "offers", OFFERS)
    first = prepare(tmp_path / "prepared", table, model)
    captured = _captured(tmp_path, captured_line(OFFERS, _predictions(OFFERS, version_of(model))))
    again = prepare(tmp_path / "prepared", table, model, captured=captured)
    assert again == first


def test_an_offer_too_large_for_a_job_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setattr(transform_input, "MAX_LINE_BYTES", 100)
    table = offers_artifact(tmp_path / "offers", [{"offer_id": "x" * 200, "title": "tent"}])
    with pytest.raises(InputError, match=r"offer x{100} is 230 bytes as JSON, a bulk job takes 100"):
        prepare(tmp_path / "prepared", table, model)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: None, r"offers-000001\.jsonl\.out is missing \(2 answers\)"),
        (lambda lines: lines[:-1], r"offers-000001\.jsonl\.out has 1 answers for 2 offers"),
        (lambda lines: lines[1:], r"000001\.jsonl\.out line 1 is about offer 3, expected 2"),
        (lambda lines: [lines[0], *lines], r"000001\.jsonl\.out line 2 is about offer 2, expected 3"),
        (lambda lines: [*lines, lines[1]], r"line 3 is about offer 3, expected 4"),
        (lambda lines: [lines[0], lines[1][:30]], r"000001\.jsonl\.out line 2 is not a prediction"),
        (lambda lines: [lines[0], b'{"error": "busy"}\n'], r"line 2 is not a prediction"),
        (
            lambda lines: [lines[0].replace(b'"model_version":"', b'"model_version":"x'), lines[1]],
            r"000001\.jsonl\.out line 1 is by model version x.*, expected",
        ),
    ],
    ids=["no file", "last missing", "first missing", "doubled", "surplus", "cut", "error", "version"],
)
def test_answers_that_do_not_fit_are_refused_by_file_and_line(model, tmp_path, damage, said):
    table = offers_artifact(tmp_path / "offers", OFFERS)
    prepare(tmp_path / "prepared", table, model, shard_offers=2)
    answer_shards(
        tmp_path / "prepared", tmp_path / "answers", lambda some: _predictions(some, version_of(model))
    )
    middle = tmp_path / "answers" / "offers-000001.jsonl.out"
    lines = damage(middle.read_bytes().splitlines(keepends=True))
    if lines is None:
        middle.unlink()
    else:
        middle.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=said + r".*delete the job's answers and run again"):
        catalogue(
            tmp_path / "out", table, model, prepared=tmp_path / "prepared", answers=tmp_path / "answers"
        )
    assert not (tmp_path / "out").exists()


def test_answers_behind_the_last_offer_are_refused(model, tmp_path):
    table = offers_artifact(tmp_path / "offers", OFFERS)
    prepare(tmp_path / "prepared", table, model)
    answer_shards(
        tmp_path / "prepared",
        tmp_path / "answers",
        lambda some: _predictions([*some, some[-1]], version_of(model)),
    )
    with pytest.raises(InputError, match=r"out line 7 answers more than was asked"):
        catalogue(
            tmp_path / "out", table, model, prepared=tmp_path / "prepared", answers=tmp_path / "answers"
        )


def test_what_was_prepared_of_other_offers_is_refused(model, tmp_path):
    prepare(tmp_path / "prepared", offers_artifact(tmp_path / "others", OFFERS[:2]), model)
    with pytest.raises(InputError, match="prepared was made of offers"):
        catalogue(
            tmp_path / "out",
            offers_artifact(tmp_path / "offers", OFFERS),
            model,
            prepared=tmp_path / "prepared",
        )


def test_without_endpoint_and_without_answers_there_is_one_clear_line(model, tmp_path):
    with pytest.raises(InputError, match="catalogued_offers needs endpoint_url, or prepared and answers"):
        catalogue(tmp_path / "out", offers_artifact(tmp_path / "offers", OFFERS), model)


def _captured(tmp_path: Path, lines: bytes) -> Path:
    file = tmp_path / "captured" / "main/2026/11/02/10/05-00.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(lines)
    return tmp_path / "captured"

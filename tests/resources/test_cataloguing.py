"""The door to cataloguing a day, where an endpoint answers: brought up if need be, asked for one version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef
from ml.serving import sent
from ml.stages import CataloguedOffersParameters
from resources.artifact_store import FolderArtifactStore
from resources.cataloguing import EndpointCataloguing
from resources.endpoints import EndpointStatus
from resources.few_offers import ask_endpoint
from tests.offer_assets.test_operation import ASKED, DeadEndpoints, StandInStages

OFFERS = ArtifactRef(kind="offers", key="o" * 32, uri="", digest="1" * 64, metrics={})
MODEL = ArtifactRef(kind="compiled_student", key="c" * 32, uri="", digest="2" * 64, metrics={})


class ServingEndpoints(DeadEndpoints):
    def status(self) -> EndpointStatus | None:
        return EndpointStatus(
            url="http://there", model_version="v", taxonomy_version="t", started="", variants=[]
        )


class EchoEndpoints(DeadEndpoints):
    """Answers with what was asked, and how many offers came with it."""

    def invoke(self, offers: Sequence[Mapping[str, Any]], variant: str = "") -> list[dict[str, Any]]:
        return [{**offer, "variant": variant, "together": len(offers)} for offer in offers]


def test_the_endpoint_is_asked_for_the_very_version(tmp_path):
    store = FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed")
    cataloguing = EndpointCataloguing(compute=StandInStages(store=store), endpoints=ServingEndpoints())
    ASKED.deployed.clear()
    made = cataloguing.catalogue(dg.build_asset_context(), "2026-11-02", OFFERS, MODEL)
    assert made.ref.kind == "catalogued_offers"
    assert ASKED.deployed == []
    assert ASKED.inputs["catalogued_offers"] == {"offers": OFFERS, "compiled_student": MODEL}
    assert ASKED.parameters["catalogued_offers"] == CataloguedOffersParameters(
        endpoint_url="http://there", variant="model-222222222222"
    )


@pytest.mark.parametrize(("limit", "together"), [(4 << 20, [256] * 256 + [44] * 44), (60, [1] * 300)])
def test_few_offers_are_answered_file_by_file_in_requests_that_an_endpoint_takes(
    tmp_path, monkeypatch, limit, together
):
    monkeypatch.setattr(sent, "_REQUEST_BYTES", limit)
    shards, answers = tmp_path / "prepared" / "shards", tmp_path / "answers"
    shards.mkdir(parents=True)
    answers.mkdir()
    asked = [{"offer_id": str(number), "title": "Zelt für vier Personen"} for number in range(300)]
    _write_lines(shards / "a.jsonl", asked)
    _write_lines(shards / "b.jsonl", asked[:1])
    ask_endpoint(EchoEndpoints(), "model-1", tmp_path / "prepared", answers)
    answered = _lines(answers / "a.jsonl.out")
    assert [line["offer_id"] for line in answered] == [offer["offer_id"] for offer in asked]
    assert [line["together"] for line in answered] == together
    assert _lines(answers / "b.jsonl.out") == [{**asked[0], "variant": "model-1", "together": 1}]


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]

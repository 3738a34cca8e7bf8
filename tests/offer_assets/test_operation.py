"""A day at work: what the endpoint does after a restart, and which offers a day is held against."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef, Manifest
from offer_assets.operation import operation_assets
from offer_assets.partitions import days_from
from resources.artifact_store import FolderArtifactStore
from resources.compute import Compute, StageResult
from resources.endpoints import Endpoints, EndpointStatus
from resources.io_manager import ArtifactRefIOManager
from resources.settings import Settings

DAYS = days_from(Settings.model_fields["first_day"].default)
DAY = DAYS.start.date().isoformat()


def ref(kind: str) -> ArtifactRef:
    return ArtifactRef(kind=kind, key=kind, digest=kind, uri=kind)


@dataclass
class Calls:
    """What the assets asked of the stand-ins below."""

    inputs: dict[str, Any] = field(default_factory=dict)
    deployed: list[ArtifactRef] = field(default_factory=list)


CALLS = Calls()
"""Dagster copies resources: what they are asked is kept outside them."""


class RecordingCompute(Compute):
    folders: str

    def run(self, context: Any, stage_name: str, inputs: Any, parameters: Any) -> StageResult:
        CALLS.inputs[stage_name] = inputs
        manifest = Manifest(
            kind=stage_name,
            key="k",
            digest="d",
            inputs={},
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={"offers": 1},
            files={},
            created_at="2026-11-02T10:00:00+00:00",
            seconds=1.0,
        )
        return StageResult(ref=ref(stage_name), reused=False, manifest=manifest)

    def folder(self, ref: ArtifactRef) -> Path:
        return Path(self.folders)

    def manifest(self, ref: ArtifactRef) -> Manifest:
        raise AssertionError("not needed to catalogue a day")

    def origin(self, ref: ArtifactRef, *kinds: str) -> ArtifactRef:
        assert (ref.kind, kinds) == ("compiled_student", ("student_checkpoint", "training_sample"))
        return ArtifactRef(kind="training_sample", key="served", digest="served", uri="served")


class DeadEndpoints(Endpoints):
    def releasing(self):
        return contextlib.nullcontext()

    def deploy(self, folder: Path, ref: ArtifactRef) -> EndpointStatus:
        CALLS.deployed.append(ref)
        return EndpointStatus(
            model=str(folder),
            url="http://up",
            model_version="v",
            taxonomy_version="t",
            pid=1,
            started="",
            process_started="",
        )

    def check_available(self) -> None:
        raise AssertionError("not needed to catalogue a day")

    def status(self) -> EndpointStatus | None:
        return None

    def invoke(self, offers: Any) -> list[dict[str, Any]]:
        raise AssertionError("not needed to catalogue a day")

    def stop(self) -> bool:
        raise AssertionError("not needed to catalogue a day")


@pytest.fixture
def processed_day(tmp_path: Path) -> Calls:
    """One day catalogued and looked at, with an endpoint that did not come back after a restart."""
    CALLS.inputs.clear()
    CALLS.deployed.clear()
    (tmp_path / "drift.json").write_text('{"columns": []}')
    store = FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed")

    @dg.asset(partitions_def=DAYS)
    def offers() -> ArtifactRef:
        return ref("offers")

    @dg.asset
    def offer_endpoint() -> ArtifactRef:
        return ref("compiled_student")

    @dg.asset
    def training_sample() -> ArtifactRef:
        return ref("training_sample")

    done = dg.materialize(
        [offers, offer_endpoint, training_sample, *operation_assets(DAYS)],
        partition_key=DAY,
        resources={
            "io_manager": ArtifactRefIOManager(store=store),
            "compute": RecordingCompute(folders=str(tmp_path)),
            "endpoints": DeadEndpoints(),
        },
    )
    assert done.success
    return CALLS


def test_an_endpoint_that_is_gone_is_brought_up_again(processed_day: Calls) -> None:
    assert [deployed.digest for deployed in processed_day.deployed] == ["compiled_student"]
    assert processed_day.inputs["catalogued_offers"]["compiled_student"].kind == "compiled_student"


def test_a_day_is_held_against_the_sample_behind_the_model_that_serves(processed_day: Calls) -> None:
    assert processed_day.inputs["drift_report"]["training_sample"].key == "served"

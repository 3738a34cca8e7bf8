"""A decision in SageMaker has the effect of one in MLflow: it is served, or the sensor says why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG
from typing_extensions import override

from ml.artifacts import ArtifactRef
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.sagemaker_registry import SageMakerRegistry
from sensors.decided_versions import decided_versions
from tests.aws.conftest import BUCKET, access
from tests.aws.stand_in_registry import RegistryStandIn
from tests.registry import registry_in
from tests.release_world import BAD, RELEASE, World, failure_of, free_port


class NamedInS3(FolderArtifactStore):
    """A folder whose artifacts are called as those in S3."""

    @override
    def find(self, kind: str, key: str) -> ArtifactRef | None:
        found = super().find(kind, key)
        return _in_s3(found) if found is not None else None

    @override
    def _read(self, file: Path) -> ArtifactRef | None:
        found = super()._read(file)
        return _in_s3(found) if found is not None else None


def _in_s3(ref: ArtifactRef) -> ArtifactRef:
    return msgspec.structs.replace(ref, uri=f"s3://{BUCKET}/all/artifacts/{ref.kind}/{ref.key}")


@pytest.fixture
def registry(stand_in) -> RegistryStandIn:
    return RegistryStandIn().install(stand_in)


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, registry) -> Iterator[World]:
    tracking = SageMakerRegistry(
        inner=registry_in(tmp_path, tmp_path_factory),
        aws=access(),
        group="offer-assets",
        store=f"s3://{BUCKET}/all",
        serving_image="serving:1",
    )
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(tmp_path, tracking, instance, free_port())
        world.store = NamedInS3(root=world.store.root, feed=world.store.feed)
        world.compute = LocalCompute(store=world.store)
        yield world
        world.endpoints.stop()


def tick(world: World) -> str:
    """One tick of the sensor, with its run; returns what it said where it asked for none."""
    resources = {"tracking": world.tracking, "artifact_store": world.store}
    with dg.build_sensor_context(instance=world.instance, resources=resources) as context:
        result = decided_versions(context)
    assert isinstance(result, dg.SensorResult)
    for event in result.asset_events:
        world.instance.report_runless_asset_event(event)
    for request in result.run_requests or []:
        world.run(request.job_name, tags={RUN_KEY_TAG: request.run_key or ""})
    return result.skip_reason.skip_message or "" if result.skip_reason else ""


def arn_of(world: World, ref: ArtifactRef) -> str:
    return world.registered(ref).tags["sagemaker.package"]


def test_a_version_is_served_once_it_is_approved_in_sagemaker(world, registry):
    first = world.release("first")
    second = world.release("second", approval="required")
    assert "waits for a decision" in tick(world)
    properties = registry.packages[arn_of(world, second)]["CustomerMetadataProperties"]
    assert properties["parent_model_version"] == first.version
    assert properties["taxonomy_version"]
    assert properties["code_revision"] == "code of second"
    assert properties["data"] == world.store.find("training_sample", "second").version
    registry.click(arn_of(world, second), "Approved", "looks good")
    assert tick(world) == ""
    assert world.serving == second.version
    entry = world.tracking.history()[-1]
    assert (entry.by, entry.reason, entry.replaced) == ("sagemaker: clara", "looks good", first.version)
    assert [package["ModelLifeCycle"]["StageStatus"] for package in registry.packages.values()] == [
        "Replaced",
        "Serving",
    ]
    assert "is in production" in tick(world)


def test_an_approval_in_sagemaker_of_a_version_that_failed_the_gate_says_why_it_does_not_count(
    world, registry
):
    first = world.release("first")
    second = world.release("second", metrics=BAD)
    registry.click(arn_of(world, second), "Approved")
    for _ in range(2):
        assert "version 2" in (said := tick(world))
        assert "did not pass the gate and is not approved" in said
    assert world.serving == first.version


def test_what_serves_goes_on_serving_while_the_registry_may_not_be_asked(world, stand_in):
    first = world.release("first")
    world.train("second")
    stand_in.fail_next("sagemaker:", times=99, code="AccessDeniedException")
    assert "AccessDeniedException" in failure_of(world.run(RELEASE))
    assert world.serving == first.version
    with pytest.raises(dg.Failure, match="AccessDeniedException"):
        tick(world)
    stand_in.faults.clear()
    assert world.run(RELEASE).success
    assert world.serving != first.version

"""Canaries, shadows and splits as the graph uses them: real registry, jobs and server processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef
from ml.stages import STAGES
from offer_assets import __main__ as command_line
from offer_assets import versions as versions_module
from offer_assets.headless import LOGGERS
from offer_assets.jobs import START_ENDPOINT
from offer_assets.traffic import SHADOW_VERSION, SPLIT_TRAFFIC
from resources.endpoints import variant_name
from resources.local_endpoints import LocalEndpoints
from sensors.decided_versions import decided_versions
from tests.registry import registry_in
from tests.release_world import BAD, RELEASE, RENAMED_1, RENAMED_STUDENT, World, failure_of, free_port
from tests.resources.endpoint_world import traffic


@pytest.fixture
def world(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setitem(STAGES, "renamed_student", RENAMED_STUDENT)
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(tmp_path, registry_in(tmp_path, tmp_path_factory), instance, free_port())
        yield world
        world.endpoints.stop()


def try_out(world: World, seconds: float) -> None:
    """From now on a new version gets half of the requests first."""
    world.endpoints = LocalEndpoints(
        home=world.endpoints.home,
        port=world.port,
        workers=1,
        program=world.endpoints.program,
        canary_seconds=seconds,
        canary_percent=50,
    )


def shadow(world: World, **config: Any) -> dg.ExecuteInProcessResult:
    return world.run(SHADOW_VERSION, op="shadow", config={"by": "anna", **config})


def split(world: World, **shares: float) -> dg.ExecuteInProcessResult:
    config = {"shares": {name.removeprefix("v"): share for name, share in shares.items()}, "by": "anna"}
    return world.run(SPLIT_TRAFFIC, op="split", config={**config, "reason": "which is better"})


def shares_of(world: World) -> dict[str, float]:
    return {variant.model_version: variant.weight for variant in world.endpoints.status().variants}


def test_a_version_whose_alarm_trips_is_rejected_and_nothing_tries_it_again(world):
    first = world.release("first")
    second = world.release("second", approval="required", behaviour="fail")
    assert world.decide(second, "approved").success
    try_out(world, seconds=60)
    with traffic(world.endpoints):
        line = failure_of(world.run(START_ENDPOINT))
    assert line.startswith(f"model version {second.version} was rolled back: ")
    assert "OFFER_ASSETS_ALARM_ERROR_PERCENT=1" in line
    assert shares_of(world) == {first.version: 1.0}
    assert world.tracking.production().model_version == first.version
    decision = world.registered(second).decision
    assert (decision.decision, decision.by, decision.reason) == ("rejected", "the roll-out", line)
    tick = decided_versions(
        dg.build_sensor_context(instance=world.instance),
        tracking=world.tracking,
        artifact_store=world.store,
    )
    assert not tick.run_requests
    assert "was rejected by the roll-out and is not served" in failure_of(world.run(START_ENDPOINT))


def test_a_person_may_have_a_version_tried_again_that_was_rolled_back(world):
    world.release("first")
    second = world.train("second")
    world.run("register")
    world.tracking.decide(world.registered(second), "rejected", "the roll-out", "p99 was too high")
    assert world.decide(second, "approved").success
    try_out(world, seconds=0.2)
    assert world.run(START_ENDPOINT).success
    assert shares_of(world) == {second.version: 1.0}


def test_neither_the_way_back_nor_other_names_of_the_same_model_are_tried_out(world):
    first = world.release("first")
    world.release("second")
    try_out(world, seconds=600)
    assert world.roll_back().success
    assert shares_of(world) == {first.version: 1.0}
    assert world.rename(RENAMED_1).success
    assert world.tracking.production().ref.kind == "renamed_student"


def test_versions_that_may_serve_share_the_requests_until_one_is_deployed(world):
    first = world.release("first")
    world.release("bad", metrics=BAD)
    third = world.train("third")
    world.run("register", approval="required")
    assert "version 3 " in failure_of(split(world, v1=90, v3=10))
    world.decide(third, "approved")
    assert "the version in production is not among those" in failure_of(split(world, v3=1))
    assert "may not serve" in failure_of(split(world, v1=1, v2=1))
    assert "there is no version '7'" in failure_of(split(world, v1=1, v7=1))

    result = split(world, v1=90, v3=10)
    assert result.success
    assert shares_of(world) == {first.version: 0.9, third.version: 0.1}
    (observed,) = [event for event in result.all_events if event.is_asset_observation]
    metadata = observed.asset_observation_data.asset_observation.metadata
    assert (metadata["by"].value, metadata["reason"].value) == ("anna", "which is better")
    assert [record.data["share"] for record in metadata["variants"].records] == ["90.0%", "10.0%"]
    assert world.tracking.production().model_version == first.version

    assert world.run(START_ENDPOINT).success
    assert shares_of(world) == {third.version: 1.0}


def test_the_endpoint_answers_while_the_version_in_production_has_the_smaller_share(world):
    first = world.release("first")
    second = world.train("second")
    world.run("register")
    assert split(world, v1=10, v2=90).success
    assert world.serving == second.version
    world.store.write_pointer("model_version", first)
    result = world.run(START_ENDPOINT)
    (check,) = result.get_asset_check_evaluations()
    assert check.passed


def test_a_version_that_waits_for_a_person_may_be_a_shadow(world):
    first = world.release("first")
    world.release("bad", metrics=BAD)
    third = world.train("third")
    world.run("register", approval="required")
    assert "did not pass the gate" in failure_of(shadow(world, version="2"))
    assert "serves already" in failure_of(shadow(world, version="1"))
    assert shadow(world, version="3", percent=25, reason="is it quick enough").success
    assert shares_of(world) == {first.version: 1.0, third.version: 0.25}
    assert world.serving == first.version
    assert world.run(RELEASE, approval="required").success  # it waits still, and the shadow stays
    assert shares_of(world) == {first.version: 1.0, third.version: 0.25}
    assert shadow(world).success
    assert shares_of(world) == {first.version: 1.0}


def row_of(ref: ArtifactRef, printed: str) -> list[str]:
    """Cells behind the name of the variant."""
    (row,) = [line for line in printed.splitlines() if line.startswith(variant_name(ref))]
    return row.split()[1:]


class TestCommands:
    """What a person types."""

    @pytest.fixture(autouse=True)
    def _of_this_world(self, world, monkeypatch, tmp_path):
        monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("USER", "anna")
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))  # the commands set it: undone at the end
        resources = {"tracking": world.tracking, "compute": world.compute, "endpoints": world.endpoints}
        definitions = dg.Definitions.merge(world.definitions("automatic"), dg.Definitions(loggers=LOGGERS))
        monkeypatch.setattr(versions_module, "resources_for", lambda _: resources)
        monkeypatch.setattr(versions_module, "build_defs", lambda _: definitions)

    def test_shadow_split_and_what_serves(self, world, capsys):
        assert command_line.main(["endpoint"]) == 0
        assert "nothing answers at the endpoint" in capsys.readouterr().out
        first = world.release("first")
        second = world.train("second")
        world.run("register")
        assert command_line.main(["endpoint"]) == 0
        assert row_of(first, capsys.readouterr().out) == ["answers", "100.0%"]
        assert command_line.main(["shadow", "2", "--percent", "50"]) == 0
        assert row_of(second, capsys.readouterr().out) == ["shadow", "50.0%", "0", "0"]
        assert command_line.main(["shadow", "--end"]) == 0
        assert second.version not in capsys.readouterr().out
        assert command_line.main(["split", "1=90", "2=10", "--reason", "which is better"]) == 0
        assert row_of(second, capsys.readouterr().out) == ["answers", "10.0%", "0", "0"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["shadow"], "shadow takes a version, or --end"),
            (["shadow", "1", "--end"], "shadow takes a version, or --end"),
            (["split", "1", "--reason", "r"], "1: expected VERSION=WEIGHT"),
            (["split", "1=1", "1=2", "--reason", "r"], "expected each version once"),
        ],
    )
    def test_what_makes_no_sense_is_one_line(self, world, capsys, arguments, said):
        assert command_line.main(arguments) == 2
        assert said in capsys.readouterr().err

"""A version that a person approves is served once, by itself; everything else is a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.stages import STAGES
from sensors.decided_versions import decided_versions
from tests.registry import registry_in
from tests.release_world import BAD, RENAMED_1, RENAMED_STUDENT, World, free_port

Tick = Callable[..., dg.SensorResult]


@pytest.fixture
def world(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(tmp_path, registry_in(tmp_path, tmp_path_factory), instance, free_port())
        yield world
        world.endpoints.stop()


@pytest.fixture
def tick(world: World) -> Tick:
    """One tick; its request becomes a real run, or one that ends as told (``None``: never launched)."""

    def tick(ending: dg.DagsterRunStatus | str | None = "for real") -> dg.SensorResult:
        result = decided_versions(
            dg.build_sensor_context(instance=world.instance),
            tracking=world.tracking,
            artifact_store=world.store,
        )
        assert isinstance(result, dg.SensorResult)
        for event in result.asset_events:
            world.instance.report_runless_asset_event(event)
        for request in result.run_requests or []:
            tags = {RUN_KEY_TAG: request.run_key or ""}
            if ending == "for real":
                world.run(request.job_name, tags=tags)
            elif ending is not None:
                run_id = dg.DagsterRun(job_name="any").run_id
                run = dg.DagsterRun(job_name=request.job_name, run_id=run_id, status=ending, tags=tags)
                world.instance.add_run(run)
        return result

    return tick


def keys(result: dg.SensorResult) -> list[str | None]:
    return [request.run_key for request in result.run_requests or []]


def reason(result: dg.SensorResult) -> str:
    assert not result.run_requests
    assert result.skip_reason is not None
    return result.skip_reason.skip_message or ""


def set_in_mlflow(world: World, version: str, value: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=world.tracking.tracking_uri)
    client.set_model_version_tag(world.tracking.model_name, version, "approval", value)


def test_before_the_first_version_there_is_nothing_to_do(tick):
    assert reason(tick()) == "no version of the model is registered yet"


def test_a_version_that_waits_is_named_and_served_once_it_is_approved(world, tick):
    first = world.release("first")
    assert reason(tick()).startswith(f"version 1 (model {first.version}) is in production")
    second = world.release("second", approval="required")
    waiting = reason(tick())
    assert waiting.startswith(f"version 2 (model {second.version}) waits for a decision since 2")
    assert "approve 2 --reason" in waiting
    world.decide(second, "approved")
    (key,) = keys(tick())
    decision = world.registered(second).decision
    assert key == f"deploy:{second.digest}:{decision.at}:1"
    assert world.serving == second.version
    assert reason(tick()).startswith(f"version 2 (model {second.version}) is in production")
    assert world.tracking.history()[-1].by == "anna"


def test_a_rejected_version_starts_nothing_and_waits_no_more(world, tick):
    first = world.release("first")
    second = world.release("second", approval="required")
    world.decide(second, "rejected")
    assert reason(tick()).startswith(f"version 1 (model {first.version}) is in production")
    assert world.serving == first.version


def test_a_decision_in_mlflow_has_the_same_effect(world, tick):
    world.release("first")
    second = world.release("second", approval="required")
    set_in_mlflow(world, "2", "approved")
    assert len(keys(tick())) == 1
    assert world.serving == second.version
    entry = world.tracking.history()[-1]
    assert (entry.by, entry.reason) == ("mlflow", "decided in MLflow")
    assert world.registered(second).decision.at
    assert "is in production" in reason(tick())


def test_a_rejection_in_mlflow_is_noted(world, tick):
    world.release("first")
    world.release("second", approval="required")
    set_in_mlflow(world, "2", "rejected")
    assert "is in production" in reason(tick())
    assert world.tracking.find("2").decision.at


def test_an_approval_in_mlflow_of_a_version_that_failed_the_gate_says_why_it_does_not_count(world, tick):
    first = world.release("first")
    world.release("bad", metrics=BAD)
    set_in_mlflow(world, "2", "approved")
    assert "did not pass the gate and is not approved" in reason(tick())
    assert world.serving == first.version


def test_of_several_approved_versions_the_last_decision_counts(world, tick):
    first, second = (world.release(name, approval="required") for name in ("first", "second"))
    world.decide(second, "approved")
    world.decide(first, "approved")
    tick()
    assert world.serving == first.version
    # The approval of the second is older than what went into production since.
    assert "is in production" in reason(tick())
    assert world.serving == first.version


def test_an_older_version_that_is_approved_in_mlflow_becomes_the_next(world, tick):
    first, second = (world.release(name, approval="required") for name in ("first", "second"))
    assert world.pointers[0] == second.digest
    set_in_mlflow(world, "1", "approved")
    tick()
    assert world.serving == first.version
    event = world.instance.get_latest_materialization_event(dg.AssetKey("model_version"))
    assert event.asset_materialization.metadata["model_version"].value == first.version
    assert reason(tick()).startswith(f"version 2 (model {second.version}) waits for a decision")


def test_a_promotion_overtakes_an_older_approval(world, tick):
    first = world.release("first", approval="required")
    world.decide(first, "approved")
    second = world.release("second")
    assert "is in production" in reason(tick())
    assert world.serving == second.version


def test_new_names_of_what_serves_overtake_nothing(world, tick, monkeypatch):
    monkeypatch.setitem(STAGES, "renamed_student", RENAMED_STUDENT)
    world.release("first")
    second = world.release("second", approval="required")
    assert world.rename(RENAMED_1).success
    assert reason(tick()).startswith(f"version 2 (model {second.version}) waits for a decision")
    world.decide(second, "approved")
    assert world.rename(RENAMED_1.replace("figures", "puppets")).success
    assert len(keys(tick())) == 1
    manifest = world.compute.manifest(world.tracking.production().ref)
    assert manifest.inputs["compiled_student"] == second.digest
    assert "is in production" in reason(tick())


def test_approving_again_what_was_overtaken_serves_it(world, tick):
    first = world.release("first", approval="required")
    world.decide(first, "approved")
    tick()
    second = world.release("second")
    assert world.serving == second.version
    world.decide(first, "approved")
    assert len(keys(tick())) == 1
    assert world.serving == first.version


def test_what_was_rolled_back_from_does_not_come_back(world, tick):
    first = world.release("first")
    second = world.release("second", approval="required")
    world.decide(second, "approved")
    tick()
    world.roll_back()
    assert "is in production" in reason(tick())
    assert world.serving == first.version
    world.decide(second, "approved", reason="it was the feed")
    tick()
    assert world.serving == second.version


def test_an_approval_of_what_is_in_production_starts_nothing(world, tick):
    world.release("first")
    world.decide("1", "approved")
    assert "is in production" in reason(tick())


def test_a_repeated_tick_asks_for_the_same_run(world, tick):
    world.decide(world.release("first", approval="required"), "approved")
    assert keys(tick(ending=None)) == keys(tick(ending=None)) != []


def test_a_deployment_that_fails_is_tried_three_times_and_then_named(world, tick):
    first = world.release("first", approval="required", behaviour="broken")
    world.decide(first, "approved")
    asked = [key for _ in range(3) for key in keys(tick())]
    assert [key.rsplit(":", 1)[1] for key in asked] == ["1", "2", "3"]
    assert reason(tick()).startswith(
        f"gave up on version 1 (model {first.version}), which was approved, after 3"
    )
    world.decide(first, "approved", reason="the machine was full")
    assert len(keys(tick())) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (dg.DagsterRunStatus.STARTING, "is being deployed"),
        (dg.DagsterRunStatus.STARTED, "is being deployed"),
        (dg.DagsterRunStatus.CANCELED, "somebody canceled its deployment"),
    ],
)
def test_a_run_under_way_or_canceled_is_not_doubled(world, tick, status, said):
    world.decide(world.release("first", approval="required"), "approved")
    assert len(keys(tick(ending=status))) == 1
    assert said in reason(tick())

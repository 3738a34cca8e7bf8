"""Approval, history and rollback, with a real registry and real server processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest

from ml.artifacts import ArtifactRef, read_manifest, reference, write_manifest
from ml.stages import STAGES
from offer_assets import __main__ as command_line
from offer_assets import versions as versions_module
from offer_assets.evaluation import student_evaluation, student_of
from offer_assets.jobs import START_ENDPOINT
from offer_assets.release import CHAMPION_TAG, Lineage, lineage_of, target_of
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.local_endpoints import LocalEndpoints
from resources.tracking import MlflowTracking, now
from tests.ml.compiled_models import compiled_root, compiled_student, other_compiled_student
from tests.registry import registry_in
from tests.release_world import (
    BAD,
    GOOD,
    REGISTER,
    RELEASE,
    RENAMED_1,
    RENAMED_STUDENT,
    TAXONOMY_1,
    TAXONOMY_2,
    World,
    failure_of,
    free_port,
)

__all__ = ["compiled_root", "compiled_student", "other_compiled_student"]


@pytest.fixture
def world(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setitem(STAGES, "renamed_student", RENAMED_STUDENT)
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(tmp_path, registry_in(tmp_path, tmp_path_factory), instance, free_port())
        yield world
        world.endpoints.stop()


def materialized(world: World, asset: str) -> dict[str, object]:
    """Metadata of the last materialization in the UI's records."""
    event = world.instance.get_latest_materialization_event(dg.AssetKey(asset))
    assert event is not None
    assert event.asset_materialization is not None
    return {name: value.value for name, value in event.asset_materialization.metadata.items()}


def log_of(world: World, result: dg.ExecuteInProcessResult) -> str:
    return "\n".join(entry.user_message for entry in world.instance.all_logs(result.run_id))


def test_a_version_that_passes_is_served_and_told_with_what_it_was_made_of(world):
    first = world.release("first")
    second = world.release("second", taxonomy=TAXONOMY_2)
    assert world.serving == second.version
    one, two = world.tracking.history()
    assert (one.kind, one.by, one.reason, one.replaced) == (
        "promotion",
        f"job {RELEASE}",
        "passed the gate",
        None,
    )
    assert (two.model_version, two.replaced, two.registry_version) == (second.version, first.version, "2")
    assert two.data == world.store.find("training_sample", "second").version
    assert two.taxonomy_version == world.store.read_pointer("catalog_taxonomy").version
    assert two.taxonomy_version != one.taxonomy_version
    assert two.code_revision == "code of second"
    assert two.evaluation == world.store.find("student_evaluation", "second").digest
    assert world.instance.get_run_by_id(two.run_id).job_name == RELEASE
    rows = materialized(world, "offer_endpoint")["history"].records
    assert [row.data["model_version"] for row in rows] == [second.version, first.version]


def test_releasing_what_is_in_production_again_adds_nothing_to_the_history(world):
    world.release("first")
    for job in (RELEASE, START_ENDPOINT):
        assert world.run(job).success
    assert len(world.tracking.history()) == 1


def test_a_version_that_waits_for_a_person_is_not_served_and_its_run_succeeds(world):
    first = world.release("first")
    second = world.train("second")
    result = world.run(RELEASE, approval="required")
    assert result.success
    assert world.registered(second).approval == "pending"
    assert (world.serving, world.in_production) == (first.version, first_ref(first))
    skipped = [e.step_key for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_SKIPPED]
    assert set(skipped) == {"after", "offer_endpoint_endpoint_answers"}
    assert not [
        e
        for e in result.all_events
        if e.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION
        and e.asset_key != dg.AssetKey("model_version")
    ]
    assert "approve 2 --reason" in log_of(world, result)
    assert world.pointers == [second.digest, first.digest]
    assert materialized(world, "model_version")["approval"] == "pending"


def first_ref(ref: ArtifactRef) -> ArtifactRef:
    return ArtifactRef(kind=ref.kind, key=ref.key, digest=ref.digest, uri=ref.uri)


def test_the_very_first_version_waits_too(world):
    world.train("first")
    assert world.run(RELEASE, approval="required").success
    assert (world.serving, world.tracking.production()) == (None, None)


def test_while_a_version_waits_the_one_in_production_comes_back_after_a_restart(world):
    first = world.release("first")
    world.release("second", approval="required")
    os.kill(int(world.endpoints.status().details["pid"]), signal.SIGKILL)
    while world.serving:
        time.sleep(0.01)
    assert world.run(START_ENDPOINT).success
    assert world.serving == first.version


def test_an_approved_version_is_served_by_the_next_run(world):
    second = world.release("second", approval="required")
    assert world.decide(second, "approved", reason="looks good").success
    assert world.serving is None
    assert world.run(START_ENDPOINT).success
    assert world.serving == second.version
    (entry,) = world.tracking.history()
    assert (entry.by, entry.reason) == ("anna", "looks good")


def test_an_approved_version_stays_approved_when_a_training_finds_it_again(world):
    world.release("first", approval="required")
    world.decide("1", "approved")
    assert world.run(RELEASE, approval="required").success
    assert world.serving == world.tracking.find("1").model_version
    assert world.tracking.find("1").approval == "approved"


def test_approving_an_older_version_makes_it_the_next(world):
    first = world.release("first", approval="required")
    second = world.release("second", approval="required")
    assert world.pointers[0] == second.digest
    assert world.decide(first, "approved").success
    assert world.pointers[0] == first.digest
    told = materialized(world, "model_version")
    assert (told["model_version"], told["by"]) == (first.version, "anna")
    assert world.run(START_ENDPOINT).success
    assert world.serving == first.version
    assert world.registered(second).approval == "pending"


def test_a_rejected_version_is_refused_with_who_and_why(world):
    first = world.release("first")
    second = world.release("second", approval="required")
    assert world.decide(second, "rejected", reason="toys are wrong").success
    for job in (START_ENDPOINT, RELEASE):
        assert failure_of(world.run(job)) == (
            f"version 2 (model {second.version}) was rejected by anna and is not served: toys are wrong. "
            "What was serving goes on serving."
        )
    assert world.serving == first.version


def test_a_failed_version_is_refused_and_can_be_approved_on_purpose_only(world):
    failed = world.release("bad", metrics=BAD)
    assert world.serving is None
    assert "did not pass the gate and is not served" in failure_of(world.run(START_ENDPOINT))
    assert "did not pass the gate and is not approved" in failure_of(world.decide(failed, "approved"))
    result = world.decide(failed, "approved", despite_gate=True, reason="nothing else serves")
    assert result.success
    assert "approved despite that" in log_of(world, result)
    assert world.run(START_ENDPOINT).success
    assert world.serving == failed.version
    assert world.tracking.production().decision.despite_gate


def test_the_version_in_production_is_not_rejected_but_rolled_back(world):
    world.release("first")
    assert failure_of(world.decide("1", "rejected")).startswith("version 1 (model ")
    assert world.tracking.find("1").approval == "automatic"


def test_a_version_that_nobody_knows_is_one_line(world):
    world.release("first")
    for result in (world.decide("77", "approved"), world.roll_back("77")):
        assert failure_of(result).startswith("there is no version '77' of the model: give its number")


def test_a_rollback_serves_the_version_before_and_keeps_the_other_away(world):
    first = world.release("first")
    second = world.release("second")
    result = world.roll_back()
    assert result.success
    assert (world.serving, world.in_production) == (first.version, first_ref(first))
    assert world.pointers == [first.digest, first.digest]
    entry = world.tracking.history()[-1]
    assert (entry.kind, entry.by, entry.reason) == ("rollback", "anna", "toys are wrong")
    assert (entry.model_version, entry.replaced, entry.run_id) == (
        first.version,
        second.version,
        result.run_id,
    )
    assert entry.data == world.store.find("training_sample", "first").version
    for asset in ("model_version", "offer_endpoint"):
        told = materialized(world, asset)
        assert (told["model_version"], told["reason"]) == (first.version, "toys are wrong")
        assert told["rolled_back_from"] == f"version 2 (model {second.version})"
    # The training that made it finds the same artifact again.
    world.store.write_pointer("model_version", second)
    assert "was rejected by anna" in failure_of(world.run(START_ENDPOINT))
    assert world.serving == first.version


def test_what_was_rolled_back_to_is_what_a_restart_brings_up(world):
    first = world.release("first")
    world.release("second")
    world.roll_back()
    world.endpoints.stop()
    assert world.run(START_ENDPOINT).success
    assert world.serving == first.version
    assert [entry.kind for entry in world.tracking.history()] == ["promotion", "promotion", "rollback"]


def test_a_second_rollback_goes_one_further_and_a_third_finds_nothing(world):
    first, _, _ = (world.release(name) for name in ("first", "second", "third"))
    assert world.roll_back().success
    assert world.roll_back().success
    assert world.serving == first.version
    assert failure_of(world.roll_back()).startswith("there is no version to go back to: before version 1")
    assert world.serving == first.version


def test_a_rollback_to_a_given_version_passes_over_those_in_between(world):
    first, second, third = (world.release(name) for name in ("first", "second", "third"))
    assert world.roll_back(first.version[:6]).success
    assert world.serving == first.version
    assert world.registered(second).approval == "automatic"
    assert world.registered(third).approval == "rejected"


def test_a_rollback_to_what_makes_no_sense_is_one_line(world):
    assert failure_of(world.roll_back()).startswith("there is no version in production to roll back from")
    world.release("first")
    pending = world.release("second", approval="required")
    assert "is in production already" in failure_of(world.roll_back("1"))
    assert "never was in production" in failure_of(world.roll_back(pending.version))
    assert failure_of(world.roll_back(reason=" ")).startswith("by or reason is empty")
    world.decide(pending, "approved")
    world.run(START_ENDPOINT)
    world.roll_back()
    assert "was rejected by anna" in failure_of(world.roll_back("2"))


def test_a_rollback_to_a_damaged_or_missing_artifact_leaves_everything_as_it_is(world):
    first, second = world.release("first"), world.release("second")
    folder = world.store.destination("compiled_student", "first")
    (folder / "name").write_text("tampered with")
    assert "differs from its digest" in failure_of(world.roll_back())
    shutil.rmtree(folder)
    assert "first" in failure_of(world.roll_back())
    assert world.serving == second.version
    assert world.pointers == [second.digest, second.digest]
    assert world.registered(second).approval == "automatic"
    assert world.registered(first).approval == "automatic"


def test_a_rollback_to_a_model_of_another_text_version_is_refused_before_anything_starts(world):
    world.release("first", text_version="0")
    second = world.release("second")
    assert "was trained on offer text version 0" in failure_of(world.roll_back())
    assert world.serving == second.version


def test_a_rollback_to_a_model_that_does_not_come_up_changes_nothing(world):
    first = world.release("first")
    second = world.release("second")
    folder = world.store.destination("compiled_student", "first")
    (folder / "behaviour").write_text("broken")
    manifest = read_manifest(folder)
    (folder / "manifest.json").unlink()
    write_manifest(
        folder,
        kind=manifest.kind,
        key=manifest.key,
        inputs=manifest.inputs,
        code_version="1",
        code_revision=None,
        parameters={},
        metrics={},
        seconds=0.1,
    )
    # Registered, served before and now broken in the same way on every machine.
    broken = reference(folder)
    assert broken.digest != first.digest
    version = world.tracking.register(broken, {}, {"verdict": "passed"}, approval="automatic")
    earlier = world.tracking.history()[0]
    world.tracking.promote(version, replaced(earlier, version.version, broken))
    current = world.registered(second)
    world.tracking.promote(current, replaced(earlier, current.version, second))
    assert "did not come up" in failure_of(world.roll_back(version.version))
    assert world.serving == second.version
    assert world.in_production == first_ref(second)
    assert world.registered(second).approval == "automatic"


def replaced(entry, number, ref):
    import msgspec

    return msgspec.structs.replace(entry, at=now(), registry_version=number, model_version=ref.version)


def test_a_rollback_that_was_interrupted_is_finished_by_the_next(world, monkeypatch):
    first, second = world.release("first"), world.release("second")

    def interrupted(*_: object, **__: object) -> None:
        raise dg.Failure("MLflow does not answer", allow_retries=False)

    with monkeypatch.context() as patch:
        patch.setattr(type(world.tracking), "promote", interrupted)
        assert failure_of(world.roll_back()) == "MLflow does not answer"
    assert world.in_production == first_ref(second)
    assert world.roll_back().success
    assert (world.serving, world.in_production) == (first.version, first_ref(first))
    assert len(world.tracking.history()) == 3


def test_a_rollback_to_another_taxonomy_says_so(world):
    first = world.release("first", taxonomy=TAXONOMY_1)
    world.release("second", taxonomy=TAXONOMY_2)
    result = world.roll_back()
    assert result.success
    adopted = world.store.read_pointer("catalog_taxonomy").version
    note = materialized(world, "offer_endpoint")["other_taxonomy"]
    assert note in log_of(world, result)
    assert note.startswith(f"version 1 (model {first.version}) knows taxonomy ")
    assert adopted in note


def test_an_evaluation_from_before_a_rollback_releases_nothing(world):
    first, second = world.release("first"), world.release("second")
    third = world.train("third")
    world.roll_back()
    assert failure_of(world.run(RELEASE)) == (
        f"production has changed: student_evaluation compared with version 2 (model {second.version}), and "
        f"version 1 (model {first.version}) is in production by now. Materialize student_evaluation again, "
        "then this"
    )
    assert world.serving == first.version
    world.evaluate(third, "third again", **GOOD)
    assert world.run(RELEASE).success
    assert world.serving == third.version


def test_a_rollback_between_registration_and_deployment_wins(world):
    first = world.release("first")
    world.release("second")
    third = world.train("third")
    assert world.run(REGISTER).success
    world.roll_back()
    world.store.write_pointer("model_version", third)
    assert failure_of(world.run(START_ENDPOINT)).startswith(
        f"version 3 (model {third.version}) was not compared with version 1 (model {first.version})"
    )
    assert world.serving == first.version
    # A person who has seen the rollback has the last word.
    world.decide(third, "approved")
    assert world.run(START_ENDPOINT).success
    assert world.serving == third.version


def test_a_rollback_after_an_approval_wins_too(world):
    first = world.release("first")
    world.release("second")
    third = world.release("third", approval="required")
    world.decide(third, "approved")
    world.roll_back()
    world.store.write_pointer("model_version", third)
    assert "was not compared with version 1" in failure_of(world.run(START_ENDPOINT))
    assert world.serving == first.version


def test_of_two_trainings_at_once_the_second_does_not_replace_what_it_was_not_compared_with(world):
    world.train("first")
    assert world.run(REGISTER).success
    second = world.train("second")
    assert world.run(RELEASE).success
    world.store.write_pointer("model_version", world.tracking.find("1").ref)
    assert "was not compared with version 2" in failure_of(world.run(START_ENDPOINT))
    assert world.serving == second.version


def test_who_changes_what_serves_has_it_for_himself_to_the_end(world, monkeypatch):
    held: list[tuple[str, bool]] = []

    def noted(kind: type, name: str) -> None:
        original = getattr(kind, name)

        def method(self, *arguments, **options):
            with (world.folder / "endpoint" / "release.lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append((name, False))
                except BlockingIOError:
                    held.append((name, True))
            return original(self, *arguments, **options)

        monkeypatch.setattr(kind, name, method)

    world.release("first")
    world.train("second")
    assert world.run(REGISTER).success
    for kind, name in (
        (LocalEndpoints, "deploy"),
        (MlflowTracking, "promote"),
        (FolderArtifactStore, "write_pointer"),
    ):
        noted(kind, name)
    assert world.run(START_ENDPOINT).success
    assert held == [("deploy", True), ("promote", True), ("write_pointer", True)]
    held.clear()
    assert world.roll_back().success
    assert sorted(held) == [("deploy", True), ("promote", True), *[("write_pointer", True)] * 2]


def test_a_rollback_holds_until_a_newer_model_passes_against_the_one_rolled_back_to(world):
    """What is retrained and found to be the same stays rejected; a new one is compared with the first."""
    first, second = world.release("first"), world.release("second")
    world.roll_back()
    world.evaluate(second, "second again", **GOOD)
    assert "was rejected by anna" in failure_of(world.run(RELEASE))
    assert world.serving == first.version

    class Asked(Exception):
        pass

    class Recording(LocalCompute):
        def run(self, context, stage_name, inputs, parameters):
            raise Asked(inputs["production_model"].digest)

    third = world.train("third")
    student = world.compute.origin(third, "student_checkpoint")
    change = world.store.read_pointer("taxonomy_change")
    others = dict.fromkeys(
        ("evaluation_set", "teacher_checkpoint", "fast_checkpoint", "training_sample"), student
    )
    with pytest.raises(Asked, match=first.digest):
        student_evaluation(
            dg.build_asset_context(),
            **others,
            student_checkpoint=student,
            taxonomy_change=change,
            compute=Recording(store=world.store),
            tracking=world.tracking,
        )


class TestNames:
    """Only names of categories change; the model goes on under the new ones."""

    def test_what_serves_goes_on_under_new_names_though_the_newest_failed_the_gate(self, world):
        first = world.release("first")
        failed = world.release("bad", metrics=BAD)
        assert not world.registered(failed).may_serve
        assert world.rename(RENAMED_1).success
        production = world.tracking.production()
        assert production.ref.kind == "renamed_student"
        assert world.compute.manifest(production.ref).inputs["compiled_student"] == first.digest
        assert world.serving == production.model_version
        entry = world.tracking.history()[-1]
        assert (entry.kind, entry.by, entry.reason, entry.replaced) == (
            "rename",
            f"job {RELEASE}",
            "the same model under other names",
            first.version,
        )
        assert entry.taxonomy_version == world.store.read_pointer("catalog_taxonomy").version
        # And back: the names of before are those of the model itself.
        assert world.rename(TAXONOMY_1).success
        assert world.serving == first.version

    def test_a_model_approved_despite_the_gate_gets_new_names(self, world):
        failed = world.release("bad", metrics=BAD)
        world.decide(failed, "approved", despite_gate=True, reason="nothing else serves")
        assert world.run(START_ENDPOINT).success
        assert world.rename(RENAMED_1).success
        production = world.tracking.production()
        assert world.serving == production.model_version != failed.version
        assert production.decision == world.registered(failed).decision

    def test_a_rename_is_no_change_of_the_production_that_an_evaluation_compared_with(self, world):
        world.release("first")
        world.train("second")
        evaluation = world.store.read_pointer("student_evaluation")
        assert world.rename(RENAMED_1).success
        assert world.store.read_pointer("student_evaluation") == evaluation
        assert world.run(RELEASE).success
        assert world.tracking.history()[-1].kind == "promotion"

    def test_a_version_approved_after_a_rename_is_served_under_the_new_names(self, world):
        world.release("first")
        second = world.release("second", approval="required")
        world.rename(RENAMED_1)
        world.decide(second, "approved", reason="looks good")
        for _ in range(2):
            assert world.run(START_ENDPOINT).success
        production = world.tracking.production()
        manifest = world.compute.manifest(production.ref)
        assert world.serving == production.model_version
        assert manifest.inputs["compiled_student"] == second.digest
        assert manifest.inputs["catalog_taxonomy"] == world.store.read_pointer("catalog_taxonomy").digest
        assert production.decision == world.registered(second).decision
        assert [entry.kind for entry in world.tracking.history()] == ["promotion", "rename", "promotion"]
        assert (world.tracking.history()[-1].by, world.tracking.history()[-1].reason) == (
            "anna",
            "looks good",
        )

    def test_a_rollback_leads_to_another_model_and_the_rejected_one_stays_away_under_any_name(self, world):
        first, second = world.release("first"), world.release("second")
        world.rename(RENAMED_1)
        assert world.roll_back().success
        for _ in range(2):
            assert world.serving == first.version
            assert world.run(START_ENDPOINT).success
        world.adopt(RENAMED_1.replace("figures", "puppets"))
        world.evaluate(second, "second again", **GOOD)
        assert "was rejected by anna" in failure_of(world.run(RELEASE))
        assert world.serving == first.version


def test_a_registry_from_before_the_history_serves_and_rolls_back(world):
    from mlflow import MlflowClient

    first, second = world.release("first"), world.release("second")
    client = MlflowClient(tracking_uri=world.tracking.tracking_uri)
    for version in world.tracking.versions():
        for tag in version.tags.keys() - {"verdict", "evaluation"}:
            client.delete_model_version_tag(version.name, version.version, tag)
        at = f"2026-11-0{version.version}T10:00:00+00:00"
        for tag, value in {"promoted_at": at, "promotion_reason": "run 1"}.items():
            client.set_model_version_tag(version.name, version.version, tag, value)
    world.endpoints.stop()
    assert world.run(START_ENDPOINT).success
    assert world.serving == second.version
    assert world.roll_back().success
    assert world.serving == first.version
    assert [entry.kind for entry in world.tracking.history()] == ["promotion", "promotion", "rollback"]


def test_lineage_of_what_is_gone_is_empty(world):
    compiled = world.train("first")
    assert lineage_of(world.compute, compiled).code_revision == "code of first"
    shutil.rmtree(world.store.destination("student_checkpoint", "first"))
    assert lineage_of(world.compute, compiled) == Lineage()


def test_lineage_of_a_renamed_student_has_its_own_taxonomy_and_the_data_of_its_student(world):
    compiled = world.train("first")
    taxonomy = world.adopt(RENAMED_1)
    student = world.store.find("student_checkpoint", "first")
    renamed = world.artifact(
        "renamed_student",
        "renamed",
        {},
        {
            "compiled_student": compiled.digest,
            "student_checkpoint": student.digest,
            "catalog_taxonomy": taxonomy.digest,
        },
    )
    lineage = lineage_of(world.compute, renamed)
    assert lineage.taxonomy_version == taxonomy.version
    assert lineage.data == lineage_of(world.compute, compiled).data


def test_the_target_of_a_version_is_that_of_its_compiled_student_whatever_its_names(world):
    first = world.release("first")
    assert world.registered(first).tags["target"] == target_of(world.compute, first) == "cpu"
    compiled = world.artifact("compiled_student", "on-inf2", {}, {}, parameters={"target": "neuron"})
    renamed = world.artifact("renamed_student", "renamed", {}, {"compiled_student": compiled.digest})
    assert target_of(world.compute, compiled) == target_of(world.compute, renamed) == "neuron"


def test_no_request_is_lost_while_a_rollback_brings_a_real_model_back(
    world, compiled_student, other_compiled_student
):
    world.endpoints = LocalEndpoints(home=str(world.folder), port=world.port, workers=1)
    refs = []
    for name, source in (("first", compiled_student), ("second", other_compiled_student)):
        trained = world.train(name)
        folder = world.store.destination("compiled_student", f"real-{name}")
        shutil.copytree(source, folder)
        (folder / "manifest.json").unlink()
        write_manifest(
            folder,
            kind="compiled_student",
            key=f"real-{name}",
            inputs=read_manifest(world.store.destination("compiled_student", name)).inputs,
            code_version="1",
            code_revision=None,
            parameters={},
            metrics=trained.metrics,
            seconds=0.1,
        )
        refs.append(reference(folder))
        champion = student_of(world.tracking.production(), world.compute)
        tags = {"verdict": "passed", CHAMPION_TAG: champion}
        world.tracking.register(refs[-1], {}, tags, approval="automatic")
        world.store.write_pointer("model_version", refs[-1])
        assert world.run(START_ENDPOINT).success
    offers = [{"offer_id": str(number), "shop_id": "s", "title": f"Offer {number}"} for number in range(8)]
    is_over = threading.Event()
    answered: list[str] = []

    def ask() -> None:
        while not is_over.is_set():
            answered.append(world.endpoints.invoke(offers)[0]["model_version"])

    with ThreadPoolExecutor(max_workers=2) as pool:
        clients = [pool.submit(ask) for _ in range(2)]
        try:
            result = world.roll_back()
        finally:
            is_over.set()
    for client in clients:
        client.result()
    assert result.success
    assert set(answered) <= {ref.version for ref in refs}
    assert world.serving == refs[0].version


class TestCommands:
    """What a person types."""

    @pytest.fixture(autouse=True)
    def _of_this_world(self, world, monkeypatch, tmp_path):
        monkeypatch.setenv("OFFER_ASSETS_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("USER", "anna")
        monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))  # the commands set it: undone at the end
        resources = {"tracking": world.tracking, "compute": world.compute, "endpoints": world.endpoints}
        monkeypatch.setattr(versions_module, "resources_for", lambda _: resources)
        monkeypatch.setattr(versions_module, "build_defs", lambda _: with_terminal(world))

    def test_versions_and_history_are_tables(self, world, capsys):
        assert command_line.main(["versions"]) == 0
        assert "no version is registered yet" in capsys.readouterr().out
        assert command_line.main(["history"]) == 0
        assert "no version has been in production yet" in capsys.readouterr().out
        first = world.release("first")
        world.release("bad", metrics=BAD)
        assert command_line.main(["versions"]) == 0
        header, newest, oldest = capsys.readouterr().out.splitlines()
        assert header.split()[:2] == ["version", "model"]
        assert newest.split()[:4] == ["2", world.tracking.find("2").model_version, "failed", "none"]
        assert oldest.split()[:6] == ["1", first.version, "passed", "automatic", "yes", "0.9000"]
        assert command_line.main(["history"]) == 0
        assert f"promotion  1        {first.version}" in capsys.readouterr().out

    def test_approve_and_deploy(self, world, capsys):
        first = world.release("first", approval="required")
        second = world.release("second", approval="required")
        assert command_line.main(["approve", "1", "--reason", "fine"]) == 0
        assert "decided_versions has it served" in capsys.readouterr().out
        assert world.registered(first).decision.by == "anna"
        assert command_line.main(["deploy"]) == 0
        assert world.serving == first.version
        capsys.readouterr()
        assert (
            command_line.main(["approve", second.version, "--reason", "ok", "--by", "ben", "--deploy"]) == 0
        )
        assert f"answers with model {second.version}." in capsys.readouterr().out
        assert command_line.main(["rollback", "--reason", "toys"]) == 0
        assert f"version 1 (model {first.version}) is in production" in capsys.readouterr().out

    def test_what_does_not_work_is_one_line_and_an_exit_status(self, world, capsys):
        world.release("first")
        assert command_line.main(["reject", "1", "--reason", "toys"]) == 1
        out = capsys.readouterr().out
        assert "decide failed: version 1 (model" in out
        assert "Traceback" not in out
        assert command_line.main(["rollback", "--reason", "toys"]) == 1
        assert "there is no version to go back to" in capsys.readouterr().out


def with_terminal(world: World) -> dg.Definitions:
    from offer_assets.headless import LOGGERS

    return dg.Definitions.merge(world.definitions("required"), dg.Definitions(loggers=LOGGERS))

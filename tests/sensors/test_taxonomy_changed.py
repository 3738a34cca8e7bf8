"""The newest settled and valid release is followed by exactly one run at a time, whatever happens between."""

from __future__ import annotations

import datetime
import itertools
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import msgspec
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import sensors.taxonomy_changed as sensor_module
from ml.artifacts import ArtifactRef, reference, write_manifest
from ml.errors import InputError
from ml.stages import TaxonomyParameters
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.diff import TaxonomyDiff
from ml.taxonomy_change.releases import read_mapping, read_release
from ml.taxonomy_change.transitions import Transition, Transitions
from offer_assets.instance import FEED_TAG, process_tag
from offer_assets.jobs import weekly_training
from offer_assets.taxonomy import says_the_same, taxonomy_before
from resources.alerting import OutboxAlerts
from resources.alerts import Incident
from resources.artifact_store import FolderArtifactStore
from resources.compute import LocalCompute
from resources.processes import started_at
from resources.taxonomy_policy import TaxonomyPolicy
from resources.taxonomy_source import FoundRelease, TaxonomySource
from resources.tracking import RegisteredVersion
from sensors.taxonomy_changed import taxonomy_changed
from sensors.taxonomy_decision import (
    ATTEMPT_TAG,
    ATTEMPTS,
    BASE_TAG,
    FINGERPRINT_TAG,
    Jobs,
    KnownRun,
    Situation,
    decide,
)

HEADER = "category_id,parent_id,name\n"
HOME = HEADER + "1,,Home\n2,1,Chairs\n3,1,Tables\n4,1,Lamps\n"
HOME_REWRITTEN = HEADER + "1,,Home\n3,1,Tables\n2,1,Chairs\n4,1,Lamps\n"
HOME_RENAMED = HEADER + "1,,Living\n2,1,Seats\n3,1,Tables\n4,1,Lamps\n"
WITH_SOFAS = HEADER + "1,,Home\n2,1,Chairs\n3,1,Tables\n4,1,Lamps\n5,1,Sofas\n"
WITH_BEDS = HEADER + "1,,Home\n2,1,Chairs\n3,1,Tables\n4,1,Lamps\n6,1,Beds\n"
CYCLE = HEADER + "1,2,Home\n2,1,Chairs\n"
ALMOST_EMPTY = HEADER + "1,,Home\n"

SETTLE = 60.0
ENDS = {
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
}


class Coordinator:
    """Cancels as Dagster does: a run is on its way to its end, or goes on as if nothing were."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.works = True

    def cancel_run(self, run_id: str) -> bool:
        if not self.works:
            raise RuntimeError("no worker answers")
        assert self.world.run(run_id).is_cancelable
        self.world.set_status(run_id, dg.DagsterRunStatus.CANCELING)
        return True

    def dispose(self) -> None:
        """Nothing to end."""


class Registry(dg.ConfigurableResource):
    """What the model registry of a home answers; a resource is copied when it is used, a home is not."""

    home: str

    def production(self) -> RegisteredVersion | None:
        return self._told("production")

    def version_of(self, ref: ArtifactRef) -> RegisteredVersion | None:
        found = self._told("version")
        return found if found is not None and found.ref.digest == ref.digest else None

    def _told(self, name: str) -> RegisteredVersion | None:
        file = Path(self.home, f"{name}.json")
        if not file.exists():
            return None
        told = file.read_bytes()
        if not told:
            raise dg.Failure("MLflow does not answer")
        return msgspec.json.decode(told, type=RegisteredVersion)


class World:
    """A folder of releases, the store, the runs, and a clock: all that the sensor sees."""

    def __init__(self, home: Path, instance: dg.DagsterInstance, *, max_removed_share: float = 0.3) -> None:
        self.home = home
        self.folder = home / "taxonomy"
        self.folder.mkdir()
        self.instance = instance
        self.coordinator = Coordinator(self)
        self.store = FolderArtifactStore(root=str(home / "artifacts"), feed="f")
        self.compute = LocalCompute(store=self.store)
        self.alerts = OutboxAlerts(home=str(home))
        self.source = TaxonomySource(location=str(self.folder))
        self.policy = TaxonomyPolicy(settle_seconds=SETTLE, max_removed_share=max_removed_share)
        self.tracking = Registry(home=str(home))
        self.now = 1_000_000.0
        self.cursor: str | None = None
        self.number = itertools.count(1)
        self.observations: list[dg.AssetObservation] = []

    # The source

    def publish(self, content: str) -> str:
        name = f"r{next(self.number):03}"
        (self.folder / f"{name}.csv").write_text(content)
        return name

    def add_mapping(self, name: str, *rows: str) -> None:
        (self.folder / f"{name}.mapping.csv").write_text("\n".join(("from_id,to_id", *rows, "")))

    def found(self) -> FoundRelease:
        return self.source.newest()

    # The sensor

    def tick(self, *, keep_cursor: bool = True, launch: bool = True) -> dg.SensorResult:
        """One tick as the daemon does it: one run per key, the cursor kept after the launch."""
        sensor_module.time = SimpleNamespace(time=lambda: self.now)
        self.instance._run_coordinator = self.coordinator
        resources = {
            "taxonomy_source": self.source,
            "taxonomy_policy": self.policy,
            "artifact_store": self.store,
            "compute": self.compute,
            "tracking": self.tracking,
            "alerts": self.alerts,
        }
        with dg.build_sensor_context(
            cursor=self.cursor, instance=self.instance, resources=resources
        ) as context:
            result = taxonomy_changed(context)
        assert isinstance(result, dg.SensorResult)
        self.observations += [e for e in result.asset_events or [] if isinstance(e, dg.AssetObservation)]
        if launch:
            for request in result.run_requests or []:
                self.launch(request)
            if keep_cursor:
                self.cursor = result.cursor
        return result

    def launch(self, request: dg.RunRequest) -> None:
        key = request.run_key or ""
        if not self.instance.get_runs(filters=dg.RunsFilter(tags={RUN_KEY_TAG: key})):
            self.add_run(request.job_name or "", {**request.tags, RUN_KEY_TAG: key})

    def settle(self) -> dg.SensorResult:
        """A tick, and another when what it saw is settled."""
        self.tick()
        self.now += SETTLE
        return self.tick()

    # Runs

    def add_run(
        self, job: str, tags: dict[str, str], status: dg.DagsterRunStatus = dg.DagsterRunStatus.NOT_STARTED
    ) -> str:
        run_id = dg.DagsterRun(job_name=job).run_id
        self.instance.add_run(dg.DagsterRun(job_name=job, run_id=run_id, status=status, tags=tags))
        return run_id

    def run(self, run_id: str) -> dg.DagsterRun:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run

    def runs(self) -> list[dg.DagsterRun]:
        return list(reversed(self.instance.get_runs()))

    def open_runs(self) -> list[dg.DagsterRun]:
        return [run for run in self.runs() if run.status not in ENDS]

    def set_status(self, run_id: str, status: dg.DagsterRunStatus) -> None:
        run = self.run(run_id)
        self.instance.delete_run(run_id)
        self.instance.add_run(run.with_status(status))

    def start(self) -> None:
        (run,) = self.open_runs()
        self.set_status(run.run_id, dg.DagsterRunStatus.STARTED)

    def end(self, status: dg.DagsterRunStatus = dg.DagsterRunStatus.SUCCESS) -> None:
        (run,) = self.open_runs()
        self.set_status(run.run_id, status)

    def succeed(self) -> None:
        """The only open run does its work, as the assets would."""
        (run,) = self.open_runs()
        self.take()
        if run.job_name != "adopt_taxonomy":
            self.serve()
        self.set_status(run.run_id, dg.DagsterRunStatus.SUCCESS)

    # What runs make

    def take(self, found: FoundRelease | None = None) -> None:
        """What ``catalog_taxonomy`` and ``taxonomy_change`` do."""
        found = found or self.found()
        before = self.in_force()
        taxonomy = self.compute.run(
            SimpleNamespace(log=SimpleNamespace(info=lambda line: None)),
            "catalog_taxonomy",
            {},
            TaxonomyParameters(source=found.source, files=found.files, fingerprint=found.fingerprint),
        ).ref
        folder = self.compute.folder(taxonomy)
        tree, mapping = Taxonomy.load(folder), read_mapping(folder)
        if before is not None and says_the_same(tree, mapping, self.compute.folder(before[1])):
            self.store.write_pointer("catalog_taxonomy", before[1])
            return
        self.store.write_pointer("catalog_taxonomy", taxonomy)
        inputs = {"catalog_taxonomy": taxonomy.digest}
        history, metrics = [], {"only_names": False}
        if before is not None:
            inputs["previous_change"] = before[0].digest
            history = Transitions.read(self.compute.folder(before[0])).history
        known = taxonomy_before(self.store, self.compute)
        if known is not None and known.digest != taxonomy.digest:
            inputs["previous_taxonomy"] = known.digest
            diff = TaxonomyDiff.between(Taxonomy.load(self.compute.folder(known)), tree)
            metrics = {"only_names": diff.only_names and not mapping}
        transitions = [official(former, taxonomy.digest) for former, _ in mapping]
        change = self.artifact("taxonomy_change", inputs, metrics, [*history, taxonomy.digest], transitions)
        self.store.write_pointer("taxonomy_change", change)

    def in_force(self) -> tuple[ArtifactRef, ArtifactRef] | None:
        """The last change, and the taxonomy it led to."""
        change = self.store.read_pointer("taxonomy_change")
        if change is None:
            return None
        return change, self.compute.origin(change, "catalog_taxonomy")

    def serve(self, *, production: bool = True) -> ArtifactRef:
        """What training and release do, for the taxonomy in force."""
        in_force = self.in_force()
        assert in_force is not None
        model = self.artifact("compiled_student", {"catalog_taxonomy": in_force[1].digest}, {}, [])
        self.store.write_pointer("model_version", model)
        if production:
            self.store.write_pointer("offer_endpoint", model)
            self.promote(model)
        return model

    def promote(self, model: ArtifactRef) -> None:
        self.tell_registry("production", model)

    def tell_registry(self, name: str, ref: ArtifactRef, **tags: str) -> None:
        version = RegisteredVersion(
            name="m", version="1", ref=ref, metrics={}, tags=tags, in_production=False, registered_at=""
        )
        (self.home / f"{name}.json").write_bytes(msgspec.json.encode(version))

    def serves_in_force(self) -> bool:
        endpoint, in_force = self.store.read_pointer("offer_endpoint"), self.in_force()
        if endpoint is None or in_force is None:
            return endpoint is None
        return self.compute.manifest(endpoint).inputs["catalog_taxonomy"] == in_force[1].digest

    def artifact(
        self,
        kind: str,
        inputs: dict[str, str],
        metrics: dict[str, Any],
        history: list[str],
        transitions: list[Transition] | None = None,
    ) -> ArtifactRef:
        key = f"{next(self.number):032}"
        folder = self.store.destination(kind, key)
        folder.mkdir(parents=True)
        history = history or [key]
        Transitions(history=history, transitions=transitions or []).write(folder)
        write_manifest(
            folder,
            kind=kind,
            key=key,
            inputs=inputs,
            code_version="1",
            code_revision=None,
            parameters={},
            metrics=metrics,
            seconds=0.0,
        )
        return reference(folder)


def official(former: str, since: str) -> Transition:
    return Transition(
        from_id=former,
        from_name="",
        from_path="",
        kind="removed",
        to=[],
        origin="official",
        confidence=1.0,
        certain=False,
        since=since,
        reason="",
    )


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    """One for all tests: a new one takes longer than a test."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def world(tmp_path: Path, instance: dg.DagsterInstance) -> World:
    instance.wipe()
    return World(tmp_path, instance)


@pytest.fixture
def serving(world: World) -> World:
    """A world with a model that knows its first release."""
    world.publish(HOME)
    world.settle()
    world.succeed()
    world.serve()
    assert "is in force" in reason(world.tick())
    return world


@pytest.fixture(autouse=True)
def real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the clock back after the test."""
    monkeypatch.setattr(sensor_module, "time", sensor_module.time)


def reason(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None, result.run_requests
    return result.skip_reason.skip_message or ""


def request(result: dg.SensorResult) -> dg.RunRequest:
    assert result.run_requests, result.skip_reason
    (only,) = result.run_requests
    return only


def told(world: World) -> list[Incident]:
    return world.alerts.incidents(all_of_them=True)


def told_keys(world: World) -> list[str]:
    """What people were told about, the oldest first, without the particulars."""
    return [incident.key.split(":")[0] for incident in told(world)]


# Which job


def test_the_first_release_is_taken_and_nothing_is_trained(world: World) -> None:
    name = world.publish(HOME)
    assert f"release {name} of the taxonomy is new" in reason(world.tick())
    world.now += SETTLE
    asked = request(world.tick())
    assert (asked.job_name, asked.partition_key) == ("adopt_taxonomy", None)
    assert asked.run_key == f"taxonomy:f:none:{world.found().fingerprint[:16]}:adopt_taxonomy:1"
    assert asked.tags["offer_assets/taxonomy_release"] == name
    assert "is being followed by run" in reason(world.tick())
    world.succeed()
    assert reason(world.tick()) == f"release {name} of the taxonomy is in force"


@pytest.mark.parametrize(
    ("content", "job", "partition"),
    [(WITH_SOFAS, "follow_taxonomy", "cpu"), (HOME_RENAMED, "refresh_names", None)],
)
def test_with_a_model_new_categories_are_trained_and_new_names_are_not(
    serving: World, content: str, job: str, partition: str | None
) -> None:
    serving.publish(content)
    asked = request(serving.settle())
    assert (asked.job_name, asked.partition_key) == (job, partition)
    serving.succeed()
    assert "is in force" in reason(serving.tick())


def test_new_names_of_categories_that_the_model_does_not_know_are_trained(serving: World) -> None:
    """The model waits for approval: names alone do not bring it to the newest tree."""
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    serving.end()
    assert "waits for approval" in reason(serving.tick())
    serving.publish(WITH_SOFAS.replace("Chairs", "Seats"))
    assert request(serving.settle()).job_name == "follow_taxonomy"


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_that_failed_is_followed_by_the_same_job(serving: World, taken: bool) -> None:
    serving.publish(HOME_RENAMED)
    serving.settle()
    if taken:
        serving.take()
    serving.end(dg.DagsterRunStatus.FAILURE)
    assert request(serving.tick()).job_name == "refresh_names"


def test_a_model_approved_for_an_older_taxonomy_makes_the_newest_be_followed(world: World) -> None:
    world.publish(HOME)
    world.settle()
    world.succeed()
    world.serve(production=False)
    older = world.store.read_pointer("model_version")
    assert older is not None
    world.publish(WITH_SOFAS)
    assert request(world.settle()).job_name == "adopt_taxonomy"
    world.succeed()
    world.store.write_pointer("offer_endpoint", older)
    world.promote(older)
    assert request(world.tick()).job_name == "follow_taxonomy"


@pytest.mark.parametrize(
    ("content", "next_job"),
    [(HOME, None), (HOME_REWRITTEN, None), (HOME_RENAMED, "refresh_names"), (WITH_SOFAS, "follow_taxonomy")],
)
def test_a_home_from_before_there_were_changes_takes_the_release_first(
    serving: World, content: str, next_job: str | None
) -> None:
    """Its model may know the tree already: then nothing is trained."""
    (serving.home / "pointers" / "f" / "taxonomy_change.json").unlink()
    serving.instance.wipe()
    serving.cursor = None
    serving.publish(content)
    assert request(serving.settle()).job_name == "adopt_taxonomy"
    serving.succeed()
    result = serving.tick()
    if next_job is None:
        assert "is in force" in reason(result)
    else:
        assert request(result).job_name == next_job


def test_a_home_from_before_there_were_changes_refuses_what_its_model_speaks_against(serving: World) -> None:
    (serving.home / "pointers" / "f" / "taxonomy_change.json").unlink()
    serving.publish(ALMOST_EMPTY)
    assert "is refused" in reason(serving.settle())


def test_a_mapping_that_comes_late_is_followed(serving: World) -> None:
    name = serving.publish(WITH_SOFAS)
    serving.settle()
    serving.succeed()
    serving.tick()
    serving.add_mapping(name, "2,2", "2,5")
    assert request(serving.settle()).job_name == "follow_taxonomy"
    serving.take()
    serving.end(dg.DagsterRunStatus.FAILURE)
    assert request(serving.tick()).job_name == "follow_taxonomy"
    serving.succeed()
    assert "is in force" in reason(serving.tick())
    serving.add_mapping(name, "2,5")
    assert "is in force" in reason(serving.settle())


def test_the_same_release_in_another_file_does_not_stop_what_is_still_to_do(serving: World) -> None:
    """The next run carries the fingerprint of the taxonomy in force, by which the asset takes it."""
    serving.publish(WITH_SOFAS)
    first = request(serving.settle())
    serving.take()
    serving.publish(WITH_SOFAS.replace("4,1,Lamps\n5,1,Sofas", "5,1,Sofas\n4,1,Lamps"))
    assert "is being followed" in reason(serving.settle())
    serving.end(dg.DagsterRunStatus.FAILURE)
    again = request(serving.tick())
    assert again.tags[FINGERPRINT_TAG] == first.tags[FINGERPRINT_TAG]
    assert again.tags[ATTEMPT_TAG] == "2"
    serving.succeed()
    assert "is in force" in reason(serving.tick())


def test_the_same_categories_in_another_file_start_nothing(serving: World) -> None:
    name = serving.publish(HOME_REWRITTEN)
    assert reason(serving.settle()) == f"release {name} of the taxonomy is in force"


def test_a_release_that_comes_back_is_followed_again(serving: World) -> None:
    """Each with a run of its own: the run keys of the first time are no obstacle."""
    keys = set()
    for content in (WITH_SOFAS, HOME, WITH_SOFAS, HOME):
        serving.publish(content)
        keys.add(request(serving.settle()).run_key)
        serving.succeed()
        serving.cursor = None
        assert "is in force" in reason(serving.settle())
    assert len(keys) == 4


# Settling


def test_releases_in_quick_succession_end_in_one_run_for_the_newest(serving: World) -> None:
    for content in (WITH_SOFAS, WITH_BEDS, HOME_RENAMED):
        serving.publish(content)
        assert "is new" in reason(serving.tick())
        serving.now += SETTLE / 2
    assert "is new" in reason(serving.tick())
    serving.now += SETTLE / 2
    assert request(serving.tick()).tags[FINGERPRINT_TAG] == serving.found().fingerprint


def test_a_half_copied_file_is_not_looked_at(world: World) -> None:
    file = world.folder / "r1.csv"
    file.write_text(CYCLE)
    world.tick()
    world.now += SETTLE - 1
    file.write_text(HOME)
    assert "is new" in reason(world.tick())
    world.now += SETTLE
    assert request(world.tick())
    assert told_keys(world) == []


def test_a_clock_that_is_set_back_delays_by_no_more_than_the_time_to_settle(world: World) -> None:
    world.publish(HOME)
    world.tick()
    world.now -= 86_400
    assert "is new" in reason(world.tick())
    world.now += SETTLE
    assert request(world.tick())


# Overlaps


def test_a_newer_release_cancels_the_run_for_the_older_and_waits_for_its_end(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    first = request(serving.settle())
    (older,) = serving.open_runs()
    serving.publish(WITH_BEDS)
    assert "is new" in reason(serving.tick())
    serving.now += SETTLE
    assert "waiting for the end of run" in reason(serving.tick())  # its worker is not there yet
    serving.start()
    assert "waiting for the end of run" in reason(serving.tick())
    assert serving.run(older.run_id).status == dg.DagsterRunStatus.CANCELING
    assert "waiting for the end of run" in reason(serving.tick())
    serving.end(dg.DagsterRunStatus.CANCELED)
    second = request(serving.tick())
    assert second.tags[FINGERPRINT_TAG] != first.tags[FINGERPRINT_TAG]


def test_a_run_that_cannot_be_canceled_is_waited_for(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.start()
    serving.publish(WITH_BEDS)
    serving.coordinator.works = False
    assert "waiting for the end of run" in reason(serving.settle())
    serving.end()
    assert request(serving.tick())


def test_a_superseded_release_that_is_the_newest_again_gets_another_run(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    first = request(serving.settle())
    serving.start()
    withdrawn = serving.publish(WITH_BEDS)
    serving.settle()
    serving.end(dg.DagsterRunStatus.CANCELED)
    (serving.folder / f"{withdrawn}.csv").unlink()
    again = request(serving.settle())
    assert again.tags[FINGERPRINT_TAG] == first.tags[FINGERPRINT_TAG]
    assert (first.tags[ATTEMPT_TAG], again.tags[ATTEMPT_TAG]) == ("1", "2")


def test_a_withdrawn_release_is_not_followed_to_its_end(serving: World) -> None:
    withdrawn = serving.publish(WITH_SOFAS)
    serving.settle()
    serving.start()
    (serving.folder / f"{withdrawn}.csv").unlink()
    assert "to settle" in reason(serving.tick())
    assert serving.open_runs()[0].status == dg.DagsterRunStatus.STARTED
    serving.now += SETTLE
    serving.tick()
    serving.end(dg.DagsterRunStatus.CANCELED)
    assert "is in force" in reason(serving.tick())


@pytest.mark.parametrize("job", ["train_and_release", "follow_taxonomy"])
def test_training_started_by_others_is_waited_for(serving: World, job: str) -> None:
    serving.add_run(job, {}, dg.DagsterRunStatus.STARTED)
    serving.publish(WITH_SOFAS)
    assert f"of {job}" in reason(serving.settle())
    serving.end()
    assert request(serving.tick())


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING])
def test_a_run_whose_process_was_killed_is_not_waited_for(
    serving: World, status: dg.DagsterRunStatus
) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    (killed,) = serving.open_runs()
    with subprocess.Popen(["sleep", "60"]) as worker:
        tag, of_run = process_tag(killed.run_id)
        process = {
            tag: f"{worker.pid} {started_at(worker.pid)} {socket.gethostname()}",
            of_run: killed.run_id,
        }
        serving.instance.add_run_tags(killed.run_id, process)
        serving.set_status(killed.run_id, status)
        assert "is being followed" in reason(serving.tick())
        worker.kill()
    repeated = dg.DagsterRun(
        job_name="process_day", parent_run_id=killed.run_id, root_run_id=killed.run_id, tags=process
    )
    serving.instance.add_run(repeated.with_status(dg.DagsterRunStatus.STARTED))
    assert request(serving.tick()).tags[ATTEMPT_TAG] == "2"
    assert serving.run(killed.run_id).status == dg.DagsterRunStatus.FAILURE
    assert serving.run(repeated.run_id).status == dg.DagsterRunStatus.STARTED, "its tags are copied ones"


@pytest.mark.parametrize("job", ["train_and_release", "follow_taxonomy"])
def test_runs_of_another_feed_in_the_same_home_are_left_alone(serving: World, job: str) -> None:
    other = serving.add_run(
        job, {FEED_TAG: "g", FINGERPRINT_TAG: "of its own release"}, dg.DagsterRunStatus.STARTED
    )
    serving.publish(WITH_SOFAS)
    asked = request(serving.settle())
    assert asked.tags[FEED_TAG] == "f"
    assert serving.run(other).status == dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize(
    ("job", "tags", "skipped"),
    [
        ("follow_taxonomy", {FEED_TAG: "f"}, True),
        ("refresh_names", {}, True),
        ("adopt_taxonomy", {}, True),
        ("train_and_release", {}, True),
        ("process_day", {}, False),
        ("follow_taxonomy", {FEED_TAG: "g"}, False),
    ],
)
def test_the_weekly_training_is_left_out_while_a_release_is_followed(
    world: World, monkeypatch: pytest.MonkeyPatch, job: str, tags: dict[str, str], skipped: bool
) -> None:
    monkeypatch.setattr(dg.ScheduleEvaluationContext, "instance", world.instance)
    world.add_run(job, tags, dg.DagsterRunStatus.CANCELING)

    def told() -> Any:
        with dg.build_schedule_context(
            scheduled_execution_time=datetime.datetime(2026, 11, 22, 3, tzinfo=datetime.UTC),
            resources={"artifact_store": world.store},
        ) as context:
            return weekly_training(context)

    assert isinstance(told(), dg.SkipReason if skipped else dg.RunRequest)
    world.end()
    assert told().tags[FEED_TAG] == "f"


def test_days_that_are_taken_meanwhile_are_no_obstacle(serving: World) -> None:
    serving.add_run("process_day", {}, dg.DagsterRunStatus.STARTED)
    serving.publish(WITH_SOFAS)
    assert request(serving.settle())


# Broken releases and outages


def test_a_broken_release_starts_nothing_and_is_told_once(serving: World) -> None:
    name = serving.publish(CYCLE)
    for _ in range(3):
        line = reason(serving.settle())
        assert f"release {name} of the taxonomy is refused" in line
        assert "form a cycle" in line
    (alert,) = told(serving)
    in_force = serving.in_force()
    assert in_force is not None
    assert alert.state == "notice"
    assert (alert.asset, alert.group, alert.owners) == (
        "catalog_taxonomy_source",
        "taxonomy",
        ("team:data-engineering",),
    )
    assert alert.key == f"taxonomy-refused:{serving.found().fingerprint[:12]}:{in_force[0].version}"
    assert "form a cycle" in alert.text
    assert "accept_objections: true" in alert.text
    (observed,) = [o for o in serving.observations if "alert" in o.metadata]
    assert observed.metadata["alert"].value == alert.key
    assert not serving.open_runs()


def test_a_release_beyond_the_limit_is_refused_until_the_limit_is_another(serving: World) -> None:
    serving.publish(ALMOST_EMPTY)
    assert "is refused" in reason(serving.settle())
    serving.policy = TaxonomyPolicy(settle_seconds=SETTLE, max_removed_share=1.0)
    assert request(serving.tick()).job_name == "follow_taxonomy"


def test_a_broken_file_that_comes_again_months_later_is_told_again(serving: World) -> None:
    for content in (CYCLE, WITH_SOFAS, CYCLE):
        serving.publish(content)
        serving.settle()
        if serving.open_runs():
            serving.succeed()
    assert told_keys(serving) == ["taxonomy-refused"] * 2


@pytest.mark.parametrize("content", [CYCLE, ALMOST_EMPTY])
def test_a_refused_release_is_read_once_an_hour(
    serving: World, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    reads = []

    def counted(files: Any, source: str, in_force: Path | None = None) -> Any:
        reads.append(source)
        return read_release(files, source, in_force)

    monkeypatch.setattr(sensor_module, "read_release", counted)
    serving.publish(content)
    serving.settle()
    first = len(reads)
    for _ in range(3):
        assert "is refused" in reason(serving.tick())
    assert len(reads) == first
    serving.now += 3600
    assert "is refused" in reason(serving.tick())
    assert len(reads) > first


def test_a_refused_release_that_a_person_takes_is_followed(serving: World) -> None:
    serving.publish(ALMOST_EMPTY)
    assert "is refused" in reason(serving.settle())
    serving.add_run("adopt_taxonomy", {}, dg.DagsterRunStatus.STARTED)
    serving.succeed()
    assert request(serving.tick()).job_name == "follow_taxonomy"
    serving.succeed()
    assert "is in force" in reason(serving.tick())


def test_a_good_release_after_a_broken_one_is_followed(serving: World) -> None:
    serving.publish(CYCLE)
    serving.settle()
    serving.publish(WITH_SOFAS)
    assert request(serving.settle())
    assert told_keys(serving) == ["taxonomy-refused"]


def test_a_broken_release_does_not_end_the_run_for_the_one_before(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.publish(CYCLE)
    assert "is refused" in reason(serving.settle())
    assert len(serving.open_runs()) == 1


def test_an_outage_is_told_when_it_lasts_and_again_when_it_is_over(serving: World) -> None:
    elsewhere = serving.home / "elsewhere"
    shutil.move(serving.folder, elsewhere)
    for ticks in range(1, 6):
        assert "CATALOG_TAXONOMY" in reason(serving.tick())
        assert len(serving.alerts.incidents()) == (ticks >= 3)
        serving.now += 30
    shutil.move(elsewhere, serving.folder)
    assert "is in force" in reason(serving.tick())
    assert [incident.state for incident in told(serving)] == ["resolved"]
    assert [o.description for o in serving.observations[-2:]] == [
        "New releases of the taxonomy cannot be followed",
        "over: New releases of the taxonomy cannot be followed",
    ]
    serving.now += 3600
    shutil.move(serving.folder, elsewhere)
    for _ in range(3):
        serving.tick()
    assert told_keys(serving) == ["taxonomy-unreadable"] * 2
    assert [incident.state for incident in told(serving)] == ["resolved", "open"]


def test_an_outage_is_over_even_if_the_cursor_was_lost(serving: World) -> None:
    elsewhere = serving.home / "elsewhere"
    shutil.move(serving.folder, elsewhere)
    for _ in range(3):
        serving.tick()
    shutil.move(elsewhere, serving.folder)
    serving.cursor = None
    serving.tick()
    assert [incident.state for incident in told(serving)] == ["resolved"]


def test_a_file_that_is_gone_at_the_second_look_is_an_outage(
    serving: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.publish(WITH_SOFAS)
    serving.tick()
    serving.now += SETTLE

    def fails_once(files: Any, source: str, in_force: Path | None = None) -> Any:
        monkeypatch.setattr(sensor_module, "read_release", read_release)
        raise InputError("connection reset")

    monkeypatch.setattr(sensor_module, "read_release", fails_once)
    assert request(serving.tick())
    assert told_keys(serving) == []


def test_an_artifact_that_is_gone_is_an_outage_too(serving: World) -> None:
    shutil.rmtree(serving.home / "artifacts" / "taxonomy_change")
    assert "taxonomy_change" in reason(serving.tick())


def test_each_release_is_observed_once(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.tick()
    assert [o.asset_key.to_user_string() for o in serving.observations] == ["catalog_taxonomy_source"] * 2
    assert [o.description for o in serving.observations] == [
        "release r001",
        f"release {serving.found().name}",
    ]


# Failed runs


def test_a_failed_run_is_tried_three_times_in_all_and_then_told(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    keys = [request(serving.settle()).run_key]
    for attempt in range(2, ATTEMPTS + 1):
        if attempt == 3:
            serving.take()  # the base that the keys are made of stays the same
        serving.end(dg.DagsterRunStatus.FAILURE)
        keys.append(request(serving.tick()).run_key)
    serving.end(dg.DagsterRunStatus.FAILURE)
    assert "gave up" in reason(serving.tick())
    assert "gave up" in reason(serving.tick())
    assert [str(key).rsplit(":", 1)[1] for key in keys] == ["1", "2", "3"]
    assert len({str(key).rsplit(":", 1)[0] for key in keys}) == 1
    assert told_keys(serving) == ["taxonomy-gave-up"]


def test_a_run_canceled_by_a_person_is_left_to_them(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.end(dg.DagsterRunStatus.CANCELED)
    assert "canceled by a person" in reason(serving.tick())
    serving.publish(WITH_BEDS)
    assert request(serving.settle())


def test_a_failed_run_that_was_run_again_by_hand_and_succeeded_is_done(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    (run,) = serving.open_runs()
    serving.take()
    serving.end(dg.DagsterRunStatus.FAILURE)
    serving.add_run(run.job_name, dict(run.tags), dg.DagsterRunStatus.SUCCESS)
    assert "is in force" in reason(serving.tick())


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"verdict": "failed"}, "did not pass the gate"),
        ({"verdict": "passed", "approval": "rejected"}, "was rejected"),
    ],
)
def test_a_version_that_was_refused_is_not_trained_again(
    serving: World, tags: dict[str, str], why: str
) -> None:
    name = serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    model = serving.serve(production=False)
    serving.tell_registry("version", model, **tags)
    serving.end(dg.DagsterRunStatus.FAILURE)
    for _ in range(2):
        assert reason(serving.tick()).startswith(
            f"model version {model.version}, trained for release {name}, {why} and is not served"
        )
    assert told_keys(serving) == ["version-refused"]


def test_a_version_that_waits_for_approval_is_told_once(serving: World) -> None:
    name = serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    model = serving.serve(production=False)
    serving.tell_registry("version", model, verdict="passed", approval="pending")
    serving.end()
    for _ in range(2):
        assert "waits for approval" in reason(serving.tick())
    (alert,) = told(serving)
    assert (alert.state, alert.severity) == ("notice", "WARN")
    assert alert.title == f"The model for release {name} of the taxonomy waits for a decision"
    assert "python -m offer_assets approve 1" in alert.text


def test_a_run_that_failed_after_it_registered_a_version_is_tried_again(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    model = serving.serve(production=False)
    serving.tell_registry("version", model, verdict="passed", approval="pending")
    serving.end(dg.DagsterRunStatus.FAILURE)
    assert request(serving.tick())


def test_a_failed_run_whose_model_is_in_production_all_the_same_is_done(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    serving.promote(serving.serve(production=False))
    serving.end(dg.DagsterRunStatus.FAILURE)
    assert "is in force" in reason(serving.tick())


def test_a_registry_that_does_not_answer_is_an_outage(serving: World) -> None:
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    serving.end(dg.DagsterRunStatus.FAILURE)
    (serving.home / "production.json").write_bytes(b"")
    assert reason(serving.tick()) == "MLflow does not answer"


# Crashes


@pytest.mark.parametrize("crash", [{"launch": False}, {"keep_cursor": False}])
def test_a_tick_that_is_repeated_after_a_crash_starts_one_run(serving: World, crash: dict[str, bool]) -> None:
    serving.publish(WITH_SOFAS)
    serving.tick()
    serving.now += SETTLE
    first = request(serving.tick(**crash))
    second = serving.tick()
    assert len(serving.open_runs()) == 1
    if not crash.get("launch", True):
        assert request(second).run_key == first.run_key


@pytest.mark.parametrize("ending", [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE])
@pytest.mark.parametrize("cursor", [None, "not a cursor"])
def test_a_lost_cursor_starts_nothing_that_was_started(
    serving: World, cursor: str | None, ending: dg.DagsterRunStatus
) -> None:
    """A version that waits for approval is in no endpoint, and its run is found by its tags."""
    serving.publish(WITH_SOFAS)
    serving.settle()
    serving.take()
    serving.end(ending)
    serving.cursor = cursor
    result = serving.settle()
    if ending == dg.DagsterRunStatus.SUCCESS:
        assert "waits for approval" in reason(result)
    else:
        assert "is being followed" in reason(result)
    attempts = [run.tags[ATTEMPT_TAG] for run in serving.runs() if run.job_name == "follow_taxonomy"]
    assert attempts == ["1"] if ending == dg.DagsterRunStatus.SUCCESS else ["1", "2"]


def test_only_the_job_that_trains_has_partitions() -> None:
    from offer_assets.definitions import build_defs
    from resources.settings import Settings

    definitions = build_defs(Settings.from_environment())
    partitioned = {
        target.job_name: definitions.resolve_job_def(target.job_name).partitions_def is not None
        for target in taxonomy_changed.targets
    }
    assert partitioned == {"adopt_taxonomy": False, "refresh_names": False, "follow_taxonomy": True}


# Whatever happens


class WhateverHappens(RuleBasedStateMachine):
    """Releases, ticks, runs, crashes and time in any order."""

    instance: dg.DagsterInstance

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.instance.wipe()
        self.world = World(Path(self.folder.name), self.instance, max_removed_share=1.0)
        self.failures: dict[str, int] = {}
        self.followed: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        self.world.publish(HOME)

    @rule(content=st.sampled_from([HOME, HOME_REWRITTEN, HOME_RENAMED, WITH_SOFAS, CYCLE]))
    def publish(self, content: str) -> None:
        self.world.publish(content)
        if content == CYCLE:
            self.broken.add(self.world.found().fingerprint)

    @precondition(lambda self: len(list(self.world.folder.iterdir())) > 1)
    @rule()
    def withdraw(self) -> None:
        max(self.world.folder.iterdir()).unlink()

    @rule(seconds=st.sampled_from([1.0, 30.0, 70.0]))
    def time_passes_and_the_daemon_ticks(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.tick()

    @rule()
    def the_daemon_dies_before_the_launch(self) -> None:
        self.world.tick(launch=False)

    @rule()
    def the_daemon_dies_after_the_launch(self) -> None:
        self.world.tick(keep_cursor=False)

    @rule()
    def the_cursor_is_lost(self) -> None:
        self.world.cursor = None

    @precondition(lambda self: not self.world.open_runs())
    @rule(content=st.sampled_from([HOME, WITH_SOFAS]))
    def a_release_is_followed_undisturbed(self, content: str) -> None:
        self.world.publish(content)
        self.world.settle()
        if self.world.open_runs():
            self.the_run_succeeds(approved=True)

    @precondition(lambda self: self.world.open_runs())
    @rule()
    def a_newer_release_comes_and_goes(self) -> None:
        self.the_run_starts()
        self.world.publish(WITH_BEDS)
        self.world.settle()
        self.withdraw()
        if self.world.open_runs()[0].status == dg.DagsterRunStatus.CANCELING:
            self.world.end(dg.DagsterRunStatus.CANCELED)

    @precondition(lambda self: self.world.in_force() is not None)
    @rule()
    def a_model_is_trained_by_hand(self) -> None:
        self.world.serve()

    @precondition(lambda self: self.world.open_runs())
    @rule()
    def the_run_starts(self) -> None:
        (run,) = self.world.open_runs()
        if run.status == dg.DagsterRunStatus.NOT_STARTED:
            self.world.set_status(run.run_id, dg.DagsterRunStatus.STARTED)

    @precondition(lambda self: self.world.open_runs())
    @rule(approved=st.booleans())
    def the_run_succeeds(self, approved: bool) -> None:
        (run,) = self.world.open_runs()
        if self.take_for(run) and run.job_name != "adopt_taxonomy":
            self.followed.append((run.tags[FINGERPRINT_TAG], run.tags[BASE_TAG]))
        if run.job_name != "adopt_taxonomy":
            self.world.serve(production=approved)
        self.world.set_status(run.run_id, dg.DagsterRunStatus.SUCCESS)

    @precondition(lambda self: self.world.open_runs())
    @rule(after_taking=st.booleans())
    def the_run_fails(self, after_taking: bool) -> None:
        (run,) = self.world.open_runs()
        if after_taking:
            self.take_for(run)
        fingerprint = run.tags[FINGERPRINT_TAG]
        if run.status == dg.DagsterRunStatus.CANCELING:
            self.world.set_status(run.run_id, dg.DagsterRunStatus.CANCELED)
        elif self.failures.get(fingerprint, 0) < ATTEMPTS - 1:
            self.failures[fingerprint] = self.failures.get(fingerprint, 0) + 1
            self.world.set_status(run.run_id, dg.DagsterRunStatus.FAILURE)

    def take_for(self, run: dg.DagsterRun) -> bool:
        """A run takes the release that it was started for, if that is still the newest."""
        found, in_force = self.world.found(), self.world.in_force()
        accepted = {found.fingerprint}
        if in_force is not None and found.fingerprint not in self.broken:
            folder = self.world.compute.folder(in_force[1])
            if says_the_same(*read_release(found.files, found.source), folder):
                accepted.add(self.fingerprint_of(in_force[1]))
        if run.tags[FINGERPRINT_TAG] not in accepted:
            return False
        self.world.take(found)
        return True

    def fingerprint_of(self, taxonomy: ArtifactRef) -> str:
        return str(self.world.compute.manifest(taxonomy).parameters["fingerprint"])

    @invariant()
    def at_most_one_run_is_open(self) -> None:
        assert len(self.world.open_runs()) <= 1

    @invariant()
    def no_broken_release_has_a_run(self) -> None:
        assert not self.broken & {run.tags[FINGERPRINT_TAG] for run in self.world.runs()}

    @invariant()
    def a_change_is_followed_once(self) -> None:
        assert len(self.followed) == len(set(self.followed))

    @invariant()
    def a_run_key_is_used_once(self) -> None:
        keys = [run.tags[RUN_KEY_TAG] for run in self.world.runs()]
        assert len(keys) == len(set(keys))

    def teardown(self) -> None:
        """Once all is quiet, the newest valid release is in force, and stays so without a further run."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(12):
            world.now += SETTLE
            world.tick()
            self.at_most_one_run_is_open()
            for run in world.open_runs():
                if run.status == dg.DagsterRunStatus.CANCELING:
                    world.set_status(run.run_id, dg.DagsterRunStatus.CANCELED)
                else:
                    self.the_run_succeeds(approved=True)
        runs = len(world.runs())
        for lost in (False, True, False):
            world.cursor = None if lost else world.cursor
            world.settle()
        assert len(world.runs()) == runs
        newest = world.found()
        in_force = world.in_force()
        if newest.fingerprint in self.broken:
            assert "taxonomy-refused" in told_keys(world)
        else:
            assert in_force is not None
            taken = Taxonomy.load(world.compute.folder(in_force[1]))
            assert TaxonomyDiff.between(taken, read_release(newest.files, newest.source)[0]).is_empty
            done = [run for run in world.runs() if run.status == dg.DagsterRunStatus.SUCCESS]
            trained = any(
                run.tags[FINGERPRINT_TAG] == self.fingerprint_of(in_force[1])
                and run.job_name != "adopt_taxonomy"
                for run in done
            )
            assert world.serves_in_force() or trained
        self.folder.cleanup()


def test_whatever_happens_the_newest_valid_release_is_followed_once(instance: dg.DagsterInstance) -> None:
    WhateverHappens.instance = instance
    run_state_machine_as_test(
        WhateverHappens,
        settings=settings(
            max_examples=8,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )


known_runs = st.builds(
    KnownRun,
    run_id=st.uuids().map(str),
    job=st.sampled_from(["adopt", "refresh", "follow", "train"]),
    state=st.sampled_from(["open", "succeeded", "failed", "canceled"]),
    cancelable=st.booleans(),
    fingerprint=st.sampled_from(["new", "old", None]),
    base=st.sampled_from(["b0", "b1", ""]),
    attempt=st.integers(1, 4),
    superseded=st.booleans(),
)
situations = st.builds(
    Situation,
    jobs=st.just(Jobs(adopt="adopt", refresh="refresh", follow="follow")),
    feed=st.just("f"),
    release=st.just("r"),
    fingerprint=st.just("new"),
    in_force=st.sampled_from([None, "old", "new"]),
    base=st.just("b1"),
    base_before=st.just("b0"),
    pointer_in_step=st.booleans(),
    serves=st.booleans(),
    serves_in_force=st.booleans(),
    only_names=st.booleans(),
    runs=st.lists(known_runs, max_size=6),
)


@given(situations)
def test_a_decision_never_adds_a_second_run_nor_repeats_one(situation: Situation) -> None:
    decision = decide(situation)
    is_open = [run for run in situation.runs if run.state == "open"]
    assert (decision.action in ("wait", "cancel")) == bool(is_open)
    assert all(run.fingerprint == "old" and run.cancelable for run in decision.cancel)
    if decision.action == "start":
        asked = decision.request
        assert asked is not None
        same = [run for run in situation.runs if (run.fingerprint, run.base) == ("new", asked.base)]
        attempts = {run.attempt for run in same if run.job == asked.job}
        assert asked.attempt > max(attempts, default=0)
        spent = {run.attempt for run in same if run.job == asked.job and not run.superseded}
        assert len(spent - {run.attempt for run in same if run.superseded}) < ATTEMPTS
    if situation.in_force != "new" and not situation.runs:
        assert decision.action == "start"

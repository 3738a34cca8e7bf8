"""The sensor ``lasting_drift``: what it sees of reports and runs, and that a restart changes nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import DATA_VERSION_TAG
from dagster._core.events import DagsterEvent, StepMaterializationData
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.artifacts import ArtifactRef, reference, write_manifest
from ml.drift.answers import LEVELS, Level
from ml.drift.questions import QUESTIONS, SHOP_MIX, VOLUME
from ml.errors import InputError
from ml.quality.questions import AGREEMENT as CORRECTIONS
from ml.quality.questions import SHARES as CORRECTED_SHARES
from offer_assets import policies
from offer_assets.jobs import FOLLOW_TAXONOMY, TRAIN_AND_RELEASE
from offer_assets.plan import RetrainPolicy
from resources.alerting import OutboxAlerts
from resources.alerts import Incident, News
from resources.offer_feed import OfferFeed
from resources.settings import Settings
from resources.tracking import MlflowTracking, RegisteredVersion
from sensors import lasting_drift as sensor_module
from sensors.lasting_drift import lasting_drift
from tests import release_world
from tests.registry import registry_in
from tests.release_world import BAD, World, failure_of, free_port

FEED = {"offer_assets/feed": "feed"}


class Operation:
    """A home with a model, days that it catalogued, and a sensor that looks at them."""

    def __init__(self, world: World, folder: Path, clock: Callable[[datetime.datetime], None]) -> None:
        self.world, self.folder, self.set_clock = world, folder, clock
        self.alerts = OutboxAlerts(home=str(folder / "home"))
        self.feed = OfferFeed(
            feed=str(folder / "feed" / "*.csv"), first_day="2026-11-01", home=str(folder / "home")
        )
        self.policy = RetrainPolicy(checks=[SHOP_MIX], after_days=2, cooldown_days=7)
        (folder / "feed").mkdir()

    def serve(self, name: str) -> ArtifactRef:
        """Let a model serve, and make its reference."""
        return self.serve_model(self.world.artifact("compiled_student", name, {}, {}), name)

    def serve_model(self, model: ArtifactRef, name: str) -> ArtifactRef:
        self.reference = self.world.artifact("drift_reference", name, {}, {"compiled_student": model.digest})
        self.world.store.write_pointer("offer_endpoint", model)
        return model

    def report(
        self, day: str, level: Level, *, delivered: bool = True, is_over: bool = True, **levels: Level
    ) -> None:
        if delivered:
            self.deliver(day)
        named = {question.name: levels.get(question.name, "OK") for question in QUESTIONS} | {SHOP_MIX: level}
        folder = self.world.store.destination("drift_report", f"{day}-{self.reference.key}-{level}-{is_over}")
        folder.mkdir(parents=True)
        write_manifest(
            folder,
            kind="drift_report",
            key=folder.name,
            inputs={"drift_reference": self.reference.digest},
            code_version="1",
            code_revision="1",
            parameters={"day": day, "complete": is_over},
            metrics={f"level_{name}": LEVELS[found] for name, found in named.items()},
            seconds=0.1,
        )
        self.world.store.write_pointer(f"drift_report/{day}", reference(folder))

    def deliver(self, day: str) -> None:
        offers = f"offer_id,shop_id,title,offered_at\n{day},s,doll,{day}T10:00:00Z\n"
        (self.folder / "feed" / f"{day}.csv").write_text(offers)

    def tick(self) -> dg.SensorResult:
        resources = {
            "retrain_policy": self.policy,
            "offer_feed": self.feed,
            "artifact_store": self.world.store,
            "compute": self.world.compute,
            "tracking": self.world.tracking,
            "alerts": self.alerts,
        }
        with dg.build_sensor_context(instance=self.world.instance, resources=resources) as context:
            result = lasting_drift(context)
        assert isinstance(result, dg.SensorResult)
        return result

    def start(
        self, request: dg.RunRequest, status: dg.DagsterRunStatus, registered: ArtifactRef | None = None
    ) -> dg.DagsterRun:
        """A run as the daemon would start it, that has registered a model or not."""
        run = dg.DagsterRun(
            job_name=request.job_name,
            run_id=dg.DagsterRun(job_name="any").run_id,
            status=status,
            tags={**request.tags, RUN_KEY_TAG: request.run_key},
        )
        self.world.instance.add_run(run)
        if registered is not None:
            made = dg.AssetMaterialization("model_version", tags={DATA_VERSION_TAG: registered.digest})
            event = DagsterEvent(
                event_type_value="ASSET_MATERIALIZATION",
                job_name=run.job_name,
                event_specific_data=StepMaterializationData(made),
            )
            self.world.instance.report_dagster_event(event, run.run_id)
        return run

    def incidents(self) -> list[Incident]:
        return self.alerts.incidents()


@pytest.fixture
def operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operation]:
    with dg.DagsterInstance.ephemeral() as instance:
        # The registry is asked only about a model whose training failed: most tests get on without one.
        no_registry = MlflowTracking(tracking_uri="https://registry.invalid", model_name="offer-categories")
        world = World(tmp_path, no_registry, instance, free_port())

        def set_clock(now: datetime.datetime) -> None:
            monkeypatch.setattr(sensor_module, "_now", lambda: now)

        operation = Operation(world, tmp_path, set_clock)
        operation.serve("first")
        yield operation


def request_of(result: dg.SensorResult) -> dg.RunRequest:
    (request,) = result.run_requests or []
    return request


def reason(result: dg.SensorResult) -> str:
    assert not result.run_requests
    assert result.skip_reason is not None
    return result.skip_reason.skip_message or ""


def drifts_for_two_days(operation: Operation) -> None:
    for day, level in {"2026-11-02": "OK", "2026-11-03": "ERROR", "2026-11-04": "ERROR"}.items():
        operation.report(day, level)


def drifts_for_two_more_days(operation: Operation) -> None:
    for day in ("2026-11-05", "2026-11-06"):
        operation.report(day, "ERROR")


def days_later(days: int) -> datetime.datetime:
    """As seen from the runs of this test, which are made now."""
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def test_without_the_setting_it_says_that_it_is_off(operation):
    drifts_for_two_days(operation)
    operation.policy = RetrainPolicy.from_settings(Settings(home=operation.folder))
    assert reason(operation.tick()) == "off: OFFER_ASSETS_RETRAIN_ON_DRIFT is not set"


def test_default_means_the_checks_that_a_training_can_mend(operation):
    settings = Settings(home=operation.folder, retrain_on_drift=f"default,{VOLUME},{SHOP_MIX}")
    assert RetrainPolicy.from_settings(settings).checks == [*policies.MENDED_BY_TRAINING, VOLUME]


def test_drift_that_lasts_starts_train_and_release_with_tags_that_say_why(operation):
    drifts_for_two_days(operation)
    request = request_of(operation.tick())
    assert (request.job_name, request.partition_key) == (TRAIN_AND_RELEASE, "cpu")
    assert request.run_key.startswith("drift:feed:")
    assert request.tags["offer_assets/drift_checks"] == SHOP_MIX
    assert request.tags["offer_assets/drift_day"] == "2026-11-04"
    assert request.tags | FEED == request.tags
    assert operation.incidents() == []


def test_a_tick_that_is_repeated_asks_for_the_same_run(operation):
    drifts_for_two_days(operation)
    assert request_of(operation.tick()).run_key == request_of(operation.tick()).run_key


def test_other_checks_and_reports_of_other_models_start_nothing(operation):
    operation.report("2026-11-03", "OK", **{VOLUME: "ERROR"})
    operation.report("2026-11-04", "OK", **{VOLUME: "ERROR"})
    assert "none of 1 checks was ERROR" in reason(operation.tick())
    drifts_for_two_days(operation)
    operation.serve("second")
    assert "none of 1 checks was ERROR" in reason(operation.tick())


def test_a_model_under_new_names_is_the_model_it_was(operation):
    drifts_for_two_days(operation)
    compiled = operation.world.store.read_pointer("offer_endpoint")
    renamed = operation.world.artifact("renamed_student", "first", {}, {"compiled_student": compiled.digest})
    operation.world.store.write_pointer("offer_endpoint", renamed)
    assert request_of(operation.tick())
    operation.reference = operation.world.artifact(
        "drift_reference", "renamed", {}, {"compiled_student": renamed.digest}
    )
    operation.report("2026-11-05", "OK")
    assert "none of 1 checks" in reason(operation.tick())


def measure_quality(operation: Operation, level: Level, day: str, model: ArtifactRef) -> None:
    """Corrections say of the days of a model, up to this one, what they say."""
    operation.deliver(day)
    quality = operation.world.artifact(
        "live_quality",
        f"{day}-{model.key}",
        {},
        {},
        judged_model=model.version,
        judged_until=day,
        **{f"level_{check}": LEVELS[level] for check in (CORRECTIONS, CORRECTED_SHARES)},
    )
    operation.world.store.write_pointer("live_quality", quality)


def test_quality_counts_if_the_model_that_serves_was_judged(operation):
    operation.policy = RetrainPolicy(checks=[CORRECTIONS, CORRECTED_SHARES], after_days=2, cooldown_days=7)
    first = operation.world.store.read_pointer("offer_endpoint")
    measure_quality(operation, "ERROR", "2026-11-04", first)
    request = request_of(operation.tick())
    assert request.tags["offer_assets/drift_checks"] == f"{CORRECTIONS},{CORRECTED_SHARES}"
    second = operation.serve("second")
    assert "none of 2 checks" in reason(operation.tick())
    measure_quality(operation, "ERROR", "2026-11-05", second)
    assert request_of(operation.tick())


@pytest.mark.parametrize("judged", ["first", "renamed"])
def test_quality_counts_under_whatever_names_the_model_was_judged(operation, judged):
    operation.policy = RetrainPolicy(checks=[CORRECTIONS], after_days=2, cooldown_days=7)
    models = {"first": operation.world.store.read_pointer("offer_endpoint")}
    inputs = {"compiled_student": models["first"].digest}
    models["renamed"] = operation.world.artifact("renamed_student", "renamed", {}, inputs)
    operation.world.store.write_pointer("offer_endpoint", models["renamed"])
    measure_quality(operation, "ERROR", "2026-11-04", models[judged])
    assert request_of(operation.tick())


def test_quality_that_a_training_did_not_mend_is_told_under_its_own_check(operation):
    operation.policy = RetrainPolicy(checks=[CORRECTIONS], after_days=2, cooldown_days=7)
    measure_quality(operation, "ERROR", "2026-11-02", operation.world.store.read_pointer("offer_endpoint"))
    request = request_of(operation.tick())
    second = operation.serve("second")
    operation.start(request, dg.DagsterRunStatus.SUCCESS, second)
    measure_quality(operation, "ERROR", "2026-11-03", second)
    operation.set_clock(days_later(8))
    assert "with the model that was trained for it" in reason(operation.tick())
    (incident,) = operation.incidents()
    assert (incident.key, incident.asset) == (f"check:live_quality:{CORRECTIONS}", "live_quality")


@pytest.mark.parametrize(("level", "starts"), [("OK", True), ("WARN", True), ("UNKNOWN", False)])
def test_quality_that_was_good_since_may_have_another_training(operation, level, starts):
    operation.policy = RetrainPolicy(checks=[CORRECTIONS], after_days=2, cooldown_days=7)
    measure_quality(operation, "ERROR", "2026-11-02", operation.world.store.read_pointer("offer_endpoint"))
    operation.start(request_of(operation.tick()), dg.DagsterRunStatus.SUCCESS)
    for found in (level, "ERROR"):
        metadata = {f"level_{CORRECTIONS}": LEVELS[found]}
        looked_at = dg.AssetMaterialization("live_quality", metadata=metadata)
        operation.world.instance.report_runless_asset_event(looked_at)
    operation.set_clock(days_later(8))
    assert bool(operation.tick().run_requests) == starts


def test_days_that_are_replayed_while_newer_ones_wait_start_nothing(operation):
    drifts_for_two_days(operation)
    operation.deliver("2026-11-05")
    assert reason(operation.tick()) == "waiting for the report of 2026-11-05, the newest day of the feed"


def test_a_day_that_is_not_over_says_nothing_yet(operation):
    operation.report("2026-11-03", "ERROR")
    operation.report("2026-11-04", "ERROR", is_over=False)
    assert "none of 1 checks was ERROR" in reason(operation.tick())
    operation.report("2026-11-04", "ERROR")
    operation.report("2026-11-05", "OK", is_over=False)
    assert request_of(operation.tick()).tags["offer_assets/drift_day"] == "2026-11-05"


@pytest.mark.parametrize("job", [TRAIN_AND_RELEASE, FOLLOW_TAXONOMY])
def test_it_waits_for_any_training(operation, job):
    drifts_for_two_days(operation)
    run = dg.DagsterRun(
        job_name=job,
        run_id=dg.DagsterRun(job_name="any").run_id,
        status=dg.DagsterRunStatus.STARTED,
        tags=FEED,
    )
    operation.world.instance.add_run(run)
    assert reason(operation.tick()) == f"waiting for the end of run {run.run_id[:8]} of {job}"


def test_while_its_own_run_is_open_and_after_a_restart_nothing_else_is_started(operation):
    drifts_for_two_days(operation)
    run = operation.start(request_of(operation.tick()), dg.DagsterRunStatus.STARTED)
    assert reason(operation.tick()) == f"run {run.run_id[:8]}, which drift started, is not finished"


def test_a_failed_run_is_repeated_once_then_people_are_told_once(operation):
    drifts_for_two_days(operation)
    for attempt in (1, 2):
        request = request_of(operation.tick())
        assert request.run_key.endswith(f":1:{attempt}")
        operation.start(request, dg.DagsterRunStatus.FAILURE)
    for _ in range(3):
        assert "the training for it failed" in reason(operation.tick())
    (incident,) = operation.incidents()
    assert (incident.key, incident.severity, incident.times) == (
        f"check:drift_report:{SHOP_MIX}",
        "CRITICAL",
        1,
    )


def train_in_vain(operation: Operation) -> None:
    """Drift, a training for it that succeeds, and drift with its model too."""
    drifts_for_two_days(operation)
    request = request_of(operation.tick())
    operation.start(request, dg.DagsterRunStatus.SUCCESS, operation.serve("second"))
    drifts_for_two_more_days(operation)


def test_drift_with_the_new_model_is_told_as_critical_and_trained_for_no_more(operation):
    train_in_vain(operation)
    for days in (0, 0, 8, 80):
        operation.set_clock(days_later(days))
        assert "with the model that was trained for it" in reason(operation.tick())
    (incident,) = operation.incidents()
    assert (incident.severity, incident.times) == ("CRITICAL", 1)
    assert incident.title == f"A training did not cure the drift: {SHOP_MIX}"
    assert incident.link == f"/assets/drift_report?view=checks&checkDetail={SHOP_MIX}"
    assert "No other training is started for it before a day without an ERROR" in incident.text


def test_what_it_told_is_in_the_history_of_the_asset_alerts(operation):
    train_in_vain(operation)
    (observation,) = operation.tick().asset_events
    assert (observation.asset_key, observation.description) == (
        dg.AssetKey("alerts"),
        f"A training did not cure the drift: {SHOP_MIX}",
    )
    assert operation.tick().asset_events == []


def test_it_is_told_again_once_its_incident_was_resolved_and_is_open_again(operation):
    key = f"check:drift_report:{SHOP_MIX}"

    def tell(number: int, state: str) -> None:
        news = News(id=f"{state} {number}", incident=key, state=state, title="it is red")
        operation.alerts.tell([news])

    tell(1, "failing")
    tell(1, "resolved")
    train_in_vain(operation)
    tell(2, "failing")
    assert len(operation.tick().asset_events) == 1
    tell(2, "resolved")
    assert operation.tick().asset_events == []
    assert operation.incidents() == []
    tell(3, "failing")
    assert [incident.severity for incident in operation.incidents()] == ["ERROR"]
    assert len(operation.tick().asset_events) == 1
    assert [(incident.number, incident.severity) for incident in operation.incidents()] == [(3, "CRITICAL")]


def test_a_day_without_an_error_lets_it_train_again_after_the_cool_down(operation):
    train_in_vain(operation)
    operation.report("2026-11-07", "OK")
    operation.report("2026-11-08", "ERROR")
    operation.report("2026-11-09", "ERROR")
    assert "may start from" in reason(operation.tick())
    operation.set_clock(days_later(8))
    assert request_of(operation.tick()).run_key.endswith(":2:1")


def test_a_model_that_somebody_else_released_may_be_trained_anew(operation):
    train_in_vain(operation)
    operation.serve("theirs")
    operation.report("2026-11-07", "ERROR")
    operation.report("2026-11-08", "ERROR")
    operation.set_clock(days_later(8))
    assert request_of(operation.tick()).run_key.endswith(":2:1")


def test_a_model_that_was_registered_under_newer_names_is_still_the_one_that_was_trained(operation):
    drifts_for_two_days(operation)
    request = request_of(operation.tick())
    second = operation.serve("second")
    renamed = operation.world.artifact("renamed_student", "newer", {}, {"compiled_student": second.digest})
    operation.start(request, dg.DagsterRunStatus.SUCCESS, renamed)
    drifts_for_two_more_days(operation)
    operation.set_clock(days_later(8))
    for served in (second, renamed):
        operation.world.store.write_pointer("offer_endpoint", served)
        assert "with the model that was trained for it" in reason(operation.tick())


def test_a_run_that_fails_after_its_model_was_served_is_not_repeated(operation):
    drifts_for_two_days(operation)
    request = request_of(operation.tick())
    operation.start(request, dg.DagsterRunStatus.FAILURE, operation.serve("second"))
    drifts_for_two_more_days(operation)
    assert "with the model that was trained for it" in reason(operation.tick())


def test_trainings_of_others_do_not_make_it_forget_its_own(operation):
    train_in_vain(operation)
    for _ in range(60):
        run = dg.DagsterRun(
            job_name=TRAIN_AND_RELEASE,
            run_id=dg.DagsterRun(job_name="any").run_id,
            status=dg.DagsterRunStatus.SUCCESS,
            tags=FEED,
        )
        operation.world.instance.add_run(run)
    operation.set_clock(days_later(80))
    assert "with the model that was trained for it" in reason(operation.tick())


@pytest.fixture
def registry(
    operation: Operation, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Operation:
    """The same with a registry, and a job that registers and serves what was trained."""
    monkeypatch.setattr(release_world, "RELEASE", TRAIN_AND_RELEASE)
    operation.world.tracking = registry_in(operation.folder, tmp_path_factory)
    drifts_for_two_days(operation)
    return operation


def test_a_model_that_the_gate_refused_is_not_trained_a_second_time(registry):
    request = request_of(registry.tick())
    registry.world.train("refused", metrics=BAD)
    trained = registry.world.run(TRAIN_AND_RELEASE, tags={**request.tags, RUN_KEY_TAG: request.run_key})
    assert "did not pass the gate" in failure_of(trained)
    assert "is not served: version 1 (model " in reason(registry.tick())
    (incident,) = registry.incidents()
    assert incident.severity == "CRITICAL"
    assert "did not pass the gate: see the gate of model_version" in incident.text


def test_a_model_that_waits_for_a_person_is_told_with_how_to_decide(registry):
    request = request_of(registry.tick())
    tags = {**request.tags, RUN_KEY_TAG: request.run_key}
    model = registry.world.train("waits")
    assert registry.world.run(TRAIN_AND_RELEASE, approval="required", tags=tags).success
    said = reason(registry.tick())
    assert f"version 1 (model {model.version}) passed the gate and waits for a decision" in said
    assert "run the job decide_version, or `python -m offer_assets approve 1 --reason …` (or reject)" in said
    (incident,) = registry.incidents()
    assert incident.title == f"The model trained for the drift waits for a decision: {SHOP_MIX}"
    assert "same model" not in incident.text

    registry.world.decide(model, "rejected", reason="dolls are wrong")
    assert "was rejected by anna: dolls are wrong" in reason(registry.tick())
    (incident,) = registry.incidents()
    assert "was rejected by anna" in incident.text

    registry.world.decide(model, "approved")
    registry.serve_model(model, "approved")
    drifts_for_two_more_days(registry)
    assert "with the model that was trained for it" in reason(registry.tick())


def test_a_broken_feed_fails_the_tick_so_that_people_hear_of_it(operation):
    drifts_for_two_days(operation)
    for file in (operation.folder / "feed").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="OFFER_FEED"):
        operation.tick()


def test_a_registry_that_does_not_answer_fails_the_tick_too(operation):
    drifts_for_two_days(operation)
    request = request_of(operation.tick())
    refused = operation.world.artifact("compiled_student", "refused", {}, {})
    operation.start(request, dg.DagsterRunStatus.FAILURE, refused)
    operation.world.tracking = Unreachable(tracking_uri="", model_name="")
    with pytest.raises(dg.Failure, match="registry is away"):
        operation.tick()


class Unreachable(MlflowTracking):
    """A registry that is away."""

    def versions(self) -> list[RegisteredVersion]:
        raise dg.Failure("the registry is away")

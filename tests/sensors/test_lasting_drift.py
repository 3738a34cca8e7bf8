"""The sensor ``lasting_drift``: what it sees of reports and runs, and that a restart changes nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.drift.answers import LEVELS, Level
from ml.drift.questions import QUESTIONS, SHOP_MIX, VOLUME
from ml.quality.questions import AGREEMENT as CORRECTIONS
from ml.quality.questions import SHARES as CORRECTED_SHARES
from offer_assets import policies
from offer_assets.jobs import FOLLOW_TAXONOMY, TRAIN_AND_RELEASE
from offer_assets.plan import RetrainPolicy
from resources.alerting import OutboxAlerts
from resources.alerts import Incident
from resources.offer_feed import OfferFeed
from resources.settings import Settings
from resources.tracking import MlflowTracking
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

    def serve(self, name: str) -> None:
        """Let a model serve, and make its reference."""
        model = self.world.artifact("compiled_student", name, {}, {})
        self.reference = self.world.artifact("drift_reference", name, {}, {"compiled_student": model.digest})
        self.world.store.write_pointer("offer_endpoint", model)

    def report(self, day: str, level: Level, *, delivered: bool = True, **levels: Level) -> None:
        if delivered:
            self.deliver(day)
        named = {question.name: levels.get(question.name, "OK") for question in QUESTIONS} | {SHOP_MIX: level}
        report = self.world.artifact(
            "drift_report",
            f"{day}-{self.reference.key}-{level}",
            {},
            {"drift_reference": self.reference.digest},
            **{f"level_{name}": LEVELS[found] for name, found in named.items()},
        )
        self.world.store.write_pointer(f"drift_report/{day}", report)

    def catalogue(self, day: str) -> None:
        served = self.world.store.read_pointer("offer_endpoint")
        catalogued = self.world.artifact(
            "catalogued_offers", f"{day}-{served.key}", {}, {"compiled_student": served.digest}
        )
        self.world.store.write_pointer(f"catalogued_offers/{day}", catalogued)

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

    def start(self, request: dg.RunRequest, status: dg.DagsterRunStatus) -> dg.DagsterRun:
        run = dg.DagsterRun(
            job_name=request.job_name,
            run_id=dg.DagsterRun(job_name="any").run_id,
            status=status,
            tags={**request.tags, RUN_KEY_TAG: request.run_key},
        )
        self.world.instance.add_run(run)
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


def measure_quality(operation: Operation, level: Level, older: list[str], recent: list[str]) -> None:
    days = [{"day": day, "too_young": False, "usual": None, "offers": 9} for day in older]
    days += [{"day": day, "too_young": False, "usual": 0.9, "offers": 9} for day in recent]
    days += [{"day": "2026-11-08", "too_young": True, "usual": None, "offers": 9}]
    quality = operation.world.artifact(
        "live_quality",
        f"{older}-{recent}",
        {"quality.json": msgspec.json.encode({"days": days, "labels": 100}).decode()},
        {},
        **{f"level_{check}": LEVELS[level] for check in (CORRECTIONS, CORRECTED_SHARES)},
    )
    operation.world.store.write_pointer("live_quality", quality)


def test_quality_counts_if_the_model_that_serves_gave_the_categories_of_all_days_judged(operation):
    operation.policy = RetrainPolicy(checks=[CORRECTIONS, CORRECTED_SHARES], after_days=2, cooldown_days=7)
    older, recent = ["2026-11-02"], ["2026-11-03", "2026-11-04"]
    for day in older:
        operation.catalogue(day)
    operation.serve("second")
    operation.deliver("2026-11-04")
    measure_quality(operation, "ERROR", older, recent)
    assert "none of 2 checks" in reason(operation.tick())
    for day in recent:
        operation.catalogue(day)
    assert request_of(operation.tick()).tags["offer_assets/drift_checks"] == CORRECTIONS
    for day in older:
        operation.catalogue(day)
    assert (
        request_of(operation.tick()).tags["offer_assets/drift_checks"] == f"{CORRECTIONS},{CORRECTED_SHARES}"
    )
    operation.serve("third")
    assert "none of 2 checks" in reason(operation.tick())


def test_quality_that_a_training_did_not_mend_is_told_under_its_own_check(operation):
    operation.policy = RetrainPolicy(checks=[CORRECTIONS], after_days=2, cooldown_days=7)
    operation.deliver("2026-11-02")
    operation.catalogue("2026-11-02")
    measure_quality(operation, "ERROR", [], ["2026-11-02"])
    operation.start(request_of(operation.tick()), dg.DagsterRunStatus.SUCCESS)
    operation.serve("second")
    operation.deliver("2026-11-03")
    operation.catalogue("2026-11-03")
    measure_quality(operation, "ERROR", ["2026-11-02"], ["2026-11-03"])
    assert "with the model that was trained for it" in reason(operation.tick())
    (incident,) = operation.incidents()
    assert (incident.key, incident.asset) == (f"check:live_quality:{CORRECTIONS}", "live_quality")


def test_days_that_are_replayed_while_newer_ones_wait_start_nothing(operation):
    drifts_for_two_days(operation)
    operation.deliver("2026-11-05")
    assert reason(operation.tick()) == "waiting for the report of 2026-11-05, the newest day of the feed"


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


def test_drift_with_the_new_model_is_told_as_critical_until_the_cool_down_is_over(operation):
    drifts_for_two_days(operation)
    operation.start(request_of(operation.tick()), dg.DagsterRunStatus.SUCCESS)
    operation.serve("second")
    operation.report("2026-11-05", "ERROR")
    assert "since the training for drift" in reason(operation.tick())
    assert operation.incidents() == []
    operation.report("2026-11-06", "ERROR")
    for _ in range(2):
        assert "with the model that was trained for it" in reason(operation.tick())
    (incident,) = operation.incidents()
    assert incident.title == f"A new training did not cure the drift: {SHOP_MIX}"
    assert incident.link == f"/assets/drift_report?view=checks&checkDetail={SHOP_MIX}"
    operation.set_clock(days_later(8))
    assert request_of(operation.tick()).run_key.endswith(":2:1")


def test_a_model_that_the_gate_refused_is_not_trained_a_second_time(operation, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(release_world, "RELEASE", TRAIN_AND_RELEASE)
    operation.world.tracking = registry_in(operation.folder, tmp_path_factory)
    drifts_for_two_days(operation)
    request = request_of(operation.tick())
    operation.world.train("refused", metrics=BAD)
    trained = operation.world.run(TRAIN_AND_RELEASE, tags={**request.tags, RUN_KEY_TAG: request.run_key})
    assert "did not pass the gate" in failure_of(trained)
    assert "since the training for drift" in reason(operation.tick())
    operation.report("2026-11-05", "ERROR")
    operation.report("2026-11-06", "ERROR")
    assert "it was refused and is not served" in reason(operation.tick())
    assert [incident.severity for incident in operation.incidents()] == ["CRITICAL"]


def test_a_broken_feed_is_a_sentence_and_starts_nothing(operation):
    drifts_for_two_days(operation)
    for file in (operation.folder / "feed").iterdir():
        file.unlink()
    assert "OFFER_FEED" in reason(operation.tick())

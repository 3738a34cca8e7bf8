"""Whatever goes wrong becomes one incident, and ends when it is over; history stays history."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import msgspec
import pytest
import sqlalchemy as sa
from dagster import DagsterInstance
from dagster._core.remote_origin import (
    InProcessCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    ScheduleInstigatorData,
    SensorInstigatorData,
    TickData,
    TickStatus,
)
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Log
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._utils.error import SerializableErrorInfo

from ml.artifacts import ArtifactRef
from offer_assets import event_log
from offer_assets.checks import partitioned_check
from offer_assets.failed_ticks import Declared
from offer_assets.incidents import ALERTS, COLLECTOR, collect, look_after_collector, observations
from offer_assets.release import _objection
from resources.alerting import OutboxAlerts
from resources.alerts import Incident, News
from resources.artifact_store import FolderArtifactStore
from resources.tracking import Decision, Promotion, RegisteredVersion

FIRST, SECOND, THIRD, FOURTH, FIFTH = (f"2024-03-0{day}" for day in range(1, 6))
DAYS = dg.DailyPartitionsDefinition("2024-01-01", end_offset=1)
TARGETS = dg.StaticPartitionsDefinition(["cpu", "neuron"])
WARNING = dg.AssetCheckResult(passed=False, severity=dg.AssetCheckSeverity.WARN, description="half as many")
FAILED = dg.AssetCheckResult(passed=False, description="no offers of IT")
SETTLED = 61.0
"""Seconds after which no row of the log is awaited any more."""


class Plant:
    """A few assets with checks of every kind, that do as they are told, and what is told of them."""

    def __init__(self, instance: DagsterInstance, home: Path) -> None:
        self.instance = instance
        self.alerts = OutboxAlerts(home=str(home))
        self.store = FolderArtifactStore(root=str(home / "artifacts"), feed="f")
        self.newest_day: str | None = FIFTH
        self.told: dict[str, Any] = {}
        """What an asset or check does: an exception that it raises, or the result of a check."""
        self.definitions = self._definitions()

    def run(
        self, job: str, partition: str | None = None, tags: dict[str, str] | None = None, **told: Any
    ) -> dg.ExecuteInProcessResult:
        self.told = told
        return self.definitions.resolve_job_def(job).execute_in_process(
            instance=self.instance, partition_key=partition, tags=tags, raise_on_error=False
        )

    def collect(self, **options: Any) -> list[News]:
        options = {"offer_feed": SimpleNamespace(days=self._days), **options}
        return collect(
            self.instance,
            self.alerts,
            graph=self.definitions.resolve_asset_graph(),
            artifact_store=self.store,
            **options,
        )

    def incidents(self) -> list[Incident]:
        """All that there were, the oldest first."""
        return self.alerts.incidents(all_of_them=True)

    def the_incident(self) -> Incident:
        (incident,) = self.incidents()
        return incident

    def fail_run(self, run: dg.DagsterRun, line: str = "The process of this run was killed") -> None:
        self.instance.add_run(run)
        self.instance.report_run_failed(run, line)

    def _days(self) -> list[str]:
        if self.newest_day is None:
            raise dg.Failure("the feed is away")
        return [FIRST, self.newest_day]

    def _do(self, name: str) -> Any:
        told = self.told.get(name, dg.AssetCheckResult(passed=True))
        if isinstance(told, Exception):
            raise told
        return told

    def _definitions(self) -> dg.Definitions:
        @dg.asset(partitions_def=DAYS, group_name="feed", owners=["team:data"])
        def offers() -> None:
            self._do("offers")

        @dg.asset(partitions_def=DAYS, group_name="operation", owners=["team:ml"], deps=[offers])
        def drift_report() -> None:
            self._do("drift_report")

        @dg.asset(partitions_def=TARGETS)
        def student() -> None:
            self._do("student")

        @dg.asset
        def model() -> None:
            self._do("model")

        @dg.asset
        def offer_endpoint() -> None:
            self._do("offer_endpoint")

        @partitioned_check(asset="offers", partitions_def=DAYS, blocking=True)
        def offers_are_there() -> dg.AssetCheckResult:
            return self._do("offers_are_there")

        @partitioned_check(asset="drift_report", partitions_def=DAYS)
        def volume_is_usual() -> dg.AssetCheckResult:
            return self._do("volume_is_usual")

        @dg.asset_check(asset="student")
        def student_is_good() -> dg.AssetCheckResult:
            return self._do("student_is_good")

        @dg.asset_check(asset="model")
        def model_answers() -> dg.AssetCheckResult:
            return self._do("model_answers")

        return dg.Definitions(
            assets=[offers, drift_report, student, model, offer_endpoint],
            asset_checks=[offers_are_there, volume_is_usual, student_is_good, model_answers],
            jobs=[
                dg.define_asset_job("process_day", dg.AssetSelection.assets("offers", "drift_report")),
                dg.define_asset_job("ingest", dg.AssetSelection.assets("offers")),
                dg.define_asset_job("report", dg.AssetSelection.assets("drift_report")),
                dg.define_asset_job("train", dg.AssetSelection.assets("student", "model")),
                dg.define_asset_job("deploy", dg.AssetSelection.assets("offer_endpoint")),
                dg.define_asset_job("release", dg.AssetSelection.assets("model")),
            ],
            executor=dg.in_process_executor,
        )


@pytest.fixture(scope="module")
def shared_instance() -> Iterator[DagsterInstance]:
    """One for all tests: a new one takes longer than a test."""
    with DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture(scope="module")
def shared_instance_on_disk() -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp() as instance:
        yield instance


@pytest.fixture
def plant(shared_instance: DagsterInstance, tmp_path: Path) -> Plant:
    shared_instance.wipe()
    return Plant(shared_instance, tmp_path)


@pytest.fixture
def plant_on_disk(shared_instance_on_disk: DagsterInstance, tmp_path: Path) -> Plant:
    """Of an instance as it is in operation: with ticks, and for several threads."""
    shared_instance_on_disk.wipe()
    shared_instance_on_disk.schedule_storage.wipe()
    return Plant(shared_instance_on_disk, tmp_path)


def states(told: list[News]) -> list[tuple[str, str]]:
    return [(news.incident, news.state) for news in told]


def today(days_ago: int = 0) -> str:
    return (datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=days_ago)).isoformat()


# Checks


def test_a_failed_check_is_an_incident_until_it_passes(plant: Plant) -> None:
    run_id = plant.run("report", FIFTH, volume_is_usual=FAILED).run_id
    (news,) = plant.collect()
    incident = plant.the_incident()
    assert (incident.key, incident.state) == ("check:drift_report:volume_is_usual", "open")
    assert incident.title == "Check volume_is_usual of drift_report failed"
    assert (incident.text, incident.run) == ("2024-03-05: no offers of IT.", run_id)
    assert incident.link == "/assets/drift_report?view=checks&checkDetail=volume_is_usual"
    assert (incident.asset, incident.group, incident.owners) == ("drift_report", "operation", ("team:ml",))
    assert (incident.severity, news.severity) == ("ERROR", "ERROR")
    assert plant.collect() == []
    plant.run("report", FIFTH)
    assert states(plant.collect()) == [("check:drift_report:volume_is_usual", "resolved")]
    assert plant.the_incident().state == "resolved"
    plant.run("report", FIFTH)
    assert plant.collect() == []


def test_a_warning_is_told_as_one_and_gets_worse(plant: Plant) -> None:
    plant.run("report", FIFTH, volume_is_usual=WARNING)
    plant.collect()
    assert plant.the_incident().severity == "WARN"
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    assert len(plant.collect()) == 1
    incident = plant.the_incident()
    assert (incident.severity, incident.times) == ("ERROR", 2)


def test_a_blocking_check_that_fails_the_run_is_one_incident(plant: Plant) -> None:
    assert not plant.run("process_day", FIFTH, offers_are_there=FAILED).success
    assert states(plant.collect()) == [("check:offers:offers_are_there", "failing")]
    assert plant.run("process_day", FIFTH).success
    assert states(plant.collect()) == [("check:offers:offers_are_there", "resolved")]


def test_a_check_that_raises_is_an_incident_of_the_check_and_says_why(plant: Plant) -> None:
    error = RuntimeError("https://me:secret@example.com/report?token=hidden is gone\nsecond line")
    assert not plant.run("report", FIFTH, volume_is_usual=error).success
    assert states(plant.collect()) == [("check:drift_report:volume_is_usual", "failing")]
    incident = plant.the_incident()
    assert incident.title == "Check volume_is_usual of drift_report could not be evaluated"
    assert incident.text == (
        "2024-03-05: it raised an error: RuntimeError: https://***@example.com/report?token=*** is gone."
    )
    assert plant.run("report", FIFTH).success
    assert states(plant.collect()) == [("check:drift_report:volume_is_usual", "resolved")]


def test_a_check_that_raises_beside_an_asset_that_fails_are_two_incidents(plant: Plant) -> None:
    plant.run("process_day", FIFTH, offers_are_there=ValueError("odd"), drift_report=ValueError("no rows"))
    plant.run("train", "cpu", student_is_good=ValueError("odd"), model=ValueError("no labels"))
    assert sorted(states(plant.collect())) == [
        ("check:offers:offers_are_there", "failing"),
        ("check:student:student_is_good", "failing"),
        ("run:train:cpu", "failing"),
    ]


def test_a_check_reported_from_outside_of_runs_counts_too(plant: Plant) -> None:
    plant.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(["a b", "c"]),
            check_name="is/fine",
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
        )
    )
    plant.collect()
    incident = plant.the_incident()
    assert incident.key == "check:a b/c:is/fine"
    assert incident.link == "/assets/a%20b/c?view=checks&checkDetail=is%2Ffine"
    assert incident.text == "The check gives no reason."
    assert (incident.severity, incident.group) == ("WARN", None)


def test_a_day_that_passes_ends_nothing_that_a_newer_day_began(plant: Plant) -> None:
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    plant.collect()
    plant.run("report", THIRD)
    assert plant.collect() == []
    plant.run("report", FIFTH)
    assert [state for _, state in states(plant.collect())] == ["resolved"]


def test_of_several_days_at_once_the_newest_decides(plant: Plant) -> None:
    for day, told in ((FIFTH, FAILED), (THIRD, FAILED), (FOURTH, dg.AssetCheckResult(passed=True))):
        plant.run("report", day, volume_is_usual=told)
    plant.collect()
    incident = plant.the_incident()
    assert (incident.state, incident.text[:10]) == ("open", FIFTH)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_day_that_fails_after_a_newer_one_passed_is_told_and_over(plant: Plant, at_once: bool) -> None:
    plant.run("report", FIFTH)
    told = [] if at_once else plant.collect()
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    told += plant.collect()
    assert [state for _, state in states(told)] == ["failing", "resolved"]
    assert plant.the_incident().state == "resolved"


def test_a_partition_that_is_no_day_ends_only_its_own_failure(plant: Plant) -> None:
    plant.run("train", "cpu", student_is_good=FAILED)
    plant.collect()
    plant.run("train", "neuron")
    assert plant.collect() == []
    plant.run("train", "cpu")
    assert states(plant.collect()) == [("check:student:student_is_good", "resolved")]


def test_a_partition_that_failed_before_the_incident_opened_does_not_keep_it_open(plant: Plant) -> None:
    plant.run("train", "neuron", student_is_good=FAILED)
    plant.collect()
    plant.alerts.tell([News(id="by-hand", incident="check:student:student_is_good", state="resolved")])
    plant.run("train", "cpu", student_is_good=FAILED)
    assert [state for _, state in states(plant.collect())] == ["failing"]
    plant.run("train", "cpu")
    assert [state for _, state in states(plant.collect())] == ["resolved"]


def test_a_day_fails_anew_after_a_newer_failing_one_was_closed_by_hand(plant: Plant) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    plant.collect()
    plant.alerts.tell([News(id="by-hand", incident="check:drift_report:volume_is_usual", state="resolved")])
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    assert [state for _, state in states(plant.collect())] == ["failing"]


def not_over(level: str, **told: Any) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(metadata={"level": level, "complete": False}, **told)


def test_a_day_that_is_not_over_ends_no_incident(plant: Plant) -> None:
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    plant.collect()
    for level in ("UNKNOWN", "OK"):
        plant.run("report", FIFTH, volume_is_usual=not_over(level, passed=True))
        assert plant.collect() == []
    over = dg.AssetCheckResult(passed=True, metadata={"level": "OK", "complete": True})
    plant.run("report", FIFTH, volume_is_usual=over)
    assert [state for _, state in states(plant.collect())] == ["resolved"]


@pytest.mark.parametrize("level", ["UNKNOWN", "OK"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_day_that_fails_after_a_newer_one_passed_before_its_end_stays_open(
    plant: Plant, level: str, at_once: bool
) -> None:
    plant.run("report", FIFTH, volume_is_usual=not_over(level, passed=True))
    told = [] if at_once else plant.collect()
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    told += plant.collect()
    assert [state for _, state in states(told)] == ["failing"]
    assert plant.the_incident().state == "open"


def test_a_check_that_cannot_tell_ends_no_incident_even_of_a_day_that_is_over(plant: Plant) -> None:
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    plant.collect()
    unknown = dg.AssetCheckResult(passed=True, metadata={"level": "UNKNOWN", "complete": True})
    plant.run("report", FIFTH, volume_is_usual=unknown)
    assert plant.collect() == []


def test_a_day_that_is_not_over_opens_an_incident_and_one_before_it_makes_it_worse(plant: Plant) -> None:
    warning = not_over("WARN", passed=False, severity=dg.AssetCheckSeverity.WARN)
    plant.run("report", FIFTH, volume_is_usual=warning)
    assert [news.severity for news in plant.collect()] == ["WARN"]
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    assert [news.severity for news in plant.collect()] == ["ERROR"]
    plant.run("report", FIFTH, volume_is_usual=not_over("OK", passed=True))
    assert plant.collect() == []


def test_an_asset_without_partitions_has_none_in_a_run_with_one(plant: Plant) -> None:
    plant.run("train", "cpu", model_answers=FAILED)
    plant.collect()
    assert plant.the_incident().title == "Check model_answers of model failed"
    plant.run("release")
    assert states(plant.collect()) == [("check:model:model_answers", "resolved")]


# Runs


def test_a_failed_run_is_an_incident_until_the_same_succeeds(plant: Plant) -> None:
    error = RuntimeError("outer")
    error.__cause__ = KeyError("postgresql://me:secret@db/offers")
    run_id = plant.run("process_day", FIFTH, offers=error).run_id
    assert states(plant.collect()) == [("run:process_day:2024-03-05", "failing")]
    incident = plant.the_incident()
    assert incident.title == "Run of process_day failed (2024-03-05)"
    assert incident.text == (
        "offers: KeyError: 'postgresql://***@db/offers'. It is over when the same succeeds, or other runs "
        "make what it did not; by hand: `python -m offer_assets alerts --resolve run:process_day:2024-03-05`."
    )
    assert (incident.link, incident.run) == (f"/runs/{run_id}", run_id)
    assert (incident.asset, incident.group, incident.owners) == ("offers", "feed", ("team:data",))
    plant.run("process_day", FOURTH)
    plant.run("report", FIFTH)
    assert plant.collect() == []
    plant.run("process_day", FIFTH)
    assert states(plant.collect()) == [("run:process_day:2024-03-05", "resolved")]


def test_a_failed_run_is_over_when_another_job_made_what_it_did_not(plant: Plant) -> None:
    plant.run("process_day", FIFTH, drift_report=ValueError("odd"))
    plant.collect()
    plant.run("report", FOURTH)
    assert plant.collect() == []
    run_id = plant.run("report", FIFTH).run_id
    (news,) = plant.collect()
    assert (news.incident, news.state, news.run) == ("run:process_day:2024-03-05", "resolved", run_id)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_failed_run_is_over_when_several_made_what_it_did_not_and_not_before(
    plant: Plant, at_once: bool
) -> None:
    plant.run("process_day", FIFTH, offers=ValueError("odd"))
    plant.run("train", "cpu", student=ValueError("odd"))
    told = [] if at_once else plant.collect()
    plant.run("process_day", FOURTH)
    plant.run("release")
    told += plant.collect()
    assert [news.incident for news in told] == ["run:process_day:2024-03-05", "run:train:cpu"]
    plant.run("ingest", FIFTH)
    assert plant.collect() == []
    plant.run("report", FIFTH)
    assert states(plant.collect()) == [("run:process_day:2024-03-05", "resolved")]


def test_what_another_failed_run_made_counts_too(plant: Plant) -> None:
    plant.run("release", model=ValueError("odd"))
    plant.run("train", "cpu", student_is_good=ValueError("odd"))
    assert sorted(states(plant.collect())) == [
        ("check:student:student_is_good", "failing"),
        ("run:release", "failing"),
        ("run:release", "resolved"),
    ]


def test_a_failed_run_that_made_everything_is_over_only_when_the_same_succeeds(plant: Plant) -> None:
    run = plant.run("release").dagster_run
    plant.instance.report_run_failed(run, "the hook failed")
    plant.collect()
    assert "other runs" not in plant.the_incident().text
    plant.run("train", "cpu")
    assert plant.collect() == []
    plant.run("release")
    assert states(plant.collect()) == [("run:release", "resolved")]


def test_a_failure_meant_for_people_is_told_in_its_own_words(plant: Plant) -> None:
    plant.run("release", model=dg.Failure("there are no labels; run adopt_taxonomy", allow_retries=False))
    plant.collect()
    assert plant.the_incident().text.startswith("model: there are no labels; run adopt_taxonomy. It is")


def test_runs_that_are_repeated_are_one_incident(plant: Plant) -> None:
    for _ in range(3):
        plant.run("release", model=ValueError("odd"))
    plant.collect()
    incident = plant.the_incident()
    assert (incident.key, incident.times) == ("run:release", 3)
    plant.run("release", model=ValueError("odd"))
    plant.run("release")
    assert [state for _, state in states(plant.collect())] == ["resolved"]
    plant.run("release", model=ValueError("odd"))
    assert len(plant.collect()) == 1
    assert [incident.number for incident in plant.incidents()] == [1, 2]


def test_a_run_that_was_killed_says_so_and_a_canceled_one_is_no_failure(plant: Plant) -> None:
    canceled, killed = (dg.DagsterRun(job_name=name) for name in ("left", "killed"))
    plant.instance.add_run(canceled)
    plant.instance.report_run_canceled(canceled)
    plant.fail_run(killed, "The process of this run was killed; what it made is kept.")
    assert states(plant.collect()) == [("run:killed", "failing")]
    assert "The process of this run was killed; what it made is kept." in plant.the_incident().text


def test_a_run_without_a_job_is_called_by_its_assets(plant: Plant) -> None:
    def run(*assets: str, **tags: str) -> dg.DagsterRun:
        return dg.DagsterRun(
            job_name="__ASSET_JOB", asset_selection={dg.AssetKey(name) for name in assets}, tags=tags
        )

    plant.fail_run(run("b", "a", **{"dagster/partition": FIFTH}))
    ends = {
        "dagster/asset_partition_range_start": FOURTH,
        "dagster/asset_partition_range_end": FIFTH,
    }
    plant.fail_run(run("a", **ends))
    plant.fail_run(run(*(f"asset_{number}" for number in range(100))))
    plant.collect()
    first, second, third = (incident.key for incident in plant.incidents())
    assert (first, second) == ("run:a+b:2024-03-05", "run:a:2024-03-04..2024-03-05")
    assert third.startswith("run:asset_0+asset_1+")
    assert third.endswith("…(of 100)")


# History


@pytest.mark.parametrize(
    ("day", "newest", "alerts"),
    [(FIFTH, FIFTH, True), (THIRD, FIFTH, True), (SECOND, FIFTH, False), (FIRST, FIFTH, False)],
)
def test_only_checks_of_days_near_the_newest_of_the_feed_alert(
    plant: Plant, day: str, newest: str, alerts: bool
) -> None:
    plant.newest_day = newest
    plant.run("process_day", day, volume_is_usual=FAILED, offers_are_there=WARNING)
    assert len(plant.collect()) == (2 if alerts else 0)


def test_a_long_feed_that_is_taken_for_the_first_time_alerts_only_about_its_newest_days(plant: Plant) -> None:
    for day in (FIRST, SECOND, THIRD, FOURTH, FIFTH):
        plant.run("process_day", day, volume_is_usual=FAILED, offers_are_there=WARNING)
        plant.collect()
    assert [(incident.key, incident.times) for incident in plant.incidents()] == [
        ("check:offers:offers_are_there", 3),
        ("check:drift_report:volume_is_usual", 3),
    ]


@pytest.mark.parametrize("backfill", [{}, {"dagster/backfill": "abc"}])
@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"offers": ValueError("disk full")}, "offers: ValueError: disk full. "),
        ({"offers_are_there": ValueError("odd")}, "offers_offers_are_there: ValueError: odd. "),
        ({"offers_are_there": FAILED}, "offers_offers_are_there: "),
    ],
)
def test_a_run_of_an_old_day_that_fails_alerts_whatever_failed_in_it(
    plant: Plant, told: dict[str, Any], text: str, backfill: dict[str, str]
) -> None:
    """The day may be one that was never processed before, as when the feed is caught up with."""
    plant.run("process_day", FIRST, tags=backfill, **told)
    assert states(plant.collect()) == [(f"run:process_day:{FIRST}", "failing")]
    assert plant.the_incident().text.startswith(text)


def test_a_backfill_of_days_gone_by_does_not_alert_and_one_of_today_does(plant: Plant) -> None:
    backfill = {"dagster/backfill": "abc"}
    plant.run("report", FIFTH, tags=backfill, volume_is_usual=FAILED)
    assert plant.collect() == []
    plant.newest_day = today()
    plant.run("report", today(1), tags=backfill, volume_is_usual=FAILED)
    assert len(plant.collect()) == 1


def test_a_replay_of_an_old_day_ends_nothing(plant: Plant) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    plant.collect()
    for told in (FAILED, dg.AssetCheckResult(passed=True)):
        plant.run("report", FIRST, volume_is_usual=told)
        assert plant.collect() == []
    assert plant.the_incident().state == "open"


def test_without_the_feed_the_newest_day_that_was_taken_counts(plant: Plant) -> None:
    plant.newest_day = None
    plant.run("report", FIRST, volume_is_usual=FAILED)
    assert len(plant.collect()) == 1
    plant.store.write_pointer(
        f"offers/{FIFTH}", ArtifactRef(kind="o", key="k", digest="d", uri="", metrics={})
    )
    plant.run("report", SECOND, volume_is_usual=FAILED)
    assert plant.collect() == []


def test_a_feed_that_takes_long_is_not_waited_for_nor_asked_twice_at_once(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offer_assets.incidents._FEED_SECONDS", 0.01)
    answers, asked = threading.Event(), []

    def days() -> list[str]:
        asked.append(threading.current_thread())
        answers.wait(10)
        return [FIFTH]

    plant.store.write_pointer(
        f"offers/{FIFTH}", ArtifactRef(kind="o", key="k", digest="d", uri="", metrics={})
    )
    for day, told in ((FIFTH, 1), (SECOND, 0)):
        plant.run("report", day, volume_is_usual=FAILED)
        assert len(plant.collect(offer_feed=SimpleNamespace(days=days))) == told
    assert len(asked) == 1
    answers.set()
    asked[0].join()
    plant.run("report", SECOND, volume_is_usual=FAILED)
    plant.collect(offer_feed=SimpleNamespace(days=days))
    assert len(asked) == 2


# Crashes and damage


class Killed(BaseException):
    """What a process does not survive."""


def test_killed_before_the_news_was_told_it_is_told_by_the_next(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    plant.run("release", model=ValueError("odd"))

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(OutboxAlerts, "tell", kill)
        with pytest.raises(Killed):
            plant.collect()
    assert plant.incidents() == []
    assert len(plant.collect()) == 2
    assert plant.collect() == []


def test_killed_after_the_news_was_told_it_is_not_told_again(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    tell = OutboxAlerts.tell

    def tell_and_kill(*arguments: Any) -> None:
        tell(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(OutboxAlerts, "tell", tell_and_kill)
        with pytest.raises(Killed):
            plant.collect()
    assert plant.collect() == []
    assert plant.the_incident().times == 1


def test_an_outbox_that_cannot_be_written_is_no_silence(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)

    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(OutboxAlerts, "tell", full)
    with pytest.raises(OSError, match="disk is full"):
        plant.collect()


def test_several_at_the_same_time_tell_each_thing_once(plant_on_disk: Plant) -> None:
    plant = plant_on_disk
    for day in (THIRD, FOURTH, FIFTH):
        plant.run("process_day", day, offers=ValueError("odd"))
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    with ThreadPoolExecutor(4) as pool:
        told = [news for found in pool.map(lambda _: plant.collect(), range(4)) for news in found]
    assert len(told) == len(plant.incidents()) == 4
    assert {incident.times for incident in plant.incidents()} == {1}


def test_two_that_read_the_log_at_the_same_time_do_not_overwrite_each_other(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one has seen the failure only, and not that it passed and failed again since."""
    plant.collect()
    evaluate(plant, passed=False)
    tell, told = OutboxAlerts.tell, list[News]()

    def overtaken(alerts: OutboxAlerts, *arguments: Any) -> list[News]:
        monkeypatch.setattr(OutboxAlerts, "tell", tell)
        for passed in (True, False):
            evaluate(plant, passed=passed)
        told.extend(plant.collect())
        return tell(alerts, *arguments)

    monkeypatch.setattr(OutboxAlerts, "tell", overtaken)
    assert plant.collect() == []
    assert [state for _, state in states(told)] == ["failing"]
    assert plant.the_incident().times == 2
    monkeypatch.setattr("offer_assets.incidents._EVENTS_AT_ONCE", 1)
    assert plant.collect() == []
    assert plant.the_incident().state == "open"


def evaluate(plant: Plant, *, passed: bool) -> None:
    plant.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(asset_key=dg.AssetKey("a"), check_name="c", passed=passed)
    )


def test_after_the_event_log_was_deleted_nothing_new_is_missed(plant: Plant) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    plant.collect()
    plant.instance.wipe()
    plant.run("release", model=ValueError("odd"))
    assert states(plant.collect()) == [("run:release", "failing")]
    plant.run("report", FIFTH)
    assert states(plant.collect()) == [("check:drift_report:volume_is_usual", "resolved")]


def test_a_run_that_somebody_deleted_is_no_incident_and_no_obstacle(plant: Plant) -> None:
    plant.run("report", FIFTH, volume_is_usual=FAILED)
    plant.collect()
    deleted = plant.run("release", model=ValueError("odd"))
    plant.instance.delete_run(deleted.run_id)
    plant.run("process_day", FIFTH, offers=ValueError("odd"))
    assert states(plant.collect()) == [("run:process_day:2024-03-05", "failing")]
    assert plant.collect() == []


def test_an_event_that_cannot_be_read_is_told_and_hides_nothing(plant: Plant) -> None:
    plant.run("report", FOURTH, volume_is_usual=FAILED)
    plant.run("release", model=ValueError("odd"))
    with plant.instance.event_log_storage.index_connection() as connection:
        first = sa.select(sa.func.min(Log.c.id)).where(
            Log.c.dagster_event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION.value
        )
        connection.execute(
            sa.update(Log).where(Log.c.id == first.scalar_subquery()).values(event="{not an event")
        )
    told = plant.collect()
    assert states(told) == [("event-log:unreadable", "failing"), ("run:release", "failing")]
    assert told[0].title == "1 events of Dagster's log cannot be read"
    assert plant.collect() == []
    assert "event-log:unreadable" in {incident.key for incident in plant.alerts.incidents()}


def test_a_long_log_is_read_in_portions_and_over_several_times(plant: Plant) -> None:
    multiply_evaluation(plant, [f"check_{number % 550}" for number in range(1100)])
    assert len(plant.collect(seconds=0)) == 200
    assert len(plant.collect()) == 350
    assert {incident.times for incident in plant.incidents()} == {2}


def test_of_a_log_of_20_000_events_with_nothing_new_hardly_a_row_is_read(
    plant_on_disk: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = plant_on_disk
    multiply_evaluation(plant, [f"check_{number % 40}" for number in range(20_000)])
    plant.collect(seconds=600)
    assert len(plant.incidents()) == 40
    now = time.time()
    assert plant.collect(now=now + SETTLED) == []  # from here on no row below can appear late
    rows_read: list[int] = []
    for name in ("_ids", "_rows"):
        monkeypatch.setattr(event_log, name, counting(getattr(event_log, name), rows_read))
    for turn in range(2, 5):
        assert plant.collect(now=now + turn * SETTLED) == []
    assert rows_read
    assert sum(rows_read) < 10


def counting(query: Callable[..., list[Any]], numbers: list[int]) -> Callable[..., list[Any]]:
    """The query, which notes how many rows it gave."""

    def counted(*arguments: Any) -> list[Any]:
        rows = query(*arguments)
        numbers.append(len(rows))
        return rows

    return counted


def multiply_evaluation(plant: Plant, checks: list[str]) -> None:
    """Write evaluations of these checks, one a millisecond, without the time that Dagster takes for each."""
    plant.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(asset_key=dg.AssetKey("a"), check_name="template", passed=False)
    )
    with plant.instance.event_log_storage.index_connection() as connection:
        template = connection.execute(sa.select(*Log.c)).one()
        connection.execute(sa.delete(Log))
        content = msgspec.json.decode(template.event)
        rows = []
        for number, check in enumerate(checks):
            content["timestamp"] = template.timestamp.timestamp() + number / 1000
            event = msgspec.json.encode(content).decode().replace("template", check)
            rows.append({**template._mapping, "id": number + 1, "event": event})
        connection.execute(sa.insert(Log), rows)


# Sensors and schedules


class Instigators:
    """Sensors and schedules whose ticks end as they are told."""

    def __init__(self, instance: DagsterInstance) -> None:
        self.instance = instance
        self.at = time.time() - 3600
        self.known: dict[str, InstigatorState] = {}

    def tick(self, name: str, status: TickStatus, error: str = "", type: str = "SENSOR") -> Any:
        state = self.known.get(name) or self._add(name, InstigatorType(type))
        self.at += 30
        failure = SerializableErrorInfo(error, [], "ValueError", None) if error else None
        outer = SerializableErrorInfo("outer error", [], "Outer", failure) if failure else None
        return self.instance.create_tick(
            TickData(
                instigator_origin_id=state.instigator_origin_id,
                instigator_name=name,
                instigator_type=state.instigator_type,
                status=status,
                timestamp=self.at,
                selector_id=state.selector_id,
                error=outer,
                run_ids=[],
            )
        )

    def _add(self, name: str, type: InstigatorType) -> InstigatorState:
        location = InProcessCodeLocationOrigin(LoadableTargetOrigin(), location_name="offer_assets")
        origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), name)
        is_sensor = type is InstigatorType.SENSOR
        data = SensorInstigatorData() if is_sensor else ScheduleInstigatorData("0 3 * * 0")
        state = InstigatorState(origin, type, InstigatorStatus.RUNNING, data)
        self.instance.add_instigator_state(state)
        self.known[name] = state
        return state


@pytest.fixture
def instigators(plant_on_disk: Plant) -> Instigators:
    return Instigators(plant_on_disk.instance)


def test_a_failed_tick_is_an_incident_until_a_good_one(
    plant_on_disk: Plant, instigators: Instigators
) -> None:
    plant = plant_on_disk
    instigators.tick("new_offers", TickStatus.SKIPPED)
    assert plant.collect() == []
    for _ in range(2):
        instigators.tick("new_offers", TickStatus.FAILURE, "ValueError: https://me:secret@example.com\n")
    plant.collect()
    incident = plant.the_incident()
    assert (incident.key, incident.state) == ("sensor:new_offers", "open")
    assert incident.title == "The sensor new_offers failed"
    assert incident.text.startswith("ValueError: https://***@example.com. ")
    assert incident.link == "/locations/offer_assets/sensors/new_offers"
    assert plant.collect() == []
    instigators.tick("new_offers", TickStatus.SKIPPED)
    assert states(plant.collect()) == [("sensor:new_offers", "resolved")]


def test_a_failure_between_two_looks_is_told_though_it_is_over(
    plant_on_disk: Plant, instigators: Instigators
) -> None:
    plant = plant_on_disk
    instigators.tick("weekly", TickStatus.FAILURE, "no", type="SCHEDULE")
    instigators.tick("weekly", TickStatus.SUCCESS, type="SCHEDULE")
    assert states(plant.collect()) == [("schedule:weekly", "failing"), ("schedule:weekly", "resolved")]
    assert plant.the_incident().link == "/locations/offer_assets/schedules/weekly"


def test_a_sensor_that_fails_now_and_then_is_none_until_it_fails_twice_in_a_row(
    plant_on_disk: Plant, instigators: Instigators
) -> None:
    plant = plant_on_disk
    for _ in range(3):
        instigators.tick("new_offers", TickStatus.SKIPPED)
        assert plant.collect() == []
        instigators.tick("new_offers", TickStatus.FAILURE, "odd")
        assert plant.collect() == []
    instigators.tick("new_offers", TickStatus.FAILURE, "odd")
    assert states(plant.collect()) == [("sensor:new_offers", "failing")]


@pytest.mark.parametrize("how", ["stopped", "removed", "deleted"])
def test_a_sensor_that_does_not_run_any_more_is_no_incident(
    plant_on_disk: Plant, instigators: Instigators, how: str
) -> None:
    plant = plant_on_disk
    declared = Declared("offer_assets", frozenset({"new_offers", "other"}))
    for name in ("new_offers", "other"):
        for _ in range(2):
            instigators.tick(name, TickStatus.FAILURE, "odd")
    plant.collect(declared=declared)
    state = instigators.known["new_offers"]
    if how == "stopped":
        plant.instance.update_instigator_state(state.with_status(InstigatorStatus.STOPPED))
    elif how == "removed":
        declared = Declared("offer_assets", frozenset({"other"}))
    else:
        plant.instance.delete_instigator_state(state.instigator_origin_id, state.selector_id)
    instigators.tick("new_offers", TickStatus.FAILURE, "odd")
    assert states(plant.collect(declared=declared)) == [("sensor:new_offers", "resolved")]
    assert plant.collect(declared=declared) == []
    assert [incident.key for incident in plant.alerts.incidents()] == ["sensor:other"]


def test_a_sensor_of_another_code_location_is_not_taken_to_be_removed(
    plant_on_disk: Plant, instigators: Instigators
) -> None:
    plant = plant_on_disk
    for _ in range(2):
        instigators.tick("theirs", TickStatus.FAILURE, "odd")
    told = plant.collect(declared=Declared("another", frozenset({"ours"})))
    assert states(told) == [("sensor:theirs", "failing")]


def test_a_tick_under_way_is_waited_for_and_a_killed_one_is_not(
    plant_on_disk: Plant, instigators: Instigators
) -> None:
    plant = plant_on_disk
    instigators.at = time.time() - 120
    instigators.tick("new_offers", TickStatus.FAILURE, "odd")
    tick = instigators.tick("new_offers", TickStatus.STARTED)
    assert plant.collect() == []
    plant.instance.update_tick(
        tick.with_status(TickStatus.FAILURE, error=SerializableErrorInfo("odd", [], None))
    )
    assert states(plant.collect()) == [("sensor:new_offers", "failing")]
    instigators.tick("new_offers", TickStatus.STARTED)
    instigators.tick("new_offers", TickStatus.SUCCESS)
    assert states(plant.collect()) == [("sensor:new_offers", "resolved")]


def test_the_sensor_that_collects_is_looked_after_by_the_other(
    plant_on_disk: Plant, instigators: Instigators
) -> None:
    plant = plant_on_disk
    for _ in range(2):
        instigators.tick(COLLECTOR, TickStatus.FAILURE, "odd")
        instigators.tick("alert_delivery", TickStatus.FAILURE, "odd")
    assert states(plant.collect()) == [("sensor:alert_delivery", "failing")]
    assert states(look_after_collector(plant.instance, plant.alerts)) == [("sensor:incidents", "failing")]
    instigators.tick(COLLECTOR, TickStatus.SKIPPED)
    assert plant.collect() == []
    assert states(look_after_collector(plant.instance, plant.alerts)) == [("sensor:incidents", "resolved")]
    assert look_after_collector(plant.instance, plant.alerts) == []


# Versions of the model

HOUR = 3600.0


def at(seconds_ago: float) -> str:
    return datetime.datetime.fromtimestamp(time.time() - seconds_ago, datetime.UTC).isoformat()


def version(
    number: int, *, verdict: str = "passed", approval: str = "pending", age: float = HOUR, **changes: Any
) -> RegisteredVersion:
    digest = f"{number}" * 64
    return RegisteredVersion(
        name="m",
        version=str(number),
        ref=ArtifactRef(kind="compiled_student", key="k", digest=digest, uri="", metrics={}),
        metrics={},
        tags={"verdict": verdict, "approval": approval, **changes.pop("tags", {})},
        registered_at=at(age),
        in_production=False,
        **changes,
    )


def decided(decision: str, age: float, *, reason: str = "toys are wrong", **more: Any) -> dict[str, str]:
    kept = Decision(decision=decision, by="anna", reason=reason, at=at(age), **more)
    return {"approval": decision, "approval.decision": msgspec.json.encode(kept).decode()}


class Registry:
    """Answers with the versions that it was given, or does not."""

    def __init__(self, plant: Plant) -> None:
        self.found: list[RegisteredVersion] = []
        self.broken: Exception | None = None
        self.asked = 0
        plant.store.write_pointer("model_version", version(1).ref)

    def versions(self) -> list[RegisteredVersion]:
        self.asked += 1
        if self.broken:
            raise self.broken
        return self.found


@pytest.fixture
def registry(plant: Plant) -> Registry:
    return Registry(plant)


@pytest.fixture
def look(plant: Plant, registry: Registry) -> Callable[[float], list[tuple[str, str]]]:
    return lambda later: states(plant.collect(tracking=registry, now=time.time() + later))


def test_a_version_that_was_refused_is_told_once(
    plant: Plant, registry: Registry, look: Callable[[float], list[tuple[str, str]]]
) -> None:
    registry.found = [
        version(4, approval="rejected", tags=decided("rejected", HOUR)),
        version(3, verdict="failed", approval=""),
        version(2, verdict="failed", approval="", age=72 * HOUR),
        version(1, approval="rejected", tags=decided("rejected", 72 * HOUR), age=80 * HOUR),
    ]
    assert look(0) == [
        (f"version-refused:{'4' * 12}", "notice"),
        (f"version-refused:{'3' * 12}", "notice"),
    ]
    rejected, failed = plant.incidents()
    assert (rejected.title, rejected.group) == (f"The model {'4' * 12} was rejected by anna", "release")
    assert "toys are wrong" in rejected.text
    assert failed.title == f"The model {'3' * 12} did not pass the gate"
    assert look(700) == []


@pytest.mark.parametrize(
    "refused",
    [
        {"verdict": "failed", "approval": ""},
        {"approval": "rejected", "tags": decided("rejected", HOUR)},
    ],
)
def test_a_run_that_fails_because_its_version_is_refused_is_told_as_the_refusal_only(
    plant: Plant,
    registry: Registry,
    look: Callable[[float], list[tuple[str, str]]],
    refused: dict[str, Any],
) -> None:
    registry.found = [version(3, **refused)]
    plant.run("deploy", offer_endpoint=dg.Failure(_objection(registry.found[0]), allow_retries=False))
    assert look(0) == [(f"version-refused:{'3' * 12}", "notice")]
    plant.run("deploy", offer_endpoint=dg.Failure("the endpoint does not answer"))
    assert look(30) == [("run:deploy", "failing")]


def test_a_version_that_waits_for_a_day_is_an_incident_until_it_is_decided_or_overtaken(
    plant: Plant, registry: Registry, look: Callable[[float], list[tuple[str, str]]]
) -> None:
    waiting = version(2, age=23.9 * HOUR)
    registry.found = [waiting]
    assert look(0) == []
    assert look(700) == [(f"version-waits:{'2' * 12}", "failing")]
    assert "python -m offer_assets approve 2" in plant.the_incident().text
    registry.found = [version(2, age=25 * HOUR, approval="approved", tags=decided("approved", -1300))]
    assert look(1400) == [(f"version-waits:{'2' * 12}", "resolved")]


def test_an_approved_version_that_is_not_served_is_an_incident_until_it_is(
    plant: Plant, registry: Registry, look: Callable[[float], list[tuple[str, str]]]
) -> None:
    registry.found = [version(2, tags=decided("approved", 0))]
    assert look(0) == []
    assert look(1000) == [(f"version-stuck:{'2' * 12}", "failing")]
    assert look(1700) == []
    assert plant.the_incident().times == 2
    registry.found = [promoted(version(2, tags=decided("approved", 0)))]
    assert look(2400) == [(f"version-stuck:{'2' * 12}", "resolved")]


def promoted(registered: RegisteredVersion) -> RegisteredVersion:
    promotion = Promotion(
        at=at(-HOUR),
        by="anna",
        reason="",
        run_id="",
        kind="promotion",
        registry_version=registered.version,
        model_version=registered.model_version,
        replaced=None,
        taxonomy_version="",
        data="",
        code_revision="",
        evaluation="",
    )
    entry = {f"promotion.{promotion.at}": msgspec.json.encode(promotion).decode()}
    return msgspec.structs.replace(registered, in_production=True, tags={**registered.tags, **entry})


def test_a_registry_that_does_not_answer_is_an_incident_and_stops_nothing(
    plant: Plant, registry: Registry, look: Callable[[float], list[tuple[str, str]]]
) -> None:
    registry.broken = dg.Failure("MLflow at http://me:secret@mlflow: no answer")
    plant.run("release", model=ValueError("odd"))
    assert look(0) == [("run:release", "failing"), ("source:mlflow", "failing")]
    assert "http://***@mlflow" in plant.incidents()[1].text
    plant.run("release")
    assert look(30) == [("run:release", "resolved")]
    assert registry.asked == 1
    registry.broken = None
    assert look(700) == [("source:mlflow", "resolved")]


def test_an_event_log_that_cannot_be_read_does_not_stop_the_others(
    plant_on_disk: Plant, instigators: Instigators, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant = plant_on_disk

    def broken(*_: Any, **__: Any) -> None:
        raise sa.exc.OperationalError("select", {}, Exception("database disk image is malformed"))

    instigators.tick("weekly", TickStatus.FAILURE, "odd", type="SCHEDULE")
    with monkeypatch.context() as patched:
        patched.setattr("offer_assets.incidents.read_events", broken)
        assert states(plant.collect()) == [
            ("source:event log", "failing"),
            ("schedule:weekly", "failing"),
        ]
    assert states(plant.collect()) == [("source:event log", "resolved")]


def test_before_a_version_is_registered_the_registry_is_not_asked(plant: Plant) -> None:
    class Never:
        def versions(self) -> None:
            raise AssertionError

    assert plant.collect(tracking=Never()) == []


# The history in the UI


def test_what_is_told_is_observed_with_its_incident(plant: Plant) -> None:
    run_id = plant.run("report", FIFTH, volume_is_usual=FAILED).run_id
    (opened,) = observations(plant.collect())
    plant.run("report", FIFTH)
    (resolved,) = observations(plant.collect())
    title = "Check volume_is_usual of drift_report failed"
    assert opened.asset_key == ALERTS.key
    assert (opened.description, resolved.description) == (title, f"resolved: {title}")
    assert opened.metadata["severity"].value == "ERROR"
    link, run = opened.metadata["link"], opened.metadata["run"]
    assert isinstance(link, dg.UrlMetadataValue)
    assert link.value == "/assets/drift_report?view=checks&checkDetail=volume_is_usual"
    assert isinstance(run, dg.DagsterRunMetadataValue)
    assert run.value == run_id
    plant.instance.report_runless_asset_event(opened)

"""Experiment tracking and registry, on a real MLflow database file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dagster as dg
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ml.artifacts import Manifest
from ml.errors import InputError
from resources.tracking import MlflowTracking, Part, RegisteredVersion
from tests.registry import registry_in
from tests.tracking_contract import (
    TrackingContract,
    compiled,
    passed,
    promotion,
    read_again,
    ref,
    set_by_hand,
)

ROOT = Path(__file__).resolve().parents[2]

MANIFEST = Manifest(
    kind="student_checkpoint",
    key="1" * 32,
    digest="2" * 64,
    inputs={"training_sample": "3" * 64, "offers/2026-11-01": "4" * 64},
    code_version="1",
    code_revision="abc1234",
    parameters={"epochs": 4, "encoder": "teacher", "instruction": "", "files": ["x" * 8000]},
    metrics={"accuracy": 0.91, "labels": ["a", "b"], "note": "text", "undefined": float("nan")},
    files={},
    created_at="2026-11-02T10:00:00+00:00",
    seconds=12.5,
)
CURVE = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0, "validation_accuracy": 0.8}]


def tracking_in(folder: Path) -> MlflowTracking:
    return MlflowTracking(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", model_name="offer-categories")


@pytest.fixture
def tracking(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowTracking:
    return registry_in(tmp_path, tmp_path_factory)


class TestMlflow(TrackingContract):
    pass


def runs(tracking: MlflowTracking) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments))


def test_a_run_holds_parameters_numbers_inputs_and_code(tracking):
    tracking.record(MANIFEST, ref())
    (run,) = runs(tracking)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "4"
    assert run.data.params["encoder"] == "teacher"
    assert len(run.data.params["files"]) == 6000
    assert run.data.metrics == {"accuracy": 0.91, "seconds": 12.5}
    assert run.data.tags["input.training_sample"] == "3" * 64
    assert run.data.tags["input.offers/2026-11-01"] == "4" * 64
    assert run.data.tags["code_revision"] == "abc1234"
    assert run.data.tags["artifact.digest"] == "2" * 64
    assert run.info.start_time == run.info.end_time - 12_500


def test_a_learning_curve_is_kept_step_by_step(tracking):
    from mlflow import MlflowClient

    run_id = tracking.record(MANIFEST, ref(), learning_curve=CURVE)
    client = MlflowClient(tracking_uri=tracking.tracking_uri)
    history = client.get_metric_history(run_id, "curve/loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]
    assert client.get_metric_history(run_id, "curve/validation_accuracy")[0].step == 20


def test_the_same_artifact_is_recorded_once(tracking):
    first = tracking.record(MANIFEST, ref(), learning_curve=CURVE)
    assert tracking.record(MANIFEST, ref(), learning_curve=CURVE) == first
    other = msgspec.structs.replace(MANIFEST, key="9" * 32)
    assert tracking.record(other, ref(key="9" * 32)) != first
    assert len(runs(tracking)) == 2


def parts() -> list[Part]:
    curve = [{"step": 50, "weighted_f1": 0.7}, {"step": 100, "weighted_f1": 0.8}]
    return [
        Part(name="trial 1", parameters={"epochs": 2}, metrics={"f1": 0.8}, learning_curve=curve, seconds=3),
        Part(name="o'brien/encoder:3", parameters={}, metrics={"f1": None}, failed=True, note="no encoder"),
    ]


def test_parts_are_runs_below_the_artifacts_own(tracking):
    from mlflow import MlflowClient

    parent = tracking.record(MANIFEST, ref(), parts=parts())
    assert tracking.record(MANIFEST, ref(), parts=parts()) == parent
    found = {run.info.run_name: run for run in runs(tracking)}
    assert len(found) == len(runs(tracking)) == 3
    trial, refused = found["trial 1"], found["o'brien/encoder:3"]
    assert trial.data.tags["mlflow.parentRunId"] == refused.data.tags["mlflow.parentRunId"] == parent
    assert (trial.info.status, refused.info.status) == ("FINISHED", "FAILED")
    assert refused.data.tags["note"] == "no encoder"
    assert (trial.data.params, trial.data.metrics["f1"]) == ({"epochs": "2"}, 0.8)
    assert refused.data.metrics == {"seconds": 0.0}
    client = MlflowClient(tracking_uri=tracking.tracking_uri)
    history = client.get_metric_history(trial.info.run_id, "curve/weighted_f1")
    assert [(point.step, point.value) for point in history] == [(50, 0.7), (100, 0.8)]


def test_parts_that_were_interrupted_are_completed_without_doubling(tracking, monkeypatch):
    from mlflow import MlflowClient

    terminate, calls = MlflowClient.set_terminated, []

    def killed_at_the_second(self: MlflowClient, *given: object, **named: object) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        terminate(self, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            tracking.record(MANIFEST, ref(), parts=parts())
    tracking.record(MANIFEST, ref(), parts=parts())
    assert sorted(run.info.status for run in runs(tracking)) == ["FAILED", "FINISHED", "FINISHED"]


def test_a_record_that_was_interrupted_is_completed_without_doubling(tracking, monkeypatch):
    from mlflow import MlflowClient

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", killed)
        with pytest.raises(KeyboardInterrupt):
            tracking.record(MANIFEST, ref(), learning_curve=CURVE)
    run_id = tracking.record(MANIFEST, ref(), learning_curve=CURVE)
    (run,) = runs(tracking)
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    client = MlflowClient(tracking_uri=tracking.tracking_uri)
    assert len(client.get_metric_history(run_id, "curve/loss")) == 2


def test_many_at_once_make_a_new_database_quietly_and_record_once(tmp_path):
    program = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from tests.resources.test_tracking import MANIFEST, ref, tracking_in\n"
        "tracking = tracking_in(Path(sys.argv[1]))\n"
        "with ThreadPoolExecutor(max_workers=4) as pool:\n"
        "    ids = set(pool.map(lambda _: tracking.record(MANIFEST, ref()), range(4)))\n"
        "sys.exit(len(ids) != 1)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(runs(tracking_in(tmp_path))) == 1


def test_a_version_remembers_its_artifact_metrics_and_verdict(tracking):
    registered = tracking.register(
        compiled("5"), {"accuracy": 0.9, "worst": ["c1"]}, {"verdict": "passed", "evaluation": "e" * 64}
    )
    assert (registered.name, registered.version) == ("offer-categories", "1")
    assert registered.model_version == "5" * 12
    assert registered.ref == msgspec.structs.replace(compiled("5"), metrics={"accuracy": 0.9})
    assert registered.metrics == {"accuracy": 0.9}
    assert registered.tags == {"verdict": "passed", "evaluation": "e" * 64}
    assert not registered.in_production


def test_a_version_is_linked_to_the_run_that_made_it(tracking):
    from mlflow import MlflowClient

    manifest = msgspec.structs.replace(MANIFEST, kind="compiled_student", key="5" * 32, digest="5" * 64)
    run_id = tracking.record(manifest, compiled("5"))
    tracking.register(compiled("5"), {}, {})
    client = MlflowClient(tracking_uri=tracking.tracking_uri)
    assert client.get_model_version("offer-categories", "1").run_id == run_id


def test_a_version_of_somebody_else_under_the_name_is_left_out(tracking):
    from mlflow import MlflowClient

    tracking.register(compiled("5"), {}, {})
    MlflowClient(tracking_uri=tracking.tracking_uri).create_model_version("offer-categories", source="/x")
    assert [version.version for version in tracking.versions()] == ["1"]


def test_a_version_is_found_by_number_and_by_the_beginning_of_its_model_version(tracking):
    five, two = tracking.register(compiled("5"), {}, {}), tracking.register(compiled("2"), {}, {})
    assert tracking.find("1") == five
    assert tracking.find(" 5555 ") == five
    assert tracking.find("2") == two  # a number goes before a model version that begins like it
    assert tracking.find(two.ref.digest) == two
    assert tracking.find("3") is None
    assert tracking.find("") is None


def test_a_beginning_of_several_model_versions_is_refused(tracking):
    for digest in ("abc" + "0" * 61, "abd" + "0" * 61):
        tracking.register(ref("compiled_student", digest[:32], digest), {}, {})
    with pytest.raises(InputError, match=r"^AB may be any of abd000000000 \(version 2\), abc0") as failure:
        tracking.find("AB")
    assert "\n" not in str(failure.value)


class TestBeforeThereWasAHistory:
    """A registry of before: verdict, time and reason of the promotion, alias; no approval, no entries."""

    @pytest.fixture
    def old(self, tracking) -> list[RegisteredVersion]:
        """Two versions that have served, the second in production."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=tracking.tracking_uri)
        for number, digit in (("1", "5"), ("2", "6")):
            version = tracking.register(compiled(digit), {}, {"verdict": "passed", "evaluation": "e" * 64})
            set_by_hand(tracking, version, "promoted_at", f"2026-11-0{number}T10:00:00+00:00")
            set_by_hand(tracking, version, "promotion_reason", f"run {number}")
        client.set_registered_model_alias("offer-categories", "production", "2")
        return list(reversed(tracking.versions()))

    def test_what_served_may_serve(self, old):
        assert [(version.approval, version.may_serve) for version in old] == [("automatic", True)] * 2

    def test_what_failed_or_never_served_may_not(self, tracking, old):
        assert tracking.register(compiled("7"), {}, {"verdict": "passed"}).approval == "pending"
        set_by_hand(tracking, old[1], "verdict", "failed")
        assert not read_again(tracking, old[1]).may_serve

    def test_the_missing_approval_is_filled_in_for_the_one_in_production(self, tracking, old):
        assert passed(tracking, "6", "pending").tags["approval"] == "automatic"

    def test_promotions_are_told_by_the_old_tags(self, tracking, old):
        first, second = tracking.history()
        assert (first.at, first.reason, first.by) == ("2026-11-01T10:00:00.000000Z", "run 1", "automatic")
        assert (second.registry_version, second.kind, second.evaluation) == ("2", "promotion", "e" * 64)

    def test_promoting_what_is_in_production_adds_nothing(self, tracking, old):
        before = tracking.history()
        tracking.promote(old[1], promotion(old[1]))
        assert tracking.history() == before

    def test_the_next_promotion_writes_down_the_one_before(self, tracking, old):
        third = passed(tracking, "7")
        entry = promotion(third)
        before = tracking.history()
        tracking.promote(third, entry)
        assert tracking.history() == [*before, entry]
        replaced = read_again(tracking, old[1])
        assert replaced.tags["approval"] == "automatic"
        assert "promotion.2026-11-02T10:00:00.000000Z" in replaced.tags

    def test_what_a_hand_put_into_production_is_not_forgotten(self, tracking):
        from mlflow import MlflowClient

        first, second = (tracking.register(compiled(digit), {}, {"verdict": "passed"}) for digit in "56")
        client = MlflowClient(tracking_uri=tracking.tracking_uri)
        client.set_registered_model_alias("offer-categories", "production", "1")
        tracking.promote(second, promotion(second))
        assert [(entry.registry_version, entry.by) for entry in tracking.history()] == [
            ("1", "mlflow"),
            ("2", "automatic"),
        ]
        assert read_again(tracking, first).may_serve


@pytest.mark.parametrize(("by", "reason", "missing"), [(" ", "because", "by"), ("anna", "", "reason")])
def test_a_decision_needs_a_name_and_a_reason(tracking, by, reason, missing):
    with pytest.raises(InputError, match=f"^{missing} is empty"):
        tracking.decide(passed(tracking, "5"), "rejected", by, reason)


@pytest.mark.parametrize("unclear", ["", "yes", "approve"])
def test_an_unclear_tag_waits_for_a_person(tracking, unclear):
    version = passed(tracking, "5", "automatic")
    set_by_hand(tracking, version, "approval", unclear)
    assert read_again(tracking, version).approval == "pending"


def test_a_promotion_that_was_interrupted_is_completed_and_told_once(tracking, monkeypatch):
    from mlflow import MlflowClient

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    version = passed(tracking, "5")
    first = promotion(version)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            tracking.promote(version, first)
    assert tracking.production() is None
    assert tracking.promote(version, promotion(version)).in_production
    assert tracking.history() == [first]


def test_the_longest_reason_fits_into_a_tag(tracking):
    version = passed(tracking, "5")
    tracking.promote(version, promotion(version, reason="語" * 100_000))
    (entry,) = tracking.history()
    assert entry.reason == "語" * 1999 + "…"
    rejected = tracking.decide(version, "rejected", "anna", "語" * 100_000)
    assert rejected.decision is not None
    assert len(rejected.decision.reason) == 2000


def test_a_tag_that_a_hand_has_spoilt_is_passed_over(tracking):
    version = tracking.decide(passed(tracking, "5"), "rejected", "anna", "toys")
    tracking.promote(version, promotion(version))
    for name in read_again(tracking, version).tags:
        if name.startswith(("promotion.", "approval.")):
            set_by_hand(tracking, version, name, "not JSON")
    spoilt = read_again(tracking, version)
    assert (spoilt.promotions, spoilt.approval) == ([], "rejected")


@given(
    decisions=st.lists(st.sampled_from(["approved", "rejected", "approved by hand", "rejected by hand"])),
    verdicts=st.lists(st.sampled_from(["passed", "failed"]), min_size=1, max_size=2),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_last_decision_counts_whoever_took_it(tracking, decisions, verdicts):
    digit = f"{len(tracking.versions()):064x}"
    reference = ref("compiled_student", digit[-32:], digit)
    version = tracking.register(reference, {}, {"verdict": "passed"}, approval="pending")
    for decision in decisions:
        if decision.endswith("by hand"):
            set_by_hand(tracking, version, "approval", decision.split()[0])
        else:
            tracking.decide(version, decision, "anna", "because")
    for verdict in verdicts:
        version = tracking.register(reference, {}, {"verdict": verdict}, approval="automatic")
    last = decisions[-1].split()[0] if decisions else "automatic"
    assert version.approval == last
    assert version.may_serve == (last in ("approved", "automatic") and verdicts[-1] == "passed")


def test_nothing_is_written_outside_the_home(tracking, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tracking.record(MANIFEST, ref())
    tracking.register(compiled("5"), {}, {})
    assert list(elsewhere.iterdir()) == []


def test_a_store_that_does_not_open_is_one_line_with_the_setting(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = MlflowTracking(tracking_uri="http://127.0.0.1:9", model_name="m")
    with pytest.raises(dg.Failure, match=r"^MLflow at http://127.0.0.1:9 \(MLFLOW_TRACKING_URI\)") as failure:
        tracking.production()
    assert "\n" not in str(failure.value)


def test_a_store_that_refuses_does_not_tell_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = MlflowTracking(tracking_uri="http://me:hunter2@127.0.0.1:9", model_name="m")
    with pytest.raises(dg.Failure, match=r"^MLflow at http://\*\*\*@127.0.0.1:9 ") as failure:
        tracking.production()
    assert "hunter2" not in str(failure.value)
    assert failure.value.__suppress_context__

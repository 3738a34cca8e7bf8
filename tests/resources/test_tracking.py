"""Experiment tracking and registry, on a real MLflow database file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import msgspec
import pytest

from ml.artifacts import ArtifactRef, Manifest
from resources.tracking import MlflowTracking

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


def ref(kind: str = "student_checkpoint", key: str = "1" * 32, digest: str = "2" * 64) -> ArtifactRef:
    return ArtifactRef(kind=kind, key=key, digest=digest, uri=f"/artifacts/{kind}/{key}")


def compiled(digit: str) -> ArtifactRef:
    return ref("compiled_student", digit * 32, digit * 64)


def tracking_in(folder: Path) -> MlflowTracking:
    return MlflowTracking(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", model_name="offer-categories")


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, made once: MLflow takes seconds for it."""
    folder = tmp_path_factory.mktemp("mlflow")
    assert tracking_in(folder).production() is None
    return folder / "mlflow.db"


@pytest.fixture
def tracking(tmp_path: Path, new_database: Path) -> MlflowTracking:
    shutil.copy(new_database, tmp_path)
    return tracking_in(tmp_path)


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


def test_many_at_once_on_a_new_database_record_once(tmp_path):
    tracking = tracking_in(tmp_path)
    with ThreadPoolExecutor(max_workers=4) as pool:
        ids = list(pool.map(lambda _: tracking.record(MANIFEST, ref()), range(4)))
    assert len(set(ids)) == 1
    assert len(runs(tracking)) == 1


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


def test_a_digest_is_registered_once_and_takes_the_new_verdict(tracking):
    tracking.register(compiled("5"), {"accuracy": 0.9}, {"verdict": "failed"})
    again = tracking.register(compiled("5"), {"accuracy": 0.91}, {"verdict": "passed"})
    assert (again.version, again.tags["verdict"], again.metrics) == ("1", "passed", {"accuracy": 0.91})
    assert tracking.register(compiled("6"), {}, {}).version == "2"


def test_a_version_is_found_by_its_artifact(tracking):
    assert tracking.version_of(compiled("5")) is None
    registered = tracking.register(compiled("5"), {}, {"verdict": "passed"})
    tracking.register(compiled("6"), {}, {})
    assert tracking.version_of(compiled("5")) == registered


def test_a_version_is_linked_to_the_run_that_made_it(tracking):
    from mlflow import MlflowClient

    manifest = msgspec.structs.replace(MANIFEST, kind="compiled_student", key="5" * 32, digest="5" * 64)
    run_id = tracking.record(manifest, compiled("5"))
    tracking.register(compiled("5"), {}, {})
    client = MlflowClient(tracking_uri=tracking.tracking_uri)
    assert client.get_model_version("offer-categories", "1").run_id == run_id


def test_one_version_at_a_time_is_in_production(tracking):
    assert tracking.production() is None
    first = tracking.register(compiled("5"), {}, {})
    second = tracking.register(compiled("6"), {}, {})
    assert tracking.production() is None
    promoted = tracking.promote(first, reason="run 1")
    assert promoted.in_production
    assert promoted.tags["promotion_reason"] == "run 1"
    tracking.promote(second, reason="run 2")
    in_production = tracking.production()
    assert in_production is not None
    assert in_production.ref == second.ref
    earlier = tracking.version_of(first.ref)
    assert earlier is not None
    assert not earlier.in_production


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


def test_a_new_database_is_made_quietly(tmp_path):
    program = (
        "from resources.tracking import MlflowTracking\n"
        f"MlflowTracking(tracking_uri='sqlite:///{tmp_path}/quiet.db', model_name='m').production()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""

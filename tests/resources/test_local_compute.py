"""This machine as the place where stages run: programs, their logs, and one that waits for another."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import dagster as dg
import pytest

from ml import stages
from resources import compute as compute_module
from resources.artifact_store import FolderArtifactStore
from resources.atomic_files import only_one
from resources.compute import LocalCompute
from tests.resources.compute_runs import Run, instance_in, lines_so_far, run_of
from tests.resources.stand_in import STAND_INS


@pytest.fixture(autouse=True)
def _stand_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in STAND_INS.items():
        monkeypatch.setitem(stages.STAGES, name, stage)


@pytest.fixture
def instance(tmp_path: Path):
    with instance_in(tmp_path) as instance:
        yield instance


@pytest.fixture
def compute(tmp_path: Path) -> LocalCompute:
    store = FolderArtifactStore(root=str(tmp_path / "home" / "artifacts"), feed="feed")
    return LocalCompute(store=store, program="tests.resources.stand_in")


@pytest.fixture
def run(compute: LocalCompute, instance: dg.DagsterInstance) -> Run:
    return run_of(compute, instance)


def test_a_crash_names_stage_status_and_log_and_shows_the_last_lines(run):
    with pytest.raises(dg.Failure) as failure:
        run("heavy", behaviour="crash")
    description = failure.value.description
    assert description is not None
    assert description.startswith("heavy failed with exit status 1; run it again")
    assert failure.value.allow_retries
    log = Path(description.rpartition("Log: ")[2])
    assert "RuntimeError: something broke" in log.read_text()
    assert "RuntimeError: something broke" in str(failure.value.metadata["last lines"].value)


def test_a_killed_stage_names_the_signal(run):
    with pytest.raises(dg.Failure, match="heavy was ended by SIGKILL"):
        run("heavy", behaviour="be killed once")


def test_a_heavy_stage_waits_for_another_one_and_says_so(run, instance, tmp_path):
    holding, released = threading.Event(), threading.Event()

    def hold() -> None:
        with only_one(tmp_path / "home" / "heavy.lock"):
            holding.set()
            released.wait(60)

    threading.Thread(target=hold, daemon=True).start()
    assert holding.wait(60)

    def release_once_it_waits() -> None:
        while not any("waiting for another heavy stage" in line for line in lines_so_far(instance)):
            time.sleep(0.01)
        released.set()

    threading.Thread(target=release_once_it_waits, daemon=True).start()
    run("heavy")
    assert released.is_set()


def test_cataloguing_and_light_stages_wait_for_nobody(run, tmp_path, monkeypatch):
    monkeypatch.setattr(compute_module, "_BESIDE_TRAINING", frozenset({"heavy"}))
    with only_one(tmp_path / "home" / "heavy.lock"):
        assert not run("heavy").reused
        assert not run("light").reused


def test_a_cancelled_run_ends_the_program(run, tmp_path):
    """Ctrl-C arrives once the program has said, in its log, which process it is."""
    stderr_log: list[Path] = []

    def interrupt() -> None:
        while not stderr_log:
            stderr_log.extend(
                log for log in (tmp_path / "home" / "work" / "heavy").glob("*.log") if log.stat().st_size
            )
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(BaseException) as interruption:  # noqa: PT011 (Dagster's own is no Exception)
        run("heavy", behaviour="hang")
    assert not isinstance(interruption.value, Exception)
    process = int(stderr_log[0].read_text().split("process ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_a_damaged_input_is_refused(run, stage):
    upstream = run("light").ref
    Path(upstream.uri, "text").write_text("tampered")
    with pytest.raises(dg.Failure, match="differs from its digest"):
        run(stage, {"upstream": upstream})


def test_the_origin_of_an_artifact_may_be_gone(compute, run):
    student = run("upstream").ref
    compiled = run("light", {"upstream": student}).ref
    shutil.rmtree(student.uri)
    with pytest.raises(dg.Failure, match=r"the upstream that light .* is gone: train and deploy again"):
        compute.origin(compiled, "upstream")

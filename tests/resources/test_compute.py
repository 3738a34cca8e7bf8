"""Stages behind the compute door, in real Dagster runs, the heavy ones as real processes."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from ml import stages
from ml.artifacts import ArtifactRef
from resources import compute as compute_module
from resources.artifact_store import FolderArtifactStore
from resources.atomic_files import only_one
from resources.compute import LocalCompute, StageInputs, StageResult
from tests.resources.stand_in import STAND_INS, StandInParameters

Run = Callable[..., StageResult]


@pytest.fixture(autouse=True)
def _stand_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in STAND_INS.items():
        monkeypatch.setitem(stages.STAGES, name, stage)


@pytest.fixture
def compute(tmp_path: Path) -> LocalCompute:
    store = FolderArtifactStore(root=str(tmp_path / "home" / "artifacts"), feed="feed")
    return LocalCompute(store=store, program="tests.resources.stand_in")


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def run(compute: LocalCompute, instance: dg.DagsterInstance) -> Run:
    """Run a stage from within an asset of a Dagster run, as the graph does."""

    def run(stage: str, inputs: StageInputs | None = None, **parameters: Any) -> StageResult:
        results = []

        @dg.asset
        def made(context: dg.AssetExecutionContext, compute: LocalCompute) -> dg.MaterializeResult:
            results.append(compute.run(context, stage, inputs or {}, StandInParameters(**parameters)))
            return dg.MaterializeResult()

        dg.materialize([made], resources={"compute": compute}, instance=instance)
        return results[0]

    return run


def lines_so_far(instance: dg.DagsterInstance) -> list[str]:
    """As :func:`lines`, but while the run may not even have begun."""
    return lines(instance) if instance.get_runs(limit=1) else []


def lines(instance: dg.DagsterInstance) -> list[str]:
    """What people see in the log of the last run."""
    run_id = instance.get_runs(limit=1)[0].run_id
    return [event.user_message for event in instance.all_logs(run_id)]


def text_of(compute: LocalCompute, ref: ArtifactRef) -> str:
    return (compute.folder(ref) / "text").read_text()


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_a_stage_makes_its_artifact_and_says_so_in_the_log(run, compute, instance, stage):
    result = run(stage, text="abc")
    assert not result.reused
    assert text_of(compute, result.ref) == "abc"
    assert result.manifest == compute.manifest(result.ref)
    assert result.ref.metrics == {"characters": 3, "continued": 0}
    assert any("writes abc" in line for line in lines(instance))


def test_light_stages_run_in_this_process_and_heavy_ones_in_their_own(run, instance):
    run("light")
    assert any(f"process {os.getpid()} " in line for line in lines(instance))
    run("heavy")
    assert not any(f"process {os.getpid()} " in line for line in lines(instance))


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_the_same_again_is_found_and_not_made(run, instance, stage):
    first = run(stage)
    second = run(stage)
    assert second.reused
    assert second.ref == first.ref
    assert not any("writes" in line for line in lines(instance))
    assert any(f"{stage} is unchanged" in line for line in lines(instance))


def test_inputs_reach_the_stage_and_are_part_of_what_it_makes(run, compute):
    upstream = run("light", text="up ").ref
    result = run("heavy", {"upstream": upstream}, text="down")
    assert text_of(compute, result.ref) == "up down"
    assert result.manifest.inputs == {"upstream": upstream.digest}
    assert not run("heavy", {"upstream": run("light", text="other ").ref}, text="down").reused


def test_partitioned_inputs_reach_the_stage_by_partition(run, compute):
    days = {f"2026-11-0{number}": run("light", text=str(number)).ref for number in (2, 1)}
    result = run("gathering", {"days": days}, text="!")
    assert text_of(compute, result.ref) == "12!"
    assert set(result.manifest.inputs) == {"days/2026-11-01", "days/2026-11-02"}


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_an_input_error_is_one_plain_line_that_is_never_retried(run, stage):
    with pytest.raises(dg.Failure) as failure:
        run(stage, behaviour="input error")
    assert failure.value.description == "offers.csv row 7: price is 'abc', expected a number"
    assert not failure.value.allow_retries


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


def test_a_killed_stage_names_the_signal_and_continues_when_run_again(run, compute):
    with pytest.raises(dg.Failure, match="heavy was ended by SIGKILL"):
        run("heavy", behaviour="be killed once")
    result = run("heavy", behaviour="be killed once")
    assert not result.reused
    assert result.ref.metrics["continued"] == 1


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_a_damaged_input_is_refused(run, compute, stage):
    upstream = run("light").ref
    Path(upstream.uri, "text").write_text("tampered")
    with pytest.raises(dg.Failure, match="differs from its digest"):
        run(stage, {"upstream": upstream})


def test_wrong_input_names_are_refused(run):
    upstream = run("light").ref
    with pytest.raises(dg.Failure, match="light has no input offers"):
        run("light", {"offers": upstream})


def test_a_check_can_run_a_stage_too(compute):
    results = []

    @dg.asset
    def offers() -> None: ...

    @dg.asset_check(asset=offers)
    def holds(context: dg.AssetCheckExecutionContext, compute: LocalCompute) -> dg.AssetCheckResult:
        results.append(compute.run(context, "heavy", {}, StandInParameters()))
        return dg.AssetCheckResult(passed=True)

    assert dg.materialize([offers, holds], resources={"compute": compute}).success
    assert text_of(compute, results[0].ref) == "hello"


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


def test_the_origin_of_an_artifact_is_found_through_what_it_was_made_of(run, compute):
    sample = run("light", text="sample").ref
    run("light", text="newer sample")
    student = run("upstream", {"upstream": sample}).ref
    compiled = run("heavy", {"upstream": student}).ref
    assert compute.origin(compiled, "upstream") == student
    with pytest.raises(dg.Failure, match=rf"the light that heavy {compiled.version} was made of is gone"):
        compute.origin(compiled, "light")
    shutil.rmtree(student.uri)
    with pytest.raises(dg.Failure, match=r"the upstream that heavy .* is gone: train and deploy again"):
        compute.origin(compiled, "upstream")


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


def test_the_folder_of_an_artifact_that_is_gone_fails_plainly(compute):
    ref = ArtifactRef(kind="offers", key="0" * 32, digest="0" * 64, uri="")
    for access in (compute.folder, compute.manifest):
        with pytest.raises(dg.Failure, match="not an artifact"):
            access(ref)

"""The compute door, whichever stands behind it: stages in real Dagster runs, heavy ones in processes."""

import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from ml import stages
from ml.artifacts import ArtifactRef
from resources.artifact_store import FolderArtifactStore
from resources.compute import Compute, LocalCompute
from tests.aws.conftest import stand_in  # noqa: F401 (a fixture)
from tests.aws.jobs import sagemaker_compute
from tests.resources.compute_runs import Run, lines, run_of, text_of
from tests.resources.stand_in import STAND_INS, StandInParameters


@pytest.fixture(autouse=True)
def _stand_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in STAND_INS.items():
        monkeypatch.setitem(stages.STAGES, name, stage)


@pytest.fixture(params=["local", "sagemaker"])
def compute(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Compute]:
    if request.param == "local":
        store = FolderArtifactStore(root=str(tmp_path / "home" / "artifacts"), feed="feed")
        yield LocalCompute(store=store, program="tests.resources.stand_in")
    else:
        with sagemaker_compute(request.getfixturevalue("stand_in"), tmp_path) as (compute, _):
            yield compute


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def run(compute: Compute, instance: dg.DagsterInstance) -> Run:
    return run_of(compute, instance)


@pytest.mark.parametrize("stage", ["light", "heavy"])
def test_a_stage_makes_its_artifact_says_so_in_the_log_and_is_found_afterwards(run, compute, instance, stage):
    result = run(stage, text="abc")
    assert not result.reused
    assert text_of(compute, result.ref) == "abc"
    assert result.manifest == compute.manifest(result.ref)
    assert result.ref.metrics == {"characters": 3, "continued": 0}
    (said,) = [line for line in lines(instance) if "writes abc" in line]
    assert (f"process {os.getpid()} " in said) is (stage == "light")  # heavy ones are processes of their own

    again = run(stage, text="abc")
    assert again.reused
    assert again.ref == result.ref
    assert not any("writes" in line for line in lines(instance))
    assert any(f"{stage} is unchanged" in line for line in lines(instance))


def test_inputs_reach_the_stage_and_are_part_of_what_it_makes(run, compute):
    upstream = run("light", text="up ").ref
    result = run("heavy", {"upstream": upstream}, text="down")
    assert text_of(compute, result.ref) == "up down"
    assert result.manifest.inputs == {"upstream": upstream.digest}
    other = run("light", text="other ").ref
    assert not run("light", {"upstream": other}).reused
    assert not run("light", {"upstream": upstream}).reused


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


def test_a_killed_stage_may_be_retried_and_continues_when_run_again(run):
    with pytest.raises(dg.Failure, match="run it again and it continues from its last checkpoint") as failure:
        run("heavy", behaviour="be killed once")
    assert failure.value.allow_retries
    result = run("heavy", behaviour="be killed once")
    assert not result.reused
    assert result.ref.metrics["continued"] == 1


def test_what_a_crashed_stage_said_last_is_shown_with_its_failure(run):
    with pytest.raises(dg.Failure) as failure:
        run("heavy", behaviour="crash")
    assert failure.value.allow_retries
    assert "RuntimeError: something broke" in str(failure.value.metadata["last lines"].value)


def test_wrong_input_names_are_refused(run):
    upstream = run("light").ref
    with pytest.raises(dg.Failure, match="light has no input offers"):
        run("light", {"offers": upstream})


def test_a_check_can_run_a_stage_too(compute):
    results = []

    @dg.asset
    def offers() -> None: ...

    @dg.asset_check(asset=offers)
    def holds(context: dg.AssetCheckExecutionContext, compute: Compute) -> dg.AssetCheckResult:
        results.append(compute.run(context, "heavy", {}, StandInParameters()))
        return dg.AssetCheckResult(passed=True)

    assert dg.materialize([offers, holds], resources={"compute": compute}).success
    assert text_of(compute, results[0].ref) == "hello"


def test_the_origin_of_an_artifact_is_found_through_what_it_was_made_of(run, compute):
    sample = run("light", text="sample").ref
    run("light", text="newer sample")
    student = run("upstream", {"upstream": sample}).ref
    compiled = run("light", {"upstream": student}).ref
    assert compute.origin(compiled, "upstream") == student
    with pytest.raises(dg.Failure, match=rf"the light that light {compiled.version} was made of is gone"):
        compute.origin(compiled, "light")


def test_the_folder_of_an_artifact_that_is_gone_fails_plainly(compute):
    ref = ArtifactRef(kind="offers", key="0" * 32, digest="0" * 64, uri="")
    for access in (compute.folder, compute.manifest):
        with pytest.raises(dg.Failure, match="not an artifact"):
            access(ref)

"""What tests of the compute door share: stages in real Dagster runs, and what people see of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.stages import Parameters
from resources.compute import Compute, StageInputs, StageResult
from tests.resources.stand_in import StandInParameters

Run = Callable[..., StageResult]


def run_of(compute: Compute, instance: dg.DagsterInstance) -> Run:
    """Runs a stage from within an asset of a Dagster run, as the graph does."""

    def run(
        stage: str, inputs: StageInputs | None = None, given: Parameters | None = None, **parameters: Any
    ) -> StageResult:
        results = []

        @dg.asset
        def made(context: dg.AssetExecutionContext, compute: Compute) -> dg.MaterializeResult:
            results.append(
                compute.run(context, stage, inputs or {}, given or StandInParameters(**parameters))
            )
            return dg.MaterializeResult()

        dg.materialize([made], resources={"compute": compute}, instance=instance)
        return results[0]

    return run


def lines(instance: dg.DagsterInstance) -> list[str]:
    """What people see in the log of the last run."""
    run_id = instance.get_runs(limit=1)[0].run_id
    return [event.user_message for event in instance.all_logs(run_id)]


@contextmanager
def instance_in(folder: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that a thread may look at while a run writes: one in memory would refuse either."""
    place = folder / "dagster"
    place.mkdir()
    with dg.DagsterInstance.local_temp(str(place)) as instance:
        yield instance


def lines_so_far(instance: dg.DagsterInstance) -> list[str]:
    """As :func:`lines`, but while the run may not even have begun."""
    return lines(instance) if instance.get_runs(limit=1) else []


def text_of(compute: Compute, ref: ArtifactRef) -> str:
    """What a stand-in stage wrote."""
    return (compute.folder(ref) / "text").read_text()

"""Where Dagster keeps its state, and what becomes of runs whose process is gone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import dagster as dg
import yaml
from dagster import DagsterRunStatus, RunsFilter

from resources.artifact_store import ArtifactStore
from resources.processes import started_at
from resources.settings import Settings

_ROOT_DAGSTER_YAML = Path(__file__).resolve().parent.parent / "dagster.yaml"
FEED_TAG = "offer_assets/feed"
"""Tag of a run that changes pointers: whose, as several feeds may share a home."""

_PROCESS_TAG = "offer_assets/process"
_RUN_IN_PROCESS_TAG = "offer_assets/run_in_process"
_IN_PROGRESS = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def prepare_dagster_home(settings: Settings) -> Path:
    """Make ``<home>/dagster`` the instance folder and export it as ``DAGSTER_HOME``.

    The instance's configuration is the repository's ``dagster.yaml`` with its paths moved there.
    """
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    configuration = yaml.safe_load(_ROOT_DAGSTER_YAML.read_text(encoding="utf-8"))
    configuration["storage"]["sqlite"]["base_dir"] = str(folder)
    configuration["local_artifact_storage"]["config"]["base_dir"] = str(folder)
    configuration["compute_logs"]["config"]["base_dir"] = str(folder / "logs")
    partial = folder / f"dagster.yaml.{os.getpid()}"
    partial.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    partial.replace(folder / "dagster.yaml")
    os.environ["DAGSTER_HOME"] = str(folder)
    return folder


def instance_for(settings: Settings) -> dg.DagsterInstance:
    """The instance that the UI, the daemon and the headless run share; dead headless runs are failed."""
    prepare_dagster_home(settings)
    instance = dg.DagsterInstance.get()
    fail_dead_runs(instance)
    return instance


def instance_of_the_ui(settings: Settings) -> None:
    """Prepare the instance for a UI with daemon, and fail what an earlier one left behind.

    A lock tells whether another UI of this home is alive; it stays with this process through ``exec``
    and ends with it. Only without another one can every unfinished run be called dead.
    """
    folder = prepare_dagster_home(settings)
    lock = os.open(folder / "dev.lock", os.O_CREAT | os.O_RDWR)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    with dg.DagsterInstance.get() as instance:
        fail_dead_runs(instance, without_process_too=True)


def process_tag(run_id: str | None = None) -> dict[str, str]:
    """Tag of a run that lives in this process, by which a later one can tell that it died.

    Args:
        run_id: Of the run, where it is known: Dagster copies tags to the run that repeats a failed one.
    """
    process = {_PROCESS_TAG: f"{os.getpid()} {started_at(os.getpid())}"}
    return process | ({_RUN_IN_PROCESS_TAG: run_id} if run_id else {})


def feed_tag(store: ArtifactStore) -> dict[str, str]:
    """Tag of a run that changes the pointers of ``store``."""
    return {FEED_TAG: store.feed}


def fail_dead_runs(instance: dg.DagsterInstance, *, without_process_too: bool = False) -> None:
    """Fail the unfinished runs whose process is gone.

    Args:
        instance: Where the runs are.
        without_process_too: Also those that nothing is known of; only right where no other process of
            Dagster is alive.
    """
    for run in instance.get_runs(RunsFilter(statuses=_IN_PROGRESS)):
        process = _process_of(run)
        if _is_alive(process) if process else not without_process_too:
            continue
        # It may have come to its end since it was listed.
        again = instance.get_run_by_id(run.run_id)
        if again is not None and again.status in _IN_PROGRESS:
            instance.report_run_failed(again, "The process of this run was killed; what it made is kept.")


def _process_of(run: dg.DagsterRun) -> str | None:
    """The process tag of the run, unless it was copied from the run that it repeats."""
    copied = run.tags.get(_RUN_IN_PROCESS_TAG, run.run_id) != run.run_id
    unclear = _RUN_IN_PROCESS_TAG not in run.tags and run.parent_run_id is not None
    return None if copied or unclear else run.tags.get(_PROCESS_TAG)


def _is_alive(process: str) -> bool:
    pid, _, start = process.partition(" ")
    return started_at(int(pid)) == start

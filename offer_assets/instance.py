"""Where Dagster keeps its state, and what becomes of runs whose process is gone."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import dagster as dg
import yaml
from dagster import DagsterRunStatus, RunsFilter

from resources.processes import started_at
from resources.settings import Settings

_ROOT_DAGSTER_YAML = Path(__file__).resolve().parent.parent / "dagster.yaml"
_PROCESS_TAG = "offer_assets/process"
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
    _fail_dead_runs(instance, headless_only=True)
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
        _fail_dead_runs(instance, headless_only=False)


def process_tag() -> dict[str, str]:
    """Tag of a run that lives in this process, by which a later one can tell that it died."""
    return {_PROCESS_TAG: f"{os.getpid()} {started_at(os.getpid())}"}


def _fail_dead_runs(instance: dg.DagsterInstance, *, headless_only: bool) -> None:
    for run in instance.get_runs(RunsFilter(statuses=_IN_PROGRESS)):
        process = run.tags.get(_PROCESS_TAG)
        if process is None and headless_only:
            continue
        if process is None or not _is_alive(process):
            instance.report_run_failed(run, "The process of this run was killed; what it made is kept.")


def _is_alive(process: str) -> bool:
    pid, _, start = process.partition(" ")
    return started_at(int(pid)) == start

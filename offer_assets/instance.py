"""Where Dagster keeps its state, and what becomes of runs whose process is gone."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster import DagsterRunStatus, RunsFilter

from ml.errors import InputError
from resources.artifact_store import ArtifactStore
from resources.processes import started_at
from resources.redaction import without_secrets
from resources.settings import Settings

_ROOT_DAGSTER_YAML = Path(__file__).resolve().parent.parent / "dagster.yaml"
_POSTGRES_VARIABLE = "OFFER_ASSETS_POSTGRES_URL"
_UI_LOCK = 0x6F6666657261
"""PostgreSQL's advisory lock that a UI holds; the number only has to be ours."""

FEED_TAG = "offer_assets/feed"
"""Tag of a run that changes pointers: whose, as several feeds may share a home."""

_PROCESS_TAG = "offer_assets/process"
_RUN_IN_PROCESS_TAG = "offer_assets/run_in_process"
_IN_PROGRESS = [DagsterRunStatus.STARTING, DagsterRunStatus.STARTED, DagsterRunStatus.CANCELING]


def prepare_dagster_home(settings: Settings) -> Path:
    """Make ``<home>/dagster`` the instance folder and export it as ``DAGSTER_HOME``.

    The instance's configuration is the repository's ``dagster.yaml`` with its paths moved there, and with
    PostgreSQL as its storage where there is one. Its address may hold a password: the file only names the
    variable, which is exported here for every process that follows.
    """
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    configuration = yaml.safe_load(_ROOT_DAGSTER_YAML.read_text(encoding="utf-8"))
    if settings.postgres_url:
        configuration["storage"] = {"postgres": {"postgres_url": {"env": _POSTGRES_VARIABLE}}}
        os.environ[_POSTGRES_VARIABLE] = settings.postgres_url
    else:
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

    A lock tells whether another UI of this storage is alive; it stays with this process through ``exec``
    and ends with it. Only without another one can every unfinished run be called dead.
    """
    folder = prepare_dagster_home(settings)
    is_alone = _holds_server_lock if settings.postgres_url else _holds_file_lock
    if is_alone(settings.postgres_url or str(folder / "dev.lock")):
        with dg.DagsterInstance.get() as instance:
            fail_dead_runs(instance, without_process_too=True)


def _holds_file_lock(path: str) -> bool:
    """Take the lock for as long as this process, or what it becomes by ``exec``, lives."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holds_server_lock(url: str) -> bool:
    """The same on PostgreSQL, which holds a lock while the connection that took it is open."""
    import psycopg2

    try:
        connection = psycopg2.connect(url.replace("+psycopg2", "", 1))
    except psycopg2.OperationalError as error:
        reason = without_secrets(" ".join(str(error).split()))
        raise InputError(f"{_POSTGRES_VARIABLE}: the database does not answer: {reason}") from None
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", (_UI_LOCK,))
        (is_ours,) = cursor.fetchone()
    connection.commit()
    # Left open on purpose, also through exec: closing it would give the lock back.
    os.set_inheritable(connection.fileno(), True)
    _CONNECTIONS.append(connection)
    return bool(is_ours)


_CONNECTIONS: list[Any] = []
"""Open until this process ends."""


def process_tag(run_id: str | None = None) -> dict[str, str]:
    """Tag of a run that lives in this process, by which a later one can tell that it died.

    Args:
        run_id: Of the run, where it is known: Dagster copies tags to the run that repeats a failed one.
    """
    process = {_PROCESS_TAG: f"{os.getpid()} {started_at(os.getpid())} {socket.gethostname()}"}
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
    """Of a process on another machine (with storage that several share) only that one can tell."""
    process, _, host = process.rpartition(" ")
    pid, _, start = process.partition(" ")
    return host != socket.gethostname() or started_at(int(pid)) == start

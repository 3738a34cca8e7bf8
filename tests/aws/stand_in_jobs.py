"""Training jobs for the stand-in: the container's command really runs, here, in an ``/opt/ml`` of its own.

As in the service: channels are downloaded first, the model folder is uploaded afterwards as it is,
checkpoints are copied to S3 while the container runs and back before it starts, its output is a log stream,
and a job can be stopped, run out of time, or lose its spot instance and go on. As with network isolation the
container has no credentials and no way out.

The service's documentation describes folders, signals and ``failure``. It says neither what the folder of an
uncompressed output is called below ``<S3OutputPath>/<job>/output`` (here: ``model``) nor how files of a
manifest are called in their channel (here: without the manifest's prefix). The code under test reads the
former from the job's description, and takes the latter either way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import ClientError

from resources.job_logs import LOG_GROUP
from tests.aws.stand_in import ACCOUNT, REGION, SERVICE_CREDENTIALS, ServiceError, StandIn

_ROOT = Path(__file__).parent.parent.parent
_SECONDS_BETWEEN_COPIES = 0.1


@dataclass
class Job:
    """One training job, as its description is made of."""

    request: dict[str, Any]
    status: str = "InProgress"
    secondary: str = "Starting"
    failure: str = ""
    created_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    restarts: int = 0
    containers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stopping: str = ""
    """Why the containers were asked to end: ``stop``, ``time`` or ``spot``."""

    @property
    def name(self) -> str:
        return str(self.request["TrainingJobName"])

    def description(self) -> dict[str, Any]:
        seconds = max(1, round((self.ended_at or time.time()) - self.created_at))
        output = self.request["OutputDataConfig"]["S3OutputPath"]
        shown = {key: value for key, value in self.request.items() if key != "Tags"}
        return {
            **shown,
            "TrainingJobArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:training-job/{self.name}",
            "ModelArtifacts": {"S3ModelArtifacts": f"{output}/{self.name}/output/model/"},
            "TrainingJobStatus": self.status,
            "SecondaryStatus": self.secondary,
            "SecondaryStatusTransitions": [
                {
                    "Status": self.secondary,
                    "StartTime": self.created_at,
                    "StatusMessage": f"job: {self.secondary}",
                }
            ],
            "CreationTime": self.created_at,
            "TrainingTimeInSeconds": seconds,
            "BillableTimeInSeconds": max(1, seconds // 3)
            if self.request.get("EnableManagedSpotTraining")
            else seconds,
            **({"FailureReason": self.failure} if self.failure else {}),
        }


class JobRunner:
    """Runs what ``CreateTrainingJob`` asks for; ``install()`` makes it the stand-in's handler."""

    def __init__(
        self, stand_in: StandIn, folder: Path, program: str = "ml", seconds_to_end: float = 20.0
    ) -> None:
        self.jobs: dict[str, Job] = {}
        self.before: Callable[[Job], None] = lambda _job: None
        """Called in the job's thread before its containers start: tests hold jobs here."""
        self._stand_in = stand_in
        self._folder = folder
        self._program = program
        self._seconds_to_end = seconds_to_end
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        session = boto3.session.Session(region_name=REGION, **SERVICE_CREDENTIALS)
        self._s3 = session.client("s3", endpoint_url=stand_in.url)
        self._logs = session.client("logs", endpoint_url=stand_in.url)

    def install(self) -> JobRunner:
        """Answer the operations of training jobs."""
        self._stand_in.handlers |= {
            "CreateTrainingJob": self._create,
            "DescribeTrainingJob": self._describe,
            "StopTrainingJob": self._stop,
        }
        return self

    def close(self) -> None:
        """End whatever still runs."""
        for job in list(self.jobs.values()):
            self._end(job, "stop")
        for thread in self._threads:
            thread.join(60)

    def interrupt(self, name: str) -> None:
        """Take the spot instance away; the job starts again with what its checkpoints hold."""
        self._end(self.jobs[name], "spot")

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["TrainingJobName"]
        with self._lock:
            if name in self.jobs:
                raise ServiceError("ResourceInUse", f"Training job names must be unique: {name} exists")
            job = self.jobs[name] = Job(request)
        thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return {"TrainingJobArn": job.description()["TrainingJobArn"]}

    def _describe(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._named(request).description()

    def _stop(self, request: dict[str, Any]) -> None:
        job = self._named(request)
        if job.status != "InProgress":
            raise ServiceError(
                "ValidationException", f"The training job is in status {job.status}; it cannot be stopped."
            )
        job.status = job.secondary = "Stopping"
        self._end(job, "stop")

    def _named(self, request: dict[str, Any]) -> Job:
        job = self.jobs.get(request["TrainingJobName"])
        if job is None:
            raise ServiceError("ValidationException", "Requested resource not found.")
        return job

    def _end(self, job: Job, why: str) -> None:
        """SIGTERM, and SIGKILL for what does not heed it."""
        job.stopping = why
        running = [container for container in job.containers if container.poll() is None]
        for container in running:
            container.terminate()
        deadline = time.monotonic() + self._seconds_to_end
        for container in running:
            try:
                container.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(container.pid, signal.SIGKILL)

    def _run(self, job: Job) -> None:
        try:
            self.before(job)
            while not self._run_once(job):
                job.restarts += 1
                job.stopping = ""
                job.secondary = "Interrupted"
        except ClientError as error:
            self._set(job, "Failed", failure=f"ClientError: Data download failed: {error}")

    def _run_once(self, job: Job) -> bool:
        """One life of the job's instances; whether it was the last."""
        hosts = [f"127.0.0.{number + 1}" for number in range(job.request["ResourceConfig"]["InstanceCount"])]
        bases = [self._folder / job.name / str(job.restarts) / host for host in hosts]
        if job.stopping != "stop":
            job.secondary = "Downloading"
            for host, base in zip(hosts, bases, strict=True):
                self._prepare(job, base, host, hosts)
            job.secondary = "Training"
            with self._checkpoints_copied(job, bases):
                statuses = self._run_containers(job, bases)
        if job.stopping == "spot":
            return False
        if job.stopping == "stop":
            self._set(job, "Stopped")
        elif job.stopping == "time":
            self._set(job, "Stopped", "MaxRuntimeExceeded")
        elif any(statuses):
            failed = next(index for index, status in enumerate(statuses) if status)
            failure = bases[failed] / "output" / "failure"
            reason = failure.read_text(encoding="utf-8")[:1024] if failure.exists() else ""
            self._set(job, "Failed", failure=f"AlgorithmError: {reason}, exit code: {statuses[failed] % 256}")
        else:
            job.secondary = "Uploading"
            for base in bases:
                self._upload(base / "model", job.description()["ModelArtifacts"]["S3ModelArtifacts"], {})
            self._set(job, "Completed")
        return True

    def _set(self, job: Job, status: str, secondary: str = "", failure: str = "") -> None:
        job.failure, job.ended_at = failure, time.time()
        job.secondary = secondary or status
        job.status = status

    def _prepare(self, job: Job, base: Path, host: str, hosts: list[str]) -> None:
        for folder in ("input/data", "input/config", "model", "output/data", "checkpoints"):
            (base / folder).mkdir(parents=True)
        config = {"current_host": host, "hosts": hosts, "network_interface_name": "lo"}
        (base / "input/config/resourceconfig.json").write_text(json.dumps(config))
        (base / "input/config/hyperparameters.json").write_text("{}")
        for channel in job.request["InputDataConfig"]:
            source = channel["DataSource"]["S3DataSource"]
            for key, name in self._objects(source["S3DataType"], source["S3Uri"]):
                self._download(key, base / "input/data" / channel["ChannelName"] / name)
        if "CheckpointConfig" in job.request:
            for key, name in self._objects("S3Prefix", job.request["CheckpointConfig"]["S3Uri"]):
                self._download(key, base / "checkpoints" / name)

    def _objects(self, kind: str, uri: str) -> Iterator[tuple[tuple[str, str], str]]:
        """(bucket, key) of each object of a data source, and its name in the channel."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        if kind == "ManifestFile":
            prefixes, *names = json.loads(self._s3.get_object(Bucket=bucket, Key=prefix)["Body"].read())
            bucket, _, prefix = prefixes["prefix"].removeprefix("s3://").partition("/")
            yield from (((bucket, prefix + name), name) for name in names)
            return
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", ()):
                yield (bucket, item["Key"]), item["Key"].removeprefix(prefix)

    def _download(self, source: tuple[str, str], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._s3.get_object(Bucket=source[0], Key=source[1])["Body"].read())

    def _upload(self, folder: Path, uri: str, known: dict[Path, tuple[int, int]]) -> None:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        for path in sorted(folder.rglob("*")):
            try:
                state = (path.stat().st_mtime_ns, path.stat().st_size)
                if not path.is_file() or known.get(path) == state:
                    continue
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # a checkpoint that made room for a newer one
            self._s3.put_object(Bucket=bucket, Key=prefix + path.relative_to(folder).as_posix(), Body=content)
            known[path] = state

    @contextmanager
    def _checkpoints_copied(self, job: Job, bases: list[Path]) -> Iterator[None]:
        if "CheckpointConfig" not in job.request:
            yield
            return
        uri, ended = job.request["CheckpointConfig"]["S3Uri"], threading.Event()
        known: dict[Path, tuple[int, int]] = {}

        def copy() -> None:
            for base in bases:
                self._upload(base / "checkpoints", uri, known)

        def keep_copying() -> None:
            while not ended.wait(_SECONDS_BETWEEN_COPIES):
                copy()

        thread = threading.Thread(target=keep_copying, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            copy()

    def _run_containers(self, job: Job, bases: list[Path]) -> list[int]:
        for base in bases:
            job.containers.append(self._container(job, base))
        containers = job.containers[-len(bases) :]
        if job.stopping:  # it was stopped in between
            self._end(job, job.stopping)
        writers = [
            threading.Thread(target=self._write_log, args=(job, number, container), daemon=True)
            for number, container in enumerate(containers, start=1)
        ]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + job.request["StoppingCondition"]["MaxRuntimeInSeconds"]
        for container in containers:
            try:
                container.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._end(job, "time")
        statuses = [container.wait() for container in containers]
        for writer in writers:
            writer.join()
        return statuses

    def _container(self, job: Job, base: Path) -> subprocess.Popen[bytes]:
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DAGSTER_"))
        }
        nowhere = "http://127.0.0.1:9"
        return subprocess.Popen(
            [sys.executable, "-m", self._program, "train"],
            cwd=_ROOT,
            env={
                **kept,
                "HTTP_PROXY": nowhere,
                "HTTPS_PROXY": nowhere,
                "PYTHONPATH": str(_ROOT),
                "SAGEMAKER_BASE_DIR": str(base),
                "TRAINING_JOB_NAME": job.name,
                **job.request.get("Environment", {}),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _write_log(self, job: Job, number: int, container: subprocess.Popen[bytes]) -> None:
        stream = f"{job.name}/algo-{number}-{int(time.time())}-{job.restarts}"
        with self._lock:
            if not self._logs.describe_log_groups(logGroupNamePrefix=LOG_GROUP)["logGroups"]:
                self._logs.create_log_group(logGroupName=LOG_GROUP)
        self._logs.create_log_stream(logGroupName=LOG_GROUP, logStreamName=stream)
        assert container.stdout is not None
        for line in container.stdout:
            if text := line.decode(errors="replace").rstrip("\n"):
                event = {"timestamp": int(time.time() * 1000), "message": text}
                self._logs.put_log_events(logGroupName=LOG_GROUP, logStreamName=stream, logEvents=[event])
        container.stdout.close()

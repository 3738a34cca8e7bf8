"""Batch transforms for the stand-in: a real serving process answers the offers that lie in its S3.

As in the service: the model's data is downloaded and served, each file below the input's prefix is cut into
requests of whole lines up to ``MaxPayloadInMB``, several are under way at once, and a file whose requests
were all answered becomes ``<file>.out``. A request that is refused ends the job; what was uploaded stays.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import msgspec

from ml.serving.server import ServerState
from tests.aws.stand_in import ACCOUNT, REGION, SERVICE_CREDENTIALS, ServiceError, StandIn

_ROOT = Path(__file__).parent.parent.parent
_SECONDS_TO_COME_UP = 60.0


@dataclass
class TransformJob:
    """One job, as its description is made of."""

    request: dict[str, Any]
    status: str = "InProgress"
    failure: str = ""
    created_at: float = field(default_factory=time.time)
    stopping: threading.Event = field(default_factory=threading.Event)
    asked: list[bytes] = field(default_factory=list)
    """Bodies of all requests."""

    @property
    def name(self) -> str:
        return str(self.request["TransformJobName"])

    def description(self) -> dict[str, Any]:
        shown = {key: value for key, value in self.request.items() if key != "Tags"}
        return {
            **shown,
            "TransformJobArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:transform-job/{self.name}",
            "TransformJobStatus": self.status,
            "CreationTime": self.created_at,
            **({"FailureReason": self.failure} if self.failure else {}),
        }


class _JobFailure(Exception):
    """The job ends with this reason."""


class TransformRunner:
    """Runs what ``CreateTransformJob`` asks for; ``install()`` makes it the stand-in's handler."""

    def __init__(self, stand_in: StandIn, folder: Path, program: str = "ml") -> None:
        self.jobs: dict[str, TransformJob] = {}
        self.before: Callable[[TransformJob], None] = lambda _job: None
        """Called in the job's thread before anything else: tests hold jobs here, or raise."""
        self.payload_bytes: int | None = None
        """Instead of ``MaxPayloadInMB``, to have many requests of few offers."""
        self.answer: Callable[[bytes], bytes] | None = None
        """In place of a real server, where a test is about the job."""
        self._models: dict[str, dict[str, Any]] = {}
        self._stand_in = stand_in
        self._folder = folder
        self._program = program
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        session = boto3.session.Session(region_name=REGION, **SERVICE_CREDENTIALS)
        self._s3 = session.client("s3", endpoint_url=stand_in.url)

    def install(self) -> TransformRunner:
        """Answer the operations of transform jobs, and those of models unless somebody does."""
        self._stand_in.handlers |= {
            "CreateTransformJob": self._create,
            "DescribeTransformJob": self._describe,
            "StopTransformJob": self._stop,
        }
        self._stand_in.handlers.setdefault("CreateModel", self._create_model)
        self._stand_in.handlers.setdefault("DescribeModel", self._describe_model)
        return self

    def close(self) -> None:
        """End whatever still runs."""
        for job in list(self.jobs.values()):
            job.stopping.set()
        for thread in self._threads:
            thread.join(60)

    def _create_model(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["ModelName"]
        if name in self._models:
            raise ServiceError("ValidationException", f'Cannot create already existing model "{name}".')
        self._models[name] = given
        return {"ModelArn": f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:model/{name}"}

    def _describe_model(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given["ModelName"]
        if name not in self._models:
            raise ServiceError("ValidationException", f'Could not find model "{name}".')
        return self._models[name]

    def _create(self, request: dict[str, Any]) -> dict[str, Any]:
        name = request["TransformJobName"]
        self._stand_in.handlers["DescribeModel"]({"ModelName": request["ModelName"]})
        resources = request["TransformResources"]
        if request["MaxConcurrentTransforms"] * request["MaxPayloadInMB"] > 100:
            raise ServiceError("ValidationException", "MaxConcurrentTransforms * MaxPayloadInMB exceeds 100")
        if "VolumeKmsKeyId" in resources and "d." in resources["InstanceType"]:
            raise ServiceError("ValidationException", "VolumeKmsKeyId: the instance has local storage")
        with self._lock:
            if name in self.jobs:
                raise ServiceError("ResourceInUse", f"Transform job names must be unique: {name} exists")
            job = self.jobs[name] = TransformJob(request)
        thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return {"TransformJobArn": job.description()["TransformJobArn"]}

    def _describe(self, given: dict[str, Any]) -> dict[str, Any]:
        return self._named(given).description()

    def _stop(self, given: dict[str, Any]) -> None:
        job = self._named(given)
        if job.status != "InProgress":
            raise ServiceError("ValidationException", f"The transform job is {job.status} already")
        job.status = "Stopping"
        job.stopping.set()

    def _named(self, given: dict[str, Any]) -> TransformJob:
        job = self.jobs.get(given["TransformJobName"])
        if job is None:
            raise ServiceError("ValidationException", "Could not find requested transform job.")
        return job

    def _run(self, job: TransformJob) -> None:
        try:
            self.before(job)
            if not job.stopping.is_set():
                with self._serving(job) as url:
                    self._answer(job, url)
            job.status = "Stopped" if job.stopping.is_set() else "Completed"
        except _JobFailure as error:
            job.failure, job.status = str(error), "Failed"
        except Exception as error:
            job.failure, job.status = f"InternalServerError: {error}", "Failed"

    def fail(self, reason: str) -> None:
        """What :attr:`before` calls to end a job with a reason of the service."""
        raise _JobFailure(reason)

    def _answer(self, job: TransformJob, url: str) -> None:
        given, target = job.request["TransformInput"], job.request["TransformOutput"]
        bucket, prefix = _split(given["DataSource"]["S3DataSource"]["S3Uri"])
        target_bucket, target_prefix = _split(target["S3OutputPath"])
        headers = {"content-type": given["ContentType"], "accept": target["Accept"]}
        limit = self.payload_bytes or job.request["MaxPayloadInMB"] * 1024 * 1024

        def ask(body: bytes) -> bytes:
            job.asked.append(body)
            if self.answer is not None:
                return self.answer(body)
            answer = httpx.post(
                f"{url}/invocations", content=body, headers=headers, timeout=60, trust_env=False
            )
            if answer.status_code != 200:
                raise _JobFailure("ClientError: See job logs for more information")
            return answer.content

        with ThreadPoolExecutor(job.request["MaxConcurrentTransforms"]) as pool:
            for key in self._keys(bucket, prefix):
                content = self._s3.get_object(Bucket=bucket, Key=key)["Body"].read()
                answers = list(pool.map(ask, _requests(content, limit)))
                if job.stopping.is_set():
                    return
                name = f"{target_prefix.rstrip('/')}/{key.removeprefix(prefix)}.out"
                self._s3.put_object(Bucket=target_bucket, Key=name, Body=b"\n".join(answers))

    def _keys(self, bucket: str, prefix: str) -> list[str]:
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    @contextmanager
    def _serving(self, job: TransformJob) -> Iterator[str]:
        if self.answer is not None:
            yield ""
            return
        model = self._stand_in.handlers["DescribeModel"]({"ModelName": job.request["ModelName"]})
        assert model is not None
        bucket, prefix = _split(model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"])
        base = self._folder / job.name
        for key in self._keys(bucket, prefix):
            path = base / "model" / key.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        state_file = base / "state.json"
        command = [sys.executable, "-m", self._program, "serve", "--model", str(base / "model")]
        command += ["--port", "0", "--workers", "1", "--state-file", str(state_file)]
        process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _SECONDS_TO_COME_UP
            while not state_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise _JobFailure("AlgorithmError: the container did not pass its health check")
                time.sleep(0.02)
            yield msgspec.json.decode(state_file.read_bytes(), type=ServerState).url
        finally:
            process.terminate()
            process.wait(30)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _requests(content: bytes, limit: int) -> Iterator[bytes]:
    """Whole lines, as many as fit."""
    request = b""
    for line in content.splitlines(keepends=True):
        if request and len(request) + len(line) > limit:
            yield request
            request = b""
        request += line
    if request:
        yield request

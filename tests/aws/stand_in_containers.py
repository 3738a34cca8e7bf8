"""Model containers of the stand-in: real server processes on the model data that lies in its S3."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from moto.logs.models import logs_backends
from moto.s3.models import s3_backends

import ml
from ml.serving.server import ServerState
from ml.serving.variants import TARGET_VARIANT_HEADER
from tests import plain_http
from tests.aws.stand_in import ACCOUNT, REGION

_SECONDS_TO_COME_UP = 60.0


class ContainerError(Exception):
    """It does not come up; its last words are in the log."""


@dataclass
class Container:
    """A server process that answers at ``url``."""

    slot: str
    model_version: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    under_way: int = 0
    """Requests that are with it; counted by the host, under its lock."""

    def ask(self, body: bytes, content_type: str, target: str = "") -> httpx.Response:
        named = {TARGET_VARIANT_HEADER: target} if target else {}
        return plain_http.post(
            f"{self.url}/invocations",
            content=body,
            headers={"content-type": content_type, **named},
            timeout=60,
        )

    def stop(self) -> None:
        """As SageMaker does: what is under way is answered, SIGTERM, half a minute, SIGKILL."""
        deadline = time.monotonic() + 30
        while self.under_way and time.monotonic() < deadline:
            time.sleep(0.01)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(program: str, folder: Path, slot: str, model: dict[str, Any]) -> Container:
    """Download the model data, start the server on it and wait until it answers.

    Args:
        program: Module whose command ``serve`` is the server.
        folder: For downloads and logs.
        slot: Variant that it serves in.
        model: Input of ``create_model``.
    """
    data = folder / f"model-{uuid.uuid4().hex}"
    download(model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"], data)
    log, state_file = data.with_suffix(".log"), data.with_suffix(".state")
    command = [sys.executable, "-m", program, "serve", "--model", str(data)]
    command += ["--port", "0", "--workers", "1", "--state-file", str(state_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(ml.__file__).parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + _SECONDS_TO_COME_UP
    while process.poll() is None and time.monotonic() < deadline:
        if state_file.exists():
            state = msgspec.json.decode(state_file.read_bytes(), type=ServerState)
            return Container(slot, state.model_version, state.url, process, log)
        time.sleep(0.02)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise ContainerError(log.read_text(errors="replace"))


def download(uri: str, folder: Path) -> None:
    """All objects under a prefix, as files; from moto itself, so that no call of the code is mistaken."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for name, key in s3_backends[ACCOUNT]["aws"].buckets[bucket].keys.items():
        if name.startswith(prefix):
            file = folder / name.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(key.value)


def has_objects(uri: str) -> bool:
    """Whether anything lies under a prefix."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    buckets = s3_backends[ACCOUNT]["aws"].buckets
    return bucket in buckets and any(name.startswith(prefix) for name in buckets[bucket].keys)


def write_object(bucket: str, key: str, content: bytes) -> None:
    """Put an object into moto itself."""
    s3_backends[ACCOUNT]["aws"].put_object(bucket, key, content)


def log_lines(endpoint: str, slot: str, text: str) -> None:
    """Write into the endpoint's log group, as SageMaker does with what a container prints."""
    logs = logs_backends[ACCOUNT][REGION]
    group = f"/aws/sagemaker/Endpoints/{endpoint}"
    if group not in logs.groups:
        logs.create_log_group(group, {})
    stream = f"{slot}/i-{uuid.uuid4().hex[:17]}"
    logs.create_log_stream(group, stream)
    now = int(datetime.datetime.now(datetime.UTC).timestamp() * 1_000)
    events = [{"timestamp": now, "message": line} for line in text.splitlines() if line.strip()]
    logs.put_log_events(group, stream, events)

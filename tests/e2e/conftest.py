"""One small demo run that the end-to-end tests look at, started, killed in mid-training, and finished."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.small_encoder import small_encoder

ROOT = Path(__file__).resolve().parents[2]

SMALL = {
    "OFFER_ASSETS_DEMO_DAYS": "2",
    "OFFER_ASSETS_DEMO_OFFERS_PER_DAY": "2500",
    "OFFER_ASSETS_LABELLED_OFFERS": "1000",
    "OFFER_ASSETS_UNLABELLED_OFFERS": "500",
    "OFFER_ASSETS_TEACHER_EPOCHS": "4",
    "OFFER_ASSETS_STUDENT_EPOCHS": "6",
    "OFFER_ASSETS_STUDENT_LAYERS": "1",
    "OFFER_ASSETS_MAX_TOKENS": "32",
    "OFFER_ASSETS_ENDPOINT_WORKERS": "1",
    "OFFER_ASSETS_WARM_TEACHER_EPOCHS": "2",
    "OFFER_ASSETS_WARM_STUDENT_EPOCHS": "4",
    "OFFER_ASSETS_TAXONOMY_SETTLE_SECONDS": "2",
}
DEADLINE_SECONDS = 1_500
"""Of whatever is waited for: far more than it takes, however slow and busy the machine is."""


DAEMONS = "{ instance { daemonHealth { allDaemonStatuses { daemonType healthy required } } } }"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path, **settings: str) -> dict[str, str]:
    """The environment of a product process: nothing of the caller's own settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OFFER_", "CATALOG_", "DAGSTER_", "MLFLOW_"))
    }
    return {**kept, "OFFER_ASSETS_HOME": str(home), **settings}


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def wait_for(condition, what: str):
    """The first true value of ``condition()``, polled until the deadline."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {DEADLINE_SECONDS:,} s")


class Ui:
    """The webserver's GraphQL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, text: str, **variables: str) -> dict[str, Any]:
        answer = httpx.post(
            f"{self.url}/graphql", json={"query": text, "variables": variables}, timeout=60
        ).json()
        assert not answer.get("errors"), answer
        return answer["data"]

    def daemons_are_healthy(self) -> bool:
        try:
            statuses = self.query(DAEMONS)["instance"]["daemonHealth"]["allDaemonStatuses"]
        except httpx.TransportError:
            return False
        required = [status["healthy"] for status in statuses if status["required"]]
        return bool(required) and all(required)


@dataclass
class Dev:
    """A ``dagster dev`` with all its processes."""

    ui: Ui
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """Webserver, daemon, code server and every run: gone at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running_dev(env: dict[str, str], log: Path) -> Iterator[Dev]:
    """``make dev`` with healthy daemons."""
    port = free_port()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "offer_assets", "dev", "--port", str(port)],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    dev = Dev(Ui(f"http://127.0.0.1:{port}"), process)
    try:
        wait_for(lambda: process.poll() is not None or dev.ui.daemons_are_healthy(), "healthy daemons")
        assert process.poll() is None, log.read_text()[-4000:]
        yield dev
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        dev.kill()


@dataclass
class Demo:
    """A finished demo run."""

    home: Path
    env: dict[str, str]
    output: str
    killed_output: str

    @property
    def url(self) -> str:
        return re.search(r"http://127\.0\.0\.1:\d+", self.output).group()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The demo, killed with SIGKILL while the teacher learns, and started again."""
    home = tmp_path_factory.mktemp("demo") / "home"
    env = environment(
        home,
        **SMALL,
        OFFER_ASSETS_ENCODER=str(small_encoder(home.parent / "encoder")),
        OFFER_ASSETS_ENDPOINT_PORT=str(free_port()),
    )
    killed_output = start_and_kill_in_training(home, env)
    finished = run(["offer_assets", "demo"], env)
    try:
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
        yield Demo(home, env, finished.stdout + finished.stderr, killed_output)
    finally:
        run(["offer_assets", "stop"], env)


def start_and_kill_in_training(home: Path, env: dict[str, str]) -> str:
    """Start the demo, wait for the teacher's first checkpoint, kill every process of it."""
    log = home.parent / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "offer_assets", "demo"],
            cwd=ROOT,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(
            lambda: (
                process.poll() is not None
                or list(home.glob("work/teacher_checkpoint/*/checkpoints/step-*[0-9]"))
            ),
            "a checkpoint of the teacher",
        )
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return log.read_text()


@pytest.fixture(scope="session")
def second_run(demo: Demo) -> str:
    """What the same demo prints again, with nothing changed."""
    return _printed(["offer_assets", "demo"], demo.env)


@pytest.fixture(scope="session")
def drifted(demo: Demo, second_run: str) -> str:
    """What a drifted day prints, added after everything else was looked at unchanged."""
    return _printed(["offer_assets", "demo-drift"], demo.env)


def _printed(arguments: list[str], env: dict[str, str]) -> str:
    answer = run(arguments, env)
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]
    return answer.stdout

"""Processes of the local endpoint: started so that they outlive this one, waited for, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

import ml
from ml.serving.server import ServerState
from resources.endpoints import EndpointError
from resources.processes import started_at

_CODE_ROOT = Path(ml.__file__).parent.parent
_SECONDS_TO_ANSWER = 90.0
_SECONDS_TO_DRAIN = 30.0
_SECONDS_BETWEEN_LOOKS = 0.1
_LINES_SHOWN = 15


class ServerProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process, told from another that gets its id later."""

    pid: int
    process_started: str

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return started_at(self.pid) == self.process_started

    def end(self) -> None:
        """Let it drain and end; kill it and its workers if it takes too long."""
        if not self.is_alive:
            return
        with suppress(ProcessLookupError):  # it may end by itself at any moment
            os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + _SECONDS_TO_DRAIN
        while time.monotonic() < deadline:
            if not self.is_alive:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Launch:
    """A server on its way: nobody's child, so that it outlives this process."""

    def __init__(self, what: str, command: Sequence[str], log: Path) -> None:
        """Start it.

        Args:
            what: What it serves, for messages.
            command: Module and arguments; it is to take ``--state-file``.
            log: What it prints is added here; its place is the folder of the state file too.
        """
        self._what = what
        self._log = log
        self._log_starts_at = log.stat().st_size if log.exists() else 0
        self._state_file = log.with_name(f"{uuid.uuid4().hex}.state.json")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command, "--state-file", str(self._state_file)],
                cwd=_CODE_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        pid = self._process.pid
        self.process = ServerProcess(pid=pid, process_started=started_at(pid) or "")

    def wait(self) -> ServerState:
        """What it says of itself once it answers.

        Raises:
            EndpointError: it ended, or does not answer in time; it is gone then.
        """
        try:
            return self._state()
        except BaseException:
            self.process.end()
            raise
        finally:
            self._state_file.unlink(missing_ok=True)

    def _state(self) -> ServerState:
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        while time.monotonic() < deadline:
            status = self._process.poll()
            if status is not None:
                raise EndpointError(
                    f"{self._what} did not come up: the server ended with status {status}. "
                    f"{self._last_lines()}"
                )
            if self._state_file.exists():
                return msgspec.json.decode(self._state_file.read_bytes(), type=ServerState)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        raise EndpointError(
            f"{self._what} did not answer within {_SECONDS_TO_ANSWER:.0f} s. {self._last_lines()}"
        )

    def _last_lines(self) -> str:
        with self._log.open("rb") as opened:
            opened.seek(self._log_starts_at)
            lines = opened.read().decode(errors="replace").splitlines()[-_LINES_SHOWN:]
        return f"Last lines of {self._log}:\n" + "\n".join(lines)

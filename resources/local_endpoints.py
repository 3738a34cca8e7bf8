"""The endpoint on this machine: server processes that outlive the run that started them."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
from typing_extensions import override

import ml
from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.serving.variants import variant_of
from resources.atomic_files import only_one, write_atomically
from resources.endpoints import EndpointError, Endpoints, EndpointStatus, VariantStatus
from resources.failures import input_errors_fail_plainly
from resources.processes import started_at

_CODE_ROOT = Path(ml.__file__).parent.parent
_HOST = "127.0.0.1"
_SECONDS_TO_ANSWER = 90.0
_SECONDS_TO_DRAIN = 30.0
_SECONDS_PER_PING = 2.0
_SECONDS_PER_INVOCATION = 60.0
_SECONDS_BETWEEN_PINGS = 0.1
_LINES_SHOWN = 15


class _Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """What serves, as ``current.json`` has it."""

    model: str
    """Folder of the compiled student."""
    url: str
    model_version: str
    taxonomy_version: str
    pid: int
    """The server's main process."""
    started: str
    process_started: str
    """Start of the process as the system tells it: a process id alone may by now be another's."""
    log: str = ""


class LocalEndpoints(Endpoints):
    """A server process on this machine that outlives the run that started it.

    A new version starts beside the old one on the same port, and takes over when it answers, so
    that no request is lost in between.
    """

    home: str
    port: int
    workers: int
    program: str = "ml"
    """Module whose command ``serve`` is the server."""

    @override
    @input_errors_fail_plainly()
    def deploy(self, folder: Path, ref: ArtifactRef) -> EndpointStatus:
        with only_one(self._folder / "deploy.lock"):
            old = self._recorded()
            in_place = old if old is not None and old.url == self._url else None
            if in_place is not None and in_place.model_version == ref.version and self._answers(in_place):
                return _status_of(in_place)
            if in_place is None:
                self._check_port_is_free()
            log = self._folder / f"serve-{ref.version}.log"
            log_starts_at = log.stat().st_size if log.exists() else 0
            process = self._start(folder, log)
            try:
                ping = self._wait_for(ref.version, process, log, log_starts_at)
                new = _Recorded(
                    model=str(folder),
                    url=self._url,
                    model_version=ref.version,
                    taxonomy_version=str(ping["taxonomy_version"]),
                    pid=process.pid,
                    started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    process_started=started_at(process.pid) or "",
                    log=str(log),
                )
                write_atomically(self._current, msgspec.json.format(msgspec.json.encode(new)))
            except BaseException:
                _end(process.pid, started_at(process.pid))
                raise
            if old is not None:
                _end(old.pid, old.process_started)
            return _status_of(new)

    @override
    def releasing(self) -> AbstractContextManager[None]:
        return only_one(self._folder / "release.lock")

    @override
    @input_errors_fail_plainly()
    def check_available(self) -> None:
        recorded = self._recorded()
        if recorded is None or recorded.url != self._url:
            self._check_port_is_free()

    @override
    def status(self) -> EndpointStatus | None:
        recorded = self._recorded()
        return _status_of(recorded) if recorded is not None and self._answers(recorded) else None

    @override
    @input_errors_fail_plainly()
    def invoke(self, offers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        import httpx

        url = recorded.url if (recorded := self._recorded()) else self._url
        try:
            response = httpx.post(
                f"{url}/invocations",
                content=msgspec.json.encode({"offers": list(offers)}),
                headers={"content-type": "application/json"},
                timeout=_SECONDS_PER_INVOCATION,
                trust_env=False,
            )
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise EndpointError(
                f"the endpoint at {url} does not answer ({error}): materialize offer_endpoint to start it"
            ) from None
        if 400 <= response.status_code < 500:
            raise InputError(f"the endpoint refused the offers: {answer.get('error', response.text)}")
        if response.status_code != 200:
            raise EndpointError(f"the endpoint at {url} answered {response.status_code}: {response.text}")
        predictions: list[dict[str, Any]] = answer["predictions"]
        return predictions

    @override
    def stop(self) -> bool:
        with only_one(self._folder / "deploy.lock"):
            recorded = self._recorded()
            if recorded is not None:
                _end(recorded.pid, recorded.process_started)
            self._current.unlink(missing_ok=True)
            return recorded is not None

    @property
    def _folder(self) -> Path:
        return Path(self.home).absolute() / "endpoint"

    @property
    def _current(self) -> Path:
        return self._folder / "current.json"

    @property
    def _url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def _recorded(self) -> _Recorded | None:
        """What ``current.json`` names, if that process is still the one it was."""
        try:
            recorded = msgspec.json.decode(self._current.read_bytes(), type=_Recorded)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return recorded if started_at(recorded.pid) == recorded.process_started else None

    def _answers(self, recorded: _Recorded) -> bool:
        ping = _ping(recorded.url)
        return ping is not None and ping.get("model_version") == recorded.model_version

    def _check_port_is_free(self) -> None:
        """The server shares its port with the version before; a stranger must not be shared with."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, self.port))
            except OSError as error:
                raise InputError(
                    f"OFFER_ASSETS_ENDPOINT_PORT={self.port} cannot be used ({error.strerror}): "
                    "choose another port, or end what uses it"
                ) from None

    def _start(self, folder: Path, log: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self.program, "serve", "--model", str(folder)]
        command += ["--port", str(self.port), "--workers", str(self.workers)]
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=_CODE_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_for(
        self, model_version: str, process: subprocess.Popen[bytes], log: Path, log_starts_at: int
    ) -> dict[str, Any]:
        """Ping until the new version answers; the version before may answer some of the pings."""
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        while time.monotonic() < deadline:
            status = process.poll()
            if status is not None:
                raise EndpointError(
                    f"model version {model_version} did not come up: the server ended with status {status}. "
                    f"{_last_lines(log, log_starts_at)}"
                )
            ping = _ping(self._url)
            if ping is not None and ping.get("model_version") == model_version:
                return ping
            time.sleep(_SECONDS_BETWEEN_PINGS)
        raise EndpointError(
            f"model version {model_version} did not answer within {_SECONDS_TO_ANSWER:.0f} s. "
            f"{_last_lines(log, log_starts_at)}"
        )


def _status_of(recorded: _Recorded) -> EndpointStatus:
    return EndpointStatus(
        url=recorded.url,
        model_version=recorded.model_version,
        taxonomy_version=recorded.taxonomy_version,
        started=recorded.started,
        variants=[
            VariantStatus(
                name=variant_of(recorded.model_version), model_version=recorded.model_version, weight=1.0
            )
        ],
        details={"pid": str(recorded.pid), "log": recorded.log},
    )


def _ping(url: str) -> dict[str, Any] | None:
    """What ``/ping`` says, on a connection of its own; None unless it is healthy."""
    import httpx

    try:
        response = httpx.get(f"{url}/ping", timeout=_SECONDS_PER_PING, trust_env=False)
        answer = response.json()
    except (httpx.HTTPError, ValueError):
        return None
    return answer if response.status_code == 200 and isinstance(answer, dict) else None


def _end(pid: int, process_started: str | None) -> None:
    """Let the server drain and end; kill it and its workers if it takes too long."""
    if process_started is None or started_at(pid) != process_started:
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_DRAIN
    while time.monotonic() < deadline:
        if started_at(pid) != process_started:
            return
        time.sleep(_SECONDS_BETWEEN_PINGS)
    os.killpg(pid, signal.SIGKILL)


def _last_lines(log: Path, log_starts_at: int) -> str:
    with log.open("rb") as opened:
        opened.seek(log_starts_at)
        lines = opened.read().decode(errors="replace").splitlines()[-_LINES_SHOWN:]
    return f"Last lines of {log}:\n" + "\n".join(lines)

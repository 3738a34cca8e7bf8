"""``python -m ml serve``: an endpoint for one compiled model, by SageMaker's container contract.

This process only supervises. The work is done by processes of one thread each
(:mod:`ml.serving.worker`) that share the port by ``SO_REUSEPORT``; one that dies is started again.
Since a port is bound only by those that are ready to answer, a new version can start on the port
of the old one, which then gets SIGTERM, finishes what it has begun and leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

import msgspec

from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.serving.workers import cores_for_workers, single_thread_environment
from ml.stages import SERVABLE

BASE_FOLDER = "/opt/ml"
"""Where SageMaker puts what a container needs; ``SAGEMAKER_BASE_DIR`` moves it."""
DEFAULT_PORT = 8080
DEFAULT_QUEUE = 32
DEFAULT_TIMEOUT_SECONDS = 60

_LAST_PORT = 65_535

_WORKER_MODULE = "ml.serving.worker"

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_DRAIN = 28.0
_FIRST_RESTART_SECONDS = 0.5
_LAST_RESTART_SECONDS = 30.0
_SECONDS_TO_BE_STABLE = 60.0
"""A worker that lived this long before it died is started again as if it were its first death."""

_FAILED_STARTS = 5
"""As many starts in a row without an answer end the server: something is wrong that no restart mends."""


class Listening(msgspec.Struct):
    """What a worker tells its supervisor once it takes connections, or why it never will."""

    model_version: str = ""
    taxonomy_version: str = ""
    error: str = ""


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """``--state-file``: written when every worker answers, removed when the server ends."""

    pid: int
    url: str
    model: str
    model_version: str
    taxonomy_version: str
    workers: list[int]
    """Process ids at the time of writing."""


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT; then returns when everything under way is answered.

    Raises:
        InputError: the model cannot be loaded, the port cannot be had, or a setting is wrong.
    """
    options = _options(arguments)
    manifest = read_manifest(Path(options.model))
    if manifest.kind not in SERVABLE:
        expected = " or a ".join(SERVABLE)
        raise InputError(f"--model {options.model} is a {manifest.kind}, expected a {expected}")
    # Bound but not listening: holds the number for the workers without taking a connection.
    with bound_socket(options.host, options.port) as placeholder:
        cores = cores_for_workers(Path(options.model), options.workers)
        _Supervisor(options, placeholder.getsockname()[1], cores).run()


class _Worker:
    """One worker process, as its supervisor sees it."""

    def __init__(self, options: argparse.Namespace, port: int, neuron_core: int | None) -> None:
        self.neuron_core = neuron_core
        self._report_fd, report_write_fd = os.pipe()
        command = [sys.executable, "-m", _WORKER_MODULE]
        for name in ("model", "host", "queue", "timeout"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--port", str(port), "--report-fd", str(report_write_fd)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the worker that this process is gone, however it went
            pass_fds=[report_write_fd],
            env=single_thread_environment(neuron_core),
            process_group=0,  # Ctrl-C reaches the supervisor alone, which drains
        )
        os.close(report_write_fd)
        os.set_blocking(self._report_fd, False)
        self.started_at = time.monotonic()
        self.listening: Listening | None = None

    def look(self) -> None:
        """Take note of what the worker reported.

        Raises:
            InputError: it cannot serve what it was given.
        """
        try:
            report = os.read(self._report_fd, 1 << 16)
        except BlockingIOError:
            return
        if report:
            listening = msgspec.json.decode(report, type=Listening)
            if listening.error:
                raise InputError(listening.error)
            self.listening = listening

    @property
    def is_dead(self) -> bool:
        return self.process.poll() is not None

    @property
    def is_listening(self) -> bool:
        return self.listening is not None and not self.is_dead

    def release(self) -> None:
        """Let go of the pipes of a worker that has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.close(self._report_fd)


class _Supervisor:
    """Keeps the wanted number of workers alive until it is told to stop."""

    def __init__(self, options: argparse.Namespace, port: int, cores: Sequence[int | None]) -> None:
        self._options = options
        self._port = port
        self._wanted = len(cores)
        self._free_cores = list(cores)
        """Of workers that are to be started; see :func:`ml.serving.workers.cores_for_workers`."""
        self._workers: list[_Worker] = []
        self._is_stopping = False
        self._was_ready = False
        self._deaths = 0
        """In a row; a worker that proves stable ends the row."""
        self._start_again_at = 0.0

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            while not (self._is_stopping or (self._options.end_with_stdin and _has_ended(sys.stdin))):
                self._replace_the_dead()
                self._look_at_the_living()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        finally:
            self._end_all()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._is_stopping = True

    def _replace_the_dead(self) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.is_dead]:
            self._workers.remove(worker)
            self._free_cores.append(worker.neuron_core)
            self._note_report(worker)
            worker.release()
            self._deaths = 1 if now - worker.started_at >= _SECONDS_TO_BE_STABLE else self._deaths + 1
            pause = min(_FIRST_RESTART_SECONDS * 2 ** (self._deaths - 1), _LAST_RESTART_SECONDS)
            self._start_again_at = now + pause
            status = worker.process.returncode
            _say(f"worker {worker.process.pid} ended with status {status}, next in {pause:g} s")
        if self._deaths >= _FAILED_STARTS and not any(worker.is_listening for worker in self._workers):
            raise SystemExit(
                f"error: {self._deaths} workers ended one after the other and none answers; see above"
            )
        while self._free_cores and now >= self._start_again_at:
            self._workers.append(_Worker(self._options, self._port, self._free_cores.pop(0)))

    def _look_at_the_living(self) -> None:
        for worker in self._workers:
            self._note_report(worker)
        listening = sum(worker.is_listening for worker in self._workers)
        if not self._was_ready and listening == self._wanted:
            self._was_ready = True
            self._announce()

    def _note_report(self, worker: _Worker) -> None:
        try:
            worker.look()
        except InputError as error:
            if not self._was_ready:
                raise
            _say(f"worker {worker.process.pid} cannot start: {error}")

    def _announce(self) -> None:
        listening = self._workers[0].listening
        assert listening is not None
        host = f"[{self._options.host}]" if ":" in self._options.host else self._options.host
        state = ServerState(
            pid=os.getpid(),
            url=f"http://{host}:{self._port}",
            model=str(Path(self._options.model).resolve()),
            model_version=listening.model_version,
            taxonomy_version=listening.taxonomy_version,
            workers=[worker.process.pid for worker in self._workers],
        )
        _say(f"model {state.model_version} answers at {state.url}, {len(state.workers)} workers")
        if path := self._options.state_file:
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(state)))
            partial.rename(path)

    def _end_all(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + _SECONDS_TO_DRAIN
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _say(f"worker {worker.process.pid} did not finish in time, killed")
                worker.process.kill()
                worker.process.wait()
            worker.release()
        if path := self._options.state_file:
            _remove_own_state(path)


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket on ``host``:``port`` that tolerates others of this user there; it does not listen yet.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setblocking(False)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --port or end its user"
        ) from None
    return bound


def _remove_own_state(path: Path) -> None:
    """Unless a newer server has put its own there."""
    with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
        if msgspec.json.decode(path.read_bytes(), type=ServerState).pid == os.getpid():
            path.unlink()


def _has_ended(pipe: TextIO) -> bool:
    """Whether nobody holds the other end any more; nothing is ever written to it."""
    readable, _, _ = select.select([pipe], [], [], 0)
    return bool(readable)


def _say(line: str) -> None:
    print(f"serve: {line}", file=sys.stderr, flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    in_container = str(Path(os.environ.get("SAGEMAKER_BASE_DIR", BASE_FOLDER), "model"))
    parser = argparse.ArgumentParser(
        prog="python -m ml serve",
        description="Answer /ping and /invocations with a compiled model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=in_container, metavar="DIR", help="a compiled_student artifact")
    parser.add_argument(
        "--host",
        help=f"address to listen on (127.0.0.1; for {in_container}, in a container that is, every address)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=_number_from("SAGEMAKER_BIND_TO_PORT", DEFAULT_PORT),
        help="0: any free one; SAGEMAKER_BIND_TO_PORT sets the default",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=_number_from("SAGEMAKER_MODEL_SERVER_WORKERS", None),
        help="processes of one thread each (one per core; on a Neuron host one per Neuron core); "
        "SAGEMAKER_MODEL_SERVER_WORKERS sets the default",
    )
    parser.add_argument(
        "--timeout",
        type=int,
        default=_number_from("SAGEMAKER_MODEL_SERVER_TIMEOUT", DEFAULT_TIMEOUT_SECONDS),
        help="seconds for a body to arrive, and again for its answer; SAGEMAKER_MODEL_SERVER_TIMEOUT "
        "sets the default",
    )
    parser.add_argument(
        "--queue", type=int, default=DEFAULT_QUEUE, help="requests under way per worker; more get 503"
    )
    parser.add_argument(
        "--state-file", type=Path, metavar="FILE", help="JSON with URL and versions, written once all answer"
    )
    parser.add_argument(
        "--end-with-stdin", action="store_true", help="end when standard input does, so with who started it"
    )
    options = parser.parse_args(arguments)
    if options.host is None:
        options.host = "0.0.0.0" if options.model == in_container else "127.0.0.1"
    for name in ("workers", "queue", "timeout"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected at least 1")
    if not 0 <= options.port <= _LAST_PORT:
        raise InputError(f"--port {options.port}: expected 0 to {_LAST_PORT}")
    return options


def _number_from(variable: str, default: int | None) -> int | None:
    value = os.environ.get(variable, "")
    if value and not value.isdecimal():
        raise InputError(f"{variable}={value}: expected a whole number")
    return int(value) if value else default

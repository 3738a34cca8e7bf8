"""Starts the processes that share a stage's work, one per GPU, and sees to it that they end together.

The process that runs the stage is the first on its machine; it starts the others, as programs
(``python -m ml rank``). Several machines find each other by ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and
``MASTER_PORT``, and each runs the stage. What the processes tell each other is in
:mod:`ml.learning.distributed`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml.errors import InputError
from ml.progress import Progress
from ml.world import World

_NODE_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_UNTIL_KNOWN = 2.0
"""A connection breaks a moment before the system tells that the process behind it has ended."""
_SECONDS_TO_NOTICE = 10.0
"""A process that waits for one that is gone mostly fails by itself; on a GPU it may wait for ever."""
_SECONDS_TO_END = 60.0


class RankEnded(Exception):
    """One of the processes that share the work is gone, so the others cannot go on.

    The message is one line; started again, the stage continues from its last checkpoint.
    """


@contextmanager
def leading(
    spec: bytes, checkpoints: Path, folder: Path, devices: int, progress: Progress
) -> Iterator[World]:
    """Start and join the other processes of this machine; whatever happens inside, they are gone afterwards.

    Args:
        spec: The stage's, as JSON.
        checkpoints: Folder of the stage's checkpoints.
        folder: For what the processes need and leave; emptied.
        devices: Processes on this machine; 0: one per GPU, or one.
        progress: Where to say what is started.

    Yields:
        The world, seen from this process.

    Raises:
        InputError: there are not so many GPUs, the variables of several machines contradict each other, or
            another process ended with an input error.
        RankEnded: another process ended.
    """
    world = _world_to_lead(devices)
    if world.size == 1:
        yield world
        return
    from ml.learning import distributed

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec_file = folder / "spec.json"
    spec_file.write_bytes(spec)
    command = [
        sys.executable,
        "-m",
        "ml",
        "rank",
        "--spec",
        str(spec_file),
        "--checkpoints",
        str(checkpoints),
    ]
    listening, place = _meeting_place(world)
    server = distributed.serve_meeting_place(place, listening) if world.is_first else None
    with _variables({**world.variables(), **place}), _Followers(command, folder, world, progress) as others:
        try:
            distributed.join(world)
            yield world
        except BaseException as error:
            distributed.leave_in_failure()
            # what a broken connection raises
            if isinstance(error, RuntimeError) and (failure := others.failure(within=_SECONDS_UNTIL_KNOWN)):
                raise failure from error
            raise
        distributed.leave()
        others.wait()
    del server  # others met there until now


def end_with_leader() -> None:
    """Have this process end as soon as the one that started it is gone, however it went."""
    threading.Thread(target=_end_at_end_of_input, daemon=True).start()


def how_it_ended(status: int) -> str:
    """What became of a process, by the status that ``subprocess`` tells."""
    if status >= 0:
        return f"failed with exit status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


class _Followers:
    """The other processes of this machine; inside ``with``, none of them ends unnoticed."""

    def __init__(self, command: Sequence[str], folder: Path, world: World, progress: Progress) -> None:
        self._command = command
        self._folder = folder
        self._world = world
        self._progress = progress
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._over = threading.Event()

    def __enter__(self) -> _Followers:
        try:
            for local_rank in range(1, self._world.local_size):
                self._start(self._world.at(local_rank))
        except BaseException:
            self._end()
            raise
        machines = f" on {self._world.nodes} machines" if self._world.nodes > 1 else ""
        pids = ", ".join(str(process.pid) for process in self._processes.values())
        started = f" (started here: {pids})" if pids else ""
        self._progress.say(f"{self._world.size} processes{machines} share the work{started}")
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._end()

    def failure(self, *, within: float = 0.0) -> RankEnded | InputError | None:
        """What to raise because of a process that failed; None if after ``within`` seconds none has."""
        deadline = time.monotonic() + within
        while True:
            failed = {rank: status for rank, process in self._processes.items() if (status := process.poll())}
            if failed:
                break
            if time.monotonic() >= deadline:
                return None
            time.sleep(_SECONDS_BETWEEN_LOOKS / 10)
        rank = min(failed, key=lambda rank: failed[rank])  # a kill comes first: others fail because of it
        error_file = self._error_file(rank)
        if error_file.exists():
            return InputError(error_file.read_text(encoding="utf-8"))
        return RankEnded(
            f"process {rank + 1} of {self._world.size} {how_it_ended(failed[rank])}, and the others with it; "
            "run the stage again and it continues from its last checkpoint"
        )

    def wait(self) -> None:
        """Wait for the others to end by themselves, but not for ever."""
        self._over.set()
        deadline = time.monotonic() + _SECONDS_TO_END
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return

    def _start(self, world: World) -> None:
        code = str(Path(__file__).parent.parent)
        path = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
        self._processes[world.rank] = subprocess.Popen(
            [*self._command, "--error-file", str(self._error_file(world.rank))],
            env={**os.environ, **world.variables(), "PYTHONPATH": path},
            stdin=subprocess.PIPE,  # its end tells the process that this one is gone
            stdout=subprocess.DEVNULL,
        )

    def _error_file(self, rank: int) -> Path:
        return self._folder / f"error-{rank}.txt"

    def _watch(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_LOOKS):
            if failure := self.failure():
                if not self._over.wait(_SECONDS_TO_NOTICE):
                    self._progress.say(str(failure))
                    self._end()
                    os._exit(1)  # the main thread waits inside a library for the one that is gone
                return

    def _end(self) -> None:
        for process in self._processes.values():
            process.kill()  # they hold nothing that would be lost
        for process in self._processes.values():
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _end_at_end_of_input() -> None:
    while os.read(0, 1024):  # not through sys.stdin, which a thread may not hold while Python shuts down
        pass
    os._exit(1)


def _world_to_lead(devices: int) -> World:
    """The world, seen from the first process of this machine."""
    nodes = int(os.environ.get("NNODES", "1"))
    if nodes > 1 and (missing := [name for name in _NODE_VARIABLES if name not in os.environ]):
        raise InputError(
            f"NNODES={nodes}, but {', '.join(missing)} not set: several machines need NNODES, NODE_RANK, "
            "MASTER_ADDR and MASTER_PORT"
        )
    node = int(os.environ["NODE_RANK"]) if nodes > 1 else 0
    if not 0 <= node < nodes:
        raise InputError(f"NODE_RANK={node}: expected a number from 0 to {nodes - 1} (NNODES={nodes})")
    local = _local_processes(devices)
    return World(rank=node * local, size=nodes * local, local_size=local)


def _local_processes(devices: int) -> int:
    import torch

    gpus = torch.cuda.device_count()
    if gpus and devices > gpus:
        raise InputError(
            f"devices {devices}: this machine has {gpus} GPUs; lower devices, or 0 for all of them"
        )
    return devices or gpus or 1


def _meeting_place(world: World) -> tuple[socket.socket | None, dict[str, str]]:
    """Where the processes meet, as variables; on one machine also the socket, open to nobody else."""
    if world.nodes > 1:
        return None, {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    listening = socket.create_server(("127.0.0.1", 0))
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    port = listening.getsockname()[1]
    return listening, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": loopback}


@contextmanager
def _variables(given: Mapping[str, str]) -> Iterator[None]:
    """The environment with these variables in it."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""Places where endpoints are tried, with stand-in models; and what tests look at there."""

from __future__ import annotations

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml.artifacts import ArtifactRef, reference, write_manifest
from resources.endpoints import (
    EndpointError,
    Endpoints,
    EndpointStatus,
    Variant,
)
from resources.local_endpoints import LocalEndpoints

Model = tuple[Path, ArtifactRef]


_SECONDS_BETWEEN_REQUESTS = 0.01

OFFERS = [{"offer_id": str(number), "title": "a"} for number in range(20)]


class World(ABC):
    """A place where endpoints are tried; a further implementation joins the suite by one of these."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    @abstractmethod
    def endpoints(self, **policy: float) -> Endpoints:
        """The one endpoint of this world; ``policy`` are fields of the resource."""

    def model(self, name: str, behaviour: str = "answer") -> Model:
        """A compiled student without weights; see ``tests/resources/stand_in_server.py`` for behaviours."""
        folder = self.tmp_path / "compiled_student" / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(name)
        (folder / "behaviour").write_text(behaviour)
        write_manifest(
            folder,
            kind="compiled_student",
            key=name,
            inputs={},
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.1,
        )
        return folder, reference(folder)


class LocalWorld(World):
    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.port = free_port()

    def endpoints(self, **policy: float) -> LocalEndpoints:
        home, program = str(self.tmp_path / "home"), "tests.resources.stand_in_server"
        return LocalEndpoints(home=home, port=self.port, workers=1, program=program, **policy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def traffic(endpoints: Endpoints, clients: int = 4) -> Iterator[list[str]]:
    """Clients that ask again and again; yields the versions that answered, and "error" for each failure."""
    is_over, answers = threading.Event(), list[str]()

    def ask() -> None:
        while not is_over.is_set():
            try:
                answers.append(endpoints.invoke(OFFERS)[0]["model_version"])
            except EndpointError:
                answers.append("error")
            is_over.wait(_SECONDS_BETWEEN_REQUESTS)

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            is_over.set()
    for client in asking:
        client.result()


def eventually(look: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


def variants_of(model: Callable[..., Model], **weights: float) -> list[Variant]:
    made = {name: model(name) for name in weights}
    return [Variant(folder=folder, ref=ref, weight=weights[name]) for name, (folder, ref) in made.items()]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def servers_of(endpoints: LocalEndpoints) -> set[int]:
    """Servers and routers of this endpoint, without those behind a router."""
    processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {pid for pid in processes if is_alive(pid) and endpoints.home in command_of(pid)}


def process_of(status: EndpointStatus) -> int:
    return int(status.details["pid"])

"""Fresh processes: what a benchmark measures in one is that model's alone, its memory above all."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml.cores import available_cores

_CHUNK_OFFERS = 512
_CHUNKS_PER_PROCESS = 4
"""At least, so that few offers keep all processes busy as well."""

_THREAD_SETTINGS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
)

Offers = Sequence[Mapping[str, Any]]


class NotHereError(Exception):
    """Why a model cannot be measured here, in words."""


def environment(threads: int | None, packages: Path | None = None) -> dict[str, str]:
    """Environment of a process that may use ``threads`` threads (None: one per core), and calls nobody.

    Args:
        threads: Of arithmetic and of tokenizers.
        packages: Folder of packages that come before the installed ones.
    """
    count = str(threads or available_cores())
    root = str(Path(__file__).resolve().parents[1])
    path = [str(packages.resolve()) if packages else "", root, os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **dict.fromkeys(_THREAD_SETTINGS, count),
        "TOKENIZERS_PARALLELISM": "false" if count == "1" else "true",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def peak_memory_bytes() -> int:
    """Most memory that this process and its living children, and theirs, have held, added up.

    Not that of ``getrusage``, which a process inherits from the one that started it.
    """
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    family, waiting = [], [os.getpid()]
    while waiting:
        family.append(waiting.pop())
        waiting.extend(parents.get(family[-1], []))
    return sum(map(_peak_of, family))


def _peak_of(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    kilobytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), "0")
    return int(kilobytes) * 1024


class _Pool:
    """Processes that each have the model, and answer chunks."""

    def __init__(self, pool: Any, processes: int) -> None:
        self._pool, self._processes = pool, processes

    def answer(self, offers: Offers) -> list[str]:
        chunks = shared_out(offers, self._processes, _CHUNK_OFFERS)
        return [category for answers in self._pool.imap(_answer, chunks) for category in answers]


def shared_out(offers: Offers, processes: int, largest: int) -> list[Offers]:
    """The offers in pieces of at most ``largest``, a few for each process."""
    size = max(1, min(largest, -(-len(offers) // (_CHUNKS_PER_PROCESS * processes))))
    return [offers[start : start + size] for start in range(0, len(offers), size)]


@contextmanager
def in_processes(load: Callable[[Path], Any], folder: Path, cores: int) -> Iterator[Any]:
    """The model that ``load`` reads from ``folder``: here for one core, else in a process per core."""
    if cores == 1:
        yield load(folder)
        return
    os.environ |= dict.fromkeys(_THREAD_SETTINGS, "1")  # of the children, which are started anew
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, initializer=_load, initargs=(load, folder)) as pool:
        yield _Pool(pool, cores)


_loaded: list[Any] = []


def _load(load: Callable[[Path], Any], folder: Path) -> None:
    _loaded.append(load(folder))


def _answer(offers: Offers) -> list[str]:
    answers: list[str] = _loaded[0].answer(offers)
    return answers

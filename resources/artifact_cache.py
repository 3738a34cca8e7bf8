"""Local copies of artifacts that lie elsewhere: shared by all processes of a home, bounded, safe to kill.

``root/artifacts/<kind>/<key>`` are the copies. Beside them: ``stored``, a mark per copy that the store has
too, with its bytes and, as its time of change, its last use; ``users``, a list per process of what it got;
``locks``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ml.artifacts import ArtifactRef, Manifest, read_manifest
from ml.errors import InputError
from resources.artifact_store import segment
from resources.atomic_files import only_one, write_atomically

_USERS_LOCK = threading.Lock()
_USERS: dict[tuple[int, Path], Path] = {}
"""The list of this process, by process (a fork is another one) and folder; locked until the process ends."""


class ArtifactCache:
    """Copies below ``root``; the least recently used go when all together exceed ``limit_bytes``."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes

    def folder(self, kind: str, key: str) -> Path:
        """Where the copy lies or will lie; also where an artifact is made that the store does not have."""
        return self._root / "artifacts" / segment(kind) / segment(key)

    @contextmanager
    def held(self, kind: str, key: str) -> Iterator[Path]:
        """The folder, to look at and to change: one process or thread at a time.

        From here on the copy counts as used by this process, and stays until the process ends.
        """
        with self._lock(kind, key):
            self._note_use(kind, key)
            yield self.folder(kind, key)

    def is_copy_of(self, ref: ArtifactRef) -> bool:
        """Whether the folder says that it is this artifact; its files are not looked at."""
        try:
            return read_manifest(self.folder(ref.kind, ref.key)).digest == ref.digest
        except InputError:
            return False

    def put(self, ref: ArtifactRef, fill: Callable[[Path], None]) -> None:
        """Make a copy anew, in one step; to be called while it is held.

        Args:
            ref: The artifact; what lay in its place goes.
            fill: Fills the given folder. What a killed process left there may be used again.
        """
        folder = self.folder(ref.kind, ref.key)
        partial = self._root / "partial" / segment(ref.kind) / segment(ref.key) / ref.version
        partial.mkdir(parents=True, exist_ok=True)
        fill(partial)
        self._remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(folder)
        shutil.rmtree(partial.parent)

    def mark_stored(self, manifest: Manifest) -> None:
        """Note that the store has what lies here, so that the copy may go, and that it was used now."""
        mark = self._mark(manifest.kind, manifest.key)
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(mark, str(_bytes(manifest)).encode())

    def discard(self, kind: str, key: str) -> None:
        """Remove what lies here; to be called while it is held."""
        self._mark(kind, key).unlink(missing_ok=True)
        self._remove(self.folder(kind, key))

    def make_room(self, needed_bytes: int = 0) -> None:
        """Remove copies, the longest unused first, until ``needed_bytes`` more fit; never one in use.

        Not to be called while a copy is held.
        """
        marks = [_Mark.read(file) for file in (self._root / "stored").glob("*/*") if file.name[0] != "."]
        known = sorted((mark for mark in marks if mark is not None), key=lambda mark: mark.used_at)
        excess = sum(mark.bytes for mark in known) + needed_bytes - self._limit_bytes
        for mark in known:
            if excess <= 0:
                return
            if mark.name not in self._in_use() and self._evict(mark):
                excess -= mark.bytes

    def _evict(self, mark: _Mark) -> bool:
        kind, key = mark.name.split("/")
        with only_one(self._lock_file(kind, key)):
            if mark.name in self._in_use():
                return False
            mark.file.unlink(missing_ok=True)
            self._remove(self._root / "artifacts" / kind / key)
            return True

    def _remove(self, folder: Path) -> None:
        """First out of sight, then file by file: half a folder is never seen in its place."""
        removed = self._root / "removed"
        removed.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(removed / uuid.uuid4().hex)
        for left in removed.iterdir():  # the folder itself stays: others may be moving something there
            shutil.rmtree(left, ignore_errors=True)

    def _in_use(self) -> set[str]:
        """What processes that live have got; the lists of dead ones are removed."""
        used: set[str] = set()
        for file in (self._root / "users").glob("*"):
            with contextlib.suppress(FileNotFoundError), file.open() as opened:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    used |= set(opened.read().splitlines())
                else:
                    file.unlink()
        return used

    def _note_use(self, kind: str, key: str) -> None:
        with _USERS_LOCK:
            users = _USERS.get((os.getpid(), self._root))
            if users is None:
                users = _USERS[os.getpid(), self._root] = self._list_of_this_process()
            with users.open("a") as opened:
                opened.write(f"{segment(kind)}/{segment(key)}\n")

    def _list_of_this_process(self) -> Path:
        """A list that is locked before others can see it: an unlocked one is that of a dead process."""
        folder = self._root / "users"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{os.getpid()}-{uuid.uuid4().hex}"
        hidden = self._root / f".{name}"
        descriptor = os.open(hidden, os.O_CREAT | os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return hidden.rename(folder / name)

    def _lock(self, kind: str, key: str) -> contextlib.AbstractContextManager[None]:
        return only_one(self._lock_file(segment(kind), segment(key)))

    def _lock_file(self, kind: str, key: str) -> Path:
        return self._root / "locks" / kind / f"{key}.lock"

    def _mark(self, kind: str, key: str) -> Path:
        return self._root / "stored" / segment(kind) / segment(key)


class _Mark:
    """A copy that may go: ``name`` is ``<kind>/<key>`` as on disk."""

    def __init__(self, file: Path, size: int, used_at: float) -> None:
        self.file = file
        self.name = f"{file.parent.name}/{file.name}"
        self.bytes = size
        self.used_at = used_at

    @classmethod
    def read(cls, file: Path) -> _Mark | None:
        """None where another process just removed it."""
        try:
            return cls(file, int(file.read_text()), file.stat().st_mtime)
        except FileNotFoundError:
            return None


def _bytes(manifest: Manifest) -> int:
    return sum(entry.bytes for entry in manifest.files.values())

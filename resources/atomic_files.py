"""Small files that are replaced or created in one step, and locks, whatever is killed in between."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Replace ``file`` in one step; after a crash it holds the old content or the new, never a part."""
    partial = _written_beside(file, content)
    partial.replace(file)


def create_once(file: Path, content: bytes) -> bool:
    """Create ``file`` with ``content`` unless it exists; of many at once exactly one gets True."""
    partial = _written_beside(file, content)
    try:
        os.link(partial, file)
    except FileExistsError:
        return False
    finally:
        partial.unlink()
    return True


def _written_beside(file: Path, content: bytes) -> Path:
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    with partial.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    return partial


@contextmanager
def only_one(lock_file: Path, when_taken: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock that one process or thread has at a time; the system releases it however we end.

    Args:
        lock_file: Its file; it stays, empty.
        when_taken: Called once if another has the lock, before waiting for it.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if when_taken is not None:
                when_taken()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield

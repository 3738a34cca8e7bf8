"""Local copies: bounded, and never taken from under a living process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from ml.artifacts import ArtifactRef, read_manifest, reference
from resources.artifact_cache import ArtifactCache
from tests.resources.artifact_worlds import make_folder

ROOT = Path(__file__).resolve().parents[2]
KIND = "offers"
BYTES = 1000

PROGRAM = """
import sys
from pathlib import Path
from resources.artifact_cache import ArtifactCache

for key in sys.argv[2:]:
    with ArtifactCache(Path(sys.argv[1]), 0).held("offers", key):
        pass
print("got them", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(tmp_path: Path) -> ArtifactCache:
    return ArtifactCache(tmp_path / "cache", limit_bytes=3 * BYTES)


@pytest.fixture
def filled(cache: ArtifactCache) -> list[Path]:
    """Four copies, the first one used the longest ago; none is in use."""
    return [copy(cache, f"k{number}") for number in range(4)]


@pytest.fixture
def user(tmp_path: Path) -> Iterator[object]:
    """Start another process that got the copies with the given keys, and lives."""
    with ExitStack() as stack:

        def start(*keys: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), *keys],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "got them\n"
            return process

        yield start


def copy(cache: ArtifactCache, key: str, *, stored: bool = True) -> Path:
    """A copy as an earlier process left it."""
    folder = make_folder(cache.folder(KIND, key), KIND, key, {"data.bin": b"x" * BYTES})
    if stored:
        cache.mark_stored(read_manifest(folder))
    return folder


def present(folders: list[Path]) -> list[bool]:
    return [folder.exists() for folder in folders]


def test_the_longest_unused_copies_go_first(cache, filled):
    cache.make_room()
    assert present(filled) == [False, True, True, True]
    cache.mark_stored(read_manifest(filled[1]))  # used again
    cache.make_room(needed_bytes=2 * BYTES)
    assert present(filled) == [False, True, False, False]


def test_within_the_limit_nothing_goes(cache):
    folders = [copy(cache, f"k{number}") for number in range(3)]
    cache.make_room()
    assert present(folders) == [True] * 3


def test_what_this_process_got_stays(cache, filled):
    with cache.held(KIND, "k0"):
        pass
    cache.make_room(needed_bytes=2 * BYTES)
    assert present(filled) == [True, False, False, False]


def test_what_another_living_process_got_stays_until_it_is_killed(cache, filled, user):
    process = user("k0", "k1", "k2")
    cache.make_room(needed_bytes=3 * BYTES)
    assert present(filled) == [True, True, True, False]
    process.kill()
    process.wait()
    cache.make_room(needed_bytes=3 * BYTES)
    assert present(filled) == [False] * 4


def test_what_somebody_gets_at_the_last_moment_stays(cache, filled, monkeypatch):
    looked = ArtifactCache._in_use

    def get_it_after_the_first_look(self: ArtifactCache) -> set[str]:
        monkeypatch.undo()
        used = looked(self)
        with self.held(KIND, "k0"):
            return used

    monkeypatch.setattr(ArtifactCache, "_in_use", get_it_after_the_first_look)
    cache.make_room()
    assert present(filled) == [True, False, True, True]


def test_what_the_store_does_not_have_yet_stays(cache):
    folder = copy(cache, "made here", stored=False)
    cache.make_room(needed_bytes=10 * BYTES)
    assert folder.exists()


def test_a_copy_that_was_not_finished_is_not_there_and_is_gone_on_with(cache, tmp_path):
    ref = reference(make_folder(tmp_path / "artifact", KIND, "k", {"data.bin": b"x"}))

    def half(partial: Path) -> None:
        (partial / "data.bin").write_bytes(b"x")
        raise ConnectionError

    with cache.held(KIND, "k"), pytest.raises(ConnectionError):
        cache.put(ref, half)
    assert not cache.is_copy_of(ref)
    assert not cache.folder(KIND, "k").exists()

    found: list[str] = []
    with cache.held(KIND, "k"):
        cache.put(ref, lambda partial: finish(partial, found))
    assert found == ["data.bin"]
    assert cache.is_copy_of(ref)


def test_a_copy_replaces_what_lay_in_its_place(cache, tmp_path):
    old = copy(cache, "k")
    ref: ArtifactRef = reference(make_folder(tmp_path / "artifact", KIND, "k", {"data.bin": b"x"}))
    assert not cache.is_copy_of(ref)
    with cache.held(KIND, "k"):
        cache.put(ref, lambda partial: finish(partial, []))
    assert cache.is_copy_of(ref)
    assert (old / "data.bin").read_bytes() == b"x"


def test_what_many_remove_at_once_is_gone(cache):
    keys = [f"k{number}" for number in range(120)]
    folders = [copy(cache, key) for key in keys]

    def discard(key: str) -> None:
        with cache.held(KIND, key):
            cache.discard(KIND, key)

    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(discard, keys))
    assert present(folders) == [False] * len(folders)


def finish(partial: Path, found: list[str]) -> None:
    found += [file.name for file in partial.iterdir()]
    make_folder(partial, KIND, "k", {"data.bin": b"x"})

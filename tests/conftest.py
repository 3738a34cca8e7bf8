"""What all tests share: where real data lies, and what a missing system package means."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")
"""The same examples every time, however busy the machine is."""

os.environ.setdefault("OMP_NUM_THREADS", "1")
"""Tiny models gain nothing by threads, and several test processes lose by them: idle threads spin."""

ROOT = Path(__file__).resolve().parent.parent
END_TO_END = ROOT / "tests" / "e2e"
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes, what a file makes once is made in one, and what takes longest comes first.

    Tests that need nothing in common are dealt out one by one at the end, wherever there is time left.
    """
    for item in items:
        if item.get_closest_marker("xdist_group") is None and _shares_a_fixture(item):
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))
    items.sort(
        key=lambda item: (
            END_TO_END not in item.path.parents,
            item.get_closest_marker("xdist_group") is None,
        )
    )


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Whether the test needs something that is made once for its file."""
    fixtures = getattr(item, "_fixtureinfo", None)  # pytest has no public name for it
    return fixtures is not None and any(
        definition.scope == "module"
        for definitions in fixtures.name2fixturedefs.values()
        for definition in definitions
    )


def system_program(name: str, path: str | None = None) -> str:
    """Path of a system program; without it the test is skipped, or fails where that is required (CI).

    Args:
        name: Of the program.
        path: Folders to look in, where they are not those of PATH.
    """
    path = shutil.which(name, path=path)
    if path is None:
        reason = f"{name} is not installed"
        if os.environ.get("REQUIRE_SYSTEM_PACKAGES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real offers; tests that need it are skipped only where there is none at all."""
    if not SHARED_DATA.parent.exists():
        pytest.skip("no real data beside this checkout")
    return SHARED_DATA

"""A registry to test with: a real MLflow database file, made once per run (it takes seconds) and copied."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from resources.tracking import MlflowTracking


def registry_in(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowTracking:
    """An empty registry of its own in ``folder``."""
    base = tmp_path_factory.getbasetemp()
    # Workers of one parallel run have neighbouring folders; the first makes the database for all.
    root = base.parent if base.name.startswith("popen-") else base
    empty = root / "empty-registry"
    with (root / "empty-registry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (empty / "made").exists():
            empty.mkdir(exist_ok=True)
            assert _tracking(empty).production() is None
            (empty / "made").touch()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty / "mlflow.db", folder)
    return _tracking(folder)


def _tracking(folder: Path) -> MlflowTracking:
    return MlflowTracking(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}", model_name="offer-categories")

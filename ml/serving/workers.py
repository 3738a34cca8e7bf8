"""What worker processes have in common: one thread each, and the same code as their parent."""

from __future__ import annotations

import os
from pathlib import Path

_IMPORT_ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package ``ml``."""


def single_thread_environment() -> dict[str, str]:
    """Environment of a worker process: this one's, with one thread, and this code importable."""
    search_path = [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
    }

"""How long the definitions take to load in a fresh process, and whether that pulls in anything heavy.

Five fresh processes, median and worst; the first one warms the disk cache and is not counted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.report import save, show

_LOADS = 5
_CODE = """
import sys
from offer_assets.definitions import build_defs
from resources.settings import Settings
build_defs(Settings.from_environment()).resolve_asset_graph()
print("torch" in sys.modules)
"""


def main() -> None:
    """Measure and report."""
    seconds, torch_imported = [], False
    for _ in range(_LOADS + 1):
        started_at = time.perf_counter()
        answer = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started_at)
        torch_imported |= answer.stdout.strip() == "True"
    counted = seconds[1:]
    figures = {
        "median_seconds": statistics.median(counted),
        "worst_seconds": max(counted),
        "torch_imported": torch_imported,
    }
    show([figures])
    save("definitions_load", figures)


if __name__ == "__main__":
    main()

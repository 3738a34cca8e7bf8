"""Time per asset of the demo run, and the share of it spent outside the model; then the same run again.

    python -m benchmarks.demo_run [--home DIR]

Runs ``python -m offer_assets demo`` twice in a home of its own, which ``--home`` keeps. *Inside the model*
is what the stages that train, label, evaluate, compile and catalogue took themselves (their manifest's
``seconds``); everything else, from Dagster to reading the feed, is outside.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.report import save, show

_MODEL_ASSETS = {
    "teacher_checkpoint",
    "teacher_labels",
    "fast_checkpoint",
    "student_checkpoint",
    "student_evaluation",
    "compiled_student",
    "catalogued_offers",
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, help="an empty folder, kept")
    given = parser.parse_args().home
    with nullcontext(given) if given else tempfile.TemporaryDirectory() as folder:
        home = str(folder)
        environment = {
            **os.environ,
            "OFFER_ASSETS_HOME": home,
            "OFFER_ASSETS_ENDPOINT_PORT": str(_free_port()),
        }
        try:
            first, second = (_run(environment, Path(home)) for _ in range(2))
        finally:
            subprocess.run([sys.executable, "-m", "offer_assets", "stop"], env=environment, check=False)
    inside = sum(asset["stage_seconds"] for asset in first["assets"] if asset["asset"] in _MODEL_ASSETS)
    show(
        [
            {"asset": asset["asset"], "partition": asset["partition"], "seconds": asset["seconds"]}
            for asset in first["assets"]
        ]
    )
    figures = {
        "seconds": first["seconds"],
        "seconds_inside_the_model": inside,
        "share_outside_the_model": 1 - inside / first["seconds"],
        "seconds_of_the_second_run": second["seconds"],
        "made_in_the_second_run": [asset["asset"] for asset in second["assets"] if asset["made"]],
        "peak_memory_of_the_largest_process_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        / 2**20,
    }
    show([{name: value for name, value in figures.items() if not isinstance(value, list)}])
    save("demo_run", {**figures, "assets": first["assets"]})


def _run(environment: dict[str, str], home: Path) -> dict[str, Any]:
    subprocess.run([sys.executable, "-m", "offer_assets", "demo"], env=environment, check=True)
    return msgspec.json.decode((home / "demo_timings.json").read_bytes(), type=dict[str, Any])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

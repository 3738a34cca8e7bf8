"""Runs every benchmark that needs nothing but this repository."""

from __future__ import annotations

import subprocess
import sys

_PROGRAMS = ("definitions_load", "demo_run", "throughput")


def main() -> None:
    """One after the other, each in its own process; throughput trains tiny models for itself."""
    for program in _PROGRAMS:
        print(f"\n== {program}\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{program}"], check=True)


if __name__ == "__main__":
    main()

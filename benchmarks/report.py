"""What all benchmarks share: where results go, and what is said about the machine."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ml.errors import InputError
from ml.runner import code_revision

RESULTS = Path(__file__).parent / "results"


@contextmanager
def refused_plainly() -> Iterator[None]:
    """What is wrong with options or files ends the program with one line instead of a traceback."""
    try:
        yield
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def machine() -> dict[str, Any]:
    """The machine that a figure belongs to."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "code_revision": code_revision(),
        "measured_on": datetime.date.today().isoformat(),
    }


def save(name: str, figures: Mapping[str, Any]) -> None:
    """Write one benchmark's result beside the others."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), **figures}
    path = RESULTS / f"{name}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    print(f"\nwritten to {path.relative_to(RESULTS.parent.parent)}")


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, columns in the order of the first row."""
    names = list(rows[0])
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in ([*names], ["-" * width for width in widths], *cells):
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor()
    )

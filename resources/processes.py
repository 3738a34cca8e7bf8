"""Telling one process from another that got its id later."""

from __future__ import annotations

import subprocess
from pathlib import Path


def started_at(pid: int) -> str | None:
    """When the process started, as the system tells it; None where there is no such (living) process.

    Only good for comparing with an earlier answer on the same machine.
    """
    if Path("/proc/self/stat").exists():
        return _from_proc(pid)
    answer = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


def _from_proc(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may hold spaces; the state comes right after it.
    fields = stat.rpartition(")")[2].split()
    state, ticks_since_boot = fields[0], fields[19]
    return None if state == "Z" else f"{boot}:{ticks_since_boot}"

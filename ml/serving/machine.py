"""What this machine is, as far as it matters to how fast it computes."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ml.cores import available_cores

_INSTANCE_VARIABLE = "SM_CURRENT_INSTANCE_TYPE"
"""SageMaker sets it in the containers of jobs."""

_AMAZON = "Amazon EC2"
_ARCHITECTURES = {"amd64": "x86_64", "aarch64": "arm64"}
"""What some systems call it, and what others do."""

_FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),  # x86_64
    *("asimddp", "i8mm", "bf16", "sve"),  # arm64
)
"""Instructions that decide how fast, and how, a CPU multiplies matrices; as Linux calls them."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a machine that this process may use."""

    cpu: str
    cores: int
    architecture: str
    """``x86_64`` or ``arm64``, mostly."""
    instance_type: str = ""
    """``ml.c7i.xlarge``, ``c7i.xlarge``; empty: none, or not known."""

    @property
    def description(self) -> str:
        """All of it in a line; figures of two machines may be compared only where it is the same."""
        instance = f"{self.instance_type}: " if self.instance_type else ""
        return f"{instance}{self.cpu}, {self.architecture}, {self.cores} cores"


def this_machine(
    variables: Mapping[str, str] | None = None,
    *,
    dmi: Path = Path("/sys/devices/virtual/dmi/id"),
    cpu_file: Path = Path("/proc/cpuinfo"),
) -> Machine:
    """Where this process runs.

    Args:
        variables: Of the environment; None: of this process.
        dmi: Folder in which Linux keeps what the firmware says; on EC2 that is the instance type.
        cpu_file: In which Linux names the CPU.
    """
    variables = os.environ if variables is None else variables
    architecture = platform.machine()
    return Machine(
        cpu=_cpu(cpu_file) or platform.processor() or "unknown CPU",
        cores=available_cores(),
        architecture=_ARCHITECTURES.get(architecture.lower(), architecture),
        instance_type=variables.get(_INSTANCE_VARIABLE) or _ec2_type(dmi),
    )


def cpu_features(cpu_file: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Which of the instructions that matter to matrix products this CPU has; empty where nothing tells."""
    lines = _text(cpu_file).splitlines()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    present = set(flags.partition(":")[2].split())
    return [name for name in _FEATURES if name in present]


def _cpu(file: Path) -> str:
    lines = _text(file).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _ec2_type(dmi: Path) -> str:
    return _text(dmi / "product_name").strip() if _text(dmi / "sys_vendor").strip() == _AMAZON else ""


def _text(file: Path) -> str:
    """Content of a file of the system; empty where it has none (macOS, some containers)."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""

"""AWS Neuron: which SDK compiles for Inferentia 2, and which host runs the result.

Light on purpose: the supervisor of the servers asks here how many cores there are. ``torch_neuronx`` is
imported only by who compiles or runs a model.

The packages of these names on the public index are empty placeholders, so being installed proves nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml.errors import InputError

DEVICE_FAMILY = "inf2"

REFERENCE = "reference_"
"""Before the metrics of a model that cannot run where it was compiled: they are its reference's."""

COMPILER_ARGUMENTS = [
    "--target",
    DEVICE_FAMILY,
    "--model-type",
    "transformer",
    "--auto-cast",
    "matmult",
    "--auto-cast-type",
    "bf16",
]
"""bfloat16 for the matrix products alone; sums, norms and the output stay in float32."""

SDK_VERSION = "2.9.0.2.15.32035"
"""Of torch-neuronx: the last that compiles for inf2, of SDK 2.31. The asset asks for it, the image has it."""

SDK_PACKAGES = ("torch", "torch-neuronx", "neuronx-cc")
"""A compiled program belongs to the versions of these."""

_RELEASE = "2.9."
"""Release line of torch-neuronx that still has ``trace`` and compiles for inf2."""

_COMPILER_RELEASE = "2."
_IMAGE = "pytorch-inference-neuronx:2.9.0-neuronx-py312-sdk2.31.1-ubuntu24.04"
_TARGET_VARIABLE = "NEURON_PLATFORM_TARGET_OVERRIDE"
_CORE_VARIABLE = "NEURON_RT_VISIBLE_CORES"
_CORES_PER_DEVICE = 2
"""Of Inferentia 2."""

_FAMILY_OF = {"inferentia2": "inf2", "trainium1": "trn1", "trainium2": "trn2", "trainium3": "trn3"}
"""Device family by the name that the driver gives the device."""


@dataclass(frozen=True)
class NeuronHost:
    """The Neuron devices of a machine, as its driver shows them."""

    root: Path = Path("/")

    @property
    def devices(self) -> int:
        """Number of devices; 0 where this is no Neuron host."""
        return len(list((self.root / "dev").glob("neuron[0-9]*")))

    @property
    def cores(self) -> int:
        """Cores of all devices together."""
        return self.devices * _CORES_PER_DEVICE

    @property
    def family(self) -> str:
        """Device family (``inf2``), or the driver's name for it; empty where the driver does not tell."""
        architecture = self.root / "sys/devices/virtual/neuron_device/neuron0/info/architecture"
        try:
            name = (architecture / "device_name").read_text(encoding="utf-8").strip().lower()
        except OSError:  # drivers since 2.31 keep it elsewhere; the runtime refuses what does not fit
            return ""
        return _FAMILY_OF.get(name, name)


def sdk_versions() -> dict[str, str]:
    """Version of each of :data:`SDK_PACKAGES`; empty for one that is not installed."""
    return {name: _version(name) for name in SDK_PACKAGES}


def load_compiler(version: str = "") -> Any:
    """Import ``torch_neuronx`` so that it compiles for inf2 on any machine.

    Args:
        version: That it has to have; empty: any of the release line that compiles for inf2.

    Raises:
        InputError: the SDK is not there, is a placeholder, or another version.
    """
    # Read when the package is imported: without it, it looks for a device to compile for.
    os.environ[_TARGET_VARIABLE] = DEVICE_FAMILY
    module, found = _import_sdk()
    if module is None:
        raise InputError(
            f"target neuron needs the AWS Neuron SDK, torch_neuronx {_RELEASE}x with neuronx-cc, as in the "
            f"image {_IMAGE} (the packages of these names on the public index are empty placeholders); "
            f"here {found}. Use target cpu, or compile in that image"
        )
    if version and _release(installed := _version("torch-neuronx")) != _release(version):
        raise InputError(
            f"torch-neuronx {version} has to compile, here is {installed}; a compiled program runs with its "
            f"own SDK only: compile in the image {_IMAGE}"
        )
    return module


def load_runtime(model: Path, made_with: Mapping[str, str], family: str, host: NeuronHost) -> None:
    """Make sure that a model compiled for Neuron can run here, and teach torch its operators.

    Args:
        model: Its folder, for the message.
        made_with: Versions of the packages that compiled it.
        family: Device family that it was compiled for.
        host: This machine.

    Raises:
        InputError: this is not a Neuron host, its devices are of another family, or its SDK is another.
    """
    check_host(model, made_with, family, host)
    module, found = _import_sdk()
    if module is None:
        raise InputError(f"{_was_compiled(model, made_with, family)}; here {found}. {_where_to_run()}")


def check_host(model: Path, made_with: Mapping[str, str], family: str, host: NeuronHost) -> None:
    """The part of :func:`load_runtime` that imports nothing."""
    was_compiled = _was_compiled(model, made_with, family)
    if host.devices == 0:
        raise InputError(
            f"{was_compiled}; this is not a Neuron host ({host.root / 'dev/neuron0'} is missing). "
            f"{_where_to_run()}"
        )
    if host.family not in ("", family):
        raise InputError(
            f"{was_compiled}; the devices of this host are {host.family}. Serve it on {family}, or compile "
            "the student again"
        )
    versions = sdk_versions()
    for name, expected in made_with.items():
        if _release(versions.get(name, "")) != _release(expected):
            raise InputError(
                f"{was_compiled}; here {name} is {versions.get(name) or 'not installed'}, expected "
                f"{expected}. Serve it in the image that compiled it, or compile the student again"
            )


def core_environment(core: int | None) -> dict[str, str]:
    """Variables that leave a process one Neuron core; none where it needs none."""
    return {} if core is None else {_CORE_VARIABLE: str(core)}


def _import_sdk() -> tuple[Any, str]:
    """``torch_neuronx``, or None and why not: the placeholder installs, and can even be found."""
    if importlib.util.find_spec("torch_neuronx") is None:
        return None, "torch_neuronx is not installed"
    version, compiler = _version("torch-neuronx"), _version("neuronx-cc")
    try:
        module = importlib.import_module("torch_neuronx")
    except Exception as error:  # an SDK that does not fit the machine fails in ways of its own
        return None, f"torch_neuronx cannot be imported ({' '.join(str(error).split())[:200]})"
    if not hasattr(module, "trace") or not version.startswith(_RELEASE):
        return None, f"torch_neuronx {version} cannot trace (a placeholder or another release)"
    if not compiler.startswith(_COMPILER_RELEASE):
        return None, f"neuronx-cc is {compiler or 'not installed'} (a placeholder or another release)"
    return module, ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """Without the mark of the build: ``2.9.0+cpu`` and ``2.9.0`` run the same programs."""
    return version.split("+", maxsplit=1)[0]


def _was_compiled(model: Path, made_with: Mapping[str, str], family: str) -> str:
    sdk = ", ".join(f"{name} {version}" for name, version in made_with.items())
    return f"{model} was compiled for neuron ({family}; {sdk})"


def _where_to_run() -> str:
    return f"Serve it on an {DEVICE_FAMILY} instance in the image that compiled it, or use target cpu"

"""What worker processes have in common: one thread each, the same code as their parent, a core to itself."""

from __future__ import annotations

import os
from pathlib import Path

from ml.artifacts import read_manifest
from ml.cores import available_cores
from ml.errors import InputError
from ml.serving import neuron

_IMPORT_ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds the package ``ml``."""


def cores_for_workers(
    model: Path, workers: int | None = None, host: neuron.NeuronHost | None = None
) -> list[int | None]:
    """What each worker process has to itself, one entry per worker.

    Args:
        model: Folder of the compiled model.
        workers: Number of processes; None: one per core of what computes.
        host: Whose Neuron cores are given away; None: this machine's.

    Returns:
        Numbers of Neuron cores, for a process owns those it uses; None for each worker of any other target.

    Raises:
        InputError: the model cannot be read or run here, or there are fewer Neuron cores than workers.
    """
    # Here, for the supervisor of workers and the router run no model themselves.
    from ml.serving.compiled_model import NEURON, ModelSettings, traced_form

    read_manifest(model)  # of a wrong or unfinished folder it says so
    settings = ModelSettings.read(model)
    if settings.target != NEURON:
        return [None] * (workers or available_cores())
    host = host or neuron.NeuronHost()
    traced = traced_form(model, settings)
    neuron.check_host(model, traced.versions, traced.device_family, host)
    if workers is not None and workers > host.cores:
        raise InputError(
            f"--workers {workers}: this host has {host.cores} Neuron cores, each worker needs one to itself"
        )
    return list(range(workers or host.cores))


def single_thread_environment(neuron_core: int | None = None) -> dict[str, str]:
    """Environment of a worker process: this one's, with one thread, and this code importable.

    Args:
        neuron_core: The one core that it may use; None where it needs none.
    """
    search_path = [str(_IMPORT_ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        **neuron.core_environment(neuron_core),
    }

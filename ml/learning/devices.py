"""What there is to compute on, and how to compute on it."""

from __future__ import annotations

import os

import torch

from ml.cores import available_cores
from ml.world import world_from_environment


def best_device() -> torch.device:
    """The GPU where there is one (of several, the one that is this process's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", world_from_environment().local_rank)
    return torch.device("cpu")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether to compute in bfloat16: on GPUs made for it. Elsewhere it may be slow by surprise."""
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 arithmetic where :func:`computes_in_bfloat16` says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bfloat16(device))


def use_available_cores() -> None:
    """One thread for every core this process may use, unless ``OMP_NUM_THREADS`` says otherwise.

    Processes that share the work of a stage share the cores too.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, available_cores() // world_from_environment().local_size))

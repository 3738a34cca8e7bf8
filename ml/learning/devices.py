"""What there is to compute on, and how to compute on it."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch

from ml.cores import available_cores
from ml.errors import InputError
from ml.serving.machine import cpu_features
from ml.stages import Precision
from ml.world import world_from_environment

_MULTIPLIES_BFLOAT16 = {"avx512_bf16", "amx_bf16"}
"""Instructions with which a CPU trains faster in bfloat16; elsewhere it may be slow by surprise."""


def best_device() -> torch.device:
    """The GPU where there is one (of several, the one that is this process's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", world_from_environment().local_rank)
    return torch.device("cpu")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether to predict in bfloat16: on GPUs made for it. On a CPU the answers stay exact."""
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def trains_in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether to train with products in bfloat16 and weights in float32 (mixed precision).

    Raises:
        InputError: ``bfloat16`` was asked for on a GPU that cannot.
    """
    can = computes_in_bfloat16(device) or (
        device.type == "cpu" and not _MULTIPLIES_BFLOAT16.isdisjoint(cpu_features())
    )
    if precision == "bfloat16" and device.type == "cuda" and not can:
        raise InputError("precision bfloat16: this GPU does not compute in it; take auto or float32")
    return precision == "bfloat16" or (precision == "auto" and can)


def autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """bfloat16 arithmetic where :func:`computes_in_bfloat16` says so; else as it is around this."""
    if computes_in_bfloat16(device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def training_autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The arithmetic of a training, for what is predicted in its course and by nobody after it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=trains_in_bfloat16(device, precision))


def use_available_cores() -> None:
    """One thread for every core this process may use, unless ``OMP_NUM_THREADS`` says otherwise.

    Processes that share the work of a stage share the cores too.
    """
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, available_cores() // world_from_environment().local_size))

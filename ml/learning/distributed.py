"""What processes that share the work of a stage tell each other; alone, all of it does nothing.

Lightning Fabric trains (device, precision, gradients averaged over the processes). Predictions are dealt out
batch by batch. Nothing is pickled: what travels is tensors and JSON.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as torch_distributed

from ml.learning.devices import best_device, trains_in_bfloat16
from ml.stages import Precision
from ml.world import World, world_from_environment

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for another: more than reading inputs or writing a checkpoint takes."""
_ELEMENTS_AT_ONCE = 1 << 24

Item = TypeVar("Item")


class _Parcel(msgspec.Struct, frozen=True):
    """What is said of tensors before they travel: their names, types and shapes."""

    tensors: list[tuple[str, str, list[int]]]


def serve_meeting_place(place: Mapping[str, str], listening: socket.socket | None) -> Any:
    """Open the store through which the processes find each other, for as long as the result lives.

    Args:
        place: ``MASTER_ADDR`` and ``MASTER_PORT``.
        listening: The socket to use, which the store takes over; None: it opens one at that port.
    """
    return torch_distributed.TCPStore(
        place["MASTER_ADDR"],
        int(place["MASTER_PORT"]),
        is_master=True,
        wait_for_workers=False,
        timeout=_PATIENCE,
        master_listen_fd=listening.detach() if listening else None,
    )


def join(world: World) -> None:
    """Meet the other processes, as the environment says; returns when all are there."""
    device = best_device()
    store = torch_distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE
    )
    on_gpu = device.type == "cuda"
    torch_distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=_PATIENCE,
        device_id=device if on_gpu else None,
    )


def leave() -> None:
    """Part from the other processes; returns when all that was to be said has been said."""
    torch_distributed.destroy_process_group()


def leave_in_failure() -> None:
    """Part from processes that may be gone; not on GPUs, where it could take for ever."""
    if torch_distributed.is_initialized() and torch_distributed.get_backend() == "gloo":
        torch_distributed.destroy_process_group()


def start_fabric(device: torch.device, precision: Precision) -> Fabric:
    """Fabric for this process, which trains on ``device`` in this precision, and the others."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy, SingleDeviceStrategy

    world = world_from_environment()
    alone = world.size == 1
    fabric: Fabric = Fabric(
        accelerator=device.type,
        devices=world.local_size,
        num_nodes=world.nodes,
        precision="bf16-mixed" if trains_in_bfloat16(device, precision) else "32-true",
        strategy=(
            SingleDeviceStrategy(device)
            if alone
            else DDPStrategy(forward_sync_buffers=False, gradient_as_bucket_view=True)
        ),
        # named, so that Fabric looks for no cluster of its own
        plugins=[LightningEnvironment() if alone else TorchElasticEnvironment()],
    )
    fabric.launch()
    return fabric


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """Every ``size``-th of ``items``, which are this process's to do."""
    world = world_from_environment()
    return items[world.rank :: world.size]


def add_up(array: NDArray[np.float32], device: torch.device) -> None:
    """Add the arrays of all processes, in place; every process calls this with one of the same shape."""
    if world_from_environment().size == 1:
        return
    values = torch.from_numpy(array).view(-1)
    for piece in values.split(_ELEMENTS_AT_ONCE):
        there = piece.to(device)
        torch_distributed.all_reduce(there)
        piece.copy_(there)


def message_of_first(message: bytes) -> bytes:
    """What the first process passes here, in every process (which pass what they like)."""
    if world_from_environment().size == 1:
        return message
    device = best_device()
    length = torch.tensor([len(message)], device=device)
    torch_distributed.broadcast(length, src=0)
    content = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if world_from_environment().is_first:
        content.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
    torch_distributed.broadcast(content, src=0)
    return bytes(content.cpu().numpy())


def tensors_of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the first process passes here, in every process, on the CPU."""
    world, device = world_from_environment(), best_device()
    if world.size == 1:
        return dict(tensors)
    listed = [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in tensors.items()
    ]
    parcel = msgspec.json.decode(message_of_first(msgspec.json.encode(_Parcel(listed))), type=_Parcel)
    received = {}
    for name, dtype, shape in parcel.tensors:
        there = (
            tensors[name].to(device)
            if world.is_first
            else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        )
        torch_distributed.broadcast(there, src=0)
        received[name] = there.cpu()
    return received

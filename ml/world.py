"""Which of the processes that share a stage's work this one is.

The variables are torchrun's; :mod:`ml.ranks` sets them for the processes that it starts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:  # every command of ``ml`` comes by here, also those that need no numpy
    import numpy as np
    from numpy.typing import NDArray

_MARK = "TORCHELASTIC_RUN_ID"
"""Without it, variables such as ``RANK`` are somebody else's."""


class World(msgspec.Struct, frozen=True, kw_only=True):
    """A number of equal processes on one or more machines, seen from one of them."""

    rank: int = 0
    """Number of this process among all."""
    size: int = 1
    """Processes, on all machines together."""
    local_rank: int = 0
    """Number of this process on its machine; also that of its GPU."""
    local_size: int = 1
    """Processes on each machine."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks, and writes what stays."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """Number of this machine."""
        return self.rank // self.local_size

    @property
    def nodes(self) -> int:
        """How many machines there are."""
        return self.size // self.local_size

    def at(self, local_rank: int) -> World:
        """The same world, seen from another process of this machine."""
        return World(
            rank=self.node * self.local_size + local_rank,
            size=self.size,
            local_rank=local_rank,
            local_size=self.local_size,
        )

    def variables(self) -> dict[str, str]:
        """What :func:`world_from_environment` and Fabric read."""
        return {
            _MARK: "offer-assets",
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "GROUP_RANK": str(self.node),
        }

    def share_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], float]:
        """The rows of a batch that are this process's, and the weight of their mean.

        The mean over all processes of weight times mean over own rows is the mean over the batch. Rows are
        dealt out one by one: neighbours are of similar length, so all processes have as much to do.

        Args:
            rows: Row numbers, (rows,), at least one.

        Returns:
            Row numbers, at least one: where there are fewer rows than processes, those that go without take
            the first, and its weight is 0.
        """
        own = rows[self.rank :: self.size]
        return (own, self.size * len(own) / len(rows)) if len(own) else (rows[:1], 0.0)


def world_from_environment() -> World:
    """The world that this process was started into; alone, if it was started into none."""
    if _MARK not in os.environ:
        return World()
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
    )

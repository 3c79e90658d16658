"""The processes of a run: who I am among them, and how they agree. Everything here is called by all ranks together.

Ray Train has set up torch's process group and the environment when a worker begins.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size`."""

    rank: int
    world_size: int
    local_rank: int
    """Among the processes of its node; 0 is the node's leader."""
    device: torch.device

    @classmethod
    def here(cls) -> Ranks:
        """Of this process, from its process group and environment."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on every rank. Values are pickled: small ones."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank. If it raises there, it raises everywhere."""
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        dist.all_reduce(values)
        return values

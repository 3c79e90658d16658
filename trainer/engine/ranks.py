"""The ranks of a run and their collectives. Everything here is called by all ranks together.

Ray Train has set up torch's process group and the environment when a worker begins. What ranks tell each other here is JSON in
tensors of bytes, and figures: nothing that arrives is unpickled, since gloo and NCCL do not know who sends. That does not make
a hostile network safe: torch's own store, by which the ranks find each other, asks nobody who he is, and DeepSpeed may exchange
pickled objects when it starts. Training nodes need a network of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
E = TypeVar("E", bound=type[Exception])

_told: dict[str, type[Exception]] = {"ValueError": ValueError, "RuntimeError": RuntimeError, "OSError": OSError}


def told_to_ranks(error: E) -> E:
    """Decorates an exception class that all ranks raise when rank 0 raises it in `from_first`."""
    _told[error.__name__] = error
    return error


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
        """Describes this process from its process group and environment."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Gathers a small JSON value of every rank, in the order of ranks, on every rank; tuples arrive as lists."""
        content = _to_bytes(value)
        sizes = [int(size) for size in self.gather_tensors(torch.tensor(len(content)))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(content)] = content
        return [_from_bytes(received[:size]) for received, size in zip(self.gather_tensors(padded), sizes)]

    def gather_tensors(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Gathers a CPU tensor of every rank, in the order of ranks, on every rank; all have one shape and dtype."""
        received = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(received, tensor.contiguous())
        return received

    def from_first(self, make: Callable[[], T]) -> T:
        """Calls `make` on rank 0 and broadcasts its JSON value; an exception there is raised on every rank.

        Other ranks raise the same message, as the same class if it is ValueError, RuntimeError, OSError or one that
        `told_to_ranks` knows."""
        content, error = None, None
        if self.first:
            try:
                content = _to_bytes([make(), None])
            except Exception as raised:
                error, content = raised, _to_bytes([None, [_known_class(raised), str(raised)]])
        size = torch.tensor(len(content) if content is not None else 0)
        dist.broadcast(size, src=0)
        content = content if content is not None else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, src=0)
        value, problem = _from_bytes(content)
        if error is not None:
            raise error
        if problem is not None:
            raise _told[problem[0]](problem[1])
        return value

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        dist.all_reduce(values)
        return values


def _known_class(error: Exception) -> str:
    """Returns the name of the first of the exception's classes that other ranks know."""
    return next((base.__name__ for base in type(error).__mro__ if _told.get(base.__name__) is base), "RuntimeError")


def _to_bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(content: torch.Tensor) -> Any:
    return json.loads(content.numpy().tobytes())

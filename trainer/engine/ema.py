"""Exponential moving average of the weights: fp32, element-wise, each rank on the partition of the masters that it owns.

No communication and no gathered weights: a rank averages what its optimizer updates. The whole average exists only on disk,
in slices (see shards.py), and for a moment in the model while it is validated (`applied`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.engine.partitions import masters_are_weights, partitions_of, write_weights
from trainer.engine.shards import ShardReader, write_shard


class EMA:
    """The average of an engine's weights. Begins as a copy of them."""

    def __init__(self, engine: Any):
        self.partitions = partitions_of(engine)
        self.average: list[Tensor] = [partition.master.detach().float().clone() for partition in self.partitions]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average = decay * average + (1 - decay) * weights, after an optimizer step."""
        masters = [partition.master.detach() for partition in self.partitions]
        torch._foreach_lerp_(self.average, masters, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self, engine: Any) -> Iterator[None]:
        """Swaps the average into the model inside the context, and its own weights back after. All ranks call it together."""
        masters = [partition.master.detach() for partition in self.partitions]
        if masters_are_weights(engine):
            masters = [master.clone() for master in masters]
        write_weights(engine, self.average)
        try:
            yield
        finally:
            write_weights(engine, masters)

    def save(self, path: Path) -> None:
        """Writes this rank's slices of the average."""
        pairs = zip(self.average, self.partitions)
        write_shard(
            path,
            (
                (piece.name, piece.start, average.flatten()[piece.offset : piece.offset + piece.numel])
                for average, partition in pairs
                for piece in partition.slices
            ),
        )

    @torch.no_grad()
    def load(self, paths: list[Path]) -> None:
        """Reads this rank's slices from the files of all ranks that saved, however many, or from its own file alone."""
        with ShardReader(paths) as reader:
            for average, partition in zip(self.average, self.partitions):
                flat = average.view(-1)
                for piece in partition.slices:
                    flat[piece.offset : piece.offset + piece.numel] = reader.read(piece.name, piece.start, piece.numel)

"""Sharded tensors on disk: one safetensors file per rank with its pieces, read back whole or in any other cut.

A file holds flat pieces by parameter name; its metadata says where in the parameter each begins. So a state saved by any
number of ranks is read by any other number, without a conversion.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STARTS = "starts"  # key of the file's metadata: JSON, name -> first element


def write_shard(path: Path, slices: Iterable[tuple[str, int, Tensor]]) -> None:
    """Writes (name, first element in the flattened parameter, flat piece) of every parameter that a rank has a part of."""
    starts, tensors = {}, {}
    for name, start, piece in slices:
        assert name not in tensors, f"two pieces of {name} on one rank"
        starts[name], tensors[name] = start, piece.detach().to("cpu", copy=True).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={STARTS: json.dumps(starts)})


class ShardReader:
    """Reads the shards of some or all ranks. Use as a context."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)
        self._files: list[Any] = []
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # name -> (start, end, file), ascending

    def __enter__(self) -> ShardReader:
        for path in self.paths:
            try:
                file = safe_open(path, framework="pt", device="cpu").__enter__()
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: expected safetensors, received {error}") from error
            self._files.append(file)
            for name, start in json.loads(file.metadata()[STARTS]).items():
                (numel,) = file.get_slice(name).get_shape()
                self._pieces.setdefault(name, []).append((start, start + numel, file))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)
        self._files, self._pieces = [], {}

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """Reads elements start .. start + numel of a flattened parameter, (numel,).

        Raises:
            ValueError: no file has some of them.
        """
        end, done = start + numel, start
        parts = []
        for first, last, file in self._pieces.get(name, []):
            if first <= done < min(last, end):
                parts.append(file.get_slice(name)[done - first : min(last, end) - first])
                done = min(last, end)
        if done < end:
            raise ValueError(
                f"{name}: elements {done:,} to {end:,} are in none of {', '.join(path.name for path in self.paths)}; "
                f"was the checkpoint written by a model of another shape?"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str, shape: Sequence[int]) -> Tensor:
        """Reads a whole parameter."""
        return self.read(name, 0, torch.Size(shape).numel()).reshape(tuple(shape))

    def state(self, shapes: Mapping[str, Sequence[int]]) -> Iterable[tuple[str, Tensor]]:
        """Yields (name, parameter) one by one."""
        for name, shape in shapes.items():
            yield name, self.whole(name, shape)

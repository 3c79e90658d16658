"""Sharded tensors on disk: any cut written, any other cut read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.engine.shards import ShardReader, write_shard

pytestmark = pytest.mark.unit
SHAPES = {"a": (7, 5), "b": (3,), "c": (1,)}


def cut(folder: Path, state: dict[str, torch.Tensor], borders: dict[str, list[int]]) -> list[Path]:
    """Writes each parameter in pieces that end at its borders, one per rank; an empty piece is no piece."""
    ranks = max(map(len, borders.values()))
    paths = []
    for rank in range(ranks):
        pieces = []
        for name, ends in borders.items():
            start = ends[rank - 1] if rank else 0
            if start < ends[rank]:
                pieces.append((name, start, state[name].flatten()[start : ends[rank]]))
        paths.append(folder / f"rank_{rank}.safetensors")
        write_shard(paths[-1], pieces)
    return paths


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "borders", [{"a": [35], "b": [3], "c": [1]}, {"a": [12, 24, 35], "b": [0, 2, 3], "c": [1, 1, 1]}]
)
def test_whole_and_any_piece(tmp_path: Path, state: dict[str, torch.Tensor], borders: dict[str, list[int]]) -> None:
    paths = cut(tmp_path, state, borders)
    with ShardReader(list(reversed(paths))) as reader:
        for name, value in reader.state(SHAPES):
            assert torch.equal(value, state[name])
        draw = np.random.default_rng(1)
        for _ in range(50):
            start, end = sorted(draw.integers(0, 36, 2).tolist())
            assert torch.equal(reader.read("a", start, end - start), state["a"].flatten()[start:end])


def test_what_is_not_there_is_told(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    paths = cut(tmp_path, state, {"a": [12, 35], "b": [3, 3], "c": [1, 1]})
    with (
        ShardReader(paths[:1]) as reader,
        pytest.raises(ValueError, match=r"a: elements 12 to 20 are in none of rank_0"),
    ):
        reader.read("a", 5, 15)
    with ShardReader(paths) as reader, pytest.raises(ValueError, match="model of another shape"):
        reader.whole("nothing", (2,))
    paths[1].write_bytes(paths[1].read_bytes()[:50])
    with pytest.raises(ValueError, match=r"rank_1.safetensors: expected safetensors"), ShardReader(paths):
        pass

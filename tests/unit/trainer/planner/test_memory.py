"""What is counted on the meta device is what a real step keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lidit.config import SIZES, lidit_tiny
from lidit.info import parameter_counts
from lidit.model import LIDiT
from trainer.config import EMAConfig, PhaseConfig, TrainConfig, ZeroConfig
from trainer.planner.memory import count_parameters, memory_of, saved_activations

pytestmark = pytest.mark.unit

TOKENS, INSTRUCTION = {"one": 24, "two": 16}, {"one": 5, "two": 3}
MODEL = lidit_tiny({"one": 32, "two": 48}, in_channels=4, depth=3)
PHASE = PhaseConfig(steps=1, global_batch_size=64)


def really_saved(checkpointing: bool) -> int:
    """Bytes that autograd keeps of a real forward pass of two samples, on the CPU."""
    model = LIDiT(MODEL).set_checkpointing(checkpointing)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, Any] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    embeds = {name: torch.randn(2, length, MODEL.encoders[name]) for name, length in TOKENS.items()}
    masks = {name: torch.ones(2, length, dtype=torch.bool) for name, length in TOKENS.items()}
    instruction = {name: torch.randn(length, MODEL.encoders[name]) for name, length in INSTRUCTION.items()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(torch.randn(2, 4, 16, 16), torch.rand(2), embeds, masks, instruction)
    return sum(storage.nbytes() for storage in seen.values())


def counted(checkpointing: bool, model: Any = MODEL, batch: int = 2, dtype: torch.dtype = torch.float32) -> int:
    return saved_activations(model, batch, (16, 16), TOKENS, INSTRUCTION, dtype, checkpointing)


def test_activations_are_what_a_real_step_saves() -> None:
    """The CPU's attention kernel keeps what the fused ones keep, and copies of a mask besides."""
    assert counted(False) == pytest.approx(really_saved(False), rel=0.05)


def test_with_checkpointing_a_region_is_computed_again() -> None:
    kept, everything = really_saved(True), counted(False)
    assert kept < counted(True) < 0.7 * everything
    deeper = replace(MODEL, depth=30)
    assert counted(True, deeper) < 0.2 * counted(False, deeper)


def test_activations_grow_with_the_batch_and_shrink_with_the_precision() -> None:
    assert counted(False, batch=8) == pytest.approx(4 * counted(False), rel=0.02)
    assert 0.5 < counted(False, dtype=torch.bfloat16) / counted(False) < 0.8  # what is modulated is kept in fp32


@pytest.mark.parametrize("size", ["tiny", "1b"])
def test_parameters_are_the_models(size: str) -> None:
    model = SIZES[size](None, in_channels=16)
    every, small = count_parameters(model, 10_000)
    assert every == sum(parameter_counts(model).values())
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in LIDiT(model).parameters()]
    assert small == sum(number for number in sizes if number <= 10_000)


def of(stage: int, world_size: int = 8, **changes: Any) -> Any:
    zero = changes.pop("zero", ZeroConfig(stage=stage))  # type: ignore[arg-type]
    config = TrainConfig(phases=(PHASE,), zero=zero, **{"microbatch_size": 8, **changes})
    return memory_of(config, MODEL, world_size, activations=1e6)


def test_stages_shard_what_they_say() -> None:
    parameters = count_parameters(MODEL)[0]
    none, first, second, third = (of(stage) for stage in range(4))
    assert none.weights == first.weights == second.weights == 2 * parameters
    assert third.weights < 0.2 * second.weights
    assert none.optimizer == 12 * parameters and none.ema == 4 * parameters
    for memory in (first, second, third):
        assert memory.optimizer == 12 * parameters / 8 and memory.ema == 4 * parameters / 8
    assert none.gradients == first.gradients == 2 * parameters
    assert second.gradients == third.gradients == 2 * parameters / 8
    assert of(3, world_size=4).gradients == 4 * parameters / 4  # two microbatches, summed in fp32
    assert of(0, precision="fp32").optimizer == 8 * parameters  # no second copy of fp32 weights
    assert of(3, ema=EMAConfig(decay=0.0)).ema == 0
    assert third.total == pytest.approx(sum(third.parts().values())) and "host" not in third.parts()


def test_offloading_moves_bytes_to_the_host() -> None:
    plain = of(3)
    moved = of(3, zero=ZeroConfig(stage=3, offload_optimizer=True, offload_parameters=True))
    assert moved.optimizer == 0 and moved.host > plain.optimizer and moved.weights < plain.weights
    assert moved.total < plain.total


def test_secondary_partitions_cost_memory() -> None:
    parameters = count_parameters(MODEL)[0]
    more = of(3, zero=ZeroConfig(stage=3, hpz_partition_size=4), num_workers=8)
    assert more.weights - of(3).weights == pytest.approx(2 * parameters / 4)

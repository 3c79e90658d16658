"""GPU memory of a training step, counted on the model itself on the meta device.

Activations are what autograd saves for the backward pass: the forward pass is run on torch's meta device, which has shapes
and dtypes and no values, and every tensor saved is counted once. Attention counts as its fused kernel, which keeps queries,
keys, values, output and one number per query, where the meta device would keep all scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lidit.config import LIDiTConfig
from lidit.model import LIDiT
from trainer.config import TrainConfig
from trainer.engine.zero import accumulates_in_fp32, zero_optimization

ADAM_BYTES = 8  # bytes per weight: two fp32 moments
MASTER_BYTES = 4  # fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU, by what they are for; `host`: what offloading puts into a rank's host memory instead."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buffers: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Returns the bytes on the GPU, without the allocator's waste and CUDA's own gigabyte."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Returns the bytes on the GPU by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "host"}


def count_parameters(model: LIDiTConfig, persistent_elements: int = 0) -> tuple[int, int]:
    """Counts (all parameters, those in tensors of at most `persistent_elements`)."""

    def count(config: LIDiTConfig) -> np.ndarray:
        with torch.device("meta"):
            sizes = np.array([parameter.numel() for parameter in LIDiT(config).parameters()])
        return np.array([sizes.sum(), sizes[sizes <= persistent_elements].sum()])

    every, small = _for_depth(model, count)
    return int(every), int(small)


def saved_activations(
    model: LIDiTConfig,
    microbatch_size: int,
    latent_size: tuple[int, int],
    prompt_tokens: Mapping[str, int],
    instruction_tokens: Mapping[str, int],
    dtype: torch.dtype,
    checkpointing: bool = False,
) -> int:
    """Counts the bytes that autograd saves in the forward pass of one microbatch.

    With activation checkpointing: what is kept, and the one region that is computed again at a time.
    """
    sample = (microbatch_size, latent_size, prompt_tokens, instruction_tokens, dtype)

    kept = _for_depth(model, lambda config: np.array(_saved(config, *sample, checkpointing)))
    if not checkpointing:
        return int(kept)
    one, two = (_saved(dataclasses.replace(model, depth=depth), *sample, False) for depth in (1, 2))
    block, refiners = two - one, one - (two - one)
    return int(kept) + max(block, refiners)


def _for_depth(model: LIDiTConfig, count: Callable[[LIDiTConfig], np.ndarray]) -> np.ndarray:
    """Extrapolates a count to the model's depth from models of one and two blocks: all blocks are alike."""
    one, two = (count(dataclasses.replace(model, depth=depth)) for depth in (1, 2))
    return one + (model.depth - 1) * (two - one)


def memory_of(
    config: TrainConfig,
    model: LIDiTConfig,
    world_size: int,
    activations: float,
) -> Memory:
    """Estimates a GPU's memory, as DeepSpeed uses it at the config's ZeRO stage.

    Weights in the run's precision; fp32 master weights and AdamW's two moments (Muon's one is counted as two); EMA in fp32;
    buckets twice where communication overlaps; at stage 3 also the weights that are gathered at a time.
    """
    zero = config.zero
    sharding = zero_optimization(zero, model, world_size, on_gpu=config.use_gpu is not False)
    parameters, persistent = count_parameters(model, sharding.get("stage3_param_persistence_threshold", 0))
    width = 2 if config.precision == "bf16" else 4
    gradient_width = 4 if accumulates_in_fp32(zero, config.precision, config.run_phases, world_size) else width
    shard = parameters / world_size
    weights = float(width * parameters)
    if zero.stage == 3:
        copies = 0 if zero.hpz_partition_size == 1 else width * parameters / zero.hpz_partition_size
        weights = (0 if zero.offload_parameters else width * shard) + width * persistent + copies
    gradients = gradient_width * (shard if zero.stage >= 2 else parameters)
    masterless = zero.stage == 0 and config.precision == "fp32"  # torch's optimizer on the weights themselves
    owned = shard if zero.stage else parameters
    optimizer = (ADAM_BYTES + (0 if masterless else MASTER_BYTES)) * owned
    buffers = width * sharding["reduce_bucket_size"] * (2 if sharding["overlap_comm"] else 1)
    if zero.stage == 3:
        gathered = min(parameters, sharding["stage3_max_live_parameters"])
        buffers += width * (gathered + min(parameters, sharding["stage3_prefetch_bucket_size"]))
    if not masterless:
        buffers += MASTER_BYTES * owned  # gradients in fp32 while the optimizer steps
    host = width * shard if zero.offload_parameters else 0.0
    if zero.offload_optimizer:
        host += optimizer + MASTER_BYTES * owned
        buffers -= MASTER_BYTES * owned
        optimizer = 0.0
    ema = MASTER_BYTES * owned if config.ema.decay else 0.0
    return Memory(weights, gradients, optimizer, ema, activations, float(buffers), host)


def _saved(
    config: LIDiTConfig,
    microbatch_size: int,
    latent_size: tuple[int, int],
    prompt_tokens: Mapping[str, int],
    instruction_tokens: Mapping[str, int],
    dtype: torch.dtype,
    checkpointing: bool,
) -> int:
    with torch.device("meta"):
        model = LIDiT(config).to(dtype).set_checkpointing(checkpointing)
        noisy_latents = torch.empty(microbatch_size, config.in_channels, *latent_size)
        timestep = torch.empty(microbatch_size)
        embeds, masks, instruction = {}, {}, {}
        for name, width in config.encoders.items():
            embeds[name] = torch.empty(microbatch_size, prompt_tokens[name], width, dtype=dtype)
            masks[name] = torch.ones(microbatch_size, prompt_tokens[name], dtype=torch.bool)
            instruction[name] = torch.empty(instruction_tokens[name], width)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no address is used twice

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), _FusedAttention():
        model(noisy_latents, timestep, embeds, masks, instruction)
    return sum(storage.nbytes() for storage in seen.values())


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by one that saves what the fused kernels save."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Shapes of fused attention, forward only: (B, N, S, K), (B, N, L, K) twice -> (B, N, S, K)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

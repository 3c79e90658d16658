"""The config of ZeRO -> DeepSpeed's dictionary, purely. What the config does not ask for is derived from the model's width.

Sizes are in elements. A DiT block has about 25 D^2 weights (9 modulation, 4 self-attention, 4 cross-attention, 8 feed-forward),
its largest matrix, the modulation, 9 D^2.

- gradients are reduced in buckets of one such matrix: large enough to be bandwidth-bound, and two of them (one is filled while
  the other is sent) are small beside a block's weights;
- stage 3 fetches one block ahead of use, and keeps at least four gathered;
- what is a vector (norms, biases, those of the modulation included) stays whole on every rank at stage 3: thousands of
  all-gathers of a few kilobytes would cost their latency each, and together they are a thousandth of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lidit.config import LIDiTConfig
from trainer.config import Precision, RunPhase, ZeroConfig

BLOCK = 25  # D^2 weights of a DiT block with ffn_ratio 4
LARGEST = 9  # D^2 weights of its largest matrix
MODULATION_VECTORS = 9
LIVE_BLOCKS = 4
SMALLEST_BUCKET = 1 << 20  # elements; below it a collective is all latency
GATHERED = 10**9  # weights that may be gathered at once: 2 GB in bf16, DeepSpeed's own default


def deepspeed_config(
    zero: ZeroConfig,
    model: LIDiTConfig,
    phases: Sequence[RunPhase],
    world_size: int,
    *,
    precision: Precision,
    grad_clip: float,
    on_gpu: bool,
) -> dict[str, Any]:
    """Builds the dictionary for `deepspeed.initialize(config=...)`, with the batch sizes of the first phase.

    Raises:
        ValueError: a phase's batch, or the secondary partitions, do not divide among the ranks.
    """
    microbatch_size, grad_accum_steps = phases[0].split(world_size)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": microbatch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "train_batch_size": phases[0].global_batch_size,
        "gradient_clipping": grad_clip,
        # Only the loop decides whether a step is taken: DeepSpeed looks for overflow at some stages, not at others.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": zero_optimization(zero, model, world_size, on_gpu),
        "zero_allow_untested_optimizer": True,  # torch's; DeepSpeed's own must be compiled
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,  # our own metrics
        "wall_clock_breakdown": False,
    }
    if accumulates_in_fp32(zero, precision, phases, world_size):
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def accumulates_in_fp32(zero: ZeroConfig, precision: Precision, phases: Sequence[RunPhase], world_size: int) -> bool:
    """Whether any phase sums gradients of several microbatches in fp32: in bf16 the small ones are lost in the sum.

    DeepSpeed makes the buffers once, for all phases, and has no such option at stage 0.
    """
    return precision == "bf16" and zero.stage > 0 and any(phase.split(world_size)[1] > 1 for phase in phases)


def zero_optimization(zero: ZeroConfig, model: LIDiTConfig, world_size: int, on_gpu: bool) -> dict[str, Any]:
    """Builds the `zero_optimization` part of the dictionary."""
    square = model.width**2
    settings: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,  # there is nothing to overlap with on CPUs
        "reduce_bucket_size": max(SMALLEST_BUCKET, LARGEST * square),
        "allgather_bucket_size": max(SMALLEST_BUCKET, BLOCK * square),
    }
    if zero.offload_optimizer:
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if zero.stage < 3:
        return settings
    if world_size % zero.hpz_partition_size:
        raise ValueError(
            f"zero.hpz_partition_size {zero.hpz_partition_size} does not divide among {world_size} ranks: set it to the GPUs "
            f"of a node, or to 1"
        )
    if zero.offload_parameters:
        settings["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return settings | {
        "stage3_prefetch_bucket_size": max(SMALLEST_BUCKET, BLOCK * square),
        "stage3_param_persistence_threshold": persistent_elements(zero, model),
        "stage3_max_live_parameters": max(GATHERED, LIVE_BLOCKS * BLOCK * square),
        "stage3_max_reuse_distance": max(GATHERED, LIVE_BLOCKS * BLOCK * square),
        "stage3_gather_16bit_weights_on_model_save": False,  # a rank never holds the whole model; export reads shards
        "zero_hpz_partition_size": zero.hpz_partition_size,
    }


def persistent_elements(zero: ZeroConfig, model: LIDiTConfig) -> int:
    """Size of the largest vector of the model, unless the config says otherwise."""
    if zero.persistent_elements is not None:
        return zero.persistent_elements
    widest = max(MODULATION_VECTORS, model.ffn_ratio) * model.width
    return max(widest, *model.encoders.values())

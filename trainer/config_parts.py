"""The parts of a `TrainConfig`: model, data, optimizer, and what surrounds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lidit.config import SIZES, LIDiTConfig
from lidit.runtime.fields import (
    Config,
    Fraction,
    Interval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from lidit.store import columns

Size = Literal["tiny", "small", "1b", "10b"]
Compile = Literal["pointwise", "blocks"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]
ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True)
class ModelConfig(Config):
    """Size and options of the LI-DiT model. Encoder widths and latent channels come from the table."""

    size: Size = "tiny"
    """Model size: depth, width and heads, see `lidit.config`."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of `LIDiTConfig` that differ from the size's, such as `{refiner_blocks: 0, fusion: concat}`."""
    checkpointing: bool = False
    """Activation checkpointing: keep each block's input alone and compute the block twice. About a third more FLOPs."""
    compile: Compile | None = None
    """`pointwise`: compile what lies between the matmuls, at any ZeRO stage. `blocks`: whole blocks, faster, up to stage 2.
    null: nothing. On CPUs it needs a C++ compiler."""

    def build(self, encoders: Mapping[str, int], in_channels: int) -> LIDiTConfig:
        """The model's shape for a table's encoders (name -> width) and latent channels."""
        fixed = {"encoders", "in_channels"} & set(self.changes)
        if fixed:
            raise ValueError(f"model.changes: {', '.join(sorted(fixed))} come from the table, they cannot be set here")
        known = {f.name for f in dataclasses.fields(LIDiTConfig)}
        if unknown := set(self.changes) - known:
            raise ValueError(f"model.changes: expected fields of LIDiTConfig, received {', '.join(sorted(unknown))}")
        return SIZES[self.size](encoders, in_channels, **self.changes)


@dataclass(frozen=True)
class DataConfig(Config):
    """Data that the model is trained on, and how they are loaded."""

    encoders: Sequence[str] = ("llama", "qwen")
    """Text encoders whose embeddings the model gets, in the order of its refiner branches."""
    text_mix: dict[str, float] = field(default_factory=lambda: {columns.CAPTION: 1.0})
    """Text column -> probability that a sample is shown with it. Rows where the drawn one is null fall back to another."""
    prompt_drop_prob: Fraction = 0.1
    """Fraction of samples whose prompt is replaced by the empty one (its instruction stays), for classifier-free guidance."""
    version: int | None = None
    """Version of the table; null: the newest one at the first start, kept over every resume."""
    holdout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Fraction of rows that are held out: validated with, never trained on."""
    block_rows: PositiveInt = 8
    """Neighboring rows of a bucket that are read together."""
    block_steps: PositiveInt = 8
    """Steps that a block's rows are spread over, at most `block_rows`: more steps mix better and hold more in memory."""
    pad_multiple: PositiveInt = 16
    """Prompts are padded to the batch's longest, rounded up to a multiple of this: fewer shapes, on a GPU."""
    read_threads: PositiveInt = 4
    """Threads per rank that read and decode."""
    ahead_steps: PositiveInt = 2
    """Steps whose batches are prefetched."""
    buffer_mb: PositiveInt = 2048
    """Memory per rank, in MB, for rows that were read and not used yet. Less than `block_steps` asks for: smaller reads."""
    verify: bool = True
    """Read each data file once while the run trains, slowly and in the background, against the digests in it, and stop where
    one is damaged. Stores on local or mounted disks alone: object stores check their own content."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "encoders", tuple(self.encoders))
        if not self.encoders or len(set(self.encoders)) < len(self.encoders):
            raise ValueError(f"data.encoders: expected at least one name, each once, received {list(self.encoders)}")
        shares = self.text_mix.values()
        if not self.text_mix or min(shares) <= 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise ValueError(f"data.text_mix: expected shares above 0 that sum to 1, received {self.text_mix}")
        if self.block_rows % self.block_steps:
            raise ValueError(
                f"data: expected block_rows to be a multiple of block_steps, so that each of the steps takes as many rows "
                f"of a block, received {self.block_rows} and {self.block_steps}"
            )


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """Optimizer and learning rate over the steps."""

    name: OptimizerName = "adamw"
    """`adamw`; or `muon` for the matrices of blocks and refiners, AdamW for the rest: needs whole matrices (`zero.stage` 0)."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate after the warm-up, of Muon and AdamW alike."""
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.95
    """Muon momentum."""
    beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """AdamW beta1: decay of the mean of gradients."""
    beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.999
    """AdamW beta2: decay of the mean of squared gradients."""
    eps: PositiveFloat = 1e-8
    """AdamW epsilon, added to the root of the mean of squares."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices alone: norms, biases and embeddings have none."""
    grad_clip: NonNegativeFloat = 1.0
    """Norm that the gradient of all parameters together is clipped to; 0: no clipping."""
    schedule: Schedule = "constant"
    """Learning rate schedule after the warm-up: constant, or a decay to `final_share` at the run's last step."""
    fall_share: Annotated[float, Interval(gt=0, le=1)] = 1.0
    """Fraction of the run's steps, its last ones, over which the rate decays; before them it is constant."""
    warmup_steps: NonNegativeInt = 1000
    """Steps of linear warm-up from 0."""
    final_share: Fraction = 0.0
    """Fraction of `learning_rate` that is left at the end of a linear or cosine schedule."""
    max_skipped_steps: PositiveInt = 10
    """Consecutive steps with a loss or gradient that is not finite, after which the run stops."""

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """Learning rate of the step with that number, counted from 0; a pure function, so that a resumed run needs no state."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        first = max(self.warmup_steps, round((1 - self.fall_share) * total_steps))  # step at which the decay begins
        done = min(1.0, max(0, step - first) / max(1, total_steps - 1 - first))
        remaining = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * remaining)


@dataclass(frozen=True)
class EMAConfig(Config):
    """Exponential moving average of the weights, fp32, sharded like the optimizer's state."""

    decay: Annotated[float, Interval(ge=0, lt=1)] = 0.9999
    """Fraction of the old average that a step keeps; 0: no average is kept."""
    warmup: bool = True
    """Use the decay (1 + step) / (10 + step) while that is smaller: the start is forgotten sooner."""

    def decay_at(self, step: int) -> float:
        """Decay of the update after the step with that number, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


@dataclass(frozen=True)
class ZeroConfig(Config):
    """ZeRO sharding and offloading by DeepSpeed; see engine/zero.py for what is derived from it."""

    stage: ZeroStage = 3
    """ZeRO stage: 0 shards nothing over the ranks, 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory."""
    offload_parameters: bool = False
    """Keep weights in host memory too (stage 3)."""
    hpz_partition_size: PositiveInt = 1
    """Number of ranks, those of a node, that keep a second copy of the weights among them, so that the backward pass gathers
    inside the node (stage 3); 1: no copy."""
    persistent_elements: NonNegativeInt | None = None
    """Parameters up to this size stay whole on every rank (stage 3); null: norms, biases and modulation vectors do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage < 3 and (self.offload_parameters or self.hpz_partition_size > 1):
            raise ValueError(f"zero: offload_parameters and hpz_partition_size need stage 3, received {self.stage}")
        if self.stage < 1 and self.offload_optimizer:
            raise ValueError("zero: offload_optimizer needs stage 1 or above, received 0")


@dataclass(frozen=True)
class CheckpointConfig(Config):
    """How often the run is saved, and which checkpoints are kept."""

    every_steps: PositiveInt = 1000
    """Steps between two checkpoints; the last step and a preemption save as well."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every_steps: NonNegativeInt = 0
    """Keep the checkpoints of every so many steps for good; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"checkpoint: expected keep_every_steps to be a multiple of every_steps {self.every_steps}, received "
                f"{self.keep_every_steps}"
            )


@dataclass(frozen=True)
class ValidationConfig(Config):
    """Held-out loss at fixed timesteps and noise, and sample grids."""

    every_steps: NonNegativeInt = 0
    """Steps between two validations; 0: never."""
    rows: PositiveInt = 256
    """Largest number of held-out rows to validate with; needs `data.holdout`."""
    timesteps: PositiveInt = 4
    """Number of fixed timesteps, evenly over (0, 1), that the loss of each row is taken at."""
    prompts: str | None = None
    """Store whose `samples` table holds encoded prompts to draw; null: no grids."""
    images: PositiveInt = 16
    """Largest number of images in a sample grid."""
    guidance_scale: NonNegativeFloat = 4.5
    """Guidance scale of sample grids."""
    num_inference_steps: PositiveInt = 28
    """Number of sampling steps of sample grids."""


@dataclass(frozen=True)
class MetricsConfig(Config):
    """Logging of a training run."""

    every_steps: PositiveInt = 10
    """Steps between two lines of metrics; means are over all steps in between."""
    tensorboard: bool = True
    """Write TensorBoard files beside the JSON lines."""
    wandb: str | None = None
    """Weights & Biases project (extra `wandb`); null: none."""


@dataclass(frozen=True)
class HardwareConfig(Config):
    """GPU figures that `--dry-run` and the MFU are computed with."""

    gpu_tflops: PositiveFloat = 989.0
    """Peak TFLOP/s of dense bf16 matmuls on a GPU (989: H100 SXM); the MFU is a fraction of it."""
    gpu_memory_gb: PositiveFloat = 80.0
    """GPU memory in GB."""
    expected_mfu: Annotated[float, Interval(gt=0, le=1)] = 0.4
    """Fraction of the peak that the dry run expects."""

"""`TrainConfig`: everything that decides a training run. Its parts: config_parts.py; recipes that return one: recipes.py.

Batch sizes are counted over all GPUs and do not change with their number: `RunPhase.split` says what a rank makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from lidit.diffusion import DDPM, Flow, Objective
from lidit.runtime.fields import Config, Interval, JobConfig, PositiveFloat, PositiveInt, from_plain, to_plain
from lidit.store import columns
from trainer.config_parts import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    HardwareConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    ValidationConfig,
    ZeroConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EMAConfig",
    "HardwareConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "RunPhase",
    "TrainConfig",
    "ValidationConfig",
    "ZeroConfig",
]

Precision = Literal["fp32", "bf16"]
ResumeMode = Literal["auto", "never", "must"]
FIXED = ("model", "objective", "flow", "ddpm", "precision", "seed")
"""Fields of a run that no later start may change."""
NOT_COMPARED = ("phases", "dry_run", "stop_after_steps", "resume", "num_workers", "hardware", "name", "storage")
"""Fields whose change is no news: checked in another way, or of this start alone."""


@dataclass(frozen=True)
class PhaseConfig(Config):
    """Images of one resolution, for a number of steps. Phases follow each other; optimizer and EMA go on."""

    steps: PositiveInt
    """Number of optimizer steps."""
    global_batch_size: PositiveInt
    """Samples per optimizer step, over all GPUs and accumulation steps."""
    resolution: PositiveInt = 256
    """Side in pixels of a square with the images' area. Refused where the table's buckets have another."""
    flow_shift: PositiveFloat = 1.0
    """Shift of the flow's timesteps towards noise: 1 at 256 px, 3 above. `ddpm` has none."""
    microbatch_size: PositiveInt | None = None
    """Largest number of samples in a GPU's forward pass; null: the run's `microbatch_size`."""
    store: str | None = None
    """Feature store of this phase; null: the run's."""
    latents: str = columns.LATENTS
    """Column of the latents: `latents`, or `latent_moments`, from which every visit of a row draws anew."""
    bucket: str = columns.BUCKET
    """Column with the image size that the latents belong to, `HEIGHTxWIDTH`."""


@dataclass(frozen=True)
class RunPhase(PhaseConfig):
    """A phase with what it leaves to the run filled in, as `TrainConfig.run_phases` gives it to the trainer's parts."""

    store: str = ""
    """Feature store of this phase."""
    version: int | None = None
    """Version of its table; null: the newest."""
    microbatch_size: int = 1
    """Largest number of samples in a GPU's forward pass."""
    objective: Objective = Flow()
    """Training objective, with this phase's shift."""
    order_seed: int = 0
    """Seed of the order of its rows: phases do not repeat each other's order."""

    def split(self, world_size: int) -> tuple[int, int]:
        """Returns a rank's (microbatch_size, grad_accum_steps), with the largest microbatch that divides its part of a batch.

        Raises:
            ValueError: the global batch does not divide among the ranks.
        """
        if self.global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide among {world_size} ranks: use a number of "
                f"GPUs that divides it, so that every rank takes the same number of steps"
            )
        share = self.global_batch_size // world_size
        micro = next(size for size in range(min(share, self.microbatch_size), 0, -1) if share % size == 0)
        return micro, share // micro


@dataclass(frozen=True)
class TrainConfig(JobConfig):
    """The training job."""

    name: str = "scenes"
    """Name of the run and of its folder in `storage`. Starting the same name again resumes it."""
    store: str = "./store"
    """Folder or URI of the feature store."""
    storage: str = "./runs"
    """Folder or URI for checkpoints and metrics."""
    vae: str | None = None
    """Autoencoder that made the latents, as `lidit latents --model` had it (folder, or `owner/name@commit`): decodes sample
    grids, and exported weights name it; null: grids show three channels of the latents."""
    model: ModelConfig = ModelConfig()
    """Size and options of the LI-DiT model."""
    phases: Sequence[PhaseConfig] = (PhaseConfig(steps=2000, global_batch_size=64, resolution=64),)
    """Training phases, run one after the other. `--phases.0.steps 10` changes a field of the first one."""
    objective: Literal["flow", "ddpm"] = "flow"
    """Training objective: rectified flow, or the paper's noise prediction."""
    flow: Flow = Flow()
    """Options of the `flow` objective; its shift is each phase's `flow_shift`."""
    ddpm: DDPM = DDPM()
    """Options of the `ddpm` objective."""
    data: DataConfig = DataConfig()
    """Encoders, text mix, prompt dropout, held-out rows and the loader."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate schedule."""
    ema: EMAConfig = EMAConfig()
    """Exponential moving average of the weights."""
    zero: ZeroConfig = ZeroConfig()
    """ZeRO sharding and offloading by DeepSpeed."""
    precision: Precision = "bf16"
    """Precision of weights, gradients and activations; optimizer state, EMA and loss are always fp32."""
    microbatch_size: PositiveInt = 32
    """Largest number of samples in a GPU's forward pass; gradients are accumulated over the rest of its batch."""
    num_workers: PositiveInt = 1
    """Number of ranks: one per GPU, or processes on CPUs."""
    use_gpu: bool | None = None
    """Train on one GPU per rank (nccl), or on CPUs (gloo); null: on GPUs if the cluster has some."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray reserves for a rank."""
    accelerator_type: str | None = None
    """Kind of GPU that every rank must have, as Ray names it (`H100`): keeps a run off a cluster's other GPUs; null: any."""
    max_failures: Annotated[int, Interval(ge=-1)] = 3
    """Restarts of the ranks after a failure, each from the newest valid checkpoint; -1: no limit."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """How often the run is saved, and which checkpoints are kept."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out loss and sample grids."""
    metrics: MetricsConfig = MetricsConfig()
    """Logging: interval, TensorBoard, Weights & Biases."""
    hardware: HardwareConfig = HardwareConfig()
    """GPU figures that `--dry-run` and the MFU are computed with."""
    seed: Annotated[int, Interval(ge=0, lt=2**63)] = 0
    """Seed for initialization, data order, caption choice, prompt dropout, timesteps and noise."""
    resume: ResumeMode = "auto"
    """`auto`: from the newest valid checkpoint if there is one. `must`: refuse without. `never`: refuse with."""
    stop_after_steps: PositiveInt | None = None
    """End (and save) after this many steps of the whole run, as if it were stopped; schedules do not change."""
    dry_run: bool = False
    """Print what the run would need (parameters, memory, steps, FLOPs, reading) and exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.name or not all(letter.isalnum() or letter in "-_." for letter in self.name) or self.name[0] == ".":
            raise ValueError(f"name: expected letters, digits and -_., it names a folder, received {self.name!r}")
        if not self.phases:
            raise ValueError("phases: expected at least one, received none")
        if self.flow.shift != 1.0:
            raise ValueError(f"flow.shift: set `flow_shift` of each phase instead, received {self.flow.shift}")
        if self.validation.every_steps and not self.data.holdout and not self.validation.prompts:
            raise ValueError("validation: needs rows that are not trained on; set data.holdout, such as 0.01")
        if self.optimizer.name == "muon" and self.zero.stage > 0:
            raise ValueError(f"optimizer.name: muon needs whole matrices, zero.stage 0, received {self.zero.stage}")
        if self.model.compile == "blocks" and self.zero.stage == 3:
            raise ValueError(
                "model.compile: blocks cannot be compiled whole at zero.stage 3, which gathers weights inside them; use "
                "pointwise, or stage 0 to 2"
            )
        if self.num_workers % self.zero.hpz_partition_size:
            raise ValueError(
                f"zero.hpz_partition_size {self.zero.hpz_partition_size} does not divide num_workers {self.num_workers}"
            )
        for phase in self.run_phases:
            phase.split(self.num_workers)

    @property
    def run_phases(self) -> tuple[RunPhase, ...]:
        """The phases with what they leave to the run filled in."""
        return tuple(
            RunPhase(
                **{
                    **vars(phase),
                    "store": phase.store or self.store,
                    "version": self.data.version if phase.store in (None, self.store) else None,
                    "microbatch_size": phase.microbatch_size or self.microbatch_size,
                    "objective": self.ddpm if self.objective == "ddpm" else replace(self.flow, shift=phase.flow_shift),
                    "order_seed": (self.seed + 0x9E3779B97F4A7C15 * number) % 2**64,
                }
            )
            for number, phase in enumerate(self.phases)
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int, int]:
        """Returns (phase number, step in it, images seen before) of a step of the run; past the end, the last phase's end.

        Images are counted over all phases: what the randomness of a sample depends on.
        """
        images = 0
        for number, phase in enumerate(self.phases):
            if step < phase.steps or number == len(self.phases) - 1:
                step = min(step, phase.steps)
                return number, step, images + step * phase.global_batch_size
            step -= phase.steps
            images += phase.steps * phase.global_batch_size
        raise AssertionError("a run has phases")

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as values of JSON and YAML."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Builds a config from what `to_dict` gave, or a reader of JSON or YAML. Raises ValueError naming an unknown field."""
        return from_plain(cls, values, "config")

    def check_resumable(self, saved: Mapping[str, Any]) -> list[str]:
        """Checks that a checkpoint's run may go on with this config; returns the settings that changed and may.

        Args:
            saved: state.json of the checkpoint.

        Raises:
            ValueError: something that its steps or its state depend on is different; says what.
        """
        before, now = saved["config"], self.to_dict()
        pairs = {name: (before[name], now[name]) for name in FIXED}
        pairs["zero.stage"] = (before["zero"]["stage"], self.zero.stage)
        pairs["optimizer.name"] = (before["optimizer"].get("name", "adamw"), self.optimizer.name)
        pairs["data.encoders"] = (list(before["data"]["encoders"]), list(self.data.encoders))
        pairs["images that the phases have seen by then"] = (saved["images_seen"], self.phase_at(saved["step"])[2])
        wrong = [f"{name} was {old}, is {new}" for name, (old, new) in pairs.items() if old != new]
        if wrong:
            raise ValueError(
                f"run {self.name!r} has a checkpoint at step {saved['step']:,} that was made otherwise: {'; '.join(wrong)}. "
                f"Set it back, or train under another `name`"
            )
        compared = [name for name in before if name not in (*FIXED, *NOT_COMPARED)]
        return [change for name in compared for change in _changes(name, before[name], now.get(name))]


def _changes(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [change for key in old for change in _changes(f"{name}.{key}", old[key], new.get(key))]
    return [] if old == new else [f"{name}: {old} -> {new}"]

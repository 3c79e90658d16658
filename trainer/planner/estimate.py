"""Estimates memory, time and reading of a run before it starts: `lidit train --dry-run`.

Counts are exact where they can be: parameters and activations come from the model laid out without memory, steps and samples
from the plan, bytes from the table's own lengths. What nobody knows beforehand, the speed of a GPU, is the config's
`hardware`, and every line that depends on it says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lidit.config import DEMO_ENCODERS, PAPER_ENCODERS, LIDiTConfig
from lidit.flops import Flops, model_flops
from lidit.store.features import Features
from trainer.config import PhaseConfig, TrainConfig
from trainer.data.loader import read_steps
from trainer.data.plan import Counts, Plan
from trainer.data.survey import Survey, mean_length
from trainer.planner.memory import Memory, count_parameters, memory_of, saved_activations

GB, MB, DAY = 1e9, 1e6, 86400.0
# Sizes of a sample that are assumed where there is no table yet.
ASSUMED_WIDTH, ASSUMED_CHANNELS, ASSUMED_DOWNSCALE = 4096, 16, 8
ASSUMED_TOKENS, ASSUMED_LONGEST, ASSUMED_INSTRUCTION = 100, 256, 40
ASSUMED_BYTES = 2  # bf16


@dataclass(frozen=True)
class Shapes:
    """Sizes of a phase's samples: latents, tokens, bytes."""

    latent_size: tuple[int, int]  # (H, W), of the most frequent bucket
    prompt_tokens: dict[str, float]  # encoder -> mean L
    padded_tokens: dict[str, int]  # encoder -> L that a microbatch is padded to, as expected
    instruction_tokens: dict[str, int]  # encoder -> P
    sample_bytes: float  # read of the table

    @classmethod
    def assumed(cls, model: LIDiTConfig, phase: PhaseConfig) -> Shapes:
        """Assumes sizes where there is no table yet: prompts of 100 tokens, 256 the longest, all in bf16."""
        side = phase.resolution // ASSUMED_DOWNSCALE
        values = model.in_channels * side**2 + ASSUMED_TOKENS * sum(model.encoders.values())
        return cls(
            latent_size=(side, side),
            prompt_tokens=dict.fromkeys(model.encoders, float(ASSUMED_TOKENS)),
            padded_tokens=dict.fromkeys(model.encoders, ASSUMED_LONGEST),
            instruction_tokens=dict.fromkeys(model.encoders, ASSUMED_INSTRUCTION),
            sample_bytes=float(ASSUMED_BYTES * values),
        )

    @classmethod
    def of(cls, features: Features, survey: Survey, microbatch_size: int, pad_multiple: int) -> Shapes:
        """Takes the sizes from a table and its survey."""
        bucket = survey.rows.buckets[int(np.argmax(survey.rows.counts))]
        prompt_tokens, padded_tokens = {}, {}
        for name, states in features.encoders.items():
            histogram = mixed([survey.lengths[text][name] for text in features.texts], features.shares)
            prompt_tokens[name] = mean_length(histogram)
            longest = max(expected_longest(histogram, microbatch_size), len(states.null_embeds))
            padded_tokens[name] = -(-longest // pad_multiple) * pad_multiple
        return cls(
            latent_size=features.latents.shape(bucket)[1:],
            prompt_tokens=prompt_tokens,
            padded_tokens=padded_tokens,
            instruction_tokens={name: len(states.instruction_embeds) for name, states in features.encoders.items()},
            sample_bytes=survey.sample_bytes,
        )


@dataclass(frozen=True)
class PhaseEstimate:
    """Estimate of one phase."""

    phase: PhaseConfig
    microbatch_size: int
    grad_accum_steps: int
    shapes: Shapes
    memory: Memory
    flops: Flops  # of a sample; what checkpointing computes again is not among them
    samples_per_second: float  # of a GPU, at the expected MFU
    host_bytes: float  # of a rank, for rows that were read and not used yet
    counts: Counts | None  # of the plan, where there is a table

    @property
    def samples(self) -> int:
        """Samples of the phase."""
        return self.phase.steps * self.phase.global_batch_size

    @property
    def read_bytes_per_second(self) -> float:
        """Bytes of the table that a GPU reads per second."""
        return self.samples_per_second * self.shapes.sample_bytes


@dataclass(frozen=True)
class Estimate:
    """Estimate of a whole run."""

    config: TrainConfig
    model: LIDiTConfig
    world_size: int
    parameters: int
    phases: list[PhaseEstimate]
    tables: list[str]  # what was read of the tables, in words

    def seconds(self, phase: PhaseEstimate) -> float:
        """Seconds that a phase takes at the expected MFU."""
        return phase.samples / (phase.samples_per_second * self.world_size)

    def lines(self) -> list[str]:
        """Formats the estimate for a person, line by line."""
        config, encoders = self.config, ", ".join(f"{name} {width}" for name, width in self.model.encoders.items())
        lines = [
            f"run        {config.name}: {self.world_size} ranks, ZeRO stage {config.zero.stage}, {config.precision}",
            f"model      {config.model.size}: {self.parameters:,} parameters; width of the encoders: {encoders}",
            *(f"table      {words}" for words in self.tables),
        ]
        for number, phase in enumerate(self.phases):
            lines += self._phase_lines(number, phase)
        flops = sum(phase.flops.total * phase.samples for phase in self.phases)
        samples = sum(phase.samples for phase in self.phases)
        return [
            *lines,
            f"in all     {config.total_steps:,} steps, {samples:,} samples, {flops:.2e} FLOP",
        ]

    def _phase_lines(self, number: int, estimate: PhaseEstimate) -> list[str]:
        phase, shapes, memory = estimate.phase, estimate.shapes, estimate.memory
        parts = ", ".join(f"{name} {value / GB:.2f}" for name, value in memory.parts().items())
        prompts = ", ".join(
            f"{name} {mean:.0f} (padded to {shapes.padded_tokens[name]})" for name, mean in shapes.prompt_tokens.items()
        )
        lines = [
            f"phase {number}    {phase.resolution} px, {phase.steps:,} steps of {phase.global_batch_size:,}: "
            f"{estimate.samples:,} samples; a rank takes {estimate.grad_accum_steps} x {estimate.microbatch_size} a step",
            f"  sample   latents {'x'.join(map(str, shapes.latent_size))}; prompt tokens: {prompts}; "
            f"{shapes.sample_bytes / MB:.3f} MB to read; {estimate.flops.total / 1e12:.3g} TFLOP",
            f"  memory   {memory.total / GB:.2f} GB a rank: {parts}",
            f"  host     {estimate.host_bytes / MB:,.0f} MB a rank for rows that were read and not used yet",
        ]
        if memory.host:
            lines.append(f"  offload  {memory.host / GB:.2f} GB more of a rank's host memory")
        if self.config.use_gpu is not False:
            lines += self._gpu_lines(estimate)
        return lines + ([] if estimate.counts is None else count_lines(estimate.counts))

    def _gpu_lines(self, estimate: PhaseEstimate) -> list[str]:
        hardware, reading = self.config.hardware, estimate.read_bytes_per_second / MB
        lines = [
            f"  speed    if the MFU is {hardware.expected_mfu:.0%} of {hardware.gpu_tflops:g} TFLOP/s: "
            f"{estimate.samples_per_second:,.1f} samples/s a GPU, {self.seconds(estimate) / DAY:,.2f} days; the table is read "
            f"at {reading:,.0f} MB/s a GPU, {reading * self.world_size:,.0f} MB/s in all"
        ]
        if estimate.memory.total > hardware.gpu_memory_gb * GB:
            lines.append(
                f"  TOO MUCH for a GPU of {hardware.gpu_memory_gb:g} GB: lower `microbatch_size`, or use checkpointing"
            )
        return lines


def estimate(
    config: TrainConfig, world_size: int, tables: Mapping[int, tuple[Features, Survey]] | None = None
) -> Estimate:
    """Estimates a run on so many ranks.

    Args:
        config: the run.
        world_size: ranks.
        tables: number of a phase -> its table and what is in it. A phase without one is reckoned with prompts of 100 tokens.
    """
    tables, words = tables or {}, []
    known = PAPER_ENCODERS | DEMO_ENCODERS
    widths = {name: known.get(name, ASSUMED_WIDTH) for name in config.data.encoders}
    channels = ASSUMED_CHANNELS
    for features, survey in tables.values():
        widths = {name: states.width for name, states in features.encoders.items()}
        channels = features.latents.channels
        words.append(table_words(features, survey))
    if len(tables) < len(config.phases):
        words.append(f"none for {len(config.phases) - len(tables)} phases: samples are assumed")
    model = config.model.build(widths, channels)
    phases = [
        _phase_estimate(config, model, number, world_size, tables.get(number)) for number in range(len(config.phases))
    ]
    return Estimate(config, model, world_size, count_parameters(model)[0], phases, list(dict.fromkeys(words)))


def table_words(features: Features, survey: Survey) -> str:
    """Names the table, how many of its rows are trained on, and why the others are not."""
    rows = survey.rows
    used = int((rows.counts > 0).sum())
    reasons = [f"{count:,} {reason}" for reason, count in rows.missing.items()]
    reasons += [f"{len(rows.held_out):,} held out"] if len(rows.held_out) else []
    left_out = f"; left out: {', '.join(reasons)}" if reasons else ""
    return (
        f"{features.table.uri}, version {features.version}: {survey.total:,} rows, {int(rows.counts.sum()):,} to train on in "
        f"{used} buckets{left_out}"
    )


def count_lines(counts: Counts) -> list[str]:
    """Formats a phase's epochs, and the rows that its plan never gets to or repeats within a batch."""
    rows = sum(counts.rows.values())
    lines = [f"  plan     {counts.samples / rows:,.2f} epochs of {rows:,} rows"]
    if counts.unseen:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.unseen.items())
        lines.append(f"           rows that fill no batch in that time: {shown}")
    if counts.crowded:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.crowded.items())
        lines.append(f"           buckets with fewer rows than a batch, which repeats them: {shown}")
    return lines


def expected_longest(histogram: np.ndarray, draws: int) -> int:
    """Returns the expected longest of so many draws from a histogram of lengths, rounded up."""
    if not histogram.sum():
        return 0
    below = np.cumsum(histogram) / histogram.sum()  # fraction with at most 0, 1, 2 .. tokens
    return int(np.ceil(np.sum(1 - below**draws) - 1e-9))


def mixed(histograms: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    """Returns the histogram of lengths of a mix of texts, normalized."""
    total = np.zeros(max(len(histogram) for histogram in histograms))
    for histogram, share in zip(histograms, shares):
        total[: len(histogram)] += share * histogram / max(1, histogram.sum())
    return total


def _phase_estimate(
    config: TrainConfig,
    model: LIDiTConfig,
    number: int,
    world_size: int,
    table: tuple[Features, Survey] | None,
) -> PhaseEstimate:
    phase = config.run_phases[number]
    microbatch_size, grad_accum_steps = phase.split(world_size)
    share, data = phase.global_batch_size // world_size, config.data
    counts = None
    steps, buckets = data.block_steps, 1
    if table is None:
        shapes = Shapes.assumed(model, phase)
    else:
        shapes = Shapes.of(*table, microbatch_size, data.pad_multiple)
        rows = table[1].rows
        plan = Plan(rows, phase.global_batch_size, phase.order_seed, data.block_rows, data.block_steps)
        counts = plan.count(phase.steps)
        steps, buckets = read_steps(data, table[1], share), int((rows.counts > 0).sum())
    activations = saved_activations(
        model,
        microbatch_size,
        shapes.latent_size,
        shapes.padded_tokens,
        shapes.instruction_tokens,
        torch.bfloat16 if config.precision == "bf16" else torch.float32,
        config.model.checkpointing,
    )
    parts = model_flops(model, shapes.latent_size, shapes.prompt_tokens, shapes.instruction_tokens, microbatch_size)
    flops = sum(parts.values(), Flops())
    rows_ahead = share * (steps * (buckets + 1) + data.ahead_steps)
    return PhaseEstimate(
        phase,
        microbatch_size,
        grad_accum_steps,
        shapes,
        memory_of(config, model, world_size, activations),
        flops,
        config.hardware.gpu_tflops * 1e12 * config.hardware.expected_mfu / flops.total,
        rows_ahead * shapes.sample_bytes,
        counts,
    )

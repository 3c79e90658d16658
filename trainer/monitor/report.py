"""The figures of a run, step by step: summed up into lines, written down and shown by rank 0."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np

from lidit.config import LIDiTConfig
from lidit.diffusion import BINS
from lidit.flops import model_flops
from trainer.monitor.metrics import MetricsWriter, memory_gb
from trainer.monitor.step_metrics import Totals

SHOW_SECONDS = 5.0  # between two lines on the screen, at least

Size = tuple[int, int]
"""(H, W) of the latents."""


class Meter:
    """Sums of the steps since the last line -> the figures of a line.

    Args:
        model: whose FLOPs are counted.
        instruction_tokens: encoder -> P.
        microbatch_size: B.
        world_size: ranks.
        gpu_tflops: peak of a rank's device; None: unknown, then there is no MFU.
    """

    def __init__(
        self,
        model: LIDiTConfig,
        instruction_tokens: dict[str, int],
        microbatch_size: int,
        world_size: int,
        gpu_tflops: float | None,
    ):
        self.model, self.instruction_tokens, self.microbatch_size = model, instruction_tokens, microbatch_size
        self.world_size, self.gpu_tflops = world_size, gpu_tflops
        self.reset()

    def reset(self) -> None:
        """Begins a new line; what lies between, such as a validation, does not count."""
        self.start = time.perf_counter()
        self.steps = self.skipped = 0
        self.loss = self.norm = self.wait_seconds = 0.0
        self.bins = np.zeros((2, BINS))
        self.seen: dict[Size, np.ndarray] = {}  # samples, then prompt tokens by encoder

    def add(self, totals: Totals, size: Size, taken: bool) -> None:
        """Adds a step of one latent size. One that was skipped counts as work, not in the loss."""
        counts = np.array([totals.samples, *totals.prompt_tokens])
        self.seen[size] = self.seen.get(size, np.zeros(len(counts))) + counts
        self.wait_seconds += totals.wait_seconds
        if not taken:
            self.skipped += 1
            return
        self.steps += 1
        self.loss += totals.loss / totals.samples
        self.norm += totals.grad_norm
        self.bins += totals.bins

    def line(self) -> dict[str, Any]:
        """Computes the figures since `reset`.

        loss: mean over samples. loss_bins: the same by timestep, from clean to noise; nan where none was drawn. grad_norm:
        before clipping, mean over steps. tokens_per_second: image tokens and real prompt tokens. data_wait: fraction of
        the time that ranks waited for data. tflops: model FLOPs per second, all ranks together; mfu: tflops over the peak.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        counts = np.array(list(self.seen.values())).sum(axis=0) if self.seen else np.zeros(1)
        image_tokens = sum(size[0] * size[1] // self.model.patch_size**2 * seen[0] for size, seen in self.seen.items())
        with np.errstate(invalid="ignore"):
            by_bin = self.bins[0] / self.bins[1]
        flops = self._flops()
        figures: dict[str, Any] = {
            "loss": self.loss / self.steps if self.steps else math.nan,
            "loss_bins": by_bin.tolist(),
            "grad_norm": self.norm / self.steps if self.steps else math.nan,
            "samples_per_second": counts[0] / seconds,
            "tokens_per_second": (image_tokens + counts[1:].sum()) / seconds,
            "seconds_per_step": seconds / max(1, self.steps + self.skipped),
            "data_wait": self.wait_seconds / self.world_size / seconds,
            "tflops": flops / seconds / 1e12,
            "memory_gb": memory_gb(),
            "skipped": self.skipped,
        }
        if self.gpu_tflops:
            figures["mfu"] = figures["tflops"] / (self.gpu_tflops * self.world_size)
        return figures

    def _flops(self) -> float:
        total = 0.0
        for size, seen in self.seen.items():
            prompt_tokens = dict(zip(self.model.encoders, seen[1:] / seen[0]))
            parts = model_flops(self.model, size, prompt_tokens, self.instruction_tokens, self.microbatch_size)
            total += seen[0] * sum(part.total for part in parts.values())
        return total


class Report:
    """Writes the lines, and shows them; on rank 0.

    Args:
        writer: files, TensorBoard and the like.
        total_steps: of the run.
    """

    def __init__(self, writer: MetricsWriter, total_steps: int):
        self.writer, self.total_steps = writer, total_steps
        train, validation = (_with_loss(writer.before, kind) for kind in ("train", "validation"))
        self.first: dict[str, Any] = train[0] if train else {}
        """Figures of the run's first line, whichever start wrote it."""
        self.last: dict[str, Any] = train[-1] if train else {}
        self.validation: dict[str, Any] = validation[-1] if validation else {}
        self._shown = 0.0

    def line(self, step: int, values: dict[str, Any]) -> None:
        """Logs training figures after `step` steps, and shows them now and then."""
        self.writer.write("train", step, values)
        self.first = self.first or {"step": step, **values}
        self.last = {"step": step, **values}
        if time.monotonic() - self._shown > SHOW_SECONDS or step == self.total_steps:
            self._shown = time.monotonic()
            self.say(f"step {step:,} of {self.total_steps:,}: {self._words(step, values)}")

    def validated(self, step: int, values: dict[str, Any]) -> None:
        """Logs and shows the figures of a validation."""
        self.writer.write("validation", step, values)
        self.validation = {"step": step, **values}
        ema = f", EMA {values['ema_loss']:.4f}" if "ema_loss" in values else ""
        self.say(f"step {step:,}: held-out loss {values['loss']:.4f}{ema}")

    def say(self, words: str) -> None:
        """Prints one line to stderr."""
        print(f"lidit train: {words}", file=sys.stderr, flush=True)

    def _words(self, step: int, values: dict[str, Any]) -> str:
        mfu = f", MFU {values['mfu']:.1%}" if "mfu" in values else ""
        skipped = f", {values['skipped']} steps skipped" if values["skipped"] else ""
        left = (self.total_steps - step) * values["seconds_per_step"]
        return (
            f"loss {values['loss']:.4f}, gradient {values['grad_norm']:.3f}, {values['samples_per_second']:,.1f} samples/s"
            f"{mfu}, data wait {values['data_wait']:.1%}{skipped}, {_duration(left)} left"
        )


def _with_loss(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Returns the figures of lines of one kind, without lines whose loss is not finite."""
    return [
        {name: value for name, value in line.items() if name != "kind"}
        for line in lines
        if line["kind"] == kind and line["loss"] is not None
    ]


def _duration(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"

"""Prints parameters and FLOPs of a training sample for every part of a model.

    lidit info --size 10b
    lidit info --size 1b --encoders '{"llama3": 4096}' --height 512 --width 512
    lidit info --weights ./weights

No weights are made or read: the model is laid out without memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lidit.cli import run
from lidit.config import SIZES, LIDiTConfig
from lidit.flops import Flops, model_flops
from lidit.model import LIDiT
from lidit.runtime.fields import JobConfig, NonNegativeInt, PositiveInt
from lidit.runtime.result import JobResult, table

PARTS = {
    "timestep": "timestep embedding",
    "pooled": "projections of the pooled prompts",
    "linguistic": "linguistic refiners",
    "collaborative": "collaborative refiner",
    "patchify": "patch projection",
    "res_block": "ResBlock",
    "blocks": "DiT blocks",
    "final": "final layer",
}


@dataclass(frozen=True)
class InfoConfig(JobConfig):
    """The model, and the shapes of a sample."""

    size: Literal["tiny", "small", "1b", "10b"] = "1b"
    """The size, unless `weights` names a model."""
    weights: str | None = None
    """Weights folder; its config decides, and `size`, `encoders` and `in_channels` are not used."""
    encoders: dict[str, int] | None = None
    """Hidden width of every text encoder by name; default: the size's own."""
    in_channels: int = 16
    """Channels of the latents."""
    height: PositiveInt = 256
    """Image height in pixels."""
    width: PositiveInt = 256
    """Image width in pixels."""
    downscale: PositiveInt = 8
    """Pixels along a side of one latent pixel."""
    prompt_tokens: NonNegativeInt = 100
    """Tokens of a prompt, for every encoder."""
    instruction_tokens: NonNegativeInt = 40
    """Tokens before every prompt, for every encoder."""

    def model(self) -> LIDiTConfig:
        """The model's config. Raises ValueError where the weights folder has none."""
        if self.weights is None:
            return SIZES[self.size](self.encoders, in_channels=self.in_channels)
        from lidit.weights import read_config

        return LIDiTConfig.from_dict(read_config(self.weights)["model"])


@dataclass
class InfoResult(JobResult):
    """Parameters and FLOPs of a model, by part."""

    title: str
    model: dict[str, Any]
    parameters: dict[str, int]
    flops: dict[str, Flops]
    sample: str

    def values(self) -> dict[str, Any]:
        """The figures; `all` parts together among the parameters."""
        return {
            "ok": self.ok,
            "model": self.model,
            "parameters": {**self.parameters, "all": sum(self.parameters.values())},
            "sample": self.sample,
            "flops_forward": {part: cost.forward for part, cost in self.flops.items()},
            "flops_step": {part: cost.total for part, cost in self.flops.items()},
        }

    def lines(self) -> Iterator[str]:
        """A table for people."""
        total = sum(self.parameters.values())
        yield f"{self.title}: {total:,} parameters ({total / 1e9:.3f} B)"
        yield f"FLOPs of a sample of {self.sample}"
        parts = [(PARTS[part], count, self.flops[part]) for part, count in self.parameters.items()]
        parts.append(("all", total, sum(self.flops.values(), Flops())))
        rows = [
            [name, f"{count:,}", f"{count / total:.1%}", f"{cost.forward / 1e9:,.2f}", f"{cost.total / 1e9:,.2f}"]
            for name, count, cost in parts
        ]
        yield from ("", *table(["part", ">parameters", ">share", ">GFLOP forward", ">forward + backward"], rows))


def parameter_counts(config: LIDiTConfig) -> dict[str, int]:
    """Parameters of each part of the model, by its name."""
    with torch.device("meta"):
        model = LIDiT(config)
    return {part: sum(weight.numel() for weight in module.parameters()) for part, module in model.named_children()}


def main(config: InfoConfig) -> InfoResult:
    model = config.model()
    latent_size = (config.height // config.downscale, config.width // config.downscale)
    prompt_tokens = dict.fromkeys(model.encoders, config.prompt_tokens)
    instruction_tokens = dict.fromkeys(model.encoders, config.instruction_tokens)
    return InfoResult(
        title=config.weights or f"LI-DiT {config.size}",
        model=model.to_dict(),
        parameters=parameter_counts(model),
        flops=model_flops(model, latent_size, prompt_tokens, instruction_tokens),
        sample=f"{config.height}x{config.width} px, {config.prompt_tokens} prompt and {config.instruction_tokens} "
        f"instruction tokens of each encoder",
    )


if __name__ == "__main__":
    run("info")

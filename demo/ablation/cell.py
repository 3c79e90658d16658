"""A cell of the grid: one LI-DiT in training, stopped and continued at any step.

The trainer's own model, optimizer, learning rate, objective and draws (timestep, noise, dropped prompts are functions of seed
and image number), in one process without Ray and DeepSpeed. Cells of one seed see the same rows, noise and drops in the same
order, so that what differs between them is the setting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.ablation.cell_table import Prompts
from lidit.config import LIDiTConfig
from lidit.diffusion import Flow, draw, loss_per_sample, sample_rng
from lidit.model import LIDiT
from trainer.config import EMAConfig, OptimizerConfig
from trainer.engine.optimizer import build_optimizer

PROMPT_DROP = 0.1


@dataclass(frozen=True)
class CellConfig:
    """What all cells of a grid have in common."""

    depth: int = 4
    width: int = 128
    heads: int = 4
    batch_size: int = 64
    flow_shift: float = 4.0
    """Timesteps are drawn where the prompt decides: a scene of few tokens is laid out while little but noise is there."""
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(name="muon", learning_rate=3e-3, beta2=0.99, warmup_steps=100)
    )
    """Its rate stays constant, so that every point of a curve is a model of its own budget; what is examined is the average."""
    ema_decay: float = 0.997
    precision: str = "fp32"
    """`fp32`; or `bf16`: mixed precision, for GPUs."""

    def model(self, encoders: dict[str, int], channels: int, changes: dict[str, Any]) -> LIDiTConfig:
        """Returns the model's config under a setting."""
        shape = {"depth": self.depth, "width": self.width, "heads": self.heads, "position": "rope"}
        return LIDiTConfig(encoders=encoders, in_channels=channels, **{**shape, **changes})


class Cell:
    """A model, its optimizer and its average, after some steps.

    Args:
        config: of the grid.
        encoders: names of the setting's encoders, in order.
        changes: fields of `LIDiTConfig` that the setting has otherwise.
        seed: of weights, order, noise and drops.
        latents: (N, C, H, W) of the training rows, on the device.
        prompts: of the training rows, on the device.
    """

    def __init__(
        self,
        config: CellConfig,
        encoders: Sequence[str],
        changes: dict[str, Any],
        seed: int,
        latents: Tensor,
        prompts: Prompts,
    ):
        self.config, self.encoders, self.seed = config, tuple(encoders), seed
        self.latents, self.prompts, self.device = latents, prompts, latents.device
        widths = {name: prompts.states[name].embeds.shape[1] for name in encoders}
        torch.manual_seed(seed)
        self.model = LIDiT(config.model(widths, latents.shape[1], changes)).to(self.device)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.objective = Flow(shift=config.flow_shift)
        self.ema = EMAConfig(decay=config.ema_decay)
        self.step = 0

    def advance(self, steps: int) -> float:
        """Trains for so many steps; returns their mean loss."""
        losses = [self._train_step() for _ in range(steps)]
        loss = float(torch.stack(losses).mean())
        if not np.isfinite(loss):
            raise FloatingPointError(f"loss not finite near step {self.step}; lower the learning rate")
        return loss

    def predict(self, noisy_latents: Tensor, timestep: Tensor, *prompts: Any) -> Tensor:
        """The model in the grid's precision, called like the model itself."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(noisy_latents, timestep, *prompts)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the model its averaged weights, in evaluation mode, while the context lasts."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._write(self.average)
        self.model.eval()
        try:
            yield
        finally:
            self._write(own)
            self.model.train()

    def save(self, path: Path) -> None:
        """Writes all that the next step depends on, in one move."""
        state = {
            "config": json.dumps(dataclasses.asdict(self.config)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote. Raises ValueError where it was written under another config."""
        state = torch.load(path, weights_only=True, map_location=self.device)
        if state["config"] != (config := json.dumps(dataclasses.asdict(self.config))):
            raise ValueError(f"{path} was trained with {state['config']}, expected {config}; name another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]

    def _train_step(self) -> Tensor:
        """Does one step as `trainer.loop` does; returns its mean loss, on the device."""
        size = self.config.batch_size
        numbers = range(self.step * size, (self.step + 1) * size)
        rows = training_rows(self.seed, numbers, len(self.latents))
        dropped = [sample_rng(self.seed, number, "prompt_drop").random() < PROMPT_DROP for number in numbers]
        latents = self.latents[torch.from_numpy(rows).to(self.device)]
        timestep, noise = (
            drawn.to(self.device) for drawn in draw(self.objective, self.seed, numbers, latents.shape[1:])
        )
        index, drop = torch.from_numpy(rows).to(self.device), torch.tensor(dropped, device=self.device)
        batch = self.prompts.batch(self.encoders, index, drop)

        prediction = self.predict(
            self.objective.add_noise(latents, noise, timestep), timestep,
            batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds,
        )  # fmt: skip
        loss = loss_per_sample(self.objective, prediction, latents, noise, timestep).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate_at(self.step, 0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.ema.decay_at(self.step))
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)


def training_rows(seed: int, numbers: Sequence[int], count: int) -> np.ndarray:
    """The rows of these images of a run: every row once in each pass over `count` rows, shuffled anew for every pass."""
    return np.array([_order(seed, number // count, count)[number % count] for number in numbers])


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)

"""Does a model follow prompts? Told from losses, without making an image, and from images.

*From losses*, as a diffusion classifier (Li et al. 2023, arXiv 2303.16203). Scene, noise and timestep are the same; one loss
is with a prompt that is true of the scene, one with a prompt of which one fact is exchanged (`demo/world/swaps.py`).
`margin`: the second less the first. `accuracy`: share of scenes for which the margin, over the timesteps of `LAYOUT`, is
above zero; 0.5 is chance. `told`: the loss without a prompt less the one with it, at the timesteps of `HIGH`: there only the
prompt says what will be there.

*From images*: the exam of `demo/world/prompts.py`, drawn with guidance and judged by `demo/world/judge.py`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from demo.ablation.cell import Cell
from demo.ablation.cell_table import Prompts
from demo.plugins import SceneMetric
from demo.world.swaps import KINDS
from lidit.diffusion import Objective, loss_per_sample, sample_rng
from lidit.frozen.vae import VAE
from lidit.images.pixels import to_bytes
from lidit.sampler import SamplerConfig, initial_noise, sample
from lidit.store import columns

LAYOUT = (0.65, 0.75, 0.85)
"""Timesteps of swaps: margins of trained models are largest there, in standard errors too (docs/ablations.md)."""
HIGH = (0.875, 0.9375, 0.984375)
"""Timesteps of the held-out loss."""
SEED = 0x666F6C  # of the noise: the same in every cell, so that losses are compared on the same numbers
BATCH = 128
SAMPLER = SamplerConfig(num_inference_steps=20, guidance_scale=3.5)


class Asked(Protocol):
    """A model whose losses are examined: a cell of the grid, or trained weights."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Returns the names of the encoders, in the model's order."""

    @property
    def objective(self) -> Objective:
        """Returns the objective that the model was trained with."""

    def predict(self, noisy_latents: Tensor, timestep: Tensor, *prompts: Any) -> Tensor:
        """Returns the model's prediction (B, C, H, W)."""


@dataclass(frozen=True)
class SwapExam:
    """Swaps, ready to be asked of any cell; latents and prompts lie on the device, row n of each is swap n's."""

    kinds: tuple[str, ...]
    latents: Tensor
    right: Prompts
    wrong: Prompts

    def __call__(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Figures of every kind: margin, its standard error over scenes, accuracy, and the margin by timestep."""
        right, wrong = (losses(cell, self.latents, prompts, LAYOUT) for prompts in (self.right, self.wrong))
        margins = wrong - right  # (timesteps, N)
        kinds = np.array(self.kinds)
        return {kind: margin_figures(margins[:, kinds == kind]) for kind in KINDS if (kinds == kind).any()}


@dataclass(frozen=True)
class HeldOutExam:
    """The loss on held-out scenes with their prompts and without."""

    latents: Tensor
    prompts: Prompts

    def __call__(self, cell: Cell) -> dict[str, Any]:
        """`loss` at the high timesteps, by timestep too, and `told`: how much more it is without the prompt."""
        given, none = (losses(cell, self.latents, self.prompts, HIGH, drop) for drop in (False, True))
        return {
            "loss": _rounded(given.mean()),
            "loss_by_timestep": [_rounded(value) for value in given.mean(axis=1)],
            "told": _rounded((none - given).mean()),
        }


@dataclass(frozen=True)
class PictureExam:
    """Prompts with GenEval's records, drawn and judged."""

    records: tuple[dict[str, Any], ...]
    prompts: Prompts
    shape: tuple[int, ...]
    """(C, H, W) of the latents."""
    vae: VAE
    images_per_prompt: int = 1

    @torch.no_grad()
    def __call__(self, cell: Cell) -> dict[str, float]:
        """Task -> share of pictures that are right, `overall`, and position bias by quarter, as `lidit score` has them."""
        rows = [row for row in range(len(self.records)) for _ in range(self.images_per_prompt)]
        judge, judged = SceneMetric(None, "cpu"), []
        for first in range(0, len(rows), BATCH):
            chosen = rows[first : first + BATCH]
            images = self._draw(cell, chosen, range(first, first + len(chosen)))
            texts = [json.dumps(self.records[row]) for row in chosen]
            made = judge(images, texts)
            judged += [
                {**dict(zip(made, values)), columns.PROMPT_RECORD: text} for *values, text in zip(*made.values(), texts)
            ]
        figures = SceneMetric.summarise(judged)
        return {name: _rounded(figure["value"]) for name, figure in figures.items() if "strict" not in name}

    def _draw(self, cell: Cell, rows: Sequence[int], seeds: Sequence[int]) -> list[np.ndarray]:
        noise = initial_noise([torch.Generator().manual_seed(seed) for seed in seeds], self.shape).to(cell.device)
        index = torch.tensor(rows, device=cell.device)
        given = self.prompts.batch(cell.encoders, index)
        empty = self.prompts.batch(cell.encoders, index, torch.ones_like(index, dtype=torch.bool))
        predict: Any = cell.predict  # called like a model
        latents = sample(predict, cell.objective, noise, given, empty, SAMPLER)
        return list(to_bytes(self.vae.decode(latents)))


@torch.no_grad()
def losses(
    cell: Asked, latents: Tensor, prompts: Prompts, timesteps: Sequence[float], drop: bool = False
) -> np.ndarray:
    """Latents (N, C, H, W) and their prompts -> losses (timesteps, N), on noise that depends on row and timestep alone."""
    found = np.zeros((len(timesteps), len(latents)))
    for first in range(0, len(latents), BATCH):
        index = torch.arange(first, min(first + BATCH, len(latents)), device=latents.device)
        batch = prompts.batch(cell.encoders, index, torch.full_like(index, drop, dtype=torch.bool))
        some = latents[index]  # B C H W
        for number, value in enumerate(timesteps):
            noise = _noise([row * len(timesteps) + number for row in index.tolist()], some.shape[1:]).to(some.device)
            timestep = torch.full((len(index),), value, device=some.device)
            noisy_latents = cell.objective.add_noise(some, noise, timestep)
            prediction = cell.predict(
                noisy_latents, timestep, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds
            )
            loss = loss_per_sample(cell.objective, prediction, some, noise, timestep)
            found[number, first : first + len(index)] = loss.double().cpu().numpy()
    return found


def margin_figures(margins: np.ndarray) -> dict[str, Any]:
    """Margins (timesteps, scenes) of one kind -> its figures."""
    scenes = margins.mean(axis=0)
    return {
        "margin": _rounded(scenes.mean()),
        "error": _rounded(scenes.std(ddof=1) / len(scenes) ** 0.5) if len(scenes) > 1 else None,
        "accuracy": _rounded((scenes > 0).mean()),
        "by_timestep": [_rounded(value) for value in margins.mean(axis=1)],
    }


def _noise(numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    rows = [sample_rng(SEED, number, "noise").standard_normal(shape, dtype=np.float32) for number in numbers]
    return torch.from_numpy(np.stack(rows))


def _rounded(value: float) -> float:
    return round(float(value), 6)

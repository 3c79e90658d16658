"""Which facts of a prompt do trained weights follow, and at which timesteps does their loss tell it?

    python -m demo.ablation.weights_following --weights demo/weights --swaps 48

For every kind of swap (`demo/world/swaps.py`) and timestep: the margin, how many of its standard errors that is, and the
accuracy; Markdown on stdout. The weights must know the demo's world.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo.ablation.cell_table import encode_prompts, scene_latents
from demo.ablation.following import losses
from demo.world.swaps import KINDS, Swap, swaps
from lidit.diffusion import Objective
from lidit.text_to_image import TextToImage

TIMESTEPS = (0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Trained:
    """Weights as `demo.ablation.following` asks them."""

    encoders: tuple[str, ...]
    objective: Objective
    device: torch.device
    model: torch.nn.Module

    def predict(self, noisy_latents: Tensor, timestep: Tensor, *prompts: Any) -> Tensor:
        """Returns the model's prediction (B, C, H, W)."""
        return self.model(noisy_latents, timestep, *prompts)


def margins(weights: str, asked: Sequence[Swap], timesteps: Sequence[float]) -> np.ndarray:
    """Loss with the false prompt less loss with the true one, (timesteps, swaps)."""
    pipe = TextToImage.from_pretrained(weights)
    trained = Trained(tuple(pipe.encoders), pipe.objective, pipe.device, pipe.model.float().eval())
    encoders = [encoder.config for encoder in pipe.encoders.values()]
    side = pipe.image_size[0]
    with tempfile.TemporaryDirectory() as folder:
        latents = scene_latents(Path(folder), [swap.seed for swap in asked], side, pipe.vae, pipe.device)
        found = [
            losses(trained, latents, encode_prompts(Path(folder), texts, encoders, pipe.device), timesteps)
            for texts in ([swap.right for swap in asked], [swap.wrong for swap in asked])
        ]
    return found[1] - found[0]


def table(asked: Sequence[Swap], found: np.ndarray, timesteps: Sequence[float]) -> list[str]:
    """Kinds as rows, timesteps as columns: margin (its standard errors) accuracy."""
    kinds = np.array([swap.kind for swap in asked])
    lines = [
        "| kind | " + " | ".join(f"{timestep:g}" for timestep in timesteps) + " |",
        "|---" * (len(timesteps) + 1) + "|",
    ]
    for kind in (kind for kind in KINDS if kind in kinds):
        rows = found[:, kinds == kind]
        errors = rows.std(axis=1, ddof=1) / rows.shape[1] ** 0.5
        cells = [
            f"{row.mean():+.3f} ({row.mean() / error if error else 0:.1f}) {(row > 0).mean():.2f}"
            for row, error in zip(rows, errors)
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="demo/weights", help="weights folder (default %(default)s)")
    parser.add_argument("--swaps", type=int, default=48, help="of every kind (default %(default)s)")
    parser.add_argument("--timesteps", type=float, nargs="+", default=list(TIMESTEPS), help="(default %(default)s)")
    values = parser.parse_args(argv)
    asked = swaps(values.swaps)
    print("\n".join(table(asked, margins(values.weights, asked, values.timesteps), values.timesteps)))


if __name__ == "__main__":
    main()

"""Objectives: how latents are noised, what the model learns to predict, and how much each timestep counts.

**Time.** `timestep` t is a float in [0, 1] for both objectives: **0 is clean data, 1 is pure noise**. Training draws t;
sampling walks from 1 down to 0; the model multiplies it by 1000 before it embeds it. `ddpm` counts steps k = 0 .. T - 1 as
its paper does, and step k is t = (k + 1) / T; t = 0 is no step of it but the clean image.

| objective | noisy_latents                                | target of the model                              |
|-----------|----------------------------------------------|--------------------------------------------------|
| `Flow`    | (1 - t) latents + t noise                    | noise - latents                                  |
| `DDPM`    | sqrt(a_k) latents + sqrt(1 - a_k) noise      | noise, or v = sqrt(a_k) noise - sqrt(1 - a_k) latents |

with a_k = prod_(i <= k) (1 - beta_i). Everything here is a pure function of its arguments. A training step is

    timestep, noise = draw(objective, seed, image_numbers, latents.shape[1:])
    noisy_latents = objective.add_noise(latents, noise, timestep)
    prediction = model(noisy_latents, timestep, ...)
    loss = loss_per_sample(objective, prediction, latents, noise, timestep)  # (B,)

Shape notation: B samples, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lidit.runtime.fields import Config, PositiveFloat, PositiveInt, from_plain

BINS = 10  # of `timestep_bins`: fixed, so that runs and ranks can be compared and added


@dataclass(frozen=True)
class Flow(Config):
    """Rectified flow: a straight line from data to noise, and the model predicts its velocity.

    Liu et al. 2022 (arXiv 2209.03003); timestep density and shift of Esser et al. 2024 (SD3, arXiv 2403.03206).
    """

    name: ClassVar[str] = "flow"

    shift: PositiveFloat = 1.0
    """Moves timesteps towards noise, t' = s t / (1 + (s - 1) t), SD3 eq. 23: larger images need more noise to lose the same
    detail. 1 at 256 px, 3 above. The sampler uses the same shift unless told otherwise."""
    density: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of timesteps before the shift. `logit_normal`: sigmoid of a normal variable, most of them in the middle."""
    logit_mean: float = 0.0
    """Mean of that normal variable; above 0 leans towards noise."""
    logit_std: PositiveFloat = 1.0
    """Its standard deviation."""
    min_snr_gamma: PositiveFloat | None = None
    """Loss weight min(SNR, gamma) on the error in the latents (arXiv 2303.09556); none by default: the density weighs."""

    def timestep_at(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> timesteps in (0, 1): the inverse of the density's distribution function."""
        timestep = uniform.double()
        if self.density == "logit_normal":
            normal = torch.special.ndtri(timestep.clamp(2.0**-53, 1 - 2.0**-53))
            timestep = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return shift_timestep(timestep, self.shift).float()

    def sample_timestep(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count,) timesteps on the generator's device. `draw` is the one that training uses."""
        return self.timestep_at(_uniform(count, generator))

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """latents, noise (B, C, H, W), timestep (B,) -> noisy_latents (B, C, H, W)."""
        t = _per_sample(timestep)
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns what the model should predict, (B, C, H, W): the velocity from data to noise, the same at every timestep."""
        return noise - latents

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """timestep (B,) -> weight of each sample's loss (B,)."""
        if self.min_snr_gamma is None:
            return torch.ones_like(timestep)
        # An error e in the velocity is one of t e in the latents: weight t^2 min(SNR, gamma), SNR = (1 - t)^2 / t^2.
        return torch.minimum((1 - timestep) ** 2, self.min_snr_gamma * timestep**2)


@dataclass(frozen=True)
class DDPM(Config):
    """Discrete diffusion with linear betas, the paper's objective.

    Ho et al. 2020 (arXiv 2006.11239); v-prediction of Salimans and Ho 2022 (arXiv 2202.00512).
    """

    name: ClassVar[str] = "ddpm"

    num_steps: PositiveInt = 1000
    """T, the steps of the chain."""
    beta_start: float = 1e-4
    """Variance of the first step's noise."""
    beta_end: float = 0.02
    """Variance of the last step's noise; linear in between."""
    prediction_type: Literal["epsilon", "v"] = "epsilon"
    """The model's prediction: `epsilon`, the noise (the paper), or `v`, which stays well defined where noise is all."""
    min_snr_gamma: PositiveFloat | None = None
    """Loss weight min(SNR, gamma) on the error in the latents (arXiv 2303.09556 uses 5); none by default, as the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"ddpm: expected 0 < beta_start <= beta_end < 1, received {self.beta_start} and {self.beta_end}"
            )

    def timestep_at(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> timesteps, each of the T steps equally often."""
        step = (uniform.double() * self.num_steps).floor().clamp(max=self.num_steps - 1)
        return ((step + 1) / self.num_steps).float()

    def sample_timestep(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws (count,) timesteps on the generator's device. `draw` is the one that training uses."""
        return self.timestep_at(_uniform(count, generator))

    def alpha_bar(self, timestep: Tensor) -> Tensor:
        """timestep (B,) -> a_k (B,), the share of the latents' variance that is left; 1 at timestep 0.

        A timestep between two steps is taken for the nearer one.
        """
        table = _alpha_bars(self.num_steps, self.beta_start, self.beta_end, timestep.device)
        return table[(timestep * self.num_steps).round().long().clamp(0, self.num_steps)]

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """latents, noise (B, C, H, W), timestep (B,) -> noisy_latents (B, C, H, W)."""
        alpha_bar = _per_sample(self.alpha_bar(timestep))
        return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns what the model should predict, (B, C, H, W): the noise, or v."""
        if self.prediction_type == "epsilon":
            return noise
        alpha_bar = _per_sample(self.alpha_bar(timestep))
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents

    def loss_weight(self, timestep: Tensor) -> Tensor:
        """timestep (B,) -> weight of each sample's loss (B,)."""
        if self.min_snr_gamma is None:
            return torch.ones_like(timestep)
        alpha_bar = self.alpha_bar(timestep)  # SNR = a / (1 - a)
        # On the error in the latents the weight is min(SNR, gamma); that error is 1 / SNR of the one in the noise, and
        # 1 - a of the one in v (squares).
        weight = torch.minimum(alpha_bar, self.min_snr_gamma * (1 - alpha_bar))
        return weight / alpha_bar if self.prediction_type == "epsilon" else weight


Objective = Flow | DDPM
OBJECTIVES: dict[str, type[Flow] | type[DDPM]] = {Flow.name: Flow, DDPM.name: DDPM}


def objective_to_dict(objective: Objective) -> dict[str, Any]:
    """Returns `name` and the fields, ready for JSON."""
    return {"name": objective.name, **dataclasses.asdict(objective)}


def objective_from_dict(values: dict[str, Any]) -> Objective:
    """The inverse of `objective_to_dict`. Raises ValueError for a name or field that is not known."""
    values = dict(values)
    name = values.pop("name", None)
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected name {' or '.join(OBJECTIVES)}, received {name!r}")
    return from_plain(OBJECTIVES[name], values, f"objective {name}")


def shift_timestep(timestep: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t), SD3 eq. 23; leaves 0 and 1 where they are."""
    return shift * timestep / (1 + (shift - 1) * timestep)


# -- loss -------------------------------------------------------------------------------------------------------------


def loss_per_sample(
    objective: Objective, prediction: Tensor, latents: Tensor, noise: Tensor, timestep: Tensor
) -> Tensor:
    """Weighted mean squared error of each sample, (B,) float32; prediction, latents, noise (B, C, H, W), timestep (B,)."""
    target = objective.target(latents.float(), noise.float(), timestep)
    squared = (prediction.float() - target).square().flatten(1).mean(dim=1)
    return squared * objective.loss_weight(timestep)


def timestep_bins(loss: Tensor, timestep: Tensor, bins: int = BINS) -> Tensor:
    """Losses (B,) sorted into equal bins of the timestep -> (2, bins) float64: sums, then counts.

    Sums and counts, so that microbatches and ranks can be added up: the mean of a bin is `sums / counts` after that. Bin i
    holds i / bins <= t < (i + 1) / bins, the last one also t = 1.
    """
    index = (timestep * bins).long().clamp(0, bins - 1)
    totals = torch.zeros(2, bins, dtype=torch.float64, device=loss.device)
    values = torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])  # (2, B)
    return totals.index_add_(1, index, values)


# -- randomness of a sample -------------------------------------------------------------------------------------------

STREAMS = ("timestep", "noise", "caption", "prompt_drop", "latents")  # the place in this list is part of every draw


def sample_rng(seed: int, image_number: int, stream: str) -> np.random.Generator:
    """The random numbers of one sample of a training run, for one purpose.

    A counter-based generator (Philox 4x64): the key is (seed, stream), the counter begins at (image_number, 0). So the
    numbers depend on nothing but the arguments (not on batch, rank, or what was drawn before) and no two samples or
    streams ever share any. It takes about 20 microseconds to make, and 15 ns for a normal number (docs/sampling.md).

    Args:
        seed: of the run, 0 <= seed < 2**64.
        image_number: the sample's place in the run's order, counted over all ranks (`images_seen` before it), >= 0. A second
            visit to the same row is another number.
        stream: one of `STREAMS`: what the numbers are for.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream: expected one of {', '.join(STREAMS)}, received {stream!r}")
    seed, image_number = int(seed), int(image_number)  # numpy's integers would overflow below
    if not (0 <= seed < 2**64 and 0 <= image_number < 2**64):
        raise ValueError(f"expected seed and image_number in 0 .. 2**64 - 1, received {seed} and {image_number}")
    key = (STREAMS.index(stream) << 64) | seed
    return np.random.Generator(np.random.Philox(key=key, counter=image_number << 192))


def draw(objective: Objective, seed: int, image_numbers: Iterable[int], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The timestep (B,) and noise (B, *shape) of each sample, float32 on the CPU.

    Each is a function of (seed, image number) alone, so that a run gives the same losses on any number of ranks, with any
    microbatch, and after any resume. numpy leaves the GIL while it draws: a loader's threads do it beside the training.
    """
    numbers = list(image_numbers)
    uniform = torch.tensor([sample_rng(seed, number, "timestep").random() for number in numbers], dtype=torch.float64)
    noise = torch.empty(len(numbers), *shape)
    for row, number in zip(noise.numpy(), numbers):
        sample_rng(seed, number, "noise").standard_normal(dtype=np.float32, out=row)
    return objective.timestep_at(uniform), noise


# -- parts ------------------------------------------------------------------------------------------------------------


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)


def _per_sample(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


@functools.lru_cache(maxsize=16)
def _alpha_bars(num_steps: int, beta_start: float, beta_end: float, device: torch.device) -> Tensor:
    """(T + 1,) float32: 1, a_0, .., a_(T-1). Kept per device: a copy at every step would make the GPU wait."""
    betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    table = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])
    return table.float().to(device)

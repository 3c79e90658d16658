"""Samplers: noise -> latents, the model asked at falling timesteps, with classifier-free guidance.

`flow` is integrated by Euler steps along `flow_sigmas`; `ddpm` by DPM-Solver++ (2M, arXiv 2211.01095) of diffusers. At every
step the whole model runs, refiners included, since they depend on the timestep; the LLMs never do: their states come in as a
`PromptBatch`. Time runs from 1, noise, to 0, data: see `lidit.diffusion`.

**Guidance** (Ho and Salimans 2022, arXiv 2207.12598) asks for each image twice, in one batch of 2 B rows: with its prompt,
and with the negative or empty one. The second is a prompt like any other: the encoder's real states of it, through the
refiners, with its own pooled vector (maybe of no tokens at all), and the instruction kept, as in prompt drop.

Shape notation: B images, L tokens of the longest prompt, E an LLM's width, P instruction tokens, C H W of the latents, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lidit.diffusion import DDPM, Flow, Objective, shift_timestep
from lidit.runtime.fields import Config, NonNegativeFloat, PositiveFloat, PositiveInt

OnStep = Callable[[int, int, Tensor], None]
"""Called after every step with (steps done, steps in all, latents (B, C, H, W) so far)."""
Predict = Callable[[Tensor, float], Tensor]
"""(noisy_latents (B, C, H, W), timestep) -> prediction (B, C, H, W) float32, guidance included."""


@dataclass(frozen=True)
class SamplerConfig(Config):
    """Settings of sampling: how latents are made from noise."""

    num_inference_steps: PositiveInt = 28
    """Steps from noise to data; each runs the model once (on twice the rows where guidance is on)."""
    guidance_scale: NonNegativeFloat = 4.5
    """unconditional + guidance_scale * (conditional - unconditional). 1 = no guidance, and half the work."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Timesteps from, to (0 = data, 1 = noise) where guidance is on; outside, the prompt's prediction alone is used, at half
    the work (arXiv 2404.07724). All of them by default."""
    shift: PositiveFloat | None = None
    """flow: shift of the sigmas towards noise; by default the one that the weights were trained with."""
    spacing: Literal["linear", "diffusers", "diffusers_dynamic"] = "linear"
    """flow: spacing of the sigmas, see `flow_sigmas`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: expected 0 <= from <= to <= 1, received {low} and {high}")


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as the model gets them, by encoder; on the model's device, floats in its precision."""

    prompt_embeds: dict[str, Tensor]
    """(B, L_n, E_n); L_n may be 0."""
    prompt_mask: dict[str, Tensor]
    """(B, L_n) bool."""
    instruction_embeds: dict[str, Tensor]
    """(P_n, E_n), the same for every row."""

    def rows(self, index: Sequence[int]) -> PromptBatch:
        """Some of the rows, in that order; a row may be taken more than once."""
        rows = list(index)
        embeds = {name: states[rows] for name, states in self.prompt_embeds.items()}
        mask = {name: mask[rows] for name, mask in self.prompt_mask.items()}
        return PromptBatch(embeds, mask, self.instruction_embeds)

    def join(self, other: PromptBatch) -> PromptBatch:
        """These rows, then the other's; the shorter ones padded on the right."""
        embeds, masks = {}, {}
        for name, states in self.prompt_embeds.items():
            pairs = [(states, self.prompt_mask[name]), (other.prompt_embeds[name], other.prompt_mask[name])]
            longest = max(mask.shape[1] for _, mask in pairs)
            embeds[name] = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part, _ in pairs])
            masks[name] = torch.cat([F.pad(mask, (0, longest - mask.shape[1])) for _, mask in pairs])
        return PromptBatch(embeds, masks, self.instruction_embeds)


def initial_noise(generators: Sequence[torch.Generator], shape: Sequence[int]) -> Tensor:
    """One CPU generator per image -> noise (B, *shape), float32 on the CPU.

    A generator per image, so that an image does not depend on the others of its batch; on the CPU, so that it does not
    depend on the device either.
    """
    others = {str(generator.device) for generator in generators if generator.device.type != "cpu"}
    if others:
        raise ValueError(f"generators: expected torch.Generator on the CPU, received some on {', '.join(others)}")
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    objective: Objective,
    noise: Tensor,
    prompts: PromptBatch,
    negative: PromptBatch | None = None,
    config: SamplerConfig = SamplerConfig(),
    on_step: OnStep | None = None,
) -> Tensor:
    """Denoises a batch of images of one size.

    Args:
        model: a `LIDiT`, or anything that is called like it.
        objective: what the model was trained with.
        noise: (B, C, H, W) float32 on the model's device, of `initial_noise`.
        prompts: B rows.
        negative: B rows of what guidance leads away from: negative prompts, or the encoders' real `null_embeds`.
        config: steps and guidance.
        on_step: progress; may look at the latents, must not change them.

    Returns:
        latents (B, C, H, W) float32, scaled as in training: ready for the VAE's `decode`.
    """
    predict = guided(model, prompts, negative, config)
    if isinstance(objective, Flow):
        shift = objective.shift if config.shift is None else config.shift
        sigmas = flow_sigmas(config.num_inference_steps, shift, config.spacing)
        return euler(predict, noise, sigmas, on_step)
    return dpm_solver(predict, noise, objective, config.num_inference_steps, on_step)


def guided(
    model: torch.nn.Module, prompts: PromptBatch, negative: PromptBatch | None, config: SamplerConfig
) -> Predict:
    """The model as a function of latents and timestep, prompts filled in, guidance applied in float32."""
    low, high = config.guidance_interval
    if config.guidance_scale != 1 and negative is None:
        raise ValueError(
            f"guidance_scale {config.guidance_scale}: expected the negative or empty prompts, received none; pass `negative`, "
            f"or set guidance_scale to 1"
        )
    both = prompts.join(negative) if negative is not None and config.guidance_scale != 1 else prompts

    def ask(noisy_latents: Tensor, timestep: float, batch: PromptBatch) -> Tensor:
        timesteps = torch.full((len(noisy_latents),), timestep, device=noisy_latents.device)  # (B,)
        return model(noisy_latents, timesteps, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds).float()

    def predict(noisy_latents: Tensor, timestep: float) -> Tensor:
        if both is prompts or not low <= timestep <= high:
            return ask(noisy_latents, timestep, prompts)
        prediction = ask(torch.cat([noisy_latents, noisy_latents]), timestep, both)  # (2 B, C, H, W)
        conditional, unconditional = prediction.chunk(2)
        return unconditional + config.guidance_scale * (conditional - unconditional)

    return predict


# -- flow -------------------------------------------------------------------------------------------------------------


def flow_sigmas(
    num_inference_steps: int,
    shift: float = 1.0,
    spacing: Literal["linear", "diffusers", "diffusers_dynamic"] = "linear",
) -> Tensor:
    """The timesteps that Euler visits, (N + 1,) float32, from 1 down to 0.

    Args:
        num_inference_steps: N.
        shift: s of t' = s t / (1 + (s - 1) t).
        spacing: `linear`: N + 1 equal spaces from 1 to 0, then the shift, once (as the reference code of FLUX).
            `diffusers`: as its FlowMatchEulerDiscreteScheduler: N values from 1 to the **shifted** 1 / 1000, then the shift of
            all (its lower end is shifted twice), then 0: the last step is a jump from there.
            `diffusers_dynamic`: the same with `use_dynamic_shifting` and mu = ln(shift), whose lower end is shifted once.
    """
    if spacing == "linear":
        return shift_timestep(torch.linspace(1, 0, num_inference_steps + 1, dtype=torch.float64), shift).float()
    lowest = torch.tensor(1e-3, dtype=torch.float64)
    if spacing == "diffusers":
        lowest = shift_timestep(lowest, shift)
    sigmas = shift_timestep(torch.linspace(1, lowest.item(), num_inference_steps, dtype=torch.float64), shift)
    return torch.cat([sigmas.float(), torch.zeros(1)])


def euler(predict: Predict, noise: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Follows the velocity from noise (B, C, H, W) at sigmas[0] to latents at sigmas[-1], one straight line per step."""
    latents, num_steps = noise.float(), len(sigmas) - 1
    for step in range(num_steps):
        velocity = predict(latents, sigmas[step].item())
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
        if on_step is not None:
            on_step(step + 1, num_steps, latents)
    return latents


# -- ddpm -------------------------------------------------------------------------------------------------------------


def dpm_solver(
    predict: Predict, noise: Tensor, objective: DDPM, num_inference_steps: int, on_step: OnStep | None = None
) -> Tensor:
    """DPM-Solver++ (2M) from noise (B, C, H, W) at timestep 1 to latents; steps k equally spaced, the last lands on data."""
    scheduler = dpm_scheduler(objective)
    if num_inference_steps >= objective.num_steps:
        raise ValueError(
            f"num_inference_steps: expected less than the {objective.num_steps} steps of the chain, "
            f"received {num_inference_steps}"
        )
    scheduler.set_timesteps(num_inference_steps)
    latents = noise.float()
    for done, step in enumerate(scheduler.timesteps.tolist(), start=1):
        prediction = predict(latents, (step + 1) / objective.num_steps)
        latents = scheduler.step(prediction, step, latents).prev_sample
        if on_step is not None:
            on_step(done, num_inference_steps, latents)
    return latents


def dpm_scheduler(objective: DDPM) -> Any:
    """diffusers' scheduler for the objective."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        num_train_timesteps=objective.num_steps,
        beta_start=objective.beta_start,
        beta_end=objective.beta_end,
        beta_schedule="linear",
        prediction_type="epsilon" if objective.prediction_type == "epsilon" else "v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="linspace",
    )

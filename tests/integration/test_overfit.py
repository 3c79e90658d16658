"""The model, an objective and its sampler together: eight scenes learnt by heart come back as images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from demo.world.scenes import describe, make_scene, render
from lidit.config import lidit_tiny
from lidit.diffusion import DDPM, Flow, Objective, draw, loss_per_sample
from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.frozen.vae import load_vae
from lidit.model import LIDiT
from lidit.sampler import PromptBatch, SamplerConfig, initial_noise, sample

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]
DEMO = Path(__file__).parents[2] / "demo"
SCENES, SIDE, DRAWS = 8, 32, 4  # scenes, pixels, noises of each scene per step
STEPS = {"flow": 400, "ddpm": 800}  # noise prediction learns what stands in pure noise last


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Of a model so small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae():
    return load_vae(str(DEMO / "vae"))


@pytest.fixture(scope="module")
def latents(vae) -> Tensor:
    """(8, C, H, W) of eight scenes."""
    images = np.stack([np.asarray(render(make_scene(seed), SIDE, SIDE)) for seed in range(SCENES)])  # B height width 3
    pixels = torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1
    return vae.encode(pixels)


@pytest.fixture(scope="module")
def prompts() -> PromptBatch:
    """Their dense captions, encoded by both demo LLMs."""
    embeds, masks, instructions = {}, {}, {}
    for name in ("llama", "qwen"):
        encoder = PromptEncoder(EncoderConfig(name, str(DEMO / "encoders" / f"{name}-tuned"), dtype="fp32"), "cpu")
        embeds[name], masks[name] = encoder([describe(make_scene(seed), 0) for seed in range(SCENES)])
        instructions[name] = torch.from_numpy(encoder.instruction_embeds)
    return PromptBatch(embeds, masks, instructions)


def train(objective: Objective, latents: Tensor, prompts: PromptBatch) -> tuple[LIDiT, list[float]]:
    """A tiny model, and its loss at every step."""
    torch.manual_seed(0)
    widths = {name: states.shape[-1] for name, states in prompts.prompt_embeds.items()}
    model = LIDiT(lidit_tiny(widths, in_channels=latents.shape[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    rows = list(range(SCENES)) * DRAWS
    batch, fixed = prompts.rows(rows), latents[rows]
    losses, steps = [], STEPS[objective.name]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20, (steps - step) / (steps / 2))
        timestep, noise = draw(objective, 0, range(step * len(rows), (step + 1) * len(rows)), latents.shape[1:])
        noisy_latents = objective.add_noise(fixed, noise, timestep)
        prediction = model(noisy_latents, timestep, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds)
        loss = loss_per_sample(objective, prediction, fixed, noise, timestep).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("objective", [Flow(), DDPM()], ids=["flow", "ddpm"])
def test_eight_scenes_are_learnt_by_heart(objective, latents, prompts, vae):
    model, losses = train(objective, latents, prompts)
    ratio = np.mean(losses[-20:]) / losses[0]
    config = SamplerConfig(num_inference_steps=28, guidance_scale=1.0)
    noise = initial_noise([torch.Generator().manual_seed(seed) for seed in range(SCENES)], latents.shape[1:])
    together = sample(model, objective, noise, prompts, config=config)
    alone = [
        sample(model, objective, noise[row : row + 1], prompts.rows([row]), config=config) for row in range(SCENES)
    ]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-3, rtol=1e-3)
    error = (vae.decode(together).clamp(-1, 1) - vae.decode(latents)).square().flatten(1).mean(dim=1) / 4
    psnr = [-10 * math.log10(value) for value in error.tolist()]
    print(
        f"{objective.name}: loss {losses[0]:.3f} -> {ratio:.1%} of it, PSNR {np.mean(psnr):.1f} dB, worst {min(psnr):.1f}"
    )
    assert ratio < 0.05
    assert min(psnr) > 20

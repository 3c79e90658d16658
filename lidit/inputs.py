"""Whether what a caller gives to `LIDiT` fits the model and itself; looks at shapes and dtypes, never at values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lidit.config import LIDiTConfig


def check_inputs(
    config: LIDiTConfig,
    noisy_latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Mapping[str, Tensor],
    prompt_mask: Mapping[str, Tensor],
    instruction_embeds: Mapping[str, Tensor],
) -> None:
    """Raises ValueError that says what was expected of which argument of `LIDiT.forward`."""
    _check_latents(config, noisy_latents)
    batch = len(noisy_latents)
    if timestep.shape != (batch,) or timestep.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"timestep: expected ({batch},) float32 in [0, 1], received {tuple(timestep.shape)} {timestep.dtype}"
        )
    given = {"prompt_embeds": prompt_embeds, "prompt_mask": prompt_mask, "instruction_embeds": instruction_embeds}
    for what, by_encoder in given.items():
        if set(by_encoder) != set(config.encoders):
            raise ValueError(f"{what}: expected encoders {list(config.encoders)}, received {list(by_encoder)}")
    for name, width in config.encoders.items():
        _check_text(name, batch, width, prompt_embeds[name], prompt_mask[name], instruction_embeds[name])


def _check_latents(config: LIDiTConfig, noisy_latents: Tensor) -> None:
    shape = tuple(noisy_latents.shape)
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise ValueError(f"noisy_latents: expected (B, {config.in_channels}, H, W), received {shape}")
    if any(side % config.patch_size or not side for side in shape[2:]):
        raise ValueError(
            f"noisy_latents: expected H and W to be multiples of the patch size {config.patch_size}, received "
            f"{shape[2:]}; crop or resize the image to multiples of patch size x VAE downscale"
        )


def _check_text(name: str, batch: int, width: int, embeds: Tensor, mask: Tensor, instruction: Tensor) -> None:
    if embeds.ndim != 3 or len(embeds) != batch or embeds.shape[2] != width:
        raise ValueError(f"prompt_embeds[{name}]: expected ({batch}, L, {width}), received {tuple(embeds.shape)}")
    if mask.shape != embeds.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"prompt_mask[{name}]: expected {tuple(embeds.shape[:2])} bool, true for real tokens, "
            f"received {tuple(mask.shape)} {mask.dtype}"
        )
    if instruction.ndim != 2 or instruction.shape[1] != width:
        raise ValueError(
            f"instruction_embeds[{name}]: expected (P, {width}), one for the whole batch, "
            f"received {tuple(instruction.shape)}"
        )

"""TAEF2: a tiny autoencoder for the latents of FLUX.2 (32 channels, 8x down), by Ollin Boer Bohan, MIT license.

diffusers' `AutoencoderTiny` has no place for the `pool` branch of its middle blocks, and would load it without them and
without a word. Layers and key names: `madebyollin/taesd`, as the notes beside the weights describe them.

Shape notation: B images, C latent channels, H W latent height and width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTH = 64
LATENT_CHANNELS = 32
DOWNSCALE = 8


class TAEF2(nn.Module):
    """pixels (B, 3, height, width) in [-1, 1] <-> latents (B, 32, height / 8, width / 8), as FLUX.2 scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder_layers()
        self.decoder = decoder_layers()

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, height, width) in [-1, 1] -> latents (B, C, H, W). The layers themselves take [0, 1]."""
        return self.encoder((pixels + 1) / 2)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) -> pixels (B, 3, height, width), about [-1, 1], not clamped."""
        return self.decoder(latents) * 2 - 1


class Block(nn.Module):
    """relu(conv(x) + x) of three convolutions; with `pool`, a branch that sees the whole image is added first."""

    def __init__(self, pool: bool = False):
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH), nn.ReLU(), conv(WIDTH), nn.ReLU(), conv(WIDTH))
        self.pool = pool_branch() if pool else None

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 64, H, W) -> features of the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Squash(nn.Module):
    """Latents of any size -> (-3, 3), nearly unchanged around 0."""

    def forward(self, latents: Tensor) -> Tensor:
        """Latents -> latents of the same shape, element by element."""
        return torch.tanh(latents / 3) * 3


def conv(outputs: int, inputs: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3 x 3 convolution."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def pool_branch() -> nn.Sequential:
    """Widen, GroupNorm (whose statistics are those of the whole image), narrow."""
    return nn.Sequential(
        nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
        nn.GroupNorm(4, 4 * WIDTH),
        nn.ReLU(),
        nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
    )


def encoder_layers() -> nn.Sequential:
    """Image in [0, 1] -> latents, 8 times smaller."""
    return nn.Sequential(
        conv(WIDTH, 3), Block(),
        conv(WIDTH, stride=2, bias=False), Block(), Block(), Block(),
        conv(WIDTH, stride=2, bias=False), Block(), Block(), Block(),
        conv(WIDTH, stride=2, bias=False), Block(pool=True), Block(pool=True), Block(pool=True),
        conv(LATENT_CHANNELS),
    )  # fmt: skip


def decoder_layers() -> nn.Sequential:
    """Latents -> image in [0, 1], 8 times larger."""
    return nn.Sequential(
        Squash(), conv(WIDTH, LATENT_CHANNELS), nn.ReLU(),
        Block(pool=True), Block(pool=True), Block(pool=True), nn.Upsample(scale_factor=2), conv(WIDTH, bias=False),
        Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, bias=False),
        Block(), Block(), Block(), nn.Upsample(scale_factor=2), conv(WIDTH, bias=False),
        Block(), conv(3),
    )  # fmt: skip


def load_taef2(weights: Path) -> TAEF2:
    """A safetensors file with exactly TAEF2's tensors -> the model, in the file's precision, on the CPU.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = TAEF2()
    found, wanted = load_file(weights), model.state_dict()
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in wanted]
    wrong += [
        f"{name} has shape {list(found[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(
            f"weights {weights}: expected the {len(wanted)} tensors of TAEF2; {len(wrong)} do not fit, such as "
            f"{'; '.join(wrong[:3])}"
        )
    model.load_state_dict(found, assign=True)
    return model.eval().requires_grad_(False)

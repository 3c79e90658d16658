"""Layers of the refiners and the DiT.

Shape notation, here and wherever shapes stand beside a line:
B samples, L prompt tokens of one LLM (padding included), P instruction tokens of one LLM, S image tokens, D model width,
E an LLM's hidden width, N heads, K channels per head, M encoders, F feed-forward width, C latent channels, H W latent
height and width, h w the same in patches, p patch size, T real tokens of a packed batch. Pixels: `height`, `width`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lidit.attention import Keys, attention

EPS = 1e-6
TIMESTEP_SCALE = 1000.0  # `timestep` is in [0, 1]; the embedding's frequencies are made for [0, 1000]
TIMESTEP_CHANNELS = 256
ROTARY_BASE = 100.0  # the slowest rotation turns once in some 600 tokens; an image has up to 64 on a side
GROUPS = 32  # of GroupNorm, or as many of them as divide the width


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then `x (1 + scale) + shift`, in fp32: a small scale changes no value that is bf16 already.

    Shapes: x (B, S, D), shift and scale (B, 1, D). Source: DiT (arXiv 2212.09748), adaLN.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=EPS)
    return torch.addcmul(shift.float(), normed, 1 + scale.float()).to(x.dtype)


def add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """`x + gate * update`, rounded once. Shapes: x and update (B, S, D), gate (B, 1, D)."""
    return torch.addcmul(x, gate, update)


def timestep_features(timestep: Tensor, channels: int = TIMESTEP_CHANNELS, max_period: float = 10000.0) -> Tensor:
    """(B,) -> (B, channels) fp32: cosines, then sines, of geometrically spaced frequencies (DiT's convention)."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # B half
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_angles(h: int, w: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Angles (h w, channels / 2) fp32 for tokens in rows: the first half from a token's row, the second from its column.

    RoPE (arXiv 2104.09864) on two axes; frequencies fall geometrically from 1 to 1 / ROTARY_BASE a token.
    """
    half = channels // 4
    frequency = ROTARY_BASE ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device)[:, None] * frequency for size in (h, w))
    row = rows[:, None].expand(h, w, half)
    return torch.cat([row, columns.expand(h, w, half)], dim=-1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns channel i with channel i + K / 2 by the token's angle i, in fp32. Shapes: x (B, S, N, K), angles (S, K / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # S 1 K/2
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


def masked_mean(tokens: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens, zeros if there are none: (B, L, E), (B, L) bool -> (B, E) fp32. The others must be zeros."""
    return tokens.sum(dim=1, dtype=torch.float32) / real.sum(dim=1, keepdim=True).clamp(min=1)


class ZeroLinear(nn.Linear):
    """A projection that starts at zero: gates, modulations, the model's last layer."""


class Modulated(nn.Module):
    """A module that modulates and gates. Its two functions stand here so that `LIDiT.compile_regions` can replace them."""

    modulate = staticmethod(modulate)
    add_gated = staticmethod(add_gated)


class Modulation(nn.Module):
    """cond (B, D) -> `vectors` vectors (B, 1, D) each: zeros at the start (adaLN-zero)."""

    def __init__(self, width: int, vectors: int):
        super().__init__()
        self.sizes = [width] * vectors
        self.project = ZeroLinear(width, vectors * width)

    def forward(self, cond: Tensor) -> tuple[Tensor, ...]:
        vectors = self.project(F.silu(cond))[:, None]  # B 1 (vectors D)
        # Copies, since compiled code would be made anew for each view's offset. Torch's stub says that it returns nothing.
        return torch.split_with_sizes_copy(vectors, self.sizes, dim=-1)  # type: ignore[func-returns-value, return-value]


class TimestepEmbedding(nn.Module):
    """E_t: timestep (B,) in [0, 1] -> (B, D). Give it in fp32: in bf16 neighboring timesteps become one."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(TIMESTEP_CHANNELS, width)
        self.out = nn.Linear(width, width)

    def forward(self, timestep: Tensor) -> Tensor:
        features = timestep_features(timestep.float() * TIMESTEP_SCALE)
        return self.out(F.silu(self.up(features.to(self.up.weight.dtype))))


class NormedProjection(nn.Module):
    """RMSNorm, then a linear map to the model's width. An LLM's states differ by orders of magnitude: hence the norm."""

    def __init__(self, encoder_width: int, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(encoder_width, eps=EPS)
        self.project = nn.Linear(encoder_width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.project(self.norm(states))  # ... E -> ... D


class FeedForward(nn.Module):
    """Two linear maps and a GELU between them."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, with RMSNorm on queries and keys. No biases."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, keys: Keys | None = None, angles: Tensor | None = None) -> Tensor:
        """x (B, S, D), keys of its S tokens, `rotary_angles` of their places -> (B, S, D)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # B S N K each
        q, k = self.norm_q(q), self.norm_k(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = attention(q, k, v, keys)  # B S N K
        return self.out(y.flatten(2))  # B S D


class CrossAttention(nn.Module):
    """The same from tokens to others'. No biases, so that a sample with nothing to attend to gets exactly 0."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, others: Tensor, keys: Keys) -> Tensor:
        """x (B, S, D), others (B, L, D) or as `keys.pack` made them -> (B, S, D)."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))  # B S N K
        k, v = self.to_kv(others).unflatten(-1, (2, self.heads, -1)).unbind(-3)  # B L N K each, or T N K
        y = attention(self.norm_q(q), self.norm_k(k), v, keys)  # B S N K
        return self.out(y.flatten(2))  # B S D


class ResBlock(nn.Module):
    """(GroupNorm, SiLU, 3x3 convolution) x 2 and a skip, over the grid of image tokens.

    It stands for a positional embedding: zero padding tells the convolutions where the edges are.
    """

    def __init__(self, width: int):
        super().__init__()
        groups = math.gcd(GROUPS, width)
        self.norm1, self.norm2 = (nn.GroupNorm(groups, width, eps=EPS) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(width, width, kernel_size=3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))  # B D h w
        return x + self.conv2(F.silu(self.norm2(y)))

"""FLOPs of a training sample by part of the model, computed from the shapes alone.

Counted are matrix multiplications and convolutions, 2 per multiply-add, as torch.utils.flop_counter counts them: the
operations that the mathematics needs. What a kernel or activation checkpointing computes twice is counted once, so that
`flops / seconds / peak` is the MFU (PaLM, arXiv 2204.02311, appendix B). Padding tokens are counted if they are given.

Shape notation: see layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lidit.config import LIDiTConfig
from lidit.layers import TIMESTEP_CHANNELS


@dataclass(frozen=True)
class Flops:
    """Floating point operations of a forward and a backward pass."""

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        """Forward and backward together: a training step."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)


def model_flops(
    config: LIDiTConfig,
    latent_size: tuple[int, int],
    prompt_tokens: Mapping[str, float],
    instruction_tokens: Mapping[str, float],
    batch: int = 1,
) -> dict[str, Flops]:
    """Counts the FLOPs of one sample of a batch for every part of `LIDiT`, by the part's name.

    Args:
        config: the model.
        latent_size: (H, W).
        prompt_tokens: encoder -> L, the mean if it varies.
        instruction_tokens: encoder -> P.
        batch: B; the instruction is projected once for all of them.
    """
    width, image_tokens = config.width, latent_size[0] * latent_size[1] // config.patch_size**2
    patch = config.in_channels * config.patch_size**2
    kept = {name: instruction_tokens[name] if config.instruction == "kept" else 0 for name in config.encoders}
    tokens = {name: prompt_tokens[name] + kept[name] for name in config.encoders}
    context = sum(prompt_tokens[name] for name in config.encoders)
    parts = {
        "timestep": _linear(1, TIMESTEP_CHANNELS, width, from_data=True) + _linear(1, width, width),
        "pooled": _total(_linear(1, encoder_width, width) for encoder_width in config.encoders.values()),
        "linguistic": _total(
            _linear(prompt_tokens[name] + kept[name] / batch, encoder_width, width)
            + _linguistic_block(config, tokens[name]) * config.refiner_blocks
            for name, encoder_width in config.encoders.items()
        ),
        "patchify": _linear(image_tokens, patch, width, from_data=True),
        "res_block": _linear(image_tokens, 9 * width, width) * 2,
        "blocks": _dit_block(config, image_tokens, context) * config.depth,
        "final": _linear(1, width, 2 * width) + _linear(image_tokens, width, patch),
    }
    if config.collaborative:
        everyone = sum(tokens.values())
        branches = (_collaborative_branch(config, own, everyone - own) for own in tokens.values())
        parts["collaborative"] = _total(branches)
    return parts


def _linguistic_block(config: LIDiTConfig, tokens: float) -> Flops:
    gates = _linear(1, config.width, 2 * config.width) if config.refiner_gate else Flops()
    return gates + _attention(config, tokens, tokens) + _feed_forward(config, tokens)


def _collaborative_branch(config: LIDiTConfig, tokens: float, others: float) -> Flops:
    modulation = _linear(1, config.width, 6 * config.width)
    return modulation + _attention(config, tokens, others) + _feed_forward(config, tokens)


def _dit_block(config: LIDiTConfig, image_tokens: float, context: float) -> Flops:
    modulation = _linear(1, config.width, 9 * config.width)
    own, cross = _attention(config, image_tokens, image_tokens), _attention(config, image_tokens, context)
    return modulation + own + cross + _feed_forward(config, image_tokens)


def _attention(config: LIDiTConfig, queries: float, keys: float) -> Flops:
    width = config.width
    projections = _linear(queries, width, width) * 2 + _linear(keys, width, 2 * width)
    scores_and_values = 4 * queries * keys * width
    return projections + Flops(scores_and_values, 2 * scores_and_values)


def _feed_forward(config: LIDiTConfig, tokens: float) -> Flops:
    return _linear(tokens, config.width, config.ffn_ratio * config.width) * 2


def _linear(tokens: float, inputs: int, outputs: int, from_data: bool = False) -> Flops:
    """`from_data`: nothing before it is trained, so the backward pass makes the gradient of its weights alone."""
    forward = 2 * tokens * inputs * outputs
    return Flops(forward, forward if from_data else 2 * forward)


def _total(parts: Any) -> Flops:
    return sum(parts, Flops())

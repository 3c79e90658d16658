"""How many floating point operations a training sample costs, from the shapes alone: the model by parts, and the text encoders.

Counted are matrix multiplications and convolutions, 2 per multiply-add, as torch.utils.flop_counter counts them: the
operations that the mathematics needs. What a kernel or activation checkpointing computes twice is counted once, so that
`flops / seconds / peak` is the MFU (PaLM, arXiv 2204.02311, appendix B). Padding tokens are counted if they are given.

Letters: see layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lidit.config import LIDiTConfig
from lidit.layers import TIMESTEP_CHANNELS


@dataclass(frozen=True)
class Flops:
    """Operations of the forward and of the backward pass."""

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        """Of a training step."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class TextModelShape:
    """A decoder-only LLM with gated feed-forward layers (Llama, Qwen), as far as it runs."""

    width: int
    """E."""
    blocks: int
    """Blocks that run: up to the one whose states are taken."""
    heads: int
    """Of queries."""
    key_value_heads: int
    """Of keys and values."""
    head_channels: int
    """Channels per head."""
    ffn_width: int
    """F."""

    @classmethod
    def of(cls, text_config: Any, blocks: int) -> TextModelShape:
        """From the (text) config of a transformers model, and how many of its blocks run."""
        heads = text_config.num_attention_heads
        return cls(
            width=text_config.hidden_size,
            blocks=blocks,
            heads=heads,
            key_value_heads=getattr(text_config, "num_key_value_heads", None) or heads,
            head_channels=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
            ffn_width=text_config.intermediate_size,
        )


# The paper's, up to their third-to-last block.
LLAMA3_8B = TextModelShape(width=4096, blocks=30, heads=32, key_value_heads=8, head_channels=128, ffn_width=14336)
QWEN15_7B = TextModelShape(width=4096, blocks=30, heads=32, key_value_heads=32, head_channels=128, ffn_width=11008)


def text_flops(shape: TextModelShape, prompt_tokens: float, prefix_tokens: float = 0) -> Flops:
    """A frozen LLM over one prompt of L tokens behind a prefix whose keys and values are there already: forward only.

    Attention is counted in full, L x (P + L), as flop counters do, though it is causal.
    """
    queries, keys = shape.heads * shape.head_channels, shape.key_value_heads * shape.head_channels
    weights = shape.width * (2 * queries + 2 * keys + 3 * shape.ffn_width)
    pairs = prompt_tokens * (prefix_tokens + prompt_tokens)
    return Flops(shape.blocks * (2 * weights * prompt_tokens + 4 * queries * pairs))


def model_flops(
    config: LIDiTConfig,
    latent_size: tuple[int, int],
    prompt_tokens: Mapping[str, float],
    instruction_tokens: Mapping[str, float],
    batch: int = 1,
) -> dict[str, Flops]:
    """What one sample of a batch costs in `LIDiT`, by the names of its parts.

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

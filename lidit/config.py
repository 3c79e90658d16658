"""`LIDiTConfig`: everything that decides the model's shape, and its sizes as functions that return one.

How a model is run (attention backend, activation checkpointing, compilation) is no part of it: see the methods of `LIDiT`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lidit.runtime.fields import Config, NonNegativeInt, PositiveInt, from_plain

Instruction = Literal["kept", "cut"]
RefinerAttention = Literal["full", "causal"]
Fusion = Literal["collaborative", "concat"]
Position = Literal["conv", "rope"]
HEAD_CHANNELS_STEP = 8  # fused attention kernels want K in whole steps of it


@dataclass(frozen=True)
class LIDiTConfig(Config):
    """The model's shape. The defaults are the paper's; the refiner's switches are those of its ablations (table 5)."""

    encoders: dict[str, int]
    """Hidden width E of every text encoder, by name. One refiner branch each; the order is the context's."""
    depth: PositiveInt
    """Number of DiT blocks."""
    width: PositiveInt
    """Model width D, of the DiT and the refiners."""
    heads: PositiveInt
    """Attention heads N, in the DiT and the refiners; each has D / N channels."""
    in_channels: PositiveInt = 16
    """Latent channels C."""
    patch_size: PositiveInt = 2
    """Patch size p: latent pixels along a side of an image token."""
    ffn_ratio: PositiveInt = 4
    """Width of every feed-forward layer, as a multiple F / D of the model's."""
    instruction: Instruction = "kept"
    """`kept`: the instruction's tokens go through both refiners and are cut off after. `cut`: the refiners do not see
    them. A text model that was given no instruction has an empty one, (0, E): then the two are the same."""
    refiner_blocks: NonNegativeInt = 2
    """Number of blocks of each linguistic refiner; 0 leaves its input projection alone."""
    refiner_attention: RefinerAttention = "full"
    """Attention in the linguistic refiner: a token sees every token, or, `causal`, those before it."""
    refiner_gate: bool = True
    """Gates from timestep and pooled prompt in the linguistic refiner; without, plain residuals."""
    fusion: Fusion = "collaborative"
    """`collaborative`: branches attend to each other before their tokens are concatenated. `concat`: they do not.
    With one encoder there is nobody to attend to, and both mean the same."""
    position: Position = "conv"
    """Positions of image tokens. `conv`: the ResBlock's zero padding alone, the paper's way. `rope`: besides, the
    DiT's self-attention rotates queries and keys by row and column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "encoders", dict(self.encoders))  # ours: a caller's later change must not reach it
        if not self.encoders:
            raise ValueError("encoders: expected at least one, as {name: hidden width}, received none")
        for name, width in self.encoders.items():
            if not name.isidentifier() or _taken(name):
                raise ValueError(
                    f"encoders: expected names of letters, digits and underscores, received {name!r}; it names modules "
                    f"of the model, so it must not be an attribute of torch.nn.ModuleDict either"
                )
            if not isinstance(width, int) or width < 1:
                raise ValueError(f"encoders[{name}]: expected a whole number >= 1, received {width!r}")
        if self.width % (self.heads * HEAD_CHANNELS_STEP):
            raise ValueError(
                f"width {self.width}, heads {self.heads}: expected a multiple of {HEAD_CHANNELS_STEP} channels per head, "
                f"received {self.width / self.heads:g}"
            )

    @property
    def head_channels(self) -> int:
        """K, channels per head."""
        return self.width // self.heads

    @property
    def collaborative(self) -> bool:
        """True if there is a collaborative refiner."""
        return self.fusion == "collaborative" and len(self.encoders) > 1

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LIDiTConfig:
        """Builds a config from what `to_dict` or a JSON reader gave. Raises ValueError naming unknown or missing fields."""
        return from_plain(cls, values, "model config")


def lidit_tiny(encoders: Mapping[str, int] | None = None, in_channels: int = 16, **changes: Any) -> LIDiTConfig:
    """About 4 M parameters: tests, and the demo on a CPU. Default encoders: the demo's two LLMs."""
    return _size(dict(depth=4, width=128, heads=4), encoders or DEMO_ENCODERS, in_channels, changes)


def lidit_small(encoders: Mapping[str, int] | None = None, in_channels: int = 16, **changes: Any) -> LIDiTConfig:
    """About 60 M parameters (the shape of DiT-S): experiments on one GPU. Default encoders: the demo's two LLMs."""
    return _size(dict(depth=12, width=384, heads=6), encoders or DEMO_ENCODERS, in_channels, changes)


def lidit_1b(encoders: Mapping[str, int] | None = None, in_channels: int = 16, **changes: Any) -> LIDiTConfig:
    """LI-DiT-1B, about 1.08 B parameters. Default encoders: LLaMA3-8B and Qwen1.5-7B."""
    return _size(dict(depth=28, width=1152, heads=16), encoders or PAPER_ENCODERS, in_channels, changes)


def lidit_10b(encoders: Mapping[str, int] | None = None, in_channels: int = 16, **changes: Any) -> LIDiTConfig:
    """LI-DiT-10B, about 10.35 B parameters. Default encoders: LLaMA3-8B and Qwen1.5-7B."""
    return _size(dict(depth=48, width=2816, heads=44), encoders or PAPER_ENCODERS, in_channels, changes)


PAPER_ENCODERS = {"llama3": 4096, "qwen15": 4096}
DEMO_ENCODERS = {"llama": 128, "qwen": 192}
SIZES = {"tiny": lidit_tiny, "small": lidit_small, "1b": lidit_1b, "10b": lidit_10b}


def _size(shape: dict[str, int], encoders: Mapping[str, int], in_channels: int, changes: dict[str, Any]) -> LIDiTConfig:
    return LIDiTConfig(**{"encoders": dict(encoders), "in_channels": in_channels, **shape, **changes})


def _taken(name: str) -> bool:
    import torch  # here: whoever only reads a config need not wait for torch

    return hasattr(torch.nn.ModuleDict(), name)

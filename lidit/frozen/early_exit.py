"""Early exit after block k of a decoder-only model, and a KV cache of a prefix that all batches share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class EarlyExit(Exception):
    """Carries the chosen block's output out of the model's forward pass, so that nothing after that block runs."""

    def __init__(self, states: Tensor):
        self.states = states


class SharedPrefixLayer(DynamicLayer):
    """Keys and values of the prefix, (1, N, P, K): prepended to every batch's own, and never grown by them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        batch = key_states.shape[0]
        assert self.keys is not None and self.values is not None
        return (
            torch.cat([self.keys.expand(batch, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(batch, -1, -1, -1), value_states], dim=-2),
        )


def early_exit_hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of the last block to run: raises `EarlyExit` with the block's output."""
    raise EarlyExit(output[0] if isinstance(output, tuple) else output)


def blocks_of(model: torch.nn.Module, depth: int) -> torch.nn.ModuleList:
    """Finds the model's `depth` transformer blocks: the largest ModuleList of that many modules.

    Raises:
        ValueError: it has none of that many.
    """
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth]
    if not lists:
        raise ValueError(
            f"{type(model).__name__}: expected a ModuleList of {depth} blocks, found none; is it decoder-only?"
        )
    return max(lists, key=lambda blocks: sum(weight.numel() for weight in blocks.parameters()))


def context_length(text_config: transformers.PretrainedConfig) -> int:
    """Returns the longest input in tokens that the model's positions allow; unbounded for relative positions (T5)."""
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(text_config, key, None), int):
            return getattr(text_config, key) if text_config.model_type not in ("t5", "mt5", "umt5") else 1 << 30
    return 1 << 30


@contextlib.contextmanager
def no_load_report() -> Iterator[None]:
    """Silences transformers' table of checkpoint tensors that a model of fewer blocks does not take."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

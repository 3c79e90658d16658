"""A decoder-only model cut after a block, and the keys and values of a prefix that all batches share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class BlockReached(Exception):
    """Carries the chosen block's output out of the model, so that nothing after it runs, whatever its class calls it."""

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


def stop_here(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    raise BlockReached(output[0] if isinstance(output, tuple) else output)


def blocks_of(model: torch.nn.Module, depth: int) -> torch.nn.ModuleList:
    """The model's `depth` transformer blocks: the largest ModuleList of that many modules.

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
    """Tokens that the model's positions reach; unbounded for relative positions (T5)."""
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(getattr(text_config, key, None), int):
            return getattr(text_config, key) if text_config.model_type not in ("t5", "mt5", "umt5") else 1 << 30
    return 1 << 30


@contextlib.contextmanager
def no_load_report() -> Iterator[None]:
    """Without transformers' table of tensors that a model of fewer blocks does not take."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

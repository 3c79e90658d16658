"""Batches prompts of mixed length with little padding, and copies a batch's states to the host while the next one runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Launched = TypeVar("Launched")


@dataclass(frozen=True)
class EncodedBatch:
    """States of some prompts, packed by the codec, on the CPU; the tokens of a prompt are contiguous."""

    rows: np.ndarray  # (B,) which of the prompts
    lengths: np.ndarray  # (B,) tokens of each
    packed: np.ndarray  # (T, bytes_per_token) uint8
    finite: np.ndarray  # (B,) bool, no NaN or Inf in the prompt's states
    slots: int  # B * L, what the model computed: T / slots is the share that was not padding


def plan_batches(lengths: np.ndarray, batch_tokens: int, overhead_tokens: int = 32) -> list[np.ndarray]:
    """Lengths of prompts -> batches of row indices, longest first, with the least padding and overhead together.

    A batch of B prompts padded to its longest L costs `B * L + overhead_tokens` and holds `B * L <= batch_tokens` (or
    one prompt). The rows are sorted and the cuts between distinct lengths found by dynamic programming. Rows of the
    same length keep their order. `overhead_tokens` is what launching a batch costs, in tokens: little, even for the small
    models of the tests, so that padding stays near 2 % in windows of a thousand prompts.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    distinct, counts = distinct[::-1], counts[::-1]
    before = np.concatenate([[0], np.cumsum(counts)])  # rows longer than distinct[i]
    padded_to = np.maximum(distinct, 1)
    fit = np.maximum(batch_tokens // np.maximum(padded_to, 8), 1)  # rows of a batch; at most batch_tokens / 8 of them
    best, start = np.zeros(len(distinct) + 1), np.zeros(len(distinct) + 1, int)
    for end in range(1, len(distinct) + 1):
        rows = before[end] - before[:end]
        cost = best[:end] + rows * padded_to[:end] + -(-rows // fit[:end]) * overhead_tokens
        start[end] = np.argmin(cost)
        best[end] = cost[start[end]]
    batches: list[np.ndarray] = []
    end = len(distinct)
    while end > 0:
        group = order[before[start[end]] : before[end]]
        size = fit[start[end]]
        batches.extend(group[first : first + size] for first in reversed(range(0, len(group), size)))
        end = start[end]
    return batches[::-1]


def one_ahead(launched: Iterable[Launched]) -> Iterator[Launched]:
    """Yields each item after the next one was launched: a batch is read while the one after it computes."""
    waiting: deque[Launched] = deque()
    for item in launched:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.popleft()
    yield from waiting


def finish_batch(rows: np.ndarray, lengths: list[int], copies: list[Tensor], event: Any, slots: int) -> EncodedBatch:
    """Waits for the batch's copies to the host and wraps them."""
    if event is not None:
        event.synchronize()
    packed, finite_tokens = (copy.numpy() for copy in copies)
    ends = np.cumsum(lengths)
    bad = np.concatenate([[0], np.cumsum(~finite_tokens)])
    finite = bad[ends] == bad[ends - np.array(lengths, int)]
    return EncodedBatch(rows, np.array(lengths, np.int32), packed, finite, slots)


def to_host(tensor: Tensor) -> Tensor:
    """Starts a copy to pinned memory that overlaps the next batch; on the CPU the tensor itself."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

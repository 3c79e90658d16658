"""Sampling whose draws belong to a row and not to its batch: a row's text is the same whatever is generated beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: steps of splitmix64 (Steele et al., 2014)
MIX = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
UNIFORM_BITS = 24  # what a float32 holds exactly


class RowSampler(LogitsProcessor):
    """Turns "the likeliest token" into "a token drawn at the row's temperature", by the Gumbel-max trick.

    argmax(logits / temperature + g), with g independent Gumbel noise, is a draw from softmax(logits / temperature)
    (Gumbel, 1954). The noise is a hash of (the row's seed, the step, the token's id): no generator whose state would run
    through the batch. Use it last, with `do_sample=False`.

    Args:
        seeds: 64-bit integers, one per row of the batch.
        temperatures: one per row; 0 leaves the row's logits alone, so its likeliest token is taken.
        prompt_length: tokens of a row when generation starts, padding included.
    """

    def __init__(self, seeds: list[int], temperatures: list[float], prompt_length: int):
        drawn = [row for row, temperature in enumerate(temperatures) if temperature > 0]
        self.rows = torch.tensor(drawn, dtype=torch.long)  # the R rows that are drawn
        self.seeds = torch.tensor([_int64(seeds[row]) for row in drawn], dtype=torch.long)
        self.temperatures = torch.tensor([temperatures[row] for row in drawn])
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (B, L), scores (B, V) -> scores (B, V) whose largest entry is the row's draw."""
        if not len(self.rows):
            return scores
        if self.rows.device != scores.device:  # once: a copy at every step would wait for the device
            self.rows, self.seeds = self.rows.to(scores.device), self.seeds.to(scores.device)
            self.temperatures = self.temperatures.to(scores.device)
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.float()
        drawn = scores[self.rows] / self.temperatures[:, None] + gumbel_noise(
            self.seeds, step, scores.shape[1]
        )  # (R, V)
        return scores.index_copy(0, self.rows, drawn)


def gumbel_noise(seeds: Tensor, step: int, size: int) -> Tensor:
    """(B,) int64 seeds -> (B, size) float32 standard Gumbel noise: the same on every device."""
    state = mix(seeds[:, None] + _int64(GOLDEN * (step + 1)))  # (B, 1)
    bits = mix(state + GOLDEN * torch.arange(1, size + 1, device=seeds.device))  # (B, size)
    uniform = (_shifted(bits, 64 - UNIFORM_BITS).float() + 0.5) * 2.0**-UNIFORM_BITS
    return -(-uniform.log()).log()


def mix(state: Tensor) -> Tensor:
    """Applies the finalizer of splitmix64 on int64, which wraps as unsigned arithmetic does."""
    state = (state ^ _shifted(state, 30)) * MIX[0]
    state = (state ^ _shifted(state, 27)) * MIX[1]
    return state ^ _shifted(state, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _int64(value: int) -> int:
    """The lowest 64 bits as a signed integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value

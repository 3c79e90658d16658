"""Texts to token batches: several whole texts per row, none of which sees another.

A batch is a pure function of (seed, variant, step): a run that resumes at a step sees what an unbroken run sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from demo.models.vocabulary import VOCABULARIES
from demo.world.language import TRAIN_SEEDS, dialogue, draw_scene, plain_text

CONTEXT_WEIGHT = 0.05
"""Loss weight of a dialogue's tokens outside the answers: enough to keep the base model's knowledge of captions, and
little enough that the chance in their wording does not drown what the answers teach."""

INVENTORY_SHARE = 0.65
"""Of the dialogues: an inventory asks for every attribute of every group, so its tokens teach more than a question's."""

MOST_QUESTIONS = 10

TRIES = 4
"""Texts in sequence that fit nowhere before a batch counts as full."""


@dataclass(frozen=True)
class PackedBatch:
    """B rows of L tokens: `tokens` (B, L) int64, `weights` (B, L) float32, the loss weight of *predicting* a token,
    `mask` (B, 1, L, L) bool, True where a row's token may look at a column's token (causal, own text only)."""

    tokens: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor


def packed_batch(
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    variant: str,
    rows: int,
    length: int,
    seed: int,
    step: int,
    context_weight: float = CONTEXT_WEIGHT,
) -> PackedBatch:
    """The batch of one training step."""
    rng = np.random.default_rng([seed, 7, int(variant == "tuned"), step])
    tokens = np.full((rows, length), tokenizer.pad_token_id, dtype=np.int64)
    weights = np.zeros((rows, length), dtype=np.float32)
    owner = np.zeros((rows, length), dtype=np.int64)  # 0 is padding, which looks at padding only: no row is all masked
    used, placed, misses = np.zeros(rows, dtype=np.int64), 0, 0
    while misses < TRIES:
        ids, weight = document(tokenizer, family, variant, rng, context_weight)
        room = np.flatnonzero(used + len(ids) <= length)
        if len(room) == 0:
            misses += 1
            continue
        misses, placed = 0, placed + 1
        row = room[np.argmax(used[room])]
        span = slice(used[row], used[row] + len(ids))
        tokens[row, span], weights[row, span], owner[row, span] = ids, weight, placed
        used[row] += len(ids)
    owners = torch.from_numpy(owner)
    mask = (owners[:, None, :, None] == owners[:, None, None, :]).tril()  # (B, 1, L, L)
    return PackedBatch(torch.from_numpy(tokens), torch.from_numpy(weights), mask)


def document(
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    variant: str,
    rng: np.random.Generator,
    context_weight: float = CONTEXT_WEIGHT,
) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of one training text. The first token follows nothing and has weight 0."""
    scene = draw_scene(rng, TRAIN_SEEDS)
    if variant == "base":
        ids = tokenizer(plain_text(scene, rng))["input_ids"] + [tokenizer.eos_token_id]
        weights = [1.0] * len(ids)
    else:
        text = tokenizer.apply_chat_template(dialogue(scene, rng, INVENTORY_SHARE, MOST_QUESTIONS), tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        header = tokenizer(VOCABULARIES[family].header, add_special_tokens=False)["input_ids"]
        weights = [1.0 if answer else context_weight for answer in in_answer(ids, header, tokenizer.eos_token_id)]
    weights[0] = 0.0
    return ids, weights


def in_answer(ids: list[int], header: list[int], eos: int) -> list[bool]:
    """Which tokens belong to an assistant turn: those after its header, up to and with its end token."""
    flags, inside = [], False
    for position, token in enumerate(ids):
        flags.append(inside)
        if inside:
            inside = token != eos
        elif ids[max(0, position + 1 - len(header)) : position + 1] == header:
            inside = True
    return flags

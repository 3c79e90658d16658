"""Truncates texts before they are tokenized: who reads 256 tokens of a text need not tokenize a megabyte.

A tokenizer looks at a text piece by piece, and a piece is seldom longer than a word. So the first tokens of a text are those
of its beginning, as long as that has some tokens more. They could differ only where one unbroken word, or one run of
spaces, is more than `MARGIN` tokens long behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MARGIN = 64  # tokens that a beginning has beyond those that are read: the cut changes the last ones
CHARACTERS_PER_TOKEN = 64  # first guess; words have four, the longest runs of spaces that are a token 128
LONGER = 4  # times, where a beginning has too few tokens: of a run of spaces, or of unknown signs, some make one


def beginnings(tokenizer: Any, texts: Sequence[str], tokens: int) -> list[str]:
    """The texts as they are; of a very long one a beginning whose first `tokens` tokens are those of the whole.

    Args:
        tokenizer: of transformers.
        texts: of any length. Up to `CHARACTERS_PER_TOKEN` for each token, margin included, a text stays whole.
        tokens: how many are read.
    """
    enough = tokens + MARGIN
    limit = enough * CHARACTERS_PER_TOKEN
    return [text if len(text) <= limit else _beginning(tokenizer, text, enough, limit) for text in texts]


def _beginning(tokenizer: Any, text: str, enough: int, limit: int) -> str:
    while limit < len(text):
        begin = text[:limit]
        if len(tokenizer(begin, add_special_tokens=False, verbose=False)["input_ids"]) >= enough:
            return begin
        limit *= LONGER
    return text

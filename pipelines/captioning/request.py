"""Requests and answers: the small interface that every captioning engine has.

An engine is called with requests and returns their answers, in order:

    engine(requests: list[CaptionRequest]) -> list[CaptionAnswer]
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol

INSTRUCTION = "Describe the image in detail."
HINT = "It came with this text, which may be wrong: {hint}"
MOST_HINT_CHARACTERS = 400  # longest hint; what is longer is mostly a tag list, and costs as many tokens as the image
MARKUP = re.compile(r"<[^<>]{0,80}>|\[/?[A-Z_]{2,20}\]")  # HTML, and what chat templates mean by `<image>` or `[INST]`
GRAY = (127, 127, 127)  # color of the blank image


@dataclass(frozen=True)
class CaptionRequest:
    """One image to be described."""

    image: bytes
    """The encoded image, as it came."""
    prompt: str
    """The words of the user's turn."""
    seed: int = 0
    """Decides what is drawn when `temperature` is above 0; 64 bits."""
    temperature: float = 0.0
    """0: the likeliest word each time."""
    blank: bool = False
    """Show a gray image of the same size instead: what the engine says without looking."""


@dataclass(frozen=True)
class CaptionAnswer:
    """The answer to a request, or the reason why there is none."""

    text: str = ""
    tokens: int = 0
    """Tokens of the text, the end token not counted."""
    cut_off: bool = False
    """True where the text ran into the length limit."""
    error: str | None = None
    """Reason why there is no text: the image cannot be decoded, or the engine refuses this request. None if there is one."""


class CaptionEngine(Protocol):
    """Captions images. Made once per actor; may be called from one thread at a time."""

    counts: Counter[str]
    """`tokens` written, and `slots` computed for them where the engine knows; added up since the engine was made."""

    def load(self) -> None:
        """Makes it ready. Raises ValueError where it can never be: that is no fault of an image."""

    def __call__(self, requests: list[CaptionRequest]) -> list[CaptionAnswer]:
        """The answers, in the order of the requests. A request's answer does not depend on the others."""


def prompt_text(instruction: str, hint: str | None = None) -> str:
    """The words of the user's turn: the instruction, and the hint on a line of its own if there is one."""
    hint = " ".join(MARKUP.sub(" ", hint or "").split())[:MOST_HINT_CHARACTERS]
    return f"{instruction}\n{HINT.format(hint=hint)}" if hint else instruction


def conversation(text: str, image: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """One user turn of an image and a text; `image` is the image's part, by default as chat templates take it."""
    return [{"role": "user", "content": [image or {"type": "image"}, {"type": "text", "text": text}]}]

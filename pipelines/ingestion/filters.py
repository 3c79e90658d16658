"""Filters of rows. Each is off unless asked for, and counts what it takes away.

A rejected caption becomes null by default (`bad_caption: null`); its image is kept, and a VLM may write a better one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lidit.runtime.fields import Config, Interval, PositiveFloat, PositiveInt

BAD_CAPTIONS = ("url", "file_name", "tag_list")

URL = re.compile(
    r"(?:https?://|www\.)\S|(?<![\w-])[\w-]++\.(?:com|org|net|io|co|de|ru|cn|jp|fr|uk)\b", re.I
)  # nothing in it is tried from two places: a caption may be as long as a stranger likes
URL_WORDS = 2  # words beside a URL that do not make it a caption: "image via https://..."
FILE_ENDING = re.compile(
    r"[^\s.]\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif|raw|cr2|nef|psd|pdf|mp4|mov|docx?|zip)\s*$", re.I
)
FILE_WORDS = 4  # a longer text that ends in ".jpg" is a sentence about a file
CAMERA_NAME = re.compile(
    r"(?:img|dsc|dscn|dscf|dscn|pxl|mvi|gopr|dji|imag|p|photo|image|picture|pic|untitled|screenshot|scan|file)"
    r"[\s_-]*\(?\d(?:[\d\s_().:-]|at\b)*",
    re.I,
)
CODE = re.compile(r"(?=[^\s]*\d)[a-z0-9]+(?:[_-][a-z0-9]+)*", re.I)  # one word of letters and digits: an id, a hash
CODE_LETTERS = 8
SEPARATORS = re.compile(r"[,;|•·、，；\n]")
TAGS = 4  # items that make a list
TAG_SHARE = 0.8  # of its items that look like tags
TAG_WORDS = 3
TAG_SYMBOLS = 6  # of a tag in a script without spaces
SPACELESS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
SENTENCE_WORDS = (  # they hold a sentence together; a tag has none
    "a an the is are was were be has have with without of in on at by to from for and or but near under over behind beside "
    "this that these those its his her their there which who while as into onto between above below"
)


@dataclass(frozen=True)
class FiltersConfig(Config):
    """Filters of rows, all of them off by default. What is taken away is counted in the summary."""

    min_side: PositiveInt | None = None
    """Shorter side in pixels at least."""
    min_aspect: PositiveFloat | None = None
    """Width over height at least, such as 0.5."""
    max_aspect: PositiveFloat | None = None
    """Width over height at most, such as 2."""
    min_caption: PositiveInt | None = None
    """Characters of a caption at least; a shorter one is bad."""
    max_caption: PositiveInt | None = None
    """Characters of a caption at most; a longer one is bad."""
    captions: Sequence[str] = ()
    """What makes a caption bad besides its length, any of: url, file_name, tag_list."""
    bad_caption: Literal["null", "drop"] = "null"
    """What becomes of a bad caption: `null` takes the caption away and keeps the image, `drop` the whole row."""
    duplicates: bool = False
    """Leave out images whose very bytes are in the table, or came before, whatever their caption."""
    near_duplicates: Annotated[int, Interval(ge=0, le=11)] | None = None
    """Leave out images whose perceptual hash differs from an earlier one's in at most so many of its 64 bits (0 to 11)."""
    min_score: float | None = None
    """Value of `columns.score` at least; a row without one is left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for low, high in (("min_caption", "max_caption"), ("min_aspect", "max_aspect")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and most < least:
                raise ValueError(f"filters: expected {low} <= {high}, received {least} and {most}")
        unknown = [kind for kind in self.captions if kind not in BAD_CAPTIONS]
        if unknown:
            raise ValueError(f"filters.captions: expected any of {', '.join(BAD_CAPTIONS)}; received {unknown[0]!r}")

    def size(self, height: int, width: int) -> str | None:
        """Name of the filter that an image of so many pixels does not pass, None if it passes."""
        if self.min_side is not None and min(height, width) < self.min_side:
            return "min_side"
        aspect = width / height
        if self.min_aspect is not None and aspect < self.min_aspect:
            return "min_aspect"
        if self.max_aspect is not None and aspect > self.max_aspect:
            return "max_aspect"
        return None

    def score(self, score: float | None) -> str | None:
        """Name of the filter that a row of this score does not pass, None if it passes."""
        if self.min_score is None or (score is not None and score >= self.min_score):
            return None
        return "no_score" if score is None else "min_score"

    def caption(self, caption: str | None) -> str | None:
        """Names what is bad about a caption, None if nothing is; no caption is no bad one."""
        if caption is None:
            return None
        length = len(caption.strip())
        if self.min_caption is not None and length < self.min_caption:
            return "min_caption"
        if self.max_caption is not None and length > self.max_caption:
            return "max_caption"
        kind = caption_kind(caption) if self.captions else None
        return kind if kind in self.captions else None


def caption_kind(caption: str) -> str | None:
    """`url`, `file_name` or `tag_list` where a text is that rather than words about an image; None where it may be one.

    - url: a URL with at most two words beside it.
    - file_name: at most four words that end as image files do (`red car.jpg`), the name a camera gives (`IMG_2034`), or
      one word of letters and digits (`a1b2c3d4e5`).
    - tag_list: four items or more between commas (or the like), at least 80 % of them of at most three words with no
      word among them that holds a sentence together; or hash tags, as many as other words.
    """
    text = caption.strip()
    words = text.split()
    links = sum(URL.search(word) is not None for word in words)
    if links and len(words) - links <= URL_WORDS:
        return "url"
    if len(words) <= FILE_WORDS and FILE_ENDING.search(text):
        return "file_name"
    if CAMERA_NAME.fullmatch(text) or (len(text) >= CODE_LETTERS and _is_code(text)):
        return "file_name"
    hashes = sum(word.startswith("#") and len(word) > 1 for word in words)
    if hashes >= TAGS and hashes >= len(words) - hashes:
        return "tag_list"
    items = [item.strip() for item in SEPARATORS.split(text.rstrip(".")) if item.strip()]
    if len(items) >= TAGS and sum(map(_is_tag, items)) >= TAG_SHARE * len(items):
        return "tag_list"
    return None


def _is_code(text: str) -> bool:
    """One word with at least as many digits as a third of it: `20190817_123456`, `a1b2c3d4`, not `boeing-747`."""
    digits = sum(map(str.isdigit, text))
    return CODE.fullmatch(text) is not None and digits * 3 >= len(text)


def _is_tag(item: str) -> bool:
    if SPACELESS.search(item):
        return len(item) <= TAG_SYMBOLS
    words = item.lower().split()
    return (
        len(words) <= TAG_WORDS
        and not _sentence_words().intersection(words)
        and not item.rstrip().endswith((".", "!", "?"))
    )


@functools.cache
def _sentence_words() -> frozenset[str]:
    return frozenset(SENTENCE_WORDS.split())

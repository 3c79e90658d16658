"""Quality gate for captions: rejects empty ones, refusals, loops, those that are cut off ... Pure functions.

`judge(text, cut_off, gate)` returns a status, `OK` or the first of `REJECTIONS` that holds. Whether the image was looked at
cannot be told from a caption alone: see `same_text`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lidit.runtime.fields import Config, Fraction, PositiveInt

OK = "ok"
EMPTY = "empty"
CUT_OFF = "cut_off"
REFUSAL = "refusal"
WRONG_SCRIPT = "wrong_script"
REPETITION = "repetition"
TOO_SHORT = "too_short"
IMAGE_IGNORED = "image_ignored"
REJECTIONS = (EMPTY, CUT_OFF, REFUSAL, WRONG_SCRIPT, REPETITION, TOO_SHORT, IMAGE_IGNORED)
"""Reasons to reject a caption, in the order in which they are looked for; the last one by comparison with a blank image."""

REFUSALS = re.compile(
    r"""
    (?:i['’]?m|i\s+am)\s+(?:very\s+|really\s+)?(?:sorry|unable|not\s+able)
    | sorry\b
    | (?:i\s+)?apologi[sz]e
    | unfortunately,?\s+i\b
    | i\s+(?:can(?:no|['’])?t|can\s+not|could\s+not|couldn['’]t|won['’]t|will\s+not|am\s+not\s+able|do\s+not|don['’]t)\s+
      (?:\w+\s+)?(?:see|view|describe|provide|assist|help|identify|analy[sz]e|access|process|comply|fulfil+|have\s+access)
    | as\s+an?\s+(?:ai|artificial|language\s+model|large\s+language)
    | (?:there\s+is\s+)?no\s+image\b
    | (?:please|could\s+you)\s+(?:provide|upload|share|attach)\b
    | (?:很)?抱歉 | 对不起 | 對不起 | 我?无法(?:描述|识别|查看|提供|看到) | 作为(?:一个)?(?:人工智能|AI)
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Phrases of a VLM that will not describe an image. Looked for at the start of the caption only: in the middle, the same
words may be what a sign in the image says."""

LONGEST_LOOP = 24  # words of a phrase that is looked for, repeated at once
LOOPS = 4  # times that a phrase may not stand in a row
SENTENCE_REPEATS = 3  # times that a sentence may not stand anywhere
SENTENCE_WORDS = 4  # words that a sentence must have to count as a repetition
FEW_NEW_TRIGRAMS = 0.35  # least share of three-word runs that are new, in captions of at least
MANY_WORDS = 40


@dataclass(frozen=True)
class GateConfig(Config):
    """Conditions that a caption must meet to be kept."""

    min_words: PositiveInt = 4
    """Least number of words (characters, where the script has no spaces)."""
    scripts: Sequence[str] = ("latin",)
    """Scripts a caption may be written in, as Unicode names them: latin, cjk, hiragana, katakana, hangul, cyrillic, arabic,
    ... Empty: any."""
    max_other_script: Fraction = 0.1
    """Share of letters (0 to 1) that may belong to other scripts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.scripts if name != name.lower() or not name.isalpha()]
        if unknown:
            raise ValueError(f"gate.scripts: expected names such as latin or cjk, in lower case, received {unknown}")


def judge(text: str, cut_off: bool, gate: GateConfig) -> str:
    """Returns the status of a caption: `OK`, or what is wrong with it."""
    if not text.strip():
        return EMPTY
    if cut_off:
        return CUT_OFF
    if is_refusal(text):
        return REFUSAL
    if gate.scripts and other_script_share(text, gate.scripts) > gate.max_other_script:
        return WRONG_SCRIPT
    words = split_words(text)
    if is_repetitive(text, words):
        return REPETITION
    return TOO_SHORT if len(words) < gate.min_words else OK


def same_text(one: str, other: str) -> bool:
    """Tells whether two captions say the same, letter case, punctuation and blanks apart."""
    return split_words(one) == split_words(other)


def is_refusal(text: str) -> bool:
    """Tells whether the text begins by declining to describe."""
    return REFUSALS.match(text.lstrip(" \t\r\n\"'“‘*_#-:.")) is not None


def split_words(text: str) -> list[str]:
    """Words in lower case, without punctuation; every CJK ideograph, kana or hangul syllable is one of its own."""
    return re.findall(
        r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower()
    )


def other_script_share(text: str, scripts: Sequence[str]) -> float:
    """Share of the text's letters that belong to none of the scripts; 1 for a text without letters."""
    found = Counter(script_of(letter) for letter in text if letter.isalpha() or letter == "\ufffd")
    total = sum(found.values())
    return 1.0 if not total else sum(n for script, n in found.items() if script not in scripts) / total


def script_of(letter: str) -> str:
    """The script a letter belongs to, in lower case: the first word of its Unicode name."""
    return unicodedata.name(letter, "unknown").split()[0].split("-")[0].lower()


def is_repetitive(text: str, words: list[str]) -> bool:
    """Tells whether the text goes round in circles: a phrase many times in a row, a sentence again and again, nothing new."""
    for period in range(1, min(LONGEST_LOOP, len(words) // LOOPS) + 1):
        run = 0  # words that equal the one a period before
        for word, earlier in zip(words[period:], words):
            run = run + 1 if word == earlier else 0
            if run >= period * (LOOPS - 1):
                return True
    sentences = Counter(" ".join(split_words(sentence)) for sentence in re.split(r"[.!?。！？\n]+", text))
    if any(count >= SENTENCE_REPEATS and len(said.split()) >= SENTENCE_WORDS for said, count in sentences.items()):
        return True
    if len(words) < MANY_WORDS:
        return False
    trigrams = list(zip(words, words[1:], words[2:]))
    return len(set(trigrams)) < FEW_NEW_TRIGRAMS * len(trigrams)

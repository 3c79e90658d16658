"""Text of others, fit for a terminal: nothing in it moves the cursor, sets titles or colours, or turns the reading order."""

from __future__ import annotations

import unicodedata

ESCAPED = frozenset(
    {"Cc", "Cf", "Cs", "Zl", "Zp"}
)  # Unicode's categories: controls, formats, halves of pairs, separators
KEPT = frozenset("\n\t\u200c\u200d")  # layout; the joiners that scripts and emoji are written with


def printable(text: str) -> str:
    r"""The text with control characters, bidirectional overrides and the like as escapes (`\x1b`); newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(char) if _acts(char) else char for char in text)


def one_line(text: str) -> str:
    """The same on one line, white space as single spaces: for a value that stands in a line of ours."""
    return printable(" ".join(text.split()))


def _acts(char: str) -> bool:
    return char not in KEPT and unicodedata.category(char) in ESCAPED


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")

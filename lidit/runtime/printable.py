"""Cleans others' text for a terminal: nothing in it moves the cursor, sets titles or colors, or turns the reading order."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from lidit.runtime.uris import shown

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


@contextlib.contextmanager
def printable_streams() -> Iterator[None]:
    """All that Python prints meanwhile, warnings, tracebacks and the lines of Ray's workers too, goes through `printable`.

    It is also without the secrets of addresses.

    A progress line of lidit's own, which returns to its start, is written to `sys.__stderr__`.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Printable(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Printable:
    """A text stream whose texts are fit for a terminal and for logs; all else is the stream's own."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(shown(text)))

    def writelines(self, lines: Iterable[str]) -> None:
        self._stream.writelines(printable(shown(line)) for line in lines)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _acts(char: str) -> bool:
    return char not in KEPT and unicodedata.category(char) in ESCAPED


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")

"""File names as people write them into lists, found among the files that are there; apart from the sources that ask.

`./img/1.png`, `img\\1.png`, `IMG/1.PNG` and accents that are composed otherwise (macOS) all mean `img/1.png`, as long as
only one file can be meant.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable


class Spelling:
    """Names that are found by other spellings, too."""

    def __init__(self, names: Iterable[str]):
        self._ways: list[dict[str, set[str]]] = [{}, {}, {}]
        for name in names:
            for way, text in zip(self._ways, _spellings(name)):
                way.setdefault(text, set()).add(name)

    def find(self, name: str) -> str | None:
        """The one name that is meant; None where there is none, or several might be."""
        for way, text in zip(self._ways, _spellings(name)):
            if found := way.get(text):
                return next(iter(found)) if len(found) == 1 else None
        return None


def _spellings(name: str) -> tuple[str, str, str]:
    """As it is; with plain slashes and composed accents; in small letters too."""
    plain = unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))
    return name, plain, plain.casefold()

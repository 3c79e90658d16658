"""Compares fingerprints of different age: what differs, and what the older one does not say.

A fingerprint is the JSON of all that values depend on beyond rounding. Versions of lidit add keys to it. A key that one side
does not have is neither equal nor different: the caller decides, and tells the user.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

RECORDED_LATER = frozenset({"model_config"})
"""Keys that fingerprints made by earlier versions do not have."""


def flat(fingerprint: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested keys joined by dots, `encoders.llama.layer`."""
    made: dict[str, Any] = {}
    for key, value in fingerprint.items():
        if isinstance(value, Mapping) and value:
            made |= flat(value, f"{above}{key}.")
        else:
            made[f"{above}{key}"] = value
    return made


def comparable(old: Any, new: Any, where: str = "") -> tuple[Any, Any, list[str]]:
    """Two fingerprints (or dictionaries of them) -> (the first, the second, names of the keys that were left out of both).

    Left out is a key of `RECORDED_LATER` that only one side has.
    """
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return old, new, []
    absent = (old.keys() ^ new.keys()) & RECORDED_LATER
    first, second = ({key: value for key, value in one.items() if key not in absent} for one in (old, new))
    unrecorded = [f"{where}{key}" for key in sorted(absent)]
    for key in first.keys() & second.keys():
        first[key], second[key], more = comparable(first[key], second[key], f"{where}{key}.")
        unrecorded += more
    return first, second, sorted(unrecorded)


def warn_unrecorded(what: str, unrecorded: list[str]) -> None:
    """Says that these keys could not be compared; nothing for none of them."""
    if unrecorded:
        warnings.warn(
            f"{what}: {', '.join(unrecorded)} could not be compared, since one side was made before that was recorded; make "
            f"sure that the model's config.json was not edited since",
            stacklevel=3,
        )

"""Fields of config dataclasses: a check, and configs to and from plain values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, get_args


def at_least(least: int, config: Any, *names: str) -> None:
    """Raises ValueError unless these fields of a config are whole numbers of at least `least`."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, received {value!r}")


def to_plain(value: Any) -> Any:
    """A config -> dictionaries, lists, numbers and strings, as JSON and YAML have them."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `to_plain`, for a type made of dataclasses, sequences, dictionaries of plain values, and plain values.

    Raises:
        ValueError: a field is unknown, or a config's own checks refuse it; names the place by `where`.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(value, Mapping) or set(value) - names:
            raise ValueError(f"{where}: expected fields {', '.join(sorted(names))}, received {value!r}")
        return kind(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return value
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
        (inner,) = get_args(kind)
        return tuple(from_plain(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    return value

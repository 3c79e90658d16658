"""Base classes of configs, whose fields are checked against their types whoever makes them; configs to and from plain values.

    @dataclass(frozen=True)
    class CheckpointConfig(Config):
        every_steps: PositiveInt = 1000
        ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.0
        mode: Literal["auto", "never"] = "auto"

What fields have to do with each other a class checks in a `__post_init__` of its own, after `super().__post_init__()`.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args, get_origin

from lidit.runtime.uris import check_config


@dataclass(frozen=True, repr=False)
class Interval:
    """Numbers that a field may have, as `Annotated[float, Interval(gt=0, le=1)]`: greater or less than a bound, or equal."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __contains__(self, value: Any) -> bool:
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def __repr__(self) -> str:
        bounds = {">": self.gt, ">=": self.ge, "<": self.lt, "<=": self.le}
        return " and ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)


PositiveInt = Annotated[int, Interval(ge=1)]
NonNegativeInt = Annotated[int, Interval(ge=0)]
PositiveFloat = Annotated[float, Interval(gt=0)]
NonNegativeFloat = Annotated[float, Interval(ge=0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True)
class Config:
    """Base of a config dataclass, a job's part or one that is used without any job."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class JobConfig(Config):
    """Base of a job's config dataclass: besides, it may be written down as it is, for no address in it has a secret."""

    def __post_init__(self) -> None:
        check_config(self)
        super().__post_init__()


def check_fields(config: Any) -> None:
    """Checks the fields whose types are `Annotated` numbers, `Literal`, or one of these and None.

    Raises:
        ValueError: names the field, what was expected and what came.
    """
    for name, kinds in _checked(config.__class__).items():
        value = getattr(config, name)
        if not any(_fits(value, kind) for kind in kinds):
            part = "" if isinstance(config, JobConfig) else type(config).__name__.removesuffix("Config").lower() + "."
            words = [word for kind in kinds for word in _words(kind)]
            expected = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
            raise ValueError(f"{part}{name}: expected {expected}, received {value!r}")


def to_plain(value: Any) -> Any:
    """Converts a config to dictionaries, lists, numbers and strings, as JSON and YAML have them."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """The inverse of `to_plain`, for a type made of dataclasses, sequences, dictionaries of plain values, and plain values.

    Raises:
        ValueError: a field is unknown or missing, or a config's own checks refuse it; names the place by `where`.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        names = ", ".join(field.name for field in fields(kind))
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected fields {names}, received {value!r}")
        unknown = set(value) - {field.name for field in fields(kind)}
        missing = {field.name for field in fields(kind) if _is_required(field)} - set(value)
        if unknown or missing:
            raise ValueError(
                f"{where}: expected fields {names}; received unknown {sorted(unknown) or 'none'}, missing "
                f"{sorted(missing) or 'none'}; was it written by another version of lidit?"
            )
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if isinstance(origin := get_origin(kind), type) and issubclass(origin, Sequence):
        (item_kind,) = get_args(kind)
        return tuple(from_plain(item_kind, item, f"{where}[{index}]") for index, item in enumerate(value))
    return value


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _checked(config_class: Any) -> dict[str, tuple[Any, ...]]:
    """The fields that can be checked: name -> the alternatives of its type."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    kinds = {field.name: _alternatives(hints[field.name]) for field in fields(config_class)}
    return {name: each for name, each in kinds.items() if all(_words(kind) for kind in each)}


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _words(kind: Any) -> list[str]:
    """What to say of a type; nothing of a type that is not checked."""
    if kind is type(None):
        return ["null"]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if get_origin(kind) is Annotated:
        number, interval = get_args(kind)
        return [f"a {'whole ' if number is int else ''}number {interval}"]
    return []


def _fits(value: Any, kind: Any) -> bool:
    if kind is type(None):
        return value is None
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    number, interval = get_args(kind)
    of_kind = isinstance(value, numbers.Integral if number is int else numbers.Real) and not isinstance(value, bool)
    return of_kind and value in interval

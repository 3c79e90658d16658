"""Configs that others wrote, read as data: bounded in size, and without what would have a parser import modules or read files.

jsonargparse takes the name of a class wherever it expects one's fields (`class_path: module.Class`, or the name alone), and
imports the module, so runs it, before it refuses the class; it takes the name of a file in the same places. Neither is of use
here: all classes are known. So both are refused before parsing, by `check_fields`.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

MAX_BYTES = 1 << 20  # of a config
MAX_VALUES = 100_000  # in a config, each as often as aliases repeat it
MAX_DEPTH = 64  # of lists and mappings inside each other
RESERVED = {  # keys that jsonargparse does not take as fields
    "class_path", "init_args", "dict_kwargs", "__path__", "__orig__", "__default_config__", "__subclasses_disabled__",
    "$schema",
}  # fmt: skip


def read_text(path: str) -> str:
    """The text of a config file; `-` is standard input. A pipe will do: it is read once.

    Raises:
        ValueError: there is none, it is no text, or larger than `MAX_BYTES`.
    """
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: expected a YAML file, received: {error.strerror}") from error
    try:
        return _bounded(content, path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected YAML in UTF-8, received other bytes ({error.reason})") from error


def load_yaml(text: str | bytes, what: str) -> Any:
    """YAML or JSON as plain Python: dictionaries, lists, text, numbers. `what` names it in errors.

    Raises:
        ValueError: it is no YAML, has tags of Python, or is larger than the limits, with its aliases written out.
    """
    import yaml

    try:
        return _load(text, what)
    except yaml.YAMLError as error:
        raise ValueError(f"{what}: expected YAML, received text that is none: {error}") from error


def check_fields(value: Any, of: Any, what: str) -> None:
    """Refuses what would be imported or opened as a file, where a config class's fields are expected.

    Args:
        value: what `load_yaml` gave.
        of: the type of the field that it is for: a config class, a list of one, something else.
        what: names it in errors.

    Raises:
        ValueError: a reserved key anywhere, or something else than fields for a config class.
    """
    for key in _keys(value):
        if key in RESERVED:
            raise ValueError(f"{what}: expected fields, received {key!r}: configs name no classes, remove it")
    _check_shape(value, of, what)


def check_flags(argv: Sequence[str], config_class: Any) -> list[str]:
    """The command line, checked as by `check_fields`, with every `--config FILE` as `--config=TEXT`: a file is read once.

    Raises:
        ValueError: a file that cannot be read, is too large or asks for other files; fields that `check_fields` refuses.
    """
    checked = []
    for flag, value, words in _flags(argv):
        path = flag[2:].replace("-", "_").rstrip("+")
        if path == "config" and value is not None:
            checked.append(f"--config={_config_text(value, config_class)}")
            continue
        check_fields({path: None}, None, flag)
        if value is not None:
            check_fields(_flag_value(value, flag), _type_at(config_class, path), flag)
        checked += words
    return checked


def field_types(config_class: Any) -> dict[str, Any]:
    """The types of a config class's fields, by name."""
    types = typing.get_type_hints(config_class)
    return {field.name: types[field.name] for field in dataclasses.fields(config_class)}


def packages(config_class: Any) -> set[str]:
    """The top-level packages in which a config class, and those of its fields, are defined."""
    inner = [_config_class(each) or _item_class(each) for each in field_types(config_class).values()]
    found = (packages(each) for each in inner if each is not None)
    return {config_class.__module__.partition(".")[0]}.union(*found)


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """(flag, its value, the words that are both); words that belong to no flag have an empty one."""
    place = 0
    while place < len(argv):
        flag, equals, value = argv[place].partition("=")
        if not flag.startswith("--"):
            yield "", None, [argv[place]]
        elif equals:
            yield flag, value, [argv[place]]
        elif place + 1 == len(argv) or argv[place + 1].startswith("--"):
            yield flag, None, [flag]
        else:
            yield flag, argv[place + 1], list(argv[place : place + 2])
            place += 1
        place += 1


def _type_at(config_class: Any, path: str) -> Any:
    """The type of the field at a dotted path (`actors.max`, `phases.0.steps`); None where there is no such field."""
    name, _, rest = path.partition(".")
    of = field_types(config_class).get(name)
    inner = _config_class(of)
    if rest and inner is None:
        inner, (first, _, after) = _item_class(of), rest.partition(".")
        rest = after if first.isdecimal() else rest
    if not rest:
        return of
    return None if inner is None else _type_at(inner, rest)


def _check_shape(value: Any, of: Any, what: str) -> None:
    inner, item = _config_class(of), _item_class(of)
    if inner is not None and isinstance(value, dict):
        for name, each in field_types(inner).items():
            if name in value:
                _check_shape(value[name], each, f"{what}.{name}" if what else name)
    elif inner is not None and isinstance(value, str):
        names = ", ".join(field_types(inner))
        raise ValueError(
            f"{what}: expected fields ({names}), received {value!r}: names of classes or files are not read"
        )
    elif item is not None and isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            _check_shape(each, item, f"{what}.{number}")
    elif item is not None and isinstance(value, str):
        raise ValueError(f"{what}: expected a list, received {value!r}: names of classes or files are not read")


def _config_class(of: Any) -> Any:
    """The config class in a type (`X`, `X | None`), None where there is none."""
    return None if _is_sequence(of) else _first_config_class((of, *typing.get_args(of)))


def _item_class(of: Any) -> Any:
    """The config class of which a type is a list, None where it is no such list."""
    return _first_config_class(typing.get_args(of)) if _is_sequence(of) else None


def _first_config_class(types: Iterable[Any]) -> Any:
    return next((each for each in types if dataclasses.is_dataclass(each)), None)


def _is_sequence(of: Any) -> bool:
    origin = typing.get_origin(of)
    return isinstance(origin, type) and issubclass(origin, Sequence)


def _config_text(value: str, config_class: Any) -> str:
    """Reads and checks what `--config VALUE` stands for, a file or the YAML itself."""
    inline = value.lstrip().startswith("{")
    what = "--config" if inline else value
    text = value if inline else read_text(value)
    fields = load_yaml(text, what)
    if fields is None:
        return "{}"
    if not isinstance(fields, dict):
        raise ValueError(f"{what}: expected YAML with fields (`key: value`), received {type(fields).__name__}")
    if "config" in fields:
        raise ValueError(f"{what}: expected fields, received 'config': a file takes in no other file")
    check_fields(fields, None, what)
    for name, of in field_types(config_class).items():
        if name in fields:
            _check_shape(fields[name], of, f"{what}: {name}")
    return text


def _flag_value(text: str, flag: str) -> Any:
    """A flag's value as YAML; where it is none, the text."""
    import yaml

    try:
        return _load(text, flag)
    except yaml.YAMLError:
        return text


def _load(text: str | bytes, what: str) -> Any:
    """Raises YAMLError where it is no YAML, ValueError where it is too large."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """Dates stay text, as they do in the parser."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    _check_size(yaml.parse(_bounded(text, what), Loader=Loader), what)
    try:
        return yaml.load(text, Loader=Loader)
    except ValueError as error:  # a number with thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _keys(value: Any) -> Iterator[str]:
    """All keys in a tree, with the parts of dotted ones."""
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _keys(each)
    if isinstance(value, dict):
        for key in value:
            yield from str(key).split(".")


def _check_size(events: Any, what: str) -> None:
    """Counts values as they are with all aliases written out, without building or descending into anything."""
    import yaml

    sizes: dict[str | None, int] = {}  # by anchor
    open_at: list[tuple[str | None, int]] = []  # collections that are not closed: anchor, values before it
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor, MAX_VALUES + 1)  # one that holds itself has no size
        elif isinstance(event, yaml.CollectionStartEvent):
            open_at.append((event.anchor, total))
            total += 1
            sizes.pop(event.anchor, None)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_at.pop()
            sizes[anchor] = total - before
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes[event.anchor] = 1
        if total > MAX_VALUES or len(open_at) > MAX_DEPTH:
            raise ValueError(
                f"{what}: expected at most {MAX_VALUES:,} values, {MAX_DEPTH} levels deep, with aliases (`*name`) written "
                f"out, received more"
            )


def _bounded(content: Any, what: str) -> Any:
    if len(content) > MAX_BYTES:
        raise ValueError(f"{what}: expected a config of at most {MAX_BYTES:,} bytes, received more")
    return content

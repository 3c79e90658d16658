"""Places in configs: made the same for the driver, its workers and every library, or refused before anything is written.

A worker is another process and may stand in another folder, and a store is opened by two libraries: Lance reads a URI as one
(`%20` is a blank, `#` and `?` end the path), fsspec takes it letter by letter. So a path of this machine becomes an absolute
one, also where it was written as `file://` or with `~`, and what the two would read differently is refused.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from lidit.runtime.model_files import PROJECT_ROOT, split_revision
from lidit.runtime.uris import shown

STORES = {"store", "fid_reference", "storage"}
"""Fields whose place Lance opens, or jobs write to with several libraries."""
FILES = {"run", "out", "html", "prompts", "texts"}
MODELS = {"model", "weights", "vae", "clip", "fid_model", "encoders"}
"""Fields that name models: folders, or hub ids."""
SOURCE = "source"  # `kind:place`
WITHOUT_PLACE = {"scenes"}  # kinds of sources
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NOT_IN_FILE_URI = "%#?\\"
NOT_IN_STORE_URI = "%#?*["  # the last three are patterns where an object store deletes
EMPTY_OR_DOTS = re.compile(r"(^|/)(\.{0,2})(/|$)")

Config = TypeVar("Config")


def settled(config: Config) -> Config:
    """The config with every path of this machine absolute: what a driver may send to workers.

    Hub ids stay, and models that are found from the project's root. Calling it again changes nothing.

    Raises:
        ValueError: a place that libraries read differently, or that workers cannot see; names the field.
    """
    return _settled(config, "") if dataclasses.is_dataclass(config) else config


def absolute(path: str) -> str:
    """A path made absolute, `~` and `file://` resolved; links stay, for they may lead elsewhere on another machine.

    A URI with another scheme stays, but for the scheme's letters, which become lower case.

    Raises:
        ValueError: a `file:` URI that libraries read differently.
    """
    if (found := SCHEME.fullmatch(path)) is not None:
        scheme, rest = found[1].lower(), found[2]
        if scheme != "file":
            return f"{scheme}://{rest}"
        if not rest.startswith("/") or any(sign in rest for sign in NOT_IN_FILE_URI):
            raise ValueError(
                f"expected a path, or file:/// and a path without {' '.join(NOT_IN_FILE_URI)}, received {shown(path)!r}: "
                f"libraries read such a URI differently; write the path itself, /..."
            )
        path = rest
    elif path.lower().startswith("file:"):
        raise ValueError(f"expected a path, or file:/// and a path, received {path!r}")
    here = Path(path).expanduser()
    return str(here.resolve()) if ".." in here.parts else str(Path(os.getcwd(), here))


def store_place(uri: str) -> str:
    """A store's place, as Lance and fsspec read it alike.

    Raises:
        ValueError: they would not, or it lies in one process's memory.
    """
    place = absolute(uri)
    found = SCHEME.fullmatch(place)
    if CONTROL.search(place) or "::" in place:
        raise ValueError(f"expected a place without control characters and `::`, received {shown(place)!r}")
    if found is None:
        return place
    scheme, rest = found[1], found[2].rstrip("/")
    if scheme == "memory":
        raise ValueError(
            f"expected a folder or an object store, received {place!r}: workers are other processes and see none of this one's "
            f"memory"
        )
    if any(sign in rest for sign in NOT_IN_STORE_URI) or EMPTY_OR_DOTS.search(rest):
        raise ValueError(
            f"expected a URI without {' '.join(NOT_IN_STORE_URI)} and without empty parts, `.` and `..` in its path, received "
            f"{shown(place)!r}: Lance and fsspec would read it as two places; choose a plainer name"
        )
    return f"{scheme}://{rest}"


def model_place(model: str) -> str:
    """A model's folder made absolute, where it is found from the working directory only; hub ids and all else stay."""
    name, revision = split_revision(model)
    here = Path(name).expanduser()
    if name.lower().startswith("file:"):
        here = Path(absolute(name))
    is_same = here.is_absolute() or not here.exists() or here.resolve() == (PROJECT_ROOT / name).resolve()
    place = str(here) if here.is_absolute() else name if is_same else absolute(name)
    return place if revision is None else f"{place}@{revision}"


def source_place(source: str) -> str:
    """`kind:place` with the place made absolute; a Lance table's must be read alike by all libraries."""
    kind, colon, place = source.partition(":")
    if not colon or not place or kind in WITHOUT_PLACE or not kind.isalnum() or place.startswith("//"):
        return source
    return f"{kind}:{store_place(place) if kind == 'lance' else absolute(place)}"


def _settled(value: Any, what: str) -> Any:
    changes = {}
    for field in dataclasses.fields(value):
        name, old = f"{what}.{field.name}".lstrip("."), getattr(value, field.name)
        if "Literal" in str(field.type):
            continue
        try:
            new = _settled_field(field.name, old, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") if not _is_parent(old) else error from error
        if new != old:
            changes[field.name] = new
    return dataclasses.replace(value, **changes) if changes else value


def _settled_field(field: str, old: Any, name: str) -> Any:
    if dataclasses.is_dataclass(old):
        return _settled(old, name)
    if isinstance(old, (list, tuple)) and any(map(dataclasses.is_dataclass, old)):
        return type(old)(_settled(each, f"{name}.{number}") for number, each in enumerate(old))
    if field == "encoders" and isinstance(old, dict):
        return {key: model_place(each) if isinstance(each, str) else each for key, each in old.items()}
    if not isinstance(old, str) or not old:
        return old
    if field in STORES:
        return store_place(old)
    if field in FILES:
        return absolute(old)
    if field in MODELS:
        return model_place(old)
    return source_place(old) if field == SOURCE else old


def _is_parent(value: Any) -> bool:
    """Whether an error inside of it names its own field."""
    return dataclasses.is_dataclass(value) or (
        isinstance(value, (list, tuple)) and any(map(dataclasses.is_dataclass, value))
    )

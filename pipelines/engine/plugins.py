"""Classes that are named in configs: lidit's own by a short word, anybody's as `package.module:Class`."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from typing import Any

IMPORT_STRING = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+:[A-Za-z_]\w*")
"""With a dot in front of the colon: `folder:name` is a place, `my_package.sources:Photos` a class."""


def resolve(name: str, known: Mapping[str, str], base: Any, what: str) -> Any:
    """Imports what a word of `known`, or an import string, names. A class of somebody else's must be a subclass of `base`.

    Raises:
        ValueError: there is no such thing, or it is no such class; begins with `what`.
    """
    if name not in known and not IMPORT_STRING.fullmatch(name):
        raise ValueError(f"{what}: expected one of {', '.join(known)}, or package.module:Class; received {name!r}")
    try:
        found = pkgutil.resolve_name(known.get(name, name))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{what}: {name} cannot be imported ({type(error).__name__}: {error}). It must be installed, or on PYTHONPATH, on "
            f"every node"
        ) from error
    if name not in known and not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{what}: expected a subclass of {base.__module__}.{base.__name__}, received {name}")
    return found

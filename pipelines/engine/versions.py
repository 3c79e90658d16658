"""Versions of the libraries that columns are made with: compared when a job goes on, and noted in every file."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch

from lidit.runtime.printable import printable
from lidit.store import columns

CHANGE_VALUES = ("diffusers", "pillow", "tokenizers", "torch", "transformers")  # with a minor version, a little
MADE_WITH = "lidit:made_with"  # key of a data file's own metadata: JSON, library -> version, and `device`


def made_with(fields: Sequence[pa.Field], config: Any) -> dict[str, str]:
    """Gives a worker's note for its files: versions, here, of the libraries that the fields name, and the kind of device."""
    names = sorted({name for f in fields for name in _recorded(f)})
    on_gpu = config.actors.num_gpus != 0 and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"cpu {platform.machine()}"
    return {MADE_WITH: json.dumps({**{name: version(name) for name in names}, "device": device})}


def check_versions(schema: pa.Schema, fields: Sequence[pa.Field], strict: bool) -> None:
    """Says it where columns were begun with another minor version of a library that changes values.

    Args:
        schema: of the table.
        fields: that this job makes, with the versions of now.
        strict: refuse instead of printing.

    Raises:
        ValueError: `strict`, and a version differs.
    """
    changes = sorted({line for f in fields if f.name in schema.names for line in _changes(schema.field(f.name), f)})
    if not changes:
        return
    names = ", ".join(f.name for f in fields if f.name in schema.names and _changes(schema.field(f.name), f))
    said = f"{names}: begun with other versions of libraries that may change values: {'; '.join(changes)}"
    if strict:
        raise ValueError(
            f"{said}. Install those versions, leave --strict_versions off, or make it anew with --overwrite"
        )
    print(f"warning: {printable(said)}. --strict_versions refuses to go on", file=sys.stderr)


def _changes(present: pa.Field, wanted: pa.Field) -> list[str]:
    old, new = _recorded(present), _recorded(wanted)
    return [
        f"{name} {old[name]} then, {new[name]} now"
        for name in CHANGE_VALUES
        if name in old and name in new and _minor(old[name]) != _minor(new[name])
    ]


def _recorded(stored: pa.Field) -> dict[str, str]:
    return json.loads(columns.metadata_of(stored).get(columns.META_VERSIONS, "{}"))


def _minor(release: str) -> list[str]:
    """`2.13.0+cpu` -> 2, 13."""
    return release.partition("+")[0].split(".")[:2]

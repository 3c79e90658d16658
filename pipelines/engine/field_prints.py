"""Compares columns of one name: their types, and the JSON in their metadata, entry by entry."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from lidit.store import columns
from lidit.store.fingerprints import flat


def field_differences(present: pa.Field, wanted: pa.Field, key: str) -> list[str]:
    """Lists what makes two fields different columns: type, then every entry of the JSON under `key`; empty if nothing.

    Nested entries are named with dots, `gate.min_words`.
    """
    if present.type != wanted.type:
        return [f"type: the table has {present.type}, this run makes {wanted.type}"]
    old, new = (_entries(one, key) for one in (present, wanted))
    return [
        f"{name}: the table has {_short(old.get(name))}, this run makes {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def unrecorded_keys(present: pa.Field, wanted: pa.Field, key: str) -> list[str]:
    """Entries of the JSON under `key` that the present field lacks, where the two differ in nothing else; else none."""
    old, new = (_entries(one, key) for one in (present, wanted))
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return differing if present.type == wanted.type and not old.keys() & set(differing) else []


def _entries(stored: pa.Field, key: str) -> dict[str, Any]:
    return flat(json.loads(columns.metadata_of(stored).get(key, "{}")))


def made_before(wanted: pa.Field, uri: str, keys: list[str]) -> str:
    """Words the refusal of a column that lacks these entries alone: how to bring it up to date."""
    stage = columns.metadata_of(wanted).get(columns.META_STAGE, "JOB")
    return (
        f"column {wanted.name!r} of {uri} was made before {', '.join(keys)} was recorded: run the same `lidit {stage}` command "
        f"with --stamp once. It makes a sample of the rows again and records it if they agree; --overwrite makes all anew"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"

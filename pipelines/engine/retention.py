"""Retention of old versions of a store's tables: young ones, the newest, and every one that a reader has tagged."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from lidit.runtime.fields import Config, NonNegativeFloat, PositiveInt
from lidit.store import columns
from pipelines.engine.table import Table

VERIFIED_TAG = "lidit-verified"  # the version that a scheduled run has verified last


@dataclass(frozen=True)
class RetentionConfig(Config):
    """Old versions are removed where they are older than `days` and not among the last `versions`; tagged ones never are."""

    days: NonNegativeFloat | None = 14.0
    """Age, in days, from which an old version may go; null keeps all."""
    versions: PositiveInt = 1
    """Newest versions that stay however old they are."""


def clean_up(store: str, config: RetentionConfig) -> dict[str, Any]:
    """Removes old versions of both tables, and the files that no version refers to any more.

    Unfinished files of runs that are alive are younger than what Lance touches (7 days) and stay.

    Returns:
        `removed` versions, `bytes_freed`, and `tagged`: tag -> version of the samples table.
    """
    found: dict[str, Any] = {"removed": 0, "bytes_freed": 0, "tagged": {}}
    for name in (columns.SAMPLES_TABLE, columns.ENCODERS_TABLE):
        table = Table(f"{store.rstrip('/')}/{name}")
        if not table.exists():
            continue
        if name == columns.SAMPLES_TABLE:
            found["tagged"] = tagged_versions(table)
        versions = removable(table, config)
        if versions:
            done = table.open().cleanup_old_versions(versions=versions, error_if_tagged_old_versions=False)
            found["removed"] += done.old_versions
            found["bytes_freed"] += done.bytes_removed
    return found


def removable(table: Table, config: RetentionConfig) -> list[int]:
    """Versions that are old enough, not among the newest, and tagged by nobody."""
    if config.days is None:
        return []
    versions: Any = table.open().versions()
    listed = sorted(versions, key=lambda version: version["version"])
    newest = {version["version"] for version in listed[-config.versions :]}
    kept = newest | set(tagged_versions(table).values())
    now = listed[-1]["timestamp"].now(listed[-1]["timestamp"].tzinfo)
    limit = now - timedelta(days=config.days)
    return [v["version"] for v in listed if v["version"] not in kept and v["timestamp"] <= limit]


def tagged_versions(table: Table) -> dict[str, int]:
    """Tag -> version."""
    return {tag: entry["version"] for tag, entry in sorted(table.open().tags.list().items())}

"""Plans an ingest: the items or pieces of a source that are due, in units of about a fragment's rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from lidit.runtime.fields import to_plain
from lidit.store import columns
from pipelines.engine.table import Table
from pipelines.ingestion.compare import Difference, compare
from pipelines.ingestion.config import IngestConfig
from pipelines.ingestion.dedup import LOAD_ROWS
from pipelines.ingestion.done_pieces import DonePieces
from pipelines.ingestion.hash_index import KeySet, keys_of
from pipelines.sources.base import Item, Listed, Piece, Sharded, Source
from pipelines.sources.registry import parse_spec

EXAMPLES = 3
TYPICAL_BYTES = 16_384  # of a sample, where a shard does not tell how many it has: small shards share a unit


@dataclass
class Work:
    """Work that is to be done: units, each `{"name", "parts"}`."""

    units: list[dict[str, Any]]
    rows: int | None  # to be read; None: a tar does not tell
    bytes: int
    counts: Counter[str]  # what need not be read at all
    done: DonePieces | None = None
    examples: dict[str, list[str]] = field(default_factory=dict)  # name of a count -> a few places
    to_update: list[Difference] = field(default_factory=list)  # rows that the source has otherwise now
    sizes: dict[str, int] = field(default_factory=dict)  # image_id -> bytes of its file, that the table has in the end

    @classmethod
    def of(cls, config: IngestConfig, source: Source, table: Table) -> Work:
        """Items that are new, or pieces that are not noted as done, in units of about a fragment's rows."""
        source.left_out.clear()
        if isinstance(source, Listed):
            items = source.items()
            there = ids_there(table, items, source)
            new = [item for item, image_id in zip(items, there) if image_id is None]
            counts = Counter(already_there=len(items) - len(new), **+source.left_out)
            old = [(item, image_id) for item, image_id in zip(items, there) if image_id is not None]
            found = compare(table, source, old, config.filters, config.compares_all)
            if found.captions or found.images:
                counts.update(compared=found.captions, compared_images=found.images, differ=len(found.differ))
                if found.sizes:
                    counts["compared_sizes"] = found.sizes
                if unnamed := sum(not one.is_named for one in found.differ):
                    counts["unnamed"] = unnamed
            if failed := sum(one.is_named for one in found.failed):
                counts["failed_before"] = failed
            examples = {"differ": [one.place for one in found.differ[:EXAMPLES]]} if found.differ else {}
            units = packed(new, config.rows_per_fragment)
            sizes = {item["image_id"]: item["bytes"] for item in new if "bytes" in item and "path" in item}
            sizes |= found.same
            return cls(units, len(new), 0, counts, examples=examples, to_update=found.to_update, sizes=sizes)
        assert isinstance(source, Sharded)
        done = DonePieces(table.uri, options_of(config))
        pieces = source.pieces()
        due = [piece for piece in pieces if config.reread or piece not in done]
        counts = Counter(shards_done_before=len(pieces) - len(due), **+source.left_out)
        rows = [piece["rows"] for piece in due]
        total = None if None in rows else sum(rows)
        return cls(packed(due, config.rows_per_fragment), total, sum(piece["bytes"] for piece in due), counts, done)


def new_items(table: Table, items: list[Item]) -> list[Item]:
    """The items whose rows are not in the table; ValueError where the source gives one id twice."""
    return [item for item, image_id in zip(items, ids_there(table, items)) if image_id is None]


def ids_there(table: Table, items: list[Item], source: Listed | None = None) -> list[str | None]:
    """Per item the `image_id` of its row in the table, also one as it was made before; None where it has no row.

    Raises:
        ValueError: the source gives one id twice.
    """
    ids = [item["image_id"] for item in items]
    if len(set(ids)) < len(ids):
        twice = next(image_id for image_id, count in Counter(ids).items() if count > 1)
        raise ValueError(f"the source gives image_id {twice!r} twice: ids must be unique")
    if not table.exists():
        return [None] * len(items)
    dataset, present = table.open(), KeySet()
    for batch in dataset.to_batches(columns=[columns.IMAGE_ID], batch_size=LOAD_ROWS):
        present.add(keys_of(batch.column(0).to_pylist()))

    def has(names: list[str]) -> list[bool]:
        return present.contains(keys_of(names)).tolist()

    found = [image_id if known else None for image_id, known in zip(ids, has(ids))]
    missing = [place for place, image_id in enumerate(found) if image_id is None]
    if source is not None and missing and len(present):
        for place, image_id in zip(missing, source.earlier_ids([items[place] for place in missing], has, dataset)):
            found[place] = image_id
    return found


def packed(parts: list[Item] | list[Piece], rows: int) -> list[dict[str, Any]]:
    """Parts that follow each other, as units of about so many rows (as far as the parts tell)."""
    units: list[dict[str, Any]] = []
    room = 0.0
    for part in parts:
        size = part.get("rows", 1)  # an item is a row
        size = part["bytes"] / TYPICAL_BYTES if size is None else size
        if not units or room < min(size, rows):
            units.append({"name": str(len(units)), "parts": []})
            room = rows
        units[-1]["parts"].append(part)
        room -= size
    return units


def options_of(config: IngestConfig) -> dict[str, Any]:
    """Collects the options that decide which rows a piece gives."""
    kind, _ = parse_spec(config.source)
    return {"kind": kind, **to_plain({name: getattr(config, name) for name in ("columns", "filters", "check")})}

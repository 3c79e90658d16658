"""Compares a listed source with the table: rows that have another caption or image there now.

Captions that the listing knows (metadata files, captions.json) are compared in full: the table's captions are one small
column. Captions in files beside the images cost a request each, and images their bytes: of the first at most `CAPTION_FILES`
are read, of the second `COMPARED_IMAGES`, spread over the source, and those whose files have another size than when they were
last known to be the same; all of both where all are to be compared. Rows with an error are counted, nothing of theirs is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import lance

from lidit.store import columns
from pipelines.engine.table import Table
from pipelines.ingestion.filters import FiltersConfig
from pipelines.ingestion.listed_sizes import read_sizes
from pipelines.sources.base import ERROR_FIELD, MAX_IMAGE_BYTES, Item, Listed
from pipelines.sources.image_check import digest
from pipelines.sources.locations import STAT_THREADS
from pipelines.sources.text_files import is_unreadable

COMPARED_IMAGES = 32
CAPTION_FILES = 100_000
READ_ROWS = 8192  # of the table at a time
CHUNK = 1024  # rows that are looked at together: bounds what waits for the threads


@dataclass(frozen=True)
class Difference:
    """A row that the source has otherwise now, or perhaps (`failed`)."""

    item: Item
    image_id: str
    fragment: int
    position: int  # in the fragment, deleted rows counted
    image: bool  # its image; its caption alone otherwise
    failed: bool = False  # has an error instead of an image: whether the source has a good one is not known yet

    @property
    def place(self) -> str:
        """For messages."""
        return str(self.item.get("place") or self.image_id)

    @property
    def is_named(self) -> bool:
        """Tells whether the row's id says where in the source it comes from, and not only in a source of such a name."""
        return self.image_id == self.item["image_id"]


@dataclass
class Comparison:
    """Result of a comparison: what was compared, and what differs."""

    captions: int = 0
    images: int = 0
    differ: list[Difference] = field(default_factory=list)
    failed: list[Difference] = field(default_factory=list)  # rows with an error: an update tries them again
    sizes: int = 0  # images whose file's size was compared with that of before
    same: dict[str, int] = field(default_factory=dict)  # image_id -> bytes of its file, which is the row's; to be noted

    @property
    def to_update(self) -> list[Difference]:
        """Selects those whose row an update may replace."""
        return [one for one in [*self.differ, *self.failed] if one.is_named]


def compare(
    table: Table, source: Listed, there: Sequence[tuple[Item, str]], filters: FiltersConfig, everything: bool
) -> Comparison:
    """Holds rows that are in the table against their items (each with the `image_id` of its row).

    What is not there or cannot be opened now is not compared, nor are images of a table from before rows had digests. What can
    be opened and would make no good row (a text that is not UTF-8) is a difference.
    """
    found = Comparison()
    if not source.may_differ or not there:
        return found
    dataset = table.open()
    names = [columns.IMAGE_ID, columns.CAPTION_ORIGINAL, columns.IMAGE_DIGEST, ERROR_FIELD.name]
    if any(name not in dataset.schema.names for name in names):
        return found
    files = [image_id for item, image_id in there if "text_path" in item]
    unread = set() if everything else set(files) - set(_spread(files, CAPTION_FILES))
    sizes = read_sizes(table.uri, [image_id for item, image_id in there if "bytes" in item])
    images = {image_id for _, image_id in (there if everything else _spread(there, COMPARED_IMAGES))}
    images |= {image_id for item, image_id in there if sizes.get(image_id, item.get("bytes")) != item.get("bytes")}
    found.sizes = len(sizes)
    items = {image_id: item for item, image_id in there}
    look = _Look(source, filters, images, unread - images)
    with ThreadPoolExecutor(STAT_THREADS) as threads:
        for rows in _rows(dataset, names, items):
            for (item, row), (captions, image, difference) in zip(rows, threads.map(look, rows)):
                found.captions += captions
                found.images += image
                size, known = item.get("bytes"), sizes.get(row[columns.IMAGE_ID])
                if image and size is not None and size != known and not (difference and difference.image):
                    found.same[row[columns.IMAGE_ID]] = size
                if difference is not None:
                    (found.failed if difference.failed else found.differ).append(difference)
    return found


class _Look:
    """Compares one row. Runs in many threads at once."""

    def __init__(self, source: Listed, filters: FiltersConfig, images: set[str], unread: set[str]):
        self.source, self.filters, self.images, self.unread = source, filters, images, unread

    def __call__(self, one: tuple[Item, dict[str, Any]]) -> tuple[bool, bool, Difference | None]:
        """(item, row) -> whether its caption was compared, whether its image, how they differ."""
        item, row = one
        image_id, address = row[columns.IMAGE_ID], row["_rowaddr"]
        about = (item, image_id, address >> 32, address & 0xFFFFFFFF)
        if row[ERROR_FIELD.name] is not None:
            return False, False, Difference(*about, image=True, failed=True)
        if image_id in self.unread:
            return False, False, None
        if item.get("bytes", 0) > MAX_IMAGE_BYTES:
            return False, True, Difference(*about, image=True)
        old = row[columns.CAPTION_ORIGINAL]
        try:
            if image_id not in self.images or row[columns.IMAGE_DIGEST] is None:
                differs = self.caption_differs(item, old, self.source.text(item))
                return True, False, Difference(*about, image=False) if differs else None
            record = next(iter(self.source.records([item])))
            if record.image is None:
                self.source.text(item)  # says whether it is the text
                return False, False, None
        except ValueError as error:
            there = not is_unreadable(error.__cause__)
            return there, False, Difference(*about, image=False) if there else None
        except OSError as error:
            if not is_unreadable(error):
                raise
            return False, False, None
        other = digest(record.image) != row[columns.IMAGE_DIGEST]
        differs = other or self.caption_differs(item, old, record.caption)
        return True, True, Difference(*about, image=other) if differs else None

    def caption_differs(self, item: Item, old: str | None, caption: str | None) -> bool:
        """Tells whether an item's caption is another one, as far as it can be known: metadata may be damaged now."""
        return not item.get("text_unsure") and self.differs(old, caption)

    def differs(self, old: str | None, caption: str | None) -> bool:
        """Tells whether a row would have another caption if it were ingested now."""
        if self.filters.caption(caption) is not None:
            caption = old if self.filters.bad_caption == "drop" else None
        return caption != old


def _rows(
    dataset: lance.LanceDataset, names: list[str], items: dict[str, Item]
) -> Iterator[list[tuple[Item, dict[str, Any]]]]:
    """Rows of these items with their addresses, some at a time."""
    held: list[tuple[Item, dict[str, Any]]] = []
    for batch in dataset.to_batches(columns=names, batch_size=READ_ROWS, with_row_address=True, batch_readahead=2):
        ids = batch.column(columns.IMAGE_ID).to_pylist()
        found = [row for row, image_id in enumerate(ids) if image_id in items]
        if found:
            held += [(items[row[columns.IMAGE_ID]], row) for row in batch.take(found).to_pylist()]
        while len(held) >= CHUNK:
            yield held[:CHUNK]
            held = held[CHUNK:]
    yield held


def _spread(things: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many of them, from the first to the last."""
    return things[:: max(1, -(-len(things) // most))]

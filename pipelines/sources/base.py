"""Sources of rows. A source is cut into units, small and JSON-able; a worker reads a unit record by record.

| spec                | rows                                                          | fills                             |
|---------------------|---------------------------------------------------------------|-----------------------------------|
| `scenes:N`          | N rendered scenes of the demo world                           | image, `caption_original`, `truth` |
| `folder:URI`        | every image below a folder                                    | image, `caption_original`         |
| `coco:URI`          | one per annotation of a COCO captions set                     | image, `caption_original`         |
| `prompts:FILE`      | one per prompt of a text file                                 | `caption`                         |
| `webdataset:URI`    | one per sample of tar shards                                  | image, `caption_original`         |
| `parquet:URI`       | one per row of Parquet files                                  | image, `caption_original`         |
| `lance:URI`         | one per row of a Lance table                                  | image, `caption_original`         |
| `hf:PATH`           | one per row of a `datasets` folder (`save_to_disk`)           | image, `caption_original`         |
| `img2dataset:PATH`  | what img2dataset downloaded: tars, Parquet or plain files     | image, `caption_original`         |

A URI is a local path or anything fsspec opens (`s3://...`). The first four list their rows beforehand (*listed*); the
others are read shard by shard (*sharded*), and nobody ever holds a list of their rows. docs/ingest.md says it all.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from lidit.images.pixels import HAS_HEIF
from lidit.runtime.uris import shown
from lidit.store import columns
from pipelines.engine.column_file import UNCOMPRESSED
from pipelines.sources.image_check import check_image, digest
from pipelines.sources.locations import too_large

IMAGE_ENDINGS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "jp2", "j2k", "jpx",
    "jpf", "j2c", "jpc", "mpo", "ppm", "pgm", "pbm", "pnm", "qoi", *(("heic", "heif", "hif") if HAS_HEIF else ()),
)  # fmt: skip
MAX_IMAGE_BYTES = 256 << 20  # of an encoded image; larger files are refused before they are read
MAX_TEXT_BYTES = 256 << 10  # UTF-8 of a text that comes with a row; a dense caption has a few kB
MAX_JSON_BYTES = 4 << 20  # of a file that belongs to a row and holds its texts among other things
MAX_PLACE = 4096  # characters of a row's source that are kept: no path of a disk is longer, a name in a tar may be
SURELY_SHORT = MAX_TEXT_BYTES // 4  # characters
ID_FIELD = pa.field(columns.IMAGE_ID, pa.string())
ERROR_FIELD = pa.field(columns.error("ingest"), pa.string())
IMAGE_FIELDS = [
    pa.field(columns.IMAGE, pa.large_binary(), metadata=UNCOMPRESSED),
    pa.field(columns.HEIGHT, pa.int32()),
    pa.field(columns.WIDTH, pa.int32()),
    pa.field(columns.CAPTION_ORIGINAL, pa.string()),
    pa.field(columns.SOURCE, pa.string()),
    pa.field(columns.IMAGE_DIGEST, pa.string()),
    pa.field(columns.IMAGE_PHASH, pa.uint64()),
]
CAPTION_FIELD = pa.field(columns.CAPTION, pa.string())

Item = dict[str, Any]  # of a listed source: `image_id` and what it needs to make the row; JSON-able and small
Piece = dict[str, Any]  # of a sharded source: what it can read by itself; JSON-able and small. See `Sharded.pieces`


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of columns of a table, or of files of a tar's samples. Unset: the usual names are tried."""

    image: str | None = None
    """The image's encoded bytes: a column (also a struct with `bytes`), or a file name extension such as `jpg`."""
    caption: str | None = None
    """The text that came with it: a column, an extension such as `txt`, or `json.KEY` for a key of a sample's JSON."""
    score: str | None = None
    """A number that `filters.min_score` is held against, such as an aesthetic score: a column, or `json.KEY`."""

    def __bool__(self) -> bool:
        return any((self.image, self.caption, self.score))


USUAL_NAMES = ColumnsConfig()


@dataclass
class Record:
    """A sample as a source found it at one place: not looked at yet, not filtered."""

    place: str  # shard and key, or file: tells a person where it came from; the same every time
    image: bytes | None = None
    caption: str | None = None  # the text that came with it
    score: float | None = None
    error: str | None = None  # why it can be no good row
    image_id: str | None = None  # None: made from the content, see `identify`
    values: dict[str, Any] = field(default_factory=dict)  # further columns
    digest: str | None = None  # of the image's bytes; None until `identify`
    shard: str | None = None  # the file that it was read from, in full; of sharded sources

    def drop_long_texts(self) -> None:
        """Takes texts of more than `MAX_TEXT_BYTES` away, and says so in `error`; the `image_id` is made of the whole text."""
        if (self.caption is None or len(self.caption) <= SURELY_SHORT) and not self.values:
            return
        for name, text in (("caption", self.caption), *list(self.values.items())):
            if not isinstance(text, str) or len(text) <= SURELY_SHORT:
                continue
            if (size := len(text.encode("utf-8", "surrogatepass"))) > MAX_TEXT_BYTES:
                self.identify()
                self.error = self.error or f"{name}: {too_large(size, MAX_TEXT_BYTES)}"
                if name == "caption":
                    self.caption = None
                self.values.pop(name, None)

    def identify(self) -> str:
        """The `image_id` of its row: the source's own, or digests of image (of the place, without one) and caption."""
        if self.image is not None and self.digest is None:
            self.digest = digest(self.image)
        if self.image_id is None:
            image = self.digest or digest(f"place:{self.place}".encode("utf-8", "surrogatepass"))
            caption = digest(b"" if self.caption is None else f"text:{self.caption}".encode("utf-8", "surrogatepass"))
            self.image_id = f"{image}-{caption[:16]}"
        return self.image_id

    def identify_error(self) -> str:
        """The `image_id` of a row that says why there is no good one: of sharded sources made from the place, in full.

        So the same damaged bytes in a hundred places are a hundred errors.
        """
        identity = self.identify()
        if self.shard is None:
            return identity
        place = digest(f"place:{self.shard}#{self.place}".encode("utf-8", "surrogatepass"))
        return f"{place}-{identity[-16:]}"


class Source(ABC):
    """Something to ingest. Opened by the driver and by every worker; opening reads little or nothing."""

    fields: list[pa.Field]
    has_images = True  # a record without an image is then an error

    @cached_property
    def left_out(self) -> Counter[str]:
        """Counts what was passed over while the source was listed or read, by name: counts for the summary."""
        return Counter()

    @cached_property
    def unread(self) -> list[str]:
        """Places of the parts that were not read to their end for want of memory: the next run tries them again."""
        return []

    def set_aside(self, part: dict[str, Any], reason: str) -> Record:
        """The record that stands for what is not read of a part, which is noted as `unread`."""
        place = part.get("place") or part["image_id"]
        self.unread.append(place)
        if "image_id" in part:
            return Record(place, error=reason, image_id=part["image_id"])
        return Record(f"{place}#unread", error=reason, shard=part.get("uri", place))

    @property
    def schema(self) -> pa.Schema:
        """Columns of the rows."""
        return pa.schema([ID_FIELD, *self.fields, ERROR_FIELD])

    @abstractmethod
    def records(self, parts: Iterable[dict[str, Any]]) -> Iterator[Record]:
        """The records of some items or pieces, in an order that is the same every time.

        What is damaged is a record with an `error`.

        Raises:
            OSError: the storage cannot be read now; the job stops, and goes on when it can.
        """


class Listed(Source):
    """A source whose rows are known beforehand, each with the `image_id` that it always has."""

    may_differ = False  # whether a row's image or text may be another one later, under the same `image_id`

    @abstractmethod
    def items(self) -> list[Item]:
        """All items in order.

        Raises:
            ValueError: the source is not what its spec says; names file and line.
        """

    @abstractmethod
    def record(self, item: Item) -> Record:
        """One item's record."""

    def text(self, item: Item) -> str | None:
        """The text that comes with an item's image, without a look at the image.

        Raises:
            ValueError: it is no text.
            OSError: its file is not there, or cannot be read now.
        """
        return item.get("text")

    def earlier_ids(self, items: list[Item], has: Callable[[list[str]], list[bool]], table: Any) -> list[str | None]:
        """The `image_id` of each item's row where the table has it under one as it was made before; None where not.

        `has`: whether the table has each of some ids. `table`: the open Lance table.
        """
        earlier = [item.get("earlier_id") for item in items]
        there = has([name or "" for name in earlier])
        return [name if known and name else None for name, known in zip(earlier, there)]

    def records(self, parts: Iterable[Item]) -> Iterator[Record]:
        for item in parts:
            try:
                record = self.record(item)
            except ValueError as error:  # such as a text that is not UTF-8
                place = item.get("place") or item["image_id"]
                record = Record(place, error=f"{type(error).__name__}: {error}")
            record.image_id = item["image_id"]
            yield record

    def batch(self, items: Iterable[Item]) -> pa.RecordBatch:
        """Rows of some items, nothing filtered."""
        rows = [make_row(record, self.has_images) for record in self.records(items)]
        return pa.RecordBatch.from_pylist(rows, schema=self.schema)


class Sharded(Source):
    """A source of shards that are read as they come; a row's `image_id` is made from its content."""

    fields = IMAGE_FIELDS

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """All that there is to read, in order.

        A piece has `place`, `stamp` (changes when the content may have; None: nobody knows), `rows` (None: unknown until
        it is read), `bytes` (roughly), and whatever `read` needs.

        Raises:
            ValueError: the source is not what its spec says.
        """

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[Record]:
        """One piece's records."""

    def records(self, parts: Iterable[Piece]) -> Iterator[Record]:
        for piece in parts:
            shard = piece.get("uri", piece["place"])
            try:
                for record in self.read(piece):
                    record.shard = shard
                    yield record
            except MemoryError as error:  # what it asks for may be beyond any machine, or beyond this one
                yield self.set_aside(piece, f"reading this needs more memory than there is: {error}")


def make_row(
    record: Record,
    has_image: bool,
    decode: bool = True,
    with_phash: bool = False,
    size_filter: Callable[[int, int], str | None] = lambda height, width: None,
) -> dict[str, Any]:
    """A record as a row of its source's schema: nulls and a reason where it can be no good one.

    `decode`, `with_phash`, `size_filter` as `check_image` has them.

    Raises:
        Unwanted: the size filter leaves the image out.
    """
    record.drop_long_texts()
    row = {columns.IMAGE_ID: record.identify(), **record.values}
    if (reason := record.error or unwritable(record)) is not None:
        return error_row(record, reason)
    if not has_image:
        return row
    if record.image is None:
        return error_row(record, "there is no image")
    try:
        look = check_image(record.image, decode, with_phash, size_filter)
    except ValueError as error:
        return error_row(record, str(error))
    return {
        **row,
        columns.IMAGE: record.image,
        columns.HEIGHT: look.height,
        columns.WIDTH: look.width,
        columns.CAPTION_ORIGINAL: record.caption,
        columns.SOURCE: writable(record.place[:MAX_PLACE]),
        columns.IMAGE_DIGEST: record.digest,
        columns.IMAGE_PHASH: look.phash,
    }


def place_digest(uri: str) -> str:
    """12 hex digits for where a source lies, in full: a part of ids whose other parts are the same elsewhere."""
    return hashlib.sha256(writable(uri).encode()).hexdigest()[:12]


def writable(text: str) -> str:
    r"""The text with what UTF-8 cannot write, halves of surrogate pairs, as escapes (`\ud83d`)."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def error_row(record: Record, reason: str) -> dict[str, Any]:
    """A row that says why there is nothing in it."""
    return {
        columns.IMAGE_ID: record.identify_error(),
        columns.SOURCE: writable(record.place[:MAX_PLACE]),
        ERROR_FIELD.name: writable(shown(reason)),
    }


def unwritable(record: Record) -> str | None:
    """Why a text of a record cannot be kept: it has a character that UTF-8 cannot write."""
    for name, text in (("caption", record.caption), *record.values.items()):
        if isinstance(text, str) and (escaped := writable(text)) != text:
            place = next(place for place, (one, other) in enumerate(zip(text, escaped)) if one != other)
            return f"{name}: expected text, received half of a character, {escaped[place : place + 6]}, at {place}"
    return None

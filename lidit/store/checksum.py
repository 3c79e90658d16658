"""Notes in a data file of a table: a digest of each column's content, and the place that the file was made for.

A digest finds a flipped bit. It does not find whole files that changed places (restored or copied under each other's names),
since each of them is what was written. So the file also notes its name, its fragment, the number of rows, and a digest of
those rows' `image_id`s, all in the metadata of the file itself: a version's manifest keeps a name and a size of each file
and has no room for more. `lidit verify` holds all files against their notes, a training those that it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lidit.store import columns

DIGEST = "lidit:digest:"  # + column name: key of the file's own metadata
MADE_FOR = "lidit:made_for"  # key of the file's own metadata: JSON with file, fragment, rows, image_ids
PLACE: dict[str, Any] = {"file": str, "rows": int, "fragment": (int, type(None)), "image_ids": (str, type(None))}
READ_ROWS = 256  # at a time
READ_BYTES = 8 << 20  # at a time, where rows are large


class ColumnDigest:
    """sha256 over a column's validity, lengths and values, fed batch by batch: the same however the column is cut.

    Null slots count as null whatever bytes lie under them. Takes fixed-width, string and binary columns.
    """

    def __init__(self) -> None:
        self._parts = (hashlib.sha256(), hashlib.sha256(), hashlib.sha256())

    def update(self, array: pa.Array) -> None:
        """Adds the next rows of the column."""
        validity, lengths, values = self._parts
        validity.update(pc.is_valid(array).to_numpy(zero_copy_only=False).tobytes())
        present = array.drop_null()
        if not len(present):
            return
        if pa.types.is_primitive(array.type):
            values.update(present.to_numpy(zero_copy_only=False).tobytes())
            return
        if not (pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)):
            present = present.cast(pa.large_binary())
        _, offsets_buffer, data = present.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int64)[present.offset : present.offset + len(present) + 1]
        lengths.update(np.diff(offsets).tobytes())
        if data is not None:
            values.update(memoryview(data)[offsets[0] : offsets[-1]])

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()


@dataclass(frozen=True)
class HeldFile:
    """A data file where one version of a table has it."""

    table_uri: str
    path: str  # name inside the table's data folder
    fragment_id: int
    rows: int  # of the fragment, deleted ones included
    columns: tuple[str, ...]  # that are read from this file
    ids_path: str | None  # the fragment's file that holds `image_id`
    size: int  # bytes; 0 where the version does not say

    @property
    def uri(self) -> str:
        """Path of the file."""
        return data_file_uri(self.table_uri, self.path)

    @property
    def where(self) -> str:
        """Names the file in messages."""
        return f"fragment {self.fragment_id}, file {self.path}"


@dataclass(frozen=True)
class Notes:
    """Notes that the writer of a data file left in it."""

    digests: dict[str, str]  # column -> digest of its content; empty where another tool wrote the file
    made_for: dict[str, Any] | None  # None where the file is older than this note, or another tool wrote it


Reader = Callable[..., Any]
"""`lance.file.LanceFileReader`, which the caller hands over: this package depends on no Lance."""


def data_file_uri(table_uri: str, path: str) -> str:
    """Returns the place where a table keeps the data file of that name."""
    return f"{table_uri.rstrip('/')}/data/{path}"


def is_ours(path: str) -> bool:
    """Tells whether a `ColumnFileWriter` wrote the data file of that name; Lance's own names have no dash."""
    return "-" in path


def held_files(dataset: Any, table_uri: str, fragment: Any) -> list[HeldFile]:
    """The data files of a fragment (of a Lance dataset), as this version has them."""
    names = {field.id(): field.name() for field in dataset.lance_schema.fields()}
    files = fragment.metadata.files
    current = [tuple(names[number] for number in file.fields if number in names) for file in files]
    ids_path = next((file.path for file, held in zip(files, current) if columns.IMAGE_ID in held), None)
    return [
        HeldFile(
            table_uri,
            file.path,
            fragment.fragment_id,
            fragment.physical_rows,
            held,
            ids_path,
            file.file_size_bytes or 0,
        )
        for file, held in zip(files, current)
    ]


class DamagedBytes(OSError):
    """Bytes on which Lance's reader gave up in a panic."""


@contextlib.contextmanager
def no_panic() -> Iterator[None]:
    """Makes a `DamagedBytes` of a panic of Lance's reader, which damaged bytes may cause and which is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DamagedBytes(f"Lance's reader gave up on damaged bytes: {str(error).splitlines()[0]}") from error


def read_notes(reader: Reader, uri: str) -> Notes:
    """The notes in a data file; few reads, at its end.

    Raises:
        ValueError: the notes themselves are damaged.
        OSError: the file is not there, or cannot be read.
    """
    with no_panic():
        schema = reader(uri).metadata().schema
    notes = columns.metadata_of(schema)
    digests = {key.removeprefix(DIGEST): value for key, value in notes.items() if key.startswith(DIGEST)}
    place = json.loads(notes[MADE_FOR]) if MADE_FOR in notes else None
    if place is not None and not (
        isinstance(place, dict)
        and place.keys() == PLACE.keys()
        and all(isinstance(place[key], kind) for key, kind in PLACE.items())
    ):
        raise ValueError(f"its note of the place is damaged: expected {', '.join(PLACE)}, received {notes[MADE_FOR]!r}")
    if digests and (absent := [name for name in schema.names if name not in digests]):
        raise ValueError(f"its digest of {', '.join(absent)} is missing: the notes are damaged")
    return Notes(digests, place)


def made_for(path: str, rows: int, fragment_id: int | None, image_ids: str | None) -> str:
    """The note of a file's place, for its metadata.

    Args:
        path: the file's name.
        rows: of the file.
        fragment_id: that the columns are made for; None for rows of a new fragment, whose number nobody knows yet.
        image_ids: `image_ids_digest` of that fragment; None where it has none, or the ids are in the file itself.
    """
    return json.dumps({"file": path, "rows": rows, "fragment": fragment_id, "image_ids": image_ids})


def image_ids_digest(reader: Reader, dataset: Any, table_uri: str, fragment_id: int) -> str | None:
    """Digest of the `image_id`s of a fragment's rows, in the order of its files and deleted rows included.

    So deleting rows changes nothing. None where the fragment is not there, or has no such column.
    """
    fragment = dataset.get_fragment(fragment_id)
    files = held_files(dataset, table_uri, fragment) if fragment is not None else []
    return held_image_ids(reader, files[0]) if files else None


def held_image_ids(reader: Reader, file: HeldFile) -> str | None:
    """Digest of the `image_id`s that the file's fragment has now; None where it has no such column."""
    if file.ids_path is None:
        return None
    return content_digest(reader, data_file_uri(file.table_uri, file.ids_path), columns.IMAGE_ID)


def content_digest(
    reader: Reader, uri: str, name: str, rows: int = READ_ROWS, watch: Callable[[int], None] | None = None
) -> str:
    """Reads a column of a data file, so many rows at a time; `watch` is told the bytes of each piece."""
    digest = ColumnDigest()
    with no_panic():
        for batch in reader(uri, columns=[name]).read_all(batch_size=rows, batch_readahead=2).to_batches():
            digest.update(batch.column(0))
            if watch is not None:
                watch(batch.nbytes)
    return digest.hexdigest()


def content_problems(
    reader: Reader,
    file: HeldFile,
    notes: Notes,
    names: frozenset[str] | None = None,
    watch: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Reads the columns that a version has of a file (or those among `names`) against the file's digests."""
    rows = READ_ROWS
    if file.size and file.rows:
        rows = max(1, min(READ_ROWS, READ_BYTES * file.rows // file.size))
    for name in file.columns:
        if name not in notes.digests or (names is not None and name not in names):
            continue
        if content_digest(reader, file.uri, name, rows, watch) != notes.digests[name]:
            yield f"column {name} is not what was written"


def place_problems(file: HeldFile, notes: Notes, image_ids: Callable[[HeldFile], str | None]) -> Iterator[str]:
    """Yields why a file does not lie where it was made for; nothing where it does not say for where.

    `image_ids`: digest of the ids that the file's fragment has now, as of `held_image_ids`.
    """
    noted = notes.made_for
    if noted is None:
        return
    if noted["file"] != file.path:
        yield f"is the file {noted['file']} under another name"
    if noted["fragment"] not in (None, file.fragment_id):
        yield f"was made for fragment {noted['fragment']}"
    if noted["rows"] != file.rows:
        yield f"was made for {noted['rows']:,} rows, the fragment has {file.rows:,}"
    if noted["image_ids"] is not None and image_ids(file) != noted["image_ids"]:
        yield f"was made for rows of other {columns.IMAGE_ID}s than those of the fragment"

"""A data file with some columns of a table: written by a worker, and part of the table only once it is attached or appended."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import fsspec
import lance
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from lance.file import LanceFileReader, LanceFileWriter
from lance.fragment import DataFile

from lidit.runtime.durable import make_folders, publish
from lidit.store.checksum import DIGEST, MADE_FOR, ColumnDigest, data_file_uri, image_ids_digest, made_for, read_notes

# Chosen by measurement, docs/storage.md: large_binary without compression.
STORAGE_VERSION: Literal["2.0"] = "2.0"
UNCOMPRESSED = {"lance-encoding:compression": "none"}
UNFINISHED = "_unfinished"  # folder in the table, one folder per run in it: files being written
OURS = re.compile(
    r"(?P<run>[a-z_]+-\d{8}T\d{6}-[0-9a-f]{6})-[0-9a-f]{32}\.lance"
)  # names that `ColumnFileWriter` gives


@dataclass(frozen=True)
class ColumnFile:
    """A data file that a worker has written and nobody can see yet. Travels to the committer as JSON."""

    path: str  # name inside the table's data folder
    columns: list[str]
    rows: int
    size: int  # bytes
    layout: dict[str, Any]  # field ids and the rest of Lance's DataFile
    fragment_id: int | None = None  # None: rows of a new fragment
    replaces: dict[str, str] = field(default_factory=dict)  # column -> the file that held it when we read it
    reads: dict[str, str] = field(default_factory=dict)  # column that it was made from -> the file that held it

    def to_json(self) -> dict[str, Any]:
        """All of it, for the way through Ray."""
        return asdict(self)

    def data_file(self) -> DataFile:
        """As Lance's manifest keeps it."""
        return DataFile(self.path, **self.layout)


class ColumnFileWriter:
    """Writes a column file batch by batch; digests and the place that it is made for go into the file's own metadata, and
    `notes` beside them."""

    def __init__(self, table_uri: str, schema: pa.Schema, run_id: str, notes: Mapping[str, str] | None = None):
        self.path = f"{run_id}-{uuid.uuid4().hex}.lance"
        self._table_uri, self._schema = table_uri, schema
        self._final = self._begun = data_file_uri(table_uri, self.path)
        self._fs, root = fsspec.core.url_to_fs(table_uri)
        if isinstance(self._fs, LocalFileSystem):  # an object store shows a file once it is whole, a disk at once
            self._final = data_file_uri(root, self.path)
            self._begun = f"{root}/{UNFINISHED}/{run_id}/{uuid.uuid4().hex}/{self.path}"
            os.makedirs(os.path.dirname(self._begun), exist_ok=True)
            make_folders(os.path.dirname(self._final))
        self._writer = LanceFileWriter(self._begun, schema, version=STORAGE_VERSION)
        self._digests = {name: ColumnDigest() for name in schema.names}
        self._notes = dict(notes or {})
        self.rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Appends rows; columns in the order of the schema."""
        for name, digest in self._digests.items():
            digest.update(batch.column(name))
        self._writer.write_batch(batch.cast(self._schema))
        self.rows += batch.num_rows

    def finish(
        self,
        dataset: lance.LanceDataset,
        fragment_id: int | None = None,
        replaces: dict[str, str] | None = None,
        reads: dict[str, str] | None = None,
    ) -> ColumnFile:
        """Closes the file; only now it is whole, and on the disk. `dataset` is the table that it is meant for."""
        for name, digest in self._digests.items():
            self._writer.add_schema_metadata(DIGEST + name, digest.hexdigest())
        for key, note in self._notes.items():
            self._writer.add_schema_metadata(key, note)
        ids = None if fragment_id is None else image_ids_digest(LanceFileReader, dataset, self._table_uri, fragment_id)
        self._writer.add_schema_metadata(MADE_FOR, made_for(self.path, self.rows, fragment_id, ids))
        self._writer.close()
        if self._begun != self._final:
            publish(self._begun, self._final)  # on the disk before anybody can commit it
            os.rmdir(os.path.dirname(self._begun))
        made = DataFile.create(dataset, self.path)
        layout = {
            "fields": list(made.fields),
            "column_indices": list(made.column_indices),
            "file_major_version": made.file_major_version,
            "file_minor_version": made.file_minor_version,
            "file_size_bytes": made.file_size_bytes,
        }
        size = made.file_size_bytes or 0
        names = self._schema.names
        return ColumnFile(self.path, names, self.rows, size, layout, fragment_id, replaces or {}, reads or {})

    def discard(self) -> None:
        """Takes the unfinished file away: a full disk stays full otherwise."""
        if self._begun != self._final:
            shutil.rmtree(os.path.dirname(self._begun), ignore_errors=True)


def file_digests(table_uri: str, path: str) -> dict[str, str]:
    """Column -> content digest, as the writer left it in the file's metadata; empty where another tool wrote it."""
    return read_notes(LanceFileReader, data_file_uri(table_uri, path)).digests

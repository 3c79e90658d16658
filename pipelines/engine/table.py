"""The only writer of Lance: a table that grows columns, one file per fragment, committed by one process.

A stage's column exists from its first run as a field whose values are null (`declare`). A worker then writes one
`ColumnFile` per fragment with all columns of the stage in it; nothing of it is visible until the committer attaches it
(`attach`). What is missing is asked of the table (`missing`): fragments that have no file for a field. So there is no
ledger to fall out of step, and a job may be killed at any point: files that no version refers to are garbage, which the
next successful run removes (`remove_orphans`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec
import lance
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from lance.commit import CommitConflictError
from lance.fragment import FragmentMetadata

from lidit.runtime.durable import flushed_commit
from lidit.runtime.files import is_there, remove_file
from lidit.runtime.outage import AWAY_SECONDS, is_away, make_lance_patient, outlast
from lidit.store import columns
from lidit.store.checksum import data_file_uri
from pipelines.engine.column_file import OURS, STORAGE_VERSION, UNFINISHED, ColumnFile
from pipelines.engine.field_prints import field_differences, made_before, unrecorded_keys

TOMBSTONE = -2  # Lance's mark for a field of a data file that a later file has replaced
COMMIT_TRIES = 20
READ_BUFFER_BYTES = 64 << 20  # that Lance may have read and not handed out yet
AWAY_PAUSE = 5.0  # seconds, where the store is away
CREATE_TRIES = 3
Guard = Callable[[], None]
"""Called when the version that a commit builds on is open, before the commit; raises where it must not be made."""


@dataclass
class Attached:
    """Outcome of attaching column files: attached, not needed (somebody was first), or to be done again."""

    done: list[ColumnFile] = field(default_factory=list)
    duplicate: list[ColumnFile] = field(default_factory=list)
    stale: list[ColumnFile] = field(default_factory=list)


class Table:
    """A Lance table at a URI. Opens the newest version at every call, since others may commit meanwhile."""

    def __init__(self, uri: str):
        make_lance_patient()
        self.uri = uri

    def exists(self) -> bool:
        """Tells whether there is a table at the URI."""
        fs, path = fsspec.core.url_to_fs(f"{self.uri}/_versions")

        def look() -> bool:
            fs.invalidate_cache(path)  # s3fs remembers that there was none
            return fs.isdir(path)  # asks by listing: the refusal of a HEAD request has no body that would say why

        return outlast(look, f"looking for {self.uri}")

    def open(self, version: int | None = None) -> lance.LanceDataset:
        """The newest version, or the given one."""
        if not self.exists():
            store = self.uri.rpartition("/")[0]
            raise ValueError(
                f"no table at {self.uri}: ingest rows first (`lidit ingest --store {store} --source SPEC`), or make the "
                f"demo's (`lidit demo --store {store}`)"
            )
        return outlast(lambda: lance.dataset(self.uri, version=version), f"opening {self.uri}")

    # -- rows ---------------------------------------------------------------------------------------------------------

    def create(self, schema: pa.Schema) -> None:
        """Makes an empty table, or adds the columns that an existing one lacks. Safe against another creator."""
        for attempt in range(CREATE_TRIES):
            if self.exists():
                break
            try:
                with flushed_commit(self.uri):
                    lance.write_dataset(
                        schema.empty_table(), self.uri, mode="create", data_storage_version=STORAGE_VERSION
                    )
            except (
                OSError
            ) as error:  # "exists", of a store that refused for a moment, is tried again where there is none
                if not self.exists() and ("already exists" not in str(error) or attempt == CREATE_TRIES - 1):
                    raise
                time.sleep(random.uniform(0, 0.2))
        self._add_fields(list(schema))

    def append(self, files: Sequence[ColumnFile], guard: Guard | None = None) -> None:
        """Adds each file as a new fragment, all of them or none; columns that a file lacks read as null.

        Raises:
            RuntimeError: a file is not there any more.
        """

        def operation(dataset: lance.LanceDataset) -> lance.LanceOperation.Append | None:
            known = _data_paths(dataset)
            new = [file for file in files if file.rows and file.path not in known]
            if not new:
                return None  # an earlier try did land, whatever its answer said
            if gone := self._gone(new):
                raise RuntimeError(
                    f"{self.uri}: expected {len(new)} finished files, {len(gone)} are not there any more, such as "
                    f"{gone[0].path}: did somebody else clean up? Run the same command again: what is committed is kept"
                )
            return lance.LanceOperation.Append([FragmentMetadata(0, [file.data_file()], file.rows) for file in new])

        self._commit(operation, guard, self.barrier)

    def upsert(self, key: str, row: dict[str, Any]) -> None:
        """Replaces the row whose `key` column has the row's value, or adds it. The key must be the table's primary key."""

        def insert() -> None:
            dataset = self.open()
            rows = pa.Table.from_pylist([row], schema=dataset.schema)
            with flushed_commit(self.uri, also=("data",)):
                dataset.merge_insert(key).when_matched_update_all().when_not_matched_insert_all().execute(rows)

        outlast(insert, f"writing a row of {self.uri}")

    # -- columns ------------------------------------------------------------------------------------------------------

    def declare(self, fields: Sequence[pa.Field], compare: str) -> None:
        """Adds fields as null columns, metadata and all; those that exist must be the same.

        `compare` is the metadata key whose JSON value says what a column's values depend on.

        Raises:
            ValueError: a field exists with another type or another fingerprint; says what differs.
        """
        schema = self.open().schema
        for wanted in fields:
            if wanted.name in schema.names:
                if unrecorded := unrecorded_keys(schema.field(wanted.name), wanted, compare):
                    raise ValueError(made_before(wanted, self.uri, unrecorded))
                differences = field_differences(schema.field(wanted.name), wanted, compare)
                if differences:
                    maker = "encoder" if columns.META_ENCODER.encode() in (wanted.metadata or {}) else "new column"
                    raise ValueError(
                        f"column {wanted.name!r} of {self.uri} was made differently: {'; '.join(differences)}. "
                        f"Pass --overwrite to replace it, or give the {maker} another name to keep both"
                    )
        self._add_fields(fields)

    def record(self, metadata: Mapping[str, Mapping[str, str]]) -> None:
        """Writes entries into the metadata of columns, name -> key -> value; their other entries stay."""
        for _ in range(COMMIT_TRIES if metadata else 0):
            dataset = self.open()
            try:
                with flushed_commit(self.uri):
                    dataset.update_field_metadata({name: dict(entries) for name, entries in metadata.items()})
                return
            except Exception as error:
                _wait_or_raise(error)
        if metadata:
            raise RuntimeError(f"{self.uri}: could not write metadata of {', '.join(metadata)} in {COMMIT_TRIES} tries")

    def drop(self, names: Iterable[str], guard: Guard | None = None) -> None:
        """Removes columns from the newest version; older versions keep them until they are cleaned up."""
        for _ in range(COMMIT_TRIES):
            dataset = self.open()
            present = [name for name in names if name in dataset.schema.names]
            if not present:
                return
            if guard is not None:
                guard()
            try:
                with flushed_commit(self.uri):
                    dataset.drop_columns(present)
            except Exception as error:
                _wait_or_raise(error)
        raise RuntimeError(f"{self.uri}: could not drop {present} in {COMMIT_TRIES} tries")

    def _add_fields(self, fields: Sequence[pa.Field]) -> None:
        for _ in range(COMMIT_TRIES):
            dataset = self.open()
            new = [wanted for wanted in fields if wanted.name not in dataset.schema.names]
            if not new:
                return
            try:
                with flushed_commit(self.uri):
                    dataset.add_columns(pa.schema([wanted.with_nullable(True) for wanted in new]))
            except Exception as error:
                _wait_or_raise(error)
        raise RuntimeError(f"{self.uri}: could not add {[f.name for f in fields]} in {COMMIT_TRIES} tries")

    def missing(self, names: Sequence[str], dataset: lance.LanceDataset | None = None) -> dict[int, list[str]]:
        """Fragment id -> those of the columns that it has no file for; fragments that have all are left out."""
        dataset = self.open() if dataset is None else dataset  # an empty one is false
        ids = field_ids(dataset)
        found: dict[int, list[str]] = {}
        for fragment in dataset.get_fragments():
            absent = missing_in(fragment, names, ids)
            if absent:
                found[fragment.fragment_id] = absent
        return found

    def attach(self, files: Sequence[ColumnFile], guard: Guard | None = None) -> Attached:
        """Makes finished column files part of their fragments, in one commit.

        Rebases on whatever was committed meanwhile. A file whose columns somebody else has filled is a `duplicate`; one
        whose fragment is gone, has other rows, or had a column that it replaces or was made from changed under it, or that is
        itself not there any more, is `stale`: its fragment is still missing and will be done again. An unknown outcome is
        resolved by reading the table.
        """
        outcome = Attached()

        def operation(dataset: lance.LanceDataset) -> lance.LanceOperation.Merge | None:
            outcome.done, outcome.duplicate, outcome.stale = [], [], []
            ids = field_ids(dataset)
            fragments = {fragment.fragment_id: fragment.metadata for fragment in dataset.get_fragments()}
            changed = False
            gone = {file.path for file in self._gone(files)}
            for file in files:
                verdict = "stale" if file.path in gone else _place(file, fragments.get(file.fragment_id or 0), ids)
                getattr(outcome, verdict or "done").append(file)
                changed |= verdict is None
            if not changed:
                return None
            return lance.LanceOperation.Merge(
                list(fragments.values()), dataset.lance_schema, preserves_nullability=True
            )

        self._commit(operation, guard)
        return outcome

    def barrier(self) -> None:
        """Commits a version that changes nothing and that every commit in flight conflicts with, or comes before.

        Whoever makes such a commit again opens the new version first, and is asked by its guard whether it may.
        """
        if self.exists():
            self._commit(lambda dataset: lance.LanceOperation.Project(dataset.lance_schema))

    def _gone(self, files: Sequence[ColumnFile]) -> list[ColumnFile]:
        """Those of the files that storage says are not there."""
        fs, root = fsspec.core.url_to_fs(self.uri)

        def there(file: ColumnFile) -> bool:
            return outlast(lambda: is_there(fs, data_file_uri(root, file.path)), f"looking for {file.path}")

        if len(files) < 2 or isinstance(fs, LocalFileSystem):
            return [file for file in files if not there(file)]
        with ThreadPoolExecutor(min(16, len(files))) as pool:
            return [file for file, found in zip(files, pool.map(there, files)) if not found]

    def _commit(self, operation: Any, guard: Guard | None = None, settle: Guard | None = None) -> None:
        """Commits what `operation(newest version)` returns until it lands or is no longer needed (None).

        `settle` is called before it looks again after a commit without an answer, which may be on its way still. One that
        conflicts with itself needs none: it lands once at most.
        """
        failure: Exception | None = None
        attempt, away_since, in_doubt = 0, time.monotonic(), False
        while attempt < COMMIT_TRIES:
            if in_doubt and settle is not None:
                settle()
            in_doubt = False
            dataset = self.open()
            wanted = operation(dataset)
            if wanted is None:
                return
            if guard is not None:
                guard()
            try:
                with flushed_commit(self.uri):
                    lance.LanceDataset.commit(self.uri, wanted, read_version=dataset.version)
                return
            except CommitConflictError as conflict:  # made anew on the newest version, which it may well go with
                failure, away_since = conflict, time.monotonic()
                time.sleep(random.uniform(0, min(1.0, 0.02 * 2**attempt)))
            except Exception as error:  # may have landed, or land later: the next round looks before it tries again
                in_doubt = True
                if is_away(error) and time.monotonic() - away_since < AWAY_SECONDS:
                    time.sleep(AWAY_PAUSE)
                    continue
                if not isinstance(error, OSError) or (str(failure) == str(error) and attempt > 3):
                    raise
                failure, away_since = error, time.monotonic()
                time.sleep(min(5.0, 0.1 * 2**attempt))
            attempt += 1
        raise RuntimeError(f"{self.uri}: could not commit in {COMMIT_TRIES} tries; last error: {failure}")

    # -- garbage ------------------------------------------------------------------------------------------------------

    def remove_orphans(self, over: Callable[[], Collection[str]]) -> list[str]:
        """Deletes data files that no version of the table refers to and whose run is over.

        Args:
            over: called once the files are listed; ids of the runs whose commits cannot land any more (`Run.end_dead`).
                Files of others, and files that no run has named, are left alone, whoever they belong to.
        """
        fs, root = fsspec.core.url_to_fs(self.uri)
        present = outlast(lambda: self.open().all_files().read_all().column("path").to_pylist(), "listing files")
        candidates = [
            (match["run"], path)
            for path in present
            if PurePosixPath(path).parent.as_posix() == "data" and (match := OURS.fullmatch(PurePosixPath(path).name))
        ]
        begun = _folders(fs, f"{root}/{UNFINISHED}")
        if not candidates and not begun:
            return []
        dead = over()
        unfinished = []
        for folder in begun:
            if PurePosixPath(folder).name in dead:
                unfinished += [path.removeprefix(f"{root}/") for path in fs.find(folder)]
                fs.rm(folder, recursive=True)
        tracked = self._tracked()
        orphans = sorted(path for run_id, path in candidates if run_id in dead and path not in tracked)
        if orphans:
            self.barrier()  # the answer to a commit may have been lost, and the commit still be on its way
            tracked = self._tracked()
        orphans = [path for path in orphans if path not in tracked]
        for path in orphans:
            _remove(fs, f"{root}/{path}")
        return [*unfinished, *orphans]

    def _tracked(self) -> set[str]:
        """Files that some version refers to."""
        return set(outlast(lambda: self.open().tracked_files().read_all().column("path").to_pylist(), "listing files"))


def _remove(fs: Any, path: str) -> None:
    outlast(lambda: remove_file(fs, path), f"removing {path}")


def _folders(fs: Any, path: str) -> list[str]:
    """What lies in a folder; nothing where it is not there."""
    fs.invalidate_cache()
    try:
        return outlast(lambda: [str(found) for found in fs.ls(path, detail=False)], f"listing {path}")
    except FileNotFoundError:
        return []


def samples_of(store: str) -> Table:
    """The samples table of a store, whether it is there or not."""
    return Table(f"{store.rstrip('/')}/{columns.SAMPLES_TABLE}")


def encoders_of(store: str) -> Table:
    """The encoders table of a store, whether it is there or not."""
    return Table(f"{store.rstrip('/')}/{columns.ENCODERS_TABLE}")


def field_ids(dataset: lance.LanceDataset) -> dict[str, int]:
    """Top-level column name -> Lance's id of the field."""
    return {field.name(): field.id() for field in dataset.lance_schema.fields()}


def missing_in(fragment: lance.LanceFragment, names: Sequence[str], ids: dict[str, int]) -> list[str]:
    """Lists those of the columns that one fragment has no file for."""
    held = {field_id for file in fragment.metadata.files for field_id in file.fields}
    return [name for name in names if ids.get(name) not in held]


def column_holder(metadata: FragmentMetadata, field_id: int) -> str | None:
    """Name of the fragment's data file that holds the field, None where it has none."""
    return next((file.path for file in metadata.files if field_id in file.fields), None)


def _place(file: ColumnFile, fragment: FragmentMetadata | None, ids: dict[str, int]) -> str | None:
    """Puts the file into the fragment's metadata and returns None; or the verdict why not."""
    if fragment is None or fragment.physical_rows != file.rows:
        return "stale"
    if [ids.get(name) for name in file.columns] != file.layout["fields"]:
        return "stale"  # a column was dropped and made anew meanwhile
    if any(held.path == file.path for held in fragment.files):
        return "done"
    held_ids = {field_id for held in fragment.files for field_id in held.fields}
    new = [name for name in file.columns if name not in file.replaces]
    if new and all(ids[name] in held_ids for name in new):
        return "duplicate"
    if any(ids[name] in held_ids for name in new):
        return "stale"
    held_now = {**file.replaces, **file.reads}
    if any(name not in ids or column_holder(fragment, ids[name]) != path for name, path in held_now.items()):
        return "stale"
    replaced = {ids[name] for name in file.replaces}
    for held in fragment.files:
        held.fields = [TOMBSTONE if field_id in replaced else field_id for field_id in held.fields]
    fragment.files.append(file.data_file())
    return None


def _data_paths(dataset: lance.LanceDataset) -> set[str]:
    return {file.path for fragment in dataset.get_fragments() for file in fragment.metadata.files}


def _wait_or_raise(error: Exception) -> None:
    """Before another try on the newest version, where that may help."""
    if not isinstance(error, CommitConflictError) and not is_away(error):
        raise error
    time.sleep(random.uniform(0, 0.1) if isinstance(error, CommitConflictError) else AWAY_PAUSE)

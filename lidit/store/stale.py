"""Finds stale columns: made from values of another column that has changed since.

A stage's file notes which data file each column that it read lay in, and that column's digest. A file is never changed and a
fragment lists its files in the order in which they were attached, and a stage's file is attached only while what it read is
still there: so a column is as it should be where the columns that it was made from lie in earlier files. That is told by the
version alone. Only where one lies in a later file, or in one of another tool, are the notes looked at: another file with the
same digest (the same values) changes nothing. A file without such notes is older than them, or another tool compacted it:
nobody knows what it was made from, and it counts as it is.

Lance's own `update` and `merge_insert` move the rows that they change into files of their own, made columns and all. Such a
file is known by its transaction; its texts are compared with those of the rows as they were, if they are not too many.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lidit.runtime.outage import is_away, outlast
from lidit.store import columns
from lidit.store.checksum import Reader, data_file_uri, is_ours, no_panic, read_notes

MADE_FROM = "lidit:made_from"  # key of a file's own metadata: JSON, column that was read -> {"file", "digest"}
READ_THREADS = 16
MOST_VERSIONS = 200  # that are looked through for what moved a row
MOST_COMPARED = 200_000  # rows of the fragments that rows were moved from


@dataclass(frozen=True)
class _Suspect:
    """A column of a fragment, and one that it was made from which may have changed since."""

    fragment_id: int
    name: str
    file: str  # that holds it
    read: str
    read_file: str  # that holds what it was made from, now


def made_from(reader: Reader, table_uri: str, held: Mapping[str, str]) -> dict[str, str]:
    """The note of a stage's file: what it was made from.

    Args:
        reader: `lance.file.LanceFileReader`.
        held: column that is read -> name of the data file that holds it.
    """
    digests = {path: _digests(reader, table_uri, path) for path in set(held.values())}
    note = {name: {"file": path, "digest": digests[path].get(name)} for name, path in sorted(held.items())}
    return {MADE_FROM: json.dumps(note)}


def stale_columns(reader: Reader, dataset: Any, table_uri: str, fields: Iterable[pa.Field]) -> dict[int, list[str]]:
    """Fragment id -> those of the columns that were made from values which are others now; fragments without any are left out.

    Args:
        reader: `lance.file.LanceFileReader`.
        dataset: the open table.
        fields: columns of stages, whose metadata says what they are made from.

    Raises:
        OSError: storage is away for too long.
    """
    fields = list(fields)
    found = _moved(dataset, fields)
    suspects = list(_suspects(dataset, fields))
    if not suspects:
        return {fragment_id: list(names) for fragment_id, names in found.items()}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        own = sorted({suspect.file for suspect in suspects})
        notes = dict(zip(own, pool.map(lambda path: _note(reader, table_uri, path), own)))
        changed = [
            one for one in suspects if (noted := notes[one.file].get(one.read)) and noted["file"] != one.read_file
        ]
        read = sorted({suspect.read_file for suspect in changed})
        digests = dict(zip(read, pool.map(lambda path: _digests(reader, table_uri, path), read)))
    for suspect in changed:
        before, now = notes[suspect.file][suspect.read]["digest"], digests[suspect.read_file].get(suspect.read)
        if before is None or before != now:
            found.setdefault(suspect.fragment_id, {})[suspect.name] = None
    return {fragment_id: list(names) for fragment_id, names in found.items()}


def read_by(stored: pa.Field) -> list[str]:
    """The columns that one is made from; none for a column that no stage made."""
    metadata = stored.metadata or {}
    keys = (columns.META_READS, columns.META_ALSO_READS)
    return [name for key in keys if (name := metadata.get(key.encode(), b"").decode())]


def _suspects(dataset: Any, fields: Sequence[pa.Field]) -> Iterator[_Suspect]:
    """Yields columns that the version alone cannot clear."""
    ids = {field.name(): field.id() for field in dataset.lance_schema.fields()}
    made = {f.name: [name for name in read_by(f) if name in ids] for f in fields if f.name in ids}
    for fragment in dataset.get_fragments() if made else ():
        files = [(file.path, file.fields) for file in fragment.metadata.files]
        place = {field_id: number for number, (_, held) in enumerate(files) for field_id in held}
        for name, reads in made.items():
            own = place.get(ids[name])
            if own is None or not is_ours(files[own][0]):
                continue
            for read in reads:
                held = place.get(ids[read])
                if held is not None and held != own and (held > own or not is_ours(files[held][0])):
                    yield _Suspect(fragment.fragment_id, name, files[own][0], read, files[held][0])


def _moved(dataset: Any, fields: Sequence[pa.Field]) -> dict[int, dict[str, None]]:
    """Fragments of rows that Lance moved to change them: those of the columns that were made from texts that it changed."""
    ids = {field.name(): field.id() for field in dataset.lance_schema.fields()}
    texts = {f.name: [name for name in read_by(f) if _is_text(dataset, name)] for f in fields if f.name in ids}
    files: dict[str, tuple[int, dict[str, list[str]]]] = {}
    for fragment in dataset.get_fragments() if any(texts.values()) else ():
        for file in fragment.metadata.files:
            held = set() if is_ours(file.path) else set(file.fields)
            here = {
                name: [read for read in reads if ids[read] in held]
                for name, reads in texts.items()
                if ids[name] in held
            }
            if any(here.values()):
                files[file.path] = (fragment.fragment_id, here)
    found: dict[int, dict[str, None]] = {}
    for path, transaction in _movers(dataset, files):
        fragment_id, here = files[path]
        changed = _changed_texts(
            dataset, fragment_id, transaction, sorted({read for reads in here.values() for read in reads})
        )
        for name, reads in here.items():
            if changed & {*reads}:
                found.setdefault(fragment_id, {})[name] = None
    return found


def _is_text(dataset: Any, name: str) -> bool:
    return name in dataset.schema.names and pa.types.is_string(dataset.schema.field(name).type)


def _movers(dataset: Any, paths: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(file, transaction) of those files that an update made; the newest versions are looked through for them."""
    left, newest = set(paths), dataset.version
    for version in range(newest, max(0, newest - MOST_VERSIONS), -1):
        transaction = _transaction(dataset, version) if left else None
        if transaction is None:
            return  # nothing is left, or what is older was cleaned up
        for path in _new_files(transaction) & left:
            left.remove(path)
            if hasattr(transaction.operation, "updated_fragments"):
                yield path, transaction


def _transaction(dataset: Any, version: int) -> Any:
    try:
        return outlast(lambda: dataset.read_transaction(version), f"reading the transaction of version {version}")
    except (OSError, ValueError) as error:  # of a version that was cleaned up meanwhile, or of a tool that leaves none
        if is_away(error):
            raise
        return None


def _new_files(transaction: Any) -> set[str]:
    """Files of the fragments that a transaction made."""
    operation = getattr(transaction, "operation", None)
    groups = [operation, *getattr(operation, "groups", [])]
    fragments = [one for group in groups for one in getattr(group, "new_fragments", None) or ()]
    fragments += getattr(operation, "fragments", None) or ()
    return {file.path for fragment in fragments for file in fragment.files}


def _changed_texts(dataset: Any, fragment_id: int, transaction: Any, names: list[str]) -> set[str]:
    """Those of the columns in which a row of the fragment has another text than before it was moved, as far as is known."""
    operation = transaction.operation
    earlier = {one.id for one in operation.updated_fragments} | {*operation.removed_fragment_ids}
    try:
        before = dataset.checkout_version(transaction.read_version)
        sources = [one for one in before.get_fragments() if one.fragment_id in earlier]
        if sum(one.physical_rows for one in sources) > MOST_COMPARED:
            return set()
        wanted = [columns.IMAGE_ID, *(name for name in names if name in before.schema.names)]
        was = {row[columns.IMAGE_ID]: row for one in sources for row in one.to_table(wanted).to_pylist()}
        now = dataset.get_fragment(fragment_id).to_table(wanted).to_pylist()
    except (OSError, ValueError) as error:  # the version was cleaned up
        if is_away(error):
            raise
        return set()
    pairs = [(row, was[row[columns.IMAGE_ID]]) for row in now if row[columns.IMAGE_ID] in was]
    return {name for name in wanted[1:] if any(row[name] != old[name] for row, old in pairs)}


def _note(reader: Reader, table_uri: str, path: str) -> dict[str, dict[str, Any]]:
    """Reads what the file was made from; empty where it does not say, or its notes are damaged (which `lidit verify` tells)."""

    def read() -> dict[str, dict[str, Any]]:
        with no_panic():
            metadata = reader(data_file_uri(table_uri, path)).metadata().schema.metadata or {}
        note = json.loads(metadata.get(MADE_FROM.encode(), b"{}"))
        whole = isinstance(note, dict) and all(
            isinstance(one, dict) and {"file", "digest"} <= one.keys() for one in note.values()
        )
        return note if whole else {}

    return _unless_damaged(read, path)


def _digests(reader: Reader, table_uri: str, path: str) -> dict[str, str]:
    """Column -> digest of its values; empty where another tool wrote the file, or its notes are damaged."""
    return _unless_damaged(lambda: read_notes(reader, data_file_uri(table_uri, path)).digests, path)


def _unless_damaged(read: Any, path: str) -> dict[str, Any]:
    try:
        return outlast(read, f"reading the notes of {path}")
    except (OSError, ValueError) as error:
        if is_away(error):
            raise
        return {}

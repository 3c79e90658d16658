"""Which columns are stale: made from values of another column that has changed since.

A stage's file notes which data file each column that it read lay in, and that column's digest. A file is never changed and a
fragment lists its files in the order in which they were attached, and a stage's file is attached only while what it read is
still there: so a column is as it should be where the columns that it was made from lie in earlier files. That is told by the
version alone. Only where one lies in a later file, or in one of another tool, are the notes looked at: another file with the
same digest (the same values) changes nothing. A file without such notes is older than them, or another tool compacted it:
nobody knows what it was made from, and it counts as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lidit import columns
from lidit.checksum import Reader, data_file_uri, is_ours, no_panic, read_notes
from lidit.outage import is_away, outlast

MADE_FROM = "lidit:made_from"  # key of a file's own metadata: JSON, column that was read -> {"file", "digest"}
READ_THREADS = 16


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
    suspects = list(_suspects(dataset, list(fields)))
    if not suspects:
        return {}
    with ThreadPoolExecutor(READ_THREADS) as pool:
        own = sorted({suspect.file for suspect in suspects})
        notes = dict(zip(own, pool.map(lambda path: _note(reader, table_uri, path), own)))
        changed = [
            one for one in suspects if (noted := notes[one.file].get(one.read)) and noted["file"] != one.read_file
        ]
        read = sorted({suspect.read_file for suspect in changed})
        digests = dict(zip(read, pool.map(lambda path: _digests(reader, table_uri, path), read)))
    found: dict[int, dict[str, None]] = {}
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
    """What the version alone cannot clear."""
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


def _note(reader: Reader, table_uri: str, path: str) -> dict[str, dict[str, Any]]:
    """What the file was made from; empty where it does not say, or its notes are damaged (which `lidit verify` tells)."""

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

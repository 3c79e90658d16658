"""What verify says of data files: nothing of good ones, and which ones changed places, content or both."""

from __future__ import annotations

import itertools
import os
from functools import partial
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from lance.file import LanceFileReader

from lidit.store import checksum, columns
from lidit.store.checksum import is_ours
from pipelines.engine.column_file import UNCOMPRESSED, ColumnFileWriter
from pipelines.engine.table import Table
from pipelines.verify import VerifyConfig, main

pytestmark = pytest.mark.unit

FIELD = pa.field("value", pa.large_binary(), metadata=UNCOMPRESSED)
ROWS = pa.schema([pa.field(columns.IMAGE_ID, pa.string()), pa.field("text", pa.string())])


class Store:
    """Three fragments of four rows, each with a column file; all files of a kind have one size."""

    def __init__(self, folder: Path):
        self.uri = str(folder / "store")
        self.table = Table(f"{self.uri}/{columns.SAMPLES_TABLE}")
        self.table.create(ROWS)
        self.rows = [self.add_rows(fragment) for fragment in range(3)]
        self.table.declare([FIELD], "key")
        self.made = [self.add_column(fragment) for fragment in range(3)]

    def add_rows(self, fragment: int) -> Path:
        writer = ColumnFileWriter(self.table.uri, ROWS, "ingest-1")
        ids = [f"f{fragment}r{row}" for row in range(4)]
        writer.write(pa.record_batch([pa.array(ids), pa.array([f"text of {name}" for name in ids])], schema=ROWS))
        file = writer.finish(self.table.open())
        self.table.append([file])
        return self.path(file)

    def add_column(self, fragment: int) -> Path:
        schema = pa.schema([FIELD])
        writer = ColumnFileWriter(self.table.uri, schema, "embed-1")
        values = [f"of f{fragment}r{row}".encode() for row in range(4)]
        writer.write(pa.record_batch([pa.array(values, pa.large_binary())], schema=schema))
        file = writer.finish(self.table.open(), fragment)
        self.table.attach([file])
        return self.path(file)

    def path(self, file: Any) -> Path:
        return Path(self.table.uri, "data", file.path)

    def problems(self) -> dict[str, list[str]]:
        return {name: found for name, found in main(VerifyConfig(self.uri, sample=0)).problems.items() if found}

    def place(self) -> str:
        return main(VerifyConfig(self.uri, sample=0)).checks["place"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def exchange(one: Path, other: Path) -> None:
    assert one.stat().st_size == other.stat().st_size
    beside = one.with_suffix(".beside")
    os.rename(one, beside)
    os.rename(other, one)
    os.rename(beside, other)


def test_good_files(store: Store) -> None:
    assert store.problems() == {} and store.place() == "6 of 6 files lie where they were made for"


def test_column_files_that_changed_places_are_both_named(store: Store) -> None:
    one, other = store.made[:2]
    exchange(one, other)
    row = store.table.open().to_table().to_pylist()[0]
    assert row[columns.IMAGE_ID] == "f0r0" and row["value"] == b"of f1r0"  # read without a word
    found = store.problems()
    assert set(found) == {"place"}
    assert f"fragment 0, file {one.name}: is the file {other.name} under another name" in found["place"]
    assert f"fragment 1, file {other.name}: is the file {one.name} under another name" in found["place"]
    assert f"fragment 0, file {one.name}: was made for fragment 1" in found["place"]
    assert any("was made for rows of other image_ids" in problem for problem in found["place"])


def test_files_of_rows_that_changed_places(store: Store) -> None:
    exchange(*store.rows[:2])
    found = store.problems()["place"]
    assert {problem.partition(":")[0] for problem in found} == {
        f"fragment {number}, file {path.name}" for number in (0, 1) for path in (store.rows[number], store.made[number])
    }


def test_a_file_that_a_version_puts_beside_other_rows(store: Store) -> None:
    """Name, fragment and number of rows fit; the rows do not."""
    dataset = store.table.open()
    held = checksum.held_files(dataset, store.table.uri, dataset.get_fragments()[0])[1]
    notes = checksum.read_notes(LanceFileReader, held.uri)
    assert list(checksum.place_problems(held, notes, partial(checksum.held_image_ids, LanceFileReader))) == []
    assert list(checksum.place_problems(held, notes, lambda file: "0" * 64)) == [
        "was made for rows of other image_ids than those of the fragment"
    ]


def test_deleted_rows_and_replaced_columns_change_nothing(store: Store) -> None:
    dataset = store.table.open()
    dataset.delete(f"{columns.IMAGE_ID} IN ('f0r0', 'f1r2')")
    assert store.problems() == {}
    late = ColumnFileWriter(store.table.uri, pa.schema([FIELD]), "embed-2")
    late.write(pa.record_batch([pa.array([b"new"] * 4, pa.large_binary())], schema=pa.schema([FIELD])))
    store.table.attach([late.finish(store.table.open(), 0, {"value": store.made[0].name})])
    assert store.problems() == {} and store.place() == "6 of 6 files lie where they were made for"


def test_files_without_notes_cannot_be_checked(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an older lidit: digests, but no place."""
    monkeypatch.setattr("pipelines.engine.column_file.MADE_FOR", "other")
    store.add_rows(3)
    store.add_column(3)
    exchange(*store.made[:2])
    found = store.problems()
    assert set(found) == {"place"} and not any("fragment 3" in problem for problem in found["place"])
    exchange(*store.made[:2])
    assert store.problems() == {}
    assert store.place() == (
        "6 of 8 files lie where they were made for; not checkable are 2, of an older lidit or another tool"
    )


def test_compacted_fragments_have_no_notes_and_the_others_stay(store: Store) -> None:
    dataset = store.table.open()
    dataset.optimize.compact_files(target_rows_per_fragment=8)
    dataset = store.table.open()
    assert not all(is_ours(file.path) for fragment in dataset.get_fragments() for file in fragment.metadata.files)
    assert store.problems() == {}, "that it cannot be checked does not make it wrong"
    report = main(VerifyConfig(store.uri, sample=0))
    assert report.ok and "files of another tool have none" in report.checks["content"]
    assert "not checkable are" in store.place()


def test_a_column_of_the_users_own_needs_no_digest(store: Store) -> None:
    lance.dataset(store.table.uri).add_columns({"rating": "5"})
    report = main(VerifyConfig(store.uri, sample=0))
    assert report.ok and report.unchecked == []
    assert report.to_text().startswith(f"verify {store.uri}: nothing wrong found\n")
    assert "3 files of another tool have none" in report.checks["content"]


def test_a_store_without_embeddings_has_none_to_make_again(store: Store) -> None:
    report = main(VerifyConfig(store.uri))
    assert report.ok and report.checks["again"] == "12 rows of 0 columns"


def append(dataset: lance.LanceDataset) -> None:
    rows = dataset.to_table().slice(0, 2)
    ids = pa.array(["new-0", "new-1"])
    lance.write_dataset(
        rows.set_column(rows.schema.names.index(columns.IMAGE_ID), columns.IMAGE_ID, ids), dataset, mode="append"
    )


CHANGES = {
    "compacted": lambda dataset: dataset.optimize.compact_files(target_rows_per_fragment=8),
    "updated": lambda dataset: dataset.update({"text": "'other'"}, where=f"{columns.IMAGE_ID} = 'f0r0'"),
    "appended": append,
}


@pytest.mark.parametrize("change", CHANGES)
def test_columns_of_stages_that_another_tool_wrote_are_named_and_not_wrong(store: Store, change: str) -> None:
    metadata = {columns.META_STAGE: "embed"}
    store.table.record({"value": metadata})
    CHANGES[change](store.table.open())
    report = main(VerifyConfig(store.uri, sample=0))
    assert report.ok, report.problems
    (sentence,) = report.unchecked
    assert "hold value and no digests" in sentence and "lidit embed --overwrite" in sentence
    assert "nothing wrong found, not all could be checked" in report.to_text() and sentence in report.to_text()
    damaged = store.made[2].read_bytes().replace(b"of f2r0", b"of f2rX")
    if change != "compacted":
        store.made[2].write_bytes(damaged)
        report = main(VerifyConfig(store.uri, sample=0))
        assert not report.ok and "what to do: columns of a stage are made again" in report.to_text()


def test_a_flipped_byte_is_found_and_no_damage_ends_the_verification(store: Store) -> None:
    path = store.made[1]
    whole = path.read_bytes()
    start = whole.index(b"of f1r0")
    for position in itertools.chain(range(start, start + 28, 3), range(0, len(whole), 29)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        found = store.problems()  # padding between pages is read by nobody: not every byte is a problem
        if start <= position < start + 28:
            assert f"fragment 1, file {path.name}: column value is not what was written" in found["content"]
    path.write_bytes(whole)
    assert store.problems() == {}

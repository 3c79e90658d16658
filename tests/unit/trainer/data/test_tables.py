"""Tags that keep a run's versions: each run has its own, and a store that takes none ends no run."""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.file import LanceFileReader

from lidit.runtime.places import settled
from lidit.store import columns
from lidit.store.features import Features
from lidit.store.stale import made_from
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table, column_holder, field_ids
from tests.support import training
from trainer.config import TrainConfig
from trainer.data.tables import Tables, pinned_versions, write_versions
from trainer.storage import Storage

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> str:
    return training.make_store(tmp_path / "store", rows=(20, 10))


def begin(store: str, runs: Path) -> tuple[TrainConfig, Storage, Tables, list[str]]:
    """What a driver does before it starts the ranks."""
    config = training.make_config(store, runs, name="first")
    storage = Storage(f"{config.storage}/{config.name}")
    known = pinned_versions(storage)
    tables = Tables(config.run_phases, config.data, known)
    write_versions(storage, tables, known)
    return config, storage, tables, tables.pin(storage, known)


def append(store: str) -> int:
    table = lance.dataset(f"{store}/{columns.SAMPLES_TABLE}")
    lance.write_dataset(table.to_table(limit=7), table.uri, mode="append")
    return lance.dataset(table.uri).version


def clean_up(store: str) -> None:
    table = lance.dataset(f"{store}/{columns.SAMPLES_TABLE}")
    table.optimize.compact_files()
    table.cleanup_old_versions(datetime.timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False)


def tags(store: str) -> dict[str, int]:
    found = lance.dataset(f"{store}/{columns.SAMPLES_TABLE}").tags.list()
    return {name: int(tag["version"]) for name, tag in found.items()}


def test_two_runs_of_one_name_keep_a_version_each(store: str, tmp_path: Path) -> None:
    _, annas, anna, _ = begin(store, tmp_path / "anna")
    append(store)
    _, bobs, bob, _ = begin(store, tmp_path / "bob")
    assert anna.versions[store] < bob.versions[store] and len(tags(store)) == 2
    assert bob.unpin(bobs) == []
    clean_up(store)
    assert list(tags(store).values()) == [anna.versions[store]]
    _, _, again, warnings = begin(store, tmp_path / "anna")
    assert again.versions == anna.versions and not warnings
    again.features(0).take(0, np.array([0]), [columns.IMAGE_ID])
    again.unpin(annas)
    assert tags(store) == {}


def test_a_copy_of_a_run_is_another_run(store: str, tmp_path: Path) -> None:
    begin(store, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _, copied, tables, _ = begin(store, tmp_path / "b")
    assert len(tags(store)) == 2
    tables.unpin(copied)
    assert len(tags(store)) == 1


def test_a_run_that_lost_what_it_was_pinned_to_is_refused(store: str, tmp_path: Path) -> None:
    _, storage, tables, _ = begin(store, tmp_path)
    append(store)
    storage.remove("tables.json")
    with pytest.raises(ValueError, match=r"keeps version \d+, and this run is to begin at version \d+.*tables.json"):
        begin(store, tmp_path)
    assert list(tags(store).values()) == [tables.versions[store]]


def test_a_run_that_was_tagged_by_an_earlier_lidit_goes_on(store: str, tmp_path: Path) -> None:
    """Its tag may be another run's of that name, too: it stays, and one is told."""
    config = training.make_config(store, tmp_path, name="first")
    storage = Storage(f"{config.storage}/{config.name}")
    tables = Tables(config.run_phases, config.data, {})
    write_versions(storage, tables, {})
    tables.features(0).table.tags.create("lidit-train-first", tables.versions[store])
    append(store)
    _, _, again, _ = begin(store, tmp_path)
    assert again.versions == tables.versions and len(set(tags(store).values())) == 1 and len(tags(store)) == 2
    assert "delete it if no other run needs version" in again.unpin(storage)[0]
    assert list(tags(store)) == ["lidit-train-first"]


def test_a_store_that_takes_no_tag(store: str, tmp_path: Path) -> None:
    """The run begins, and is told what may happen to it."""
    Path(store, columns.SAMPLES_TABLE, "_refs").write_bytes(
        b"in the way of a folder: for root too, nothing is written there"
    )
    _, storage, tables, warnings = begin(store, tmp_path)
    assert (
        len(warnings) == 1
        and "takes no tag" in warnings[0]
        and "a clean-up of old versions there may end" in warnings[0]
    )
    assert Features(store, ["one"], {columns.CAPTION: 1.0}, version=tables.versions[store]).total == 30
    assert tables.unpin(storage) == []


@pytest.mark.parametrize("written", ["{store}/", "file://{store}", "file://{store}/"])
def test_a_run_keeps_its_version_however_an_earlier_start_wrote_the_store_down(
    store: str, tmp_path: Path, written: str
) -> None:
    config, storage, tables, _ = begin(written.format(store=store), tmp_path / "runs")
    before = set(tables.versions.values())
    append(store)
    known = pinned_versions(storage)
    again = Tables(settled(config).run_phases, config.data, known)
    assert set(again.versions) == {store} and set(again.versions.values()) == before


def put_column(table: Table, name: str, values: list[Any], notes: dict[str, str] | None = None) -> None:
    """Puts a column of the first fragment into a file of its own, in place of the one that holds it."""
    dataset = table.open()
    held = column_holder(dataset.get_fragment(0).metadata, field_ids(dataset)[name])
    field = dataset.schema.field(name)
    writer = ColumnFileWriter(table.uri, pa.schema([field]), "stage-1", notes)
    writer.write(pa.record_batch([pa.array(values, field.type)], schema=pa.schema([field])))
    assert len(table.attach([writer.finish(dataset, 0, {} if held is None else {name: held})]).done) == 1


def test_a_run_is_told_of_what_was_made_from_values_that_have_changed(store: str, tmp_path: Path) -> None:
    table = Table(f"{store}/{columns.SAMPLES_TABLE}")
    table.declare([pa.field("image", pa.large_binary())], columns.META_FINGERPRINT)
    table.record({columns.LATENTS: {columns.META_READS: "image"}})
    put_column(table, "image", [b"old"] * 20)
    dataset = table.open()
    image = column_holder(dataset.get_fragment(0).metadata, field_ids(dataset)["image"])
    assert image is not None
    latents = dataset.get_fragment(0).to_table(columns=[columns.LATENTS])[columns.LATENTS].to_pylist()
    put_column(table, columns.LATENTS, latents, made_from(LanceFileReader, table.uri, {"image": image}))
    assert begin(store, tmp_path / "anna")[2].stale() == []
    put_column(table, "image", [b"new"] * 20)
    (warning,) = begin(store, tmp_path / "bob")[2].stale()
    assert f"{store}: latents were made from values that have changed since, in 1 fragments" in warning

"""What reaches the disk, and in which order: content before names, both before whatever refers to them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest

from lidit.runtime.durable import flush, flushed_commit, make_folders, publish
from lidit.store.features import Features
from pipelines.engine.column_file import UNFINISHED, ColumnFileWriter
from pipelines.engine.table import Table

pytestmark = pytest.mark.unit

ROWS = pa.schema([pa.field("image_id", pa.string())])
Log = list[tuple[str, str]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """("sync" or "move", path) of all that happens, in order; the real calls are made too."""
    found: Log = []
    sync, move, commit = os.fsync, os.replace, lance.LanceDataset.commit

    def logged_sync(handle: int) -> None:
        sync(handle)
        found.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))

    def logged_move(source: Any, target: Any) -> None:
        found.append(("move", str(target)))
        move(source, target)

    def logged_commit(uri: Any, *arguments: Any, **options: Any) -> Any:
        found.append(("commit", str(uri)))
        return commit(uri, *arguments, **options)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "replace", logged_move)
    monkeypatch.setattr(lance.LanceDataset, "commit", logged_commit)
    return found


def synced(log: Log) -> set[str]:
    return {path for what, path in log if what == "sync"}


def files(folder: Path, name: str) -> set[str]:
    return {str(path) for path in (folder / name).iterdir()}


def write(table: Table, ids: list[str]) -> Any:
    writer = ColumnFileWriter(table.uri, ROWS, "ingest-1")
    writer.write(pa.record_batch([pa.array(ids)], schema=ROWS))
    return writer.finish(table.open())


def test_a_published_file_is_flushed_before_it_is_moved(tmp_path: Path, log: Log) -> None:
    (tmp_path / "new").write_text("content")
    publish(tmp_path / "new", tmp_path / "there")
    assert log == [("sync", f"{tmp_path}/new"), ("move", f"{tmp_path}/there"), ("sync", str(tmp_path))]


def test_new_folders_are_flushed_in_those_above(tmp_path: Path, log: Log) -> None:
    make_folders(tmp_path / "a" / "b")
    assert synced(log) == {str(tmp_path), f"{tmp_path}/a"}
    log.clear()
    make_folders(tmp_path / "a" / "b")
    assert not log


def test_a_column_file_is_whole_on_the_disk_before_anybody_can_commit_it(tmp_path: Path, log: Log) -> None:
    root = tmp_path / "store" / "samples.lance"
    table = Table(str(root))
    table.create(ROWS)
    log.clear()
    file = write(table, ["one", "two"])
    content, moved, name = (
        next(at for at, (what, path) in enumerate(log) if what == kind and test(path))
        for kind, test in (
            ("sync", lambda path: f"/{UNFINISHED}/" in path and path.endswith(file.path)),
            ("move", lambda path: path == f"{root}/data/{file.path}"),
            ("sync", lambda path: path == f"{root}/data"),
        )
    )
    assert content < moved < name
    assert ("sync", str(root)) in log  # `data` itself is new in it


@pytest.mark.parametrize("act", ["create", "append", "attach", "declare", "drop", "upsert"])
def test_every_commit_of_a_table_is_flushed(tmp_path: Path, log: Log, act: str) -> None:
    root = tmp_path / "store" / "samples.lance"
    table = Table(str(root))
    schema = pa.schema([pa.field("image_id", pa.string(), False, {"lance-schema:unenforced-primary-key": "true"})])
    length = pa.field("length", pa.int32())
    before: set[str] = set()
    if act != "create":
        table.create(schema)
        table.append([write(table, ["one"])])
        if act in ("attach", "drop"):
            table.declare([length], "key")
        before = {str(path) for path in root.rglob("*") if path.is_file()}
        log.clear()
    if act == "create":
        table.create(schema)
    elif act == "append":
        table.append([write(table, ["two"])])
    elif act == "attach":
        writer = ColumnFileWriter(table.uri, pa.schema([length]), "embed-1")
        writer.write(pa.record_batch([pa.array([1], pa.int32())], schema=pa.schema([length])))
        table.attach([writer.finish(table.open(), 0)])
    elif act == "declare":
        table.declare([length], "key")
    elif act == "drop":
        table.drop(["length"])
    else:
        table.upsert("image_id", {"image_id": "one"})
    new = {str(path) for path in root.rglob("*") if path.is_file()} - before
    assert any("/_versions/" in path for path in new)
    moved = {path for what, path in log if what == "move"}
    assert new - moved <= synced(log)
    assert {os.path.dirname(path) for path in new} <= synced(log)
    if act in ("append", "attach"):
        commit = next(at for at, (what, _) in enumerate(log) if what == "commit")
        manifest = max(at for at, (what, path) in enumerate(log) if what == "sync" and path.endswith(".manifest"))
        data = max(at for at, (what, path) in enumerate(log) if what == "sync" and path == f"{root}/data")
        assert data < commit < manifest
    if act == "create":
        assert {str(tmp_path), str(tmp_path / "store"), str(root)} <= synced(log)


def test_the_tag_of_a_training_is_flushed(tmp_path: Path, log: Log) -> None:
    dataset = lance.write_dataset(pa.table({"image_id": ["one"]}), str(tmp_path / "t.lance"))
    features = Features.__new__(Features)
    features.table, features.version = dataset, 1
    log.clear()
    features.pin("lidit-train-x")
    assert files(tmp_path / "t.lance", "_refs/tags") <= synced(log)
    assert str(tmp_path / "t.lance" / "_refs" / "tags") in synced(log)


def test_a_commit_that_fails_is_flushed_all_the_same(tmp_path: Path, log: Log) -> None:
    """Whether it has landed is only known by reading, and reading is not what a power cut leaves."""
    root = tmp_path / "t.lance"
    lance.write_dataset(pa.table({"x": [1]}), str(root))
    log.clear()
    with pytest.raises(OSError, match="no answer"), flushed_commit(str(root)):
        lance.write_dataset(pa.table({"x": [2]}), str(root), mode="append")
        raise OSError("no answer")
    assert files(root, "_transactions") & synced(log) and f"{root}/_versions" in synced(log)


def test_nothing_is_flushed_on_an_object_store(log: Log) -> None:
    with flushed_commit("memory://bucket/samples.lance"):
        pass
    assert not log


def test_a_file_system_that_cannot_flush_a_folder_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(code: int) -> Any:
        def fsync(handle: int) -> None:
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    flush(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        flush(tmp_path)


def test_an_emptied_newest_version_can_be_taken_away_by_hand(tmp_path: Path) -> None:
    """What a power cut in the midst of a commit may leave, and what the documentation says to do."""
    root = tmp_path / "samples.lance"
    table = Table(str(root))
    table.create(ROWS)
    table.append([write(table, ["one"])])
    table.append([write(table, ["two"])])
    newest = min((root / "_versions").glob("*.manifest"), key=lambda path: path.name)  # names count down
    newest.write_bytes(b"")
    with pytest.raises(Exception, match=r"(?i)manifest|magic|footer|size|file"):
        table.open()
    newest.unlink()
    assert table.open().to_table().to_pylist() == [{"image_id": "one"}]
    table.append([write(table, ["three"])])
    assert table.open().count_rows() == 2


def test_a_commit_that_does_not_reach_the_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(str(tmp_path / "samples.lance"))
    table.create(ROWS)
    file = write(table, ["one"])

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RuntimeError, match=r"did not reach the disk .*Input/output error"):
        table.append([file])

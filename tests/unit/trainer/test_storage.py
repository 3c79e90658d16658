"""Files of a run: whole or not there, on a disk and in a bucket (memory stands for one: the same fsspec calls)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from trainer.storage import Storage, inside

pytestmark = pytest.mark.unit


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "disk":
        yield Storage(f"{tmp_path}/run/")
        return
    yield Storage("memory://bucket/run")
    fsspec.filesystem("memory").store.clear()


def test_files_and_folders(storage: Storage, tmp_path: Path) -> None:
    assert storage.folders("checkpoints") == [] and not storage.exists("a.json")
    storage.write("checkpoints/step_2/a.json", b"12")
    storage.write("checkpoints/step_1/b/c.json", b"123")
    storage.write("checkpoints/step_1/b/c.json", b"1234")
    assert storage.read("checkpoints/step_1/b/c.json") == b"1234"
    assert storage.folders("checkpoints") == ["step_1", "step_2"]
    assert storage.sizes("checkpoints") == {"step_1/b/c.json": 4, "step_2/a.json": 2}
    source = tmp_path / "source"
    source.write_bytes(b"x" * 5)
    storage.upload(source, "checkpoints/step_2/shard")
    storage.download("checkpoints/step_2/shard", tmp_path / "deep" / "er" / "copy")
    assert (tmp_path / "deep" / "er" / "copy").read_bytes() == b"x" * 5
    storage.remove("checkpoints/step_2/a.json")
    storage.remove("checkpoints/step_2/a.json")
    storage.remove_folder("checkpoints/step_1")
    storage.remove_folder("checkpoints/step_1")
    assert storage.sizes("checkpoints") == {"step_2/shard": 5}
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")


def test_local_is_told_from_remote(tmp_path: Path) -> None:
    assert Storage(str(tmp_path)).local and Storage(f"file://{tmp_path}").local
    assert not Storage("memory://bucket").local
    assert Storage(f"file://{tmp_path}").path("a/b") == f"{tmp_path}/a/b"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a", b"old")

    def fail(path: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr("lidit.runtime.durable.flush", fail)
    with pytest.raises(OSError, match="no space"):
        storage.write("a", b"new")
    assert storage.read("a") == b"old" and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("call", ["info", "ls", "cat_file"])
def test_an_error_is_not_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A file that is there is never said not to be, whatever the disk says."""
    storage = Storage(str(tmp_path))
    storage.write("a/b", b"1")

    def fail(fs: object, path: str, *rest: object, **more: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(storage.fs), call, fail)
    asked = {
        "info": lambda: storage.exists("a/b"),
        "ls": lambda: (storage.sizes(""), storage.folders()),
        "cat_file": lambda: storage.read_if_there("a/b"),
    }
    with pytest.raises(OSError, match="Input/output"):
        asked[call]()


def test_a_file_is_created_once(storage: Storage) -> None:
    storage.create("a/b", b"first")
    storage.create("a/b", b"first")  # a try whose answer was lost
    with pytest.raises(FileExistsError):
        storage.create("a/b", b"second")
    assert storage.read("a/b") == b"first" and storage.files("a") == ["b"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "", "a\\..\\x", "a\0", ".", "a/./b"])
def test_names_out_of_storage_stay_inside(tmp_path: Path, name: str) -> None:
    assert inside(tmp_path, "a/b.pt") == tmp_path / "a" / "b.pt"
    with pytest.raises(ValueError, match="stays below"):
        inside(tmp_path, name)

"""Small files that are created by one, replaced whole, and known to be there or not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from lidit.runtime.files import create_exclusively, is_there, make_folder, replace_file, seconds_since_written
from lidit.runtime.lease import Lease
from pipelines.engine.runs import Run
from pipelines.ingestion.done_pieces import DonePieces

pytestmark = pytest.mark.unit

FS = fsspec.filesystem("file")


def test_of_many_at_once_one_creates(tmp_path: Path) -> None:
    barrier, made = threading.Barrier(16), []

    def create(number: int) -> None:
        barrier.wait()
        try:
            create_exclusively(FS, str(tmp_path / "file"), str(number).encode())
        except FileExistsError:
            return
        made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "file").read_text() == str(made[0])
    assert os.listdir(tmp_path) == ["file"], "nothing is left beside it"


def test_an_error_is_not_a_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "file")
    assert not is_there(FS, path)
    replace_file(FS, path, b"content")
    assert is_there(FS, path) and is_there(FS, str(tmp_path))

    def broken(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(type(FS), "info", broken)
    assert not FS.exists(path), "what fsspec makes of it"
    with pytest.raises(OSError, match="Input/output error"):
        is_there(FS, path)


class Buckets(fsspec.AbstractFileSystem):
    """An object store as fsspec shows one: `makedirs` makes whole buckets."""

    protocol = ("s3", "s3a")
    cachable = False

    def __init__(self, *names: str, refuses: bool = False):
        super().__init__()
        self.names, self.refuses = set(names), refuses

    def info(self, path: str, **options: object) -> dict[str, object]:
        if self.refuses:
            raise PermissionError(path)
        if path not in self.names:
            raise FileNotFoundError("The specified bucket does not exist")
        return {"name": path, "size": 0, "type": "directory"}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.names.add(path.partition("/")[0])


def test_a_folder_is_made_and_a_bucket_never(tmp_path: Path) -> None:
    make_folder(FS, str(tmp_path / "a" / "b"))
    make_folder(FS, str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    fs = Buckets("mine")
    make_folder(fs, "mine/store/runs")
    with pytest.raises(ValueError, match="there is no bucket of that name"):
        make_folder(fs, "mien/store/runs")
    assert fs.names == {"mine"}
    make_folder(Buckets(refuses=True), "closed/store/runs")  # who may not list may still write


@pytest.mark.parametrize(
    "enter",
    [
        lambda store: Run(store, "ingest").__enter__(),
        lambda store: Lease(store, "preprocess").__enter__(),
        lambda store: DonePieces(store, {}).note("ingest-1", [{"uri": "x", "place": "", "stamp": "1", "rows": 1}]),
    ],
)
def test_no_job_makes_a_bucket(monkeypatch: pytest.MonkeyPatch, enter: Callable[[str], object]) -> None:
    fs = Buckets()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda uri, **options: (fs, uri.removeprefix("s3://")))
    with pytest.raises(ValueError, match="no bucket of that name"):
        enter("s3://mien/store")
    assert fs.names == set()


def test_seconds_since_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        seconds_since_written(FS, str(path))
    path.touch()
    os.utime(path, (time.time() - 100,) * 2)
    assert seconds_since_written(FS, str(path)) == pytest.approx(100, abs=30)
    assert os.listdir(tmp_path) == ["file"]

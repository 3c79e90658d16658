"""Small files that are created by one, replaced whole, and known to be there or not."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import fsspec
import pytest

from lidit.files import create_exclusively, is_there, replace_file, seconds_since_written

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


def test_seconds_since_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        seconds_since_written(FS, str(path))
    path.touch()
    os.utime(path, (time.time() - 100,) * 2)
    assert seconds_since_written(FS, str(path)) == pytest.approx(100, abs=30)
    assert os.listdir(tmp_path) == ["file"]

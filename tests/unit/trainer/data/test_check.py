"""The check of data files while a run trains: silent on good ones, one sentence on a damaged one, gone when the run is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lidit.store import columns
from lidit.store.features import Features
from trainer.data.check import DataCheck

pytestmark = pytest.mark.unit

FAST = 1 << 40


def open_features(store: Any) -> Features:
    return Features(store.uri, ["one", "two"], {columns.CAPTION: 1.0})


@pytest.fixture
def store(make_writer: Callable[..., Any]) -> Any:
    """Four fragments of six rows, all data files of one size."""
    writer = make_writer(longest=0)
    for _ in range(4):
        writer.fragment(["64x64"] * 6)
    return writer.store


def files(store: Any) -> list[Path]:
    fragments = store.samples.open().get_fragments()
    return [Path(store.samples.uri, "data", fragment.metadata.files[0].path) for fragment in fragments]


def run(store: Any, *part: int) -> DataCheck:
    """The check at its end."""
    with DataCheck([open_features(store)], *part, bytes_per_second=FAST) as check:
        check._thread.join(30)
    assert not check._thread.is_alive()
    return check


def flip(path: Path, store: Any, fragment: int) -> None:
    """One bit of a latent: the row is read without a word."""
    content = bytearray(path.read_bytes())
    content[content.index(store.latents[fragment * 6 + 3].tobytes()) + 1] ^= 4
    path.write_bytes(content)


def test_good_files(store: Any) -> None:
    check = run(store)
    assert (check.found, check.checked, check.files) == ("", 4, 4)
    assert check.words().endswith("4 of this rank's 4 files read against their digests, nothing wrong found")


def test_a_flipped_bit_that_the_loader_reads_is_found(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = files(store)[2]
    flip(path, store, 2)
    table = open_features(store).take(2, np.array([3]), [columns.LATENTS])
    assert table[columns.LATENTS][0].as_py() != store.latents[15].tobytes()
    check = run(store)
    assert check.found == f"{store.samples.uri}, fragment 2, file {path.name}: column latents is not what was written"
    assert check.found in capsys.readouterr().err


def test_ranks_share_the_files(store: Any) -> None:
    flip(files(store)[1], store, 1)
    checks = [run(store, rank, 3) for rank in range(3)]
    assert [check.files for check in checks] == [2, 1, 1]
    assert [bool(check.found) for check in checks] == [False, True, False]


def test_files_that_changed_places_are_found(store: Any) -> None:
    one, other = files(store)[:2]
    beside = one.with_suffix(".beside")
    for source, target in ((one, beside), (other, one), (beside, other)):
        os.rename(source, target)
    assert "under another name" in run(store).found


def test_a_file_that_cannot_be_read_is_named(store: Any) -> None:
    path = files(store)[3]
    path.write_bytes(path.read_bytes()[:-30])
    assert f"file {path.name}: cannot be read: " in run(store).found


def test_columns_that_the_run_does_not_read_are_not_looked_at(store: Any) -> None:
    path = files(store)[0]
    content = bytearray(path.read_bytes())
    content[content.index(b"image-3")] ^= 4
    path.write_bytes(content)
    assert run(store).found == ""


def test_it_keeps_its_rate_and_ends_at_once_with_the_run(store: Any) -> None:
    before = threading.active_count()
    start = time.monotonic()
    with DataCheck([open_features(store)], bytes_per_second=1000) as check:
        time.sleep(0.5)
        assert check.checked == 0
    assert time.monotonic() - start < 5 and threading.active_count() == before and check.found == ""


def test_object_stores_are_left_alone(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.check.LocalFileSystem", type("Other", (), {}))
    assert run(store).files == 0

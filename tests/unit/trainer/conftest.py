"""Small feature stores to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lidit.store import columns
from tests.support.features import Store, Writer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tensors are so small that threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def make_writer(tmp_path: Path) -> Callable[..., Writer]:
    """`make_writer(texts=..., codec=...)`: an empty store in `tmp_path`, to be filled with `fragment`."""
    return lambda **options: Writer(str(tmp_path / "store"), **options)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """90 rows in 5 fragments, two buckets, two texts, some of each missing."""
    writer = Writer(str(tmp_path_factory.mktemp("store")), texts=(columns.CAPTION, columns.CAPTION_ORIGINAL))
    for number, rows in enumerate((20, 10, 30, 1, 29)):
        buckets = ["64x64" if (row + number) % 3 else "48x80" for row in range(rows)]
        missing: list[str | None] = [None if row == 7 else bucket for row, bucket in enumerate(buckets)]
        absent = {columns.CAPTION: [2, 3], columns.CAPTION_ORIGINAL: [3, 5, 9]}
        writer.fragment(missing, absent if rows > 10 else {})
    return writer.store

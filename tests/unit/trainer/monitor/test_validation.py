"""Validation: which held-out rows are looked at, and in which chunks."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.monitor.validation import held_out_chunks

pytestmark = pytest.mark.unit


def test_validation_chunks_have_one_bucket_and_count_every_row_once() -> None:
    held = np.arange(0, 700, 10)
    buckets = (np.arange(70) % 3 == 0).astype(np.uint8)
    chunks = held_out_chunks(held, buckets, 64, 8)
    counted = np.concatenate([rows for _, rows in chunks])
    assert len(counted) == len(set(counted.tolist())) == 64
    for bucket, rows in chunks:
        assert 0 < len(rows) <= 8
        assert (buckets[np.searchsorted(held, rows)] == bucket).all()
    assert counted.min() == 0 and counted.max() == 690, "rows from all over the table"
    assert sum(len(rows) for _, rows in held_out_chunks(held, buckets, 1000, 8)) == 70


def test_a_table_without_held_out_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no row is held out; raise data\.holdout"):
        held_out_chunks(np.zeros(0, np.int64), np.zeros(0, np.uint8), 8, 8)

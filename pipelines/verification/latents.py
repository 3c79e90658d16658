"""Checks latents for `lidit verify`: sizes fit the buckets, nulls have a reason, no NaN or Inf; row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import lance
import numpy as np
import pyarrow as pa

from lidit.store import columns
from lidit.store.codec import decode_latents
from pipelines.verification.scope import fresh_in, scan

READ_ROWS = 64


def latents_fields(schema: pa.Schema) -> list[pa.Field]:
    """Selects the columns of latents and of their moments."""
    return [field for field in schema if columns.META_CHANNELS in columns.metadata_of(field)]


def latents_problems(
    dataset: lance.LanceDataset,
    fields: list[pa.Field],
    fragments: Sequence[lance.LanceFragment],
    stale: Mapping[int, Sequence[str]] | None = None,
) -> Iterator[str]:
    """One sentence for every row of every such column, in these fragments, in which something is wrong.

    `stale`: fragment id -> columns that are to be made again there, and are passed over.
    """
    for stored in fields:
        bucket = columns.bucket_of(stored.name)
        error = columns.error(columns.metadata_of(stored)[columns.META_STAGE])
        # The images themselves are large and are not read: that there is one is told by its height.
        wanted = [columns.IMAGE_ID, columns.HEIGHT, stored.name, bucket, error]
        present = [name for name in wanted if name in dataset.schema.names]
        for batch in scan(dataset, fresh_in(fragments, stored.name, stale or {}), present, READ_ROWS):
            for row in range(batch.num_rows):
                problem = _problem(batch.slice(row, 1), stored, bucket, error)
                if problem:
                    yield f"{stored.name} of {batch.column(columns.IMAGE_ID)[row].as_py()!r}: {problem}"


def _problem(row: pa.RecordBatch, stored: pa.Field, bucket: str, error: str) -> str | None:
    """Says what is wrong with a row; None where nothing is."""
    if row.column(stored.name).null_count != row.column(bucket).null_count:
        return "it has latents or a bucket, not both"
    if row.column(stored.name).null_count:
        has_image = columns.HEIGHT in row.schema.names and row.column(columns.HEIGHT).null_count == 0
        return "null without a reason" if has_image and row.column(error).null_count else None
    try:
        (latents,) = decode_latents(row.column(stored.name), stored, row.column(bucket))
    except ValueError as wrong:
        return str(wrong)
    return None if latents is not None and np.isfinite(latents).all() else "NaN or Inf"

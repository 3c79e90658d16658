"""A content digest of a column, the same however the column is cut into batches."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class ColumnDigest:
    """sha256 over a column's validity, lengths and values, fed batch by batch.

    Null slots count as null whatever bytes lie under them. Takes fixed-width, string and binary columns.
    """

    def __init__(self) -> None:
        self._parts = (hashlib.sha256(), hashlib.sha256(), hashlib.sha256())

    def update(self, array: pa.Array) -> None:
        """Adds the next rows of the column."""
        validity, lengths, values = self._parts
        validity.update(pc.is_valid(array).to_numpy(zero_copy_only=False).tobytes())
        present = array.drop_null()
        if not len(present):
            return
        if pa.types.is_primitive(array.type):
            values.update(present.to_numpy(zero_copy_only=False).tobytes())
            return
        if not (pa.types.is_large_binary(array.type) or pa.types.is_large_string(array.type)):
            present = present.cast(pa.large_binary())
        _, offsets_buffer, data = present.buffers()
        offsets = np.frombuffer(offsets_buffer, np.int64)[present.offset : present.offset + len(present) + 1]
        lengths.update(np.diff(offsets).tobytes())
        if data is not None:
            values.update(memoryview(data)[offsets[0] : offsets[-1]])

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()

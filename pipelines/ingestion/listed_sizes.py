"""Notes of file sizes: how large a table's images were in their folder when they were last known to be the same.

Notes in the table's own folder, a Parquet file per run. They are never needed and never believed: an image whose file has
another size now is read and its digest compared. Of an image without a note nothing is known.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lidit.runtime.files import is_there, make_folder, replace_file
from lidit.runtime.outage import outlast
from pipelines.ingestion.hash_index import keys_of

FOLDER = "_listed"  # in the table's folder
SCHEMA = pa.schema([pa.field("key", pa.binary(16)), pa.field("bytes", pa.int64())])


def read_sizes(table_uri: str, image_ids: list[str]) -> dict[str, int]:
    """Reads the noted sizes: rows whose file's size is noted -> that size, by the newest note."""
    fs, folder = _folder(table_uri)
    if not image_ids or not is_there(fs, folder):
        return {}
    fs.invalidate_cache(folder)
    ids = dict(zip(_keys(image_ids), image_ids))
    found: dict[str, int] = {}
    paths = sorted(str(path) for path in fs.ls(folder, detail=False) if str(path).endswith(".parquet"))
    for path in sorted(paths, key=lambda path: path.rpartition("/")[2].split("-")[1:]):  # by the time of the run
        content = fs.cat_file(path)
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # emptied or damaged: a note is not needed
            table = pq.read_table(io.BytesIO(content), schema=SCHEMA)
            for key, size in zip(table["key"].to_pylist(), table["bytes"].to_pylist()):
                if key in ids and size is not None:
                    found[ids[key]] = size
    return found


def note_sizes(table_uri: str, run_id: str, sizes: Mapping[str, int]) -> None:
    """Notes the sizes of files whose content the table has (`image_id` -> bytes)."""
    if not sizes:
        return
    fs, folder = _folder(table_uri)
    content = io.BytesIO()
    pq.write_table(pa.table([_keys(list(sizes)), list(sizes.values())], schema=SCHEMA), content)

    def write() -> None:
        make_folder(fs, folder)
        replace_file(fs, f"{folder}/{run_id}.parquet", content.getvalue())

    outlast(write, "noting sizes")


def _folder(table_uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, root = fsspec.core.url_to_fs(table_uri)
    return fs, f"{root.rstrip('/')}/{FOLDER}"


def _keys(image_ids: list[str]) -> list[bytes]:
    """16 bytes for each id."""
    return [key.tobytes() for key in np.ascontiguousarray(keys_of(image_ids))]

"""Folders of Hugging Face `datasets` as a source: cut by ranges of rows, since they have no row groups of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.sources.base import USUAL_NAMES, ColumnsConfig, Piece, Record, Sharded
from pipelines.sources.locations import is_local, list_folder, read_bytes, real_place, stamp_of
from pipelines.sources.tables import READ_ROWS, READER_ERRORS, is_damage, table_names, table_records

PIECE_ROWS = 1024


class HuggingFace(Sharded):
    """A folder that `datasets` wrote with `save_to_disk`; needs the extra `hf`."""

    def __init__(self, argument: str, names: ColumnsConfig = USUAL_NAMES):
        self.argument, self.names = real_place(argument), names
        self._dataset: Any = None  # opened at first use

    def pieces(self) -> list[Piece]:
        dataset = self._open()
        table_names(dataset.features.arrow_schema, self.names)
        rows = len(dataset)
        name = self.argument.rstrip("/").rpartition("/")[2]
        state = next((entry for entry in list_folder(self.argument) if entry["name"].endswith("state.json")), {})
        each = (dataset.data.nbytes or 0) / max(rows, 1)
        return [
            {
                "place": f"{name}:{first}",
                "uri": self.argument,
                "stamp": stamp_of(state),
                "rows": min(PIECE_ROWS, rows - first),
                "bytes": int(each * min(PIECE_ROWS, rows - first)),
                "name": name,
                "first": first,
            }
            for first in range(0, rows, PIECE_ROWS)
        ]

    def read(self, piece: Piece) -> Iterator[Record]:
        dataset = self._open()
        names = table_names(dataset.features.arrow_schema, self.names)
        dataset = dataset.select_columns([name for name in names if name]).with_format("arrow")
        row, stop = piece["first"], piece["first"] + piece["rows"]
        try:
            for first in range(row, stop, READ_ROWS):
                rows = dataset[first : min(first + READ_ROWS, stop)]
                for batch in rows.to_batches():
                    batch.validate()
                    yield from table_records(batch, names, piece["name"], row)
                    row += batch.num_rows
        except READER_ERRORS as error:
            if not is_damage(error):
                raise
            yield Record(f"{piece['place']}#end", error=f"the folder is damaged from row {row} on: {error}")

    def _open(self) -> Any:
        if self._dataset is not None:
            return self._dataset
        try:
            import datasets
        except ImportError as error:
            raise ValueError("source hf: needs the package `datasets`: pip install 'lidit[hf]'") from error
        try:
            dataset = datasets.load_from_disk(self.argument)
        except FileNotFoundError as error:
            raise ValueError(
                f"source hf:{self.argument}: expected a folder written by save_to_disk: {error}. Other data sets of the "
                f"hub are Parquet files: parquet:URI reads them"
            ) from error
        except (*READER_ERRORS, ValueError, LookupError, TypeError, AttributeError) as error:
            if not is_damage(error):
                raise
            why = f"{_unopened(self.argument)} ({type(error).__name__}: {error})"
            raise ValueError(
                f"source hf:{self.argument}: expected a folder written by save_to_disk, with rows; {why}"
            ) from error
        if isinstance(dataset, datasets.DatasetDict):
            splits = ", ".join(f"hf:{self.argument.rstrip('/')}/{split}" for split in dataset)
            raise ValueError(f"source hf:{self.argument}: holds several splits; name one: {splits}")
        self._dataset = dataset
        return dataset


def _unopened(folder: str) -> str:
    """What is wrong with a folder of `datasets` that cannot be opened, and with which of its files."""
    unknown = "it cannot be read, perhaps because another version of `datasets` wrote it"
    if not is_local(folder):
        return unknown
    part = ""
    try:
        for part in ("dataset_info.json", "state.json"):
            state = json.loads(read_bytes(f"{folder}/{part}"))
        for part in [file["filename"] for file in state["_data_files"]]:
            with pa.memory_map(f"{folder}/{part}") as raw, pa.ipc.open_stream(raw) as batches:
                for _ in batches:
                    pass
    except FileNotFoundError:  # as of several splits, each in a folder of its own
        return unknown
    except (*READER_ERRORS, ValueError, LookupError, TypeError):
        return f"{folder}/{part} is damaged: copy it again"
    return unknown if state["_data_files"] else "it has none"

"""`--stamp` of a stage: brings columns that were made before some key was part of the fingerprint up to date, after a check.

Such columns do not say, for example, which config.json made them, so no job goes on with them. Here a sample of their rows is
made once more, by the same stage with the models as they are now; only where all agrees are the missing keys written into the
columns' metadata. What agrees: texts and numbers are equal, embeddings lie within the codec's tolerance and the rounding of
the arithmetic. A change that is smaller than that is not seen; nor are rows outside of the sample.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.file import LanceFileReader

from lidit.store import columns
from lidit.store.codec import decode, excess
from lidit.store.stale import stale_columns
from pipelines.engine.field_prints import field_differences, unrecorded_keys
from pipelines.engine.summary import Summary
from pipelines.engine.table import Table
from pipelines.engine.worker import Stage, columns_read

FRAGMENTS, ROWS = 8, 8  # of the sample: spread over the table, rows of each
FLOAT_TOLERANCE = 1e-4  # of a score, as a share of it


def stamp(stage: type[Stage], config: Any, table: Table, fields: Sequence[pa.Field]) -> Summary:
    """Makes a sample of the stage's older columns again, and writes the keys that they lack where all of it agrees.

    Raises:
        ValueError: a column was made differently, has no value to compare, or values made now differ from those stored;
            nothing is changed.
    """
    start, dataset = time.monotonic(), table.open()
    old = [f for f in fields if f.name in dataset.schema.names and _differences(dataset, f)]
    for wanted in old:
        if not unrecorded_keys(dataset.schema.field(wanted.name), wanted, columns.META_FINGERPRINT):
            raise ValueError(
                f"column {wanted.name!r} of {table.uri} was made differently: {'; '.join(_differences(dataset, wanted))}. "
                f"A stamp is for what was not recorded; give the config that made it"
            )
    rows = _compare(stage, config, table, dataset, old) if old else 0
    keys = {f.name: columns.metadata_of(f)[columns.META_FINGERPRINT] for f in old}
    table.record({name: {columns.META_FINGERPRINT: fingerprint} for name, fingerprint in keys.items()})
    getattr(stage, "stamped", lambda config: None)(config)
    summary = Summary(stage.name, table.uri.rpartition("/")[0], ok=True, seconds=time.monotonic() - start)
    summary.plan = [f"{name}: recorded, {rows:,} rows made again agree" for name in keys]
    summary.counts = {"stamped": len(keys), "compared": rows}
    return summary


def _differences(dataset: lance.LanceDataset, wanted: pa.Field) -> list[str]:
    return field_differences(dataset.schema.field(wanted.name), wanted, columns.META_FINGERPRINT)


def _compare(stage: type[Stage], config: Any, table: Table, dataset: lance.LanceDataset, old: list[pa.Field]) -> int:
    """Number of rows that were compared. ValueError unless all agree, and each column has a value among them."""
    maker = getattr(stage, "for_stamp", stage)(config)
    names = [f.name for f in old]
    reads = columns_read(old, dataset.schema.names)
    compared, wrong, rows = dict.fromkeys(names, 0), dict.fromkeys(names, 0), 0
    for fragment in _spread(table, dataset, names):
        sample = _draw(fragment, [*reads, *names], names)
        for window in sample.select(reads).combine_chunks().to_batches():
            made = maker(window, names)
            rows += window.num_rows
            for stored in (dataset.schema.field(name) for name in names):
                before = sample.column(stored.name).combine_chunks()
                valid = before.is_valid().to_numpy(False)
                agree = _agree(before, made.arrays[stored.name], stored)
                compared[stored.name] += int(valid.sum())
                wrong[stored.name] += int((valid & ~agree).sum())
    differing = [f"{name} in {count:,} of {compared[name]:,} rows" for name, count in wrong.items() if count]
    if differing:
        raise ValueError(
            f"{table.uri}: what is made now differs from what is stored: {'; '.join(differing)}. Either the model's files are "
            f"not those that made the columns, or its answers depend on the machine or the library versions and cannot be "
            f"verified here. Put the right files back, or make the columns anew with --overwrite"
        )
    groups = {columns.metadata_of(f)[columns.META_FINGERPRINT]: f.name for f in reversed(old)}  # the first of each
    if empty := [name for name in groups.values() if not compared[name]]:
        raise ValueError(
            f"{table.uri}: {', '.join(sorted(empty))} has no value in the sample, so there is nothing to compare: make it anew "
            f"with --overwrite"
        )
    return rows


def _spread(table: Table, dataset: lance.LanceDataset, names: list[str]) -> list[lance.LanceFragment]:
    """Up to `FRAGMENTS` fragments that have all of the columns, none of them stale, from the first to the last."""
    stale = stale_columns(LanceFileReader, dataset, table.uri, map(dataset.schema.field, names))
    without = {*table.missing(names, dataset), *stale}
    done = [fragment for fragment in dataset.get_fragments() if fragment.fragment_id not in without]
    places = np.unique(np.linspace(0, max(0, len(done) - 1), FRAGMENTS).round().astype(int))
    return [done[place] for place in places] if done else []


def _draw(fragment: lance.LanceFragment, read: list[str], names: list[str]) -> pa.Table:
    """A few neighboring rows of a fragment that have one of the columns, from a random place."""
    condition = " OR ".join(f"`{name}` IS NOT NULL" for name in names)
    last = max(0, fragment.count_rows(filter=condition) - ROWS)
    first = int(np.random.default_rng(fragment.fragment_id).integers(0, last + 1))
    wanted = list(dict.fromkeys(read))
    return fragment.scanner(columns=wanted, filter=condition, limit=ROWS, offset=first).to_table()


def _agree(before: pa.Array, made: pa.Array, stored: pa.Field) -> np.ndarray:
    """Which rows have the same value, as far as values of that column are the same at all, (rows,) bool."""
    metadata = columns.metadata_of(stored)
    if columns.META_CODEC in metadata and columns.META_WIDTH in metadata:
        codec = metadata[columns.META_CODEC]
        dtype = json.loads(metadata[columns.META_FINGERPRINT])["dtype"]
        pairs = zip(decode(before, stored), decode(made, stored))
        return np.array([_same_states(one, other, codec, dtype) for one, other in pairs], bool)
    if pa.types.is_floating(stored.type):
        one, other = (pc.fill_null(array, np.nan).to_numpy(False) for array in (before, made))
        return np.isclose(one, other, rtol=FLOAT_TOLERANCE, atol=FLOAT_TOLERANCE, equal_nan=True)
    return np.array([one == other for one, other in zip(before.to_pylist(), made.to_pylist())], bool)


def _same_states(one: np.ndarray | None, other: np.ndarray | None, codec: str, dtype: str) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and excess(one, other, codec, dtype) <= 0

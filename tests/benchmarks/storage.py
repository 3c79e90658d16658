"""How should a ragged bf16 column be stored in Lance? Writes, scans and samples the same rows in every candidate.

A row is an (L, E) array of bf16, or null. As in a stage, one file per fragment is written batch by batch and attached
to a table of ids by a Merge commit. Every measurement runs in a process of its own and the candidates take turns, so
that a disturbance hits all of them alike; figures are medians over the repeats, read from a warm page cache.

    python tests/benchmarks/storage.py --mb 400 --rows-mb 0.1 1.0
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.blob import BlobDescriptorArrayBuilder, blob_field
from lance.file import LanceFileSession, LanceFileWriter
from lance.fragment import DataFile
from rich.console import Console
from rich.progress import track
from rich.table import Table

WIDTH = 2048  # E, of a 1B decoder-only LLM
TOKEN_BYTES = 2 * WIDTH
FRAGMENTS = 2
BATCH_MB = 16  # of one write_batch: a stage's window
READ = {"batch_size": 16, "io_buffer_size": 64 << 20}  # Lance's defaults: 8,192 rows, and read far ahead
NULL_EVERY = 50  # a row without a caption
COLUMN = "embeds"
TYPES = {  # layout: (name, Arrow type, offset units in a token)
    "binary": ("large_binary", pa.large_binary(), TOKEN_BYTES),
    "blob": ("blob v2, packed", pa.large_binary(), TOKEN_BYTES),
    "values": ("list<u16>", pa.list_(pa.uint16()), WIDTH),
    "tokens": ("list<fsl<u16, E>>", pa.list_(pa.list_(pa.uint16(), WIDTH)), 1),
}
FIGURES = {  # key of a measurement: (title, format)
    "write_mb_s": ("write MB/s", "{:.0f}"),
    "scan_mb_s": ("scan MB/s", "{:.0f}"),
    "take_rows_s": ("take rows/s", "{:.0f}"),
    "block_rows_s": ("blocks rows/s", "{:.0f}"),
    "take_reads": ("reads a taken row", "{:.2f}"),
    "write_rss_mb": ("write RSS +MB", "{:.0f}"),
    "scan_rss_mb": ("scan RSS +MB", "{:.0f}"),
    "size": ("disk / raw", "{:.3f}"),
}


@dataclass(frozen=True)
class Encoding:
    """A key of `TYPES`, the version of Lance's file format, and the field's compression (None: Lance's own choice)."""

    layout: str
    version: str
    compression: str | None = None

    @property
    def name(self) -> str:
        return TYPES[self.layout][0] + (f", compression={self.compression}" if self.compression else "")

    @property
    def field(self) -> pa.Field:
        if self.layout == "blob":
            return blob_field(COLUMN)
        metadata = {"lance-encoding:compression": self.compression} if self.compression else None
        return pa.field(COLUMN, TYPES[self.layout][1], metadata=metadata)

    @property
    def read_options(self) -> dict[str, str]:
        return {"blob_handling": "all_binary"} if self.layout == "blob" else {}

    def array(self, values: np.ndarray, lengths: np.ndarray) -> pa.Array:
        """`values` (sum L, E) uint16 and `lengths` (rows,) in tokens, -1 for null -> the Arrow rows, without a copy."""
        _, kind, units = TYPES[self.layout]
        ends = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))]) * units
        valid = pa.py_buffer(np.packbits(lengths >= 0, bitorder="little"))
        if pa.types.is_large_binary(kind):
            return pa.Array.from_buffers(kind, len(lengths), [valid, pa.py_buffer(ends), pa.py_buffer(values)])
        child = pa.array(values.reshape(-1))
        if self.layout == "tokens":
            child = pa.FixedSizeListArray.from_arrays(child, WIDTH)
        offsets = pa.py_buffer(ends.astype(np.int32))
        return pa.Array.from_buffers(kind, len(lengths), [valid, offsets], children=[child])


CANDIDATES = [
    Encoding(layout, version, compression)
    for layout, compression in (("binary", "none"), ("binary", None), ("tokens", None), ("values", None))
    for version in ("2.0", "2.1", "2.2")
] + [Encoding("blob", "2.2")]


class Rows:
    """Seeded rows of `row_mb` megabytes on average, between half of it and one and a half."""

    def __init__(self, total_mb: float, row_mb: float):
        rng = np.random.default_rng(0)
        tokens = row_mb * 1e6 / TOKEN_BYTES
        self.count = max(2, round(total_mb / row_mb / FRAGMENTS)) * FRAGMENTS
        self.lengths = rng.integers(max(1, round(tokens / 2)), round(tokens * 1.5) + 1, self.count)
        self.lengths[NULL_EVERY - 1 :: NULL_EVERY] = -1
        self.raw_mb = int(np.maximum(self.lengths, 0).sum()) * TOKEN_BYTES / 1e6
        self.batch_rows = max(1, round(BATCH_MB / row_mb))
        # Upper halves of normal floats, so the exponents compress as much as a bf16 column's can and the rest does not.
        floats = rng.standard_normal((round(self.batch_rows * tokens * 3), WIDTH), np.float32)
        self.pool = (floats.view(np.uint32) >> 16).astype(np.uint16)

    def batches(self, encoding: Encoding, fragment: int) -> Iterator[pa.Array]:
        lengths = np.split(self.lengths, FRAGMENTS)[fragment]
        rng = np.random.default_rng(fragment)
        for start in range(0, len(lengths), self.batch_rows):
            part = lengths[start : start + self.batch_rows]
            total = int(np.maximum(part, 0).sum())
            offset = rng.integers(0, len(self.pool) - total)
            yield encoding.array(self.pool[offset : offset + total], part)


def write_file(uri: str, name: str, encoding: Encoding, batches: Iterable[pa.Array]) -> None:
    """Writes one column file, in memory of about one batch."""
    schema = pa.schema([encoding.field])
    if encoding.layout != "blob":
        with LanceFileWriter(f"{uri}/data/{name}", schema, version=encoding.version) as writer:
            for batch in batches:
                writer.write_batch(pa.record_batch([batch], schema=schema))
        return
    # The payloads go to a side file at once; the column, written last, holds where each lies.
    session, sizes = LanceFileSession(f"{uri}/data"), []
    payloads = session.open_packed_blob_writer(name, 1)
    for batch in batches:
        payloads.write_blobs(batch.filter(pc.greater(pc.binary_length(batch), 0)))
        sizes += pc.binary_length(batch).to_pylist()
    places, builder = iter(payloads.finish()), BlobDescriptorArrayBuilder(COLUMN)
    for size in sizes:
        if size:
            builder.append(next(places))
        else:
            builder.append_null() if size is None else builder.append_inline(b"")
    schema = pa.schema([builder.field])
    with session.open_writer(name, schema=schema, version=encoding.version) as writer:
        writer.write_batch(pa.record_batch([builder.finish()], schema=schema))


def new_table(uri: str, encoding: Encoding, rows: int) -> list[str]:
    """A table of ids with the column added as nulls. Returns the names of its fragments' column files to be."""
    ids = pa.table({"id": np.arange(rows)})
    lance.write_dataset(ids, uri, max_rows_per_file=rows // FRAGMENTS, data_storage_version=encoding.version)
    lance.dataset(uri).add_columns(pa.schema([encoding.field]))
    return [f"column-{fragment}.lance" for fragment in range(FRAGMENTS)]


def attach(uri: str, names: list[str]) -> lance.LanceDataset:
    """Commits file i to fragment i."""
    table = lance.dataset(uri)
    fragments = [fragment.metadata for fragment in table.get_fragments()]
    for metadata, name in zip(fragments, names):
        metadata.files.append(DataFile.create(table, name))
    operation = lance.LanceOperation.Merge(fragments, table.schema, preserves_nullability=True)
    return lance.LanceDataset.commit(uri, operation, read_version=table.version)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `work` took, and the peak growth of resident memory in megabytes."""

    def memory(key: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, start = memory("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - start, memory("VmHWM") - before


def measure_write(uri: str, encoding: Encoding, total_mb: float, row_mb: float) -> dict[str, float]:
    rows = Rows(total_mb, row_mb)
    names = new_table(uri, encoding, rows.count)

    def write() -> None:
        for fragment, name in enumerate(names):
            write_file(uri, name, encoding, rows.batches(encoding, fragment))

    seconds, rss = measured(write)
    attach(uri, names)
    size = sum(path.stat().st_size for path in Path(uri, "data").rglob("*.*"))  # the ids are next to nothing
    return {"write_mb_s": rows.raw_mb / seconds, "write_rss_mb": rss, "size": size / 1e6 / rows.raw_mb}


def measure_read(uri: str, encoding: Encoding, total_mb: float, row_mb: float) -> dict[str, float]:
    rows, table, rng = Rows(total_mb, row_mb), lance.dataset(uri), np.random.default_rng(1)

    def scan() -> int:
        batches = table.to_batches(columns=[COLUMN], **READ, **encoding.read_options)
        return sum(batch.num_rows for batch in batches)

    def take(groups: list[np.ndarray]) -> None:
        for group in groups:
            if encoding.layout == "blob":
                table.read_blobs(COLUMN, indices=group.tolist())
            else:
                table.take(group.tolist(), columns=[COLUMN])

    scan_seconds, scan_rss = measured(scan)
    scattered = np.split(rng.choice(rows.count, 200, replace=rows.count < 200), 10)
    blocks = [first + np.arange(16) for first in rng.integers(0, rows.count - 16, 20)]
    take(blocks[:1])  # the first call also reads the file's metadata
    table.io_stats_incremental()
    take_seconds, _ = measured(lambda: take(scattered))
    reads = table.io_stats_incremental().read_iops
    block_seconds, _ = measured(lambda: take(blocks))
    rates = {"scan_mb_s": rows.raw_mb / scan_seconds, "take_rows_s": 200 / take_seconds}
    return rates | {"block_rows_s": 320 / block_seconds, "take_reads": reads / 200, "scan_rss_mb": scan_rss}


def check(uri: str, encoding: Encoding) -> str:
    """Null, empty and full rows, in slices: 'ok' if they survive write, attach, deletion and compaction."""
    lengths = np.array([3, -1, 0, 1, 7, -1, -1, 0, 5, 2, 40, 0] * 4)
    ends = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])
    values = np.random.default_rng(2).integers(0, 1 << 16, (ends[-1], WIDTH), np.uint16)
    written = [None if n < 0 else values[at : at + n].tobytes() for at, n in zip(ends, lengths)]
    array, names, half = encoding.array(values, lengths), new_table(uri, encoding, len(lengths)), len(lengths) // 2
    for name, part in zip(names, (array[:half], array[half:])):
        write_file(uri, name, encoding, (part.slice(start, 5) for start in range(0, half, 5)))

    def stored(table: lance.LanceDataset) -> list[bytes | None]:
        rows = table.to_table(columns=[COLUMN], **encoding.read_options)[COLUMN].to_pylist()
        return [row if row is None or isinstance(row, bytes) else np.array(row, np.uint16).tobytes() for row in rows]

    table = attach(uri, names)
    table.validate()
    if stored(table) != written:
        return "reads back otherwise"
    table.delete("id IN (1, 4, 30)")
    table.optimize.compact_files()
    survivors = [row for i, row in enumerate(written) if i not in (1, 4, 30)]
    return "ok" if stored(lance.dataset(uri)) == survivors else "compacts to other rows"


def alone(encoding: Encoding, *works: Callable, sizes: tuple[float, ...] = ()) -> list:
    """Runs the works on one new table, each in a fresh process, whose memory holds nothing of the one before."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/table.lance", encoding, *sizes)
        spawn = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
        with ProcessPoolExecutor(1, **spawn) as pool:
            return [pool.submit(work, *arguments).result() for work in works]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=400, help="megabytes of rows in a case (400)")
    parser.add_argument("--rows-mb", type=float, nargs="+", default=[0.1, 1.0], help="mean megabytes of a row")
    parser.add_argument("--repeats", type=int, default=3, help="the figures are medians over them (3)")
    parser.add_argument("--markdown", type=Path, default=Path(tempfile.gettempdir(), "lidit-storage.md"))
    options = parser.parse_args()

    checks = {encoding: alone(encoding, check)[0] for encoding in CANDIDATES}
    cases = [(row_mb, encoding) for row_mb in options.rows_mb for encoding in CANDIDATES]
    turns = [case for repeat in range(options.repeats) for case in random.Random(repeat).sample(cases, len(cases))]
    runs: dict[tuple[float, Encoding], list[dict[str, float]]] = {case: [] for case in cases}
    for row_mb, encoding in track(turns, description="measuring"):
        written, read = alone(encoding, measure_write, measure_read, sizes=(options.mb, row_mb))
        runs[row_mb, encoding].append(written | read)

    header = ["row MB", "encoding", "format", *(title for title, _ in FIGURES.values()), "check"]
    title = f"lance {lance.__version__}, pyarrow {pa.__version__}, Python {platform.python_version()}"
    shown = Table(*header, title=title)
    lines = [title, "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for (row_mb, encoding), results in runs.items():
        medians = {key: statistics.median(result[key] for result in results) for key in FIGURES}
        figures = [form.format(medians[key]) for key, (_, form) in FIGURES.items()]
        cells = [f"{row_mb:g}", encoding.name, encoding.version, *figures, checks[encoding]]
        shown.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    Console(width=180).print(shown)
    options.markdown.write_text("\n".join(lines) + "\n")
    print(f"markdown: {options.markdown}")


if __name__ == "__main__":
    main()

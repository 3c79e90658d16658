"""Ingest of tars and Parquet against plain reading of the same bytes, and against the least that its work can cost.

- plain: reading every image and caption and doing nothing with them: Python's tarfile, and pyarrow's batches of 64 rows.
- bare loop: one thread that reads, digests, looks at (`decode` or `header`) and writes, without Ray, claims and commits.
- job: the real job with one actor, from its first unit's begin to its last one's end.
- table: rows/s with so many rows in the table already, all asked for: what knowing them costs; and the keeper's memory.

Images: the 35 COCO photos of ../shared/data or $LIDIT_TEST_DATA as they are, and resized to 256 pixels; every row has bytes of
its own (a few behind the image's end). All was just written and lies in the page cache. Each case runs in a process of its
own; the cases take turns; figures are medians over the repeats.

    python tests/benchmarks/ingest.py --rows 1500
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import report
from PIL import Image
from scaling import ActorWatch, peak_mb

SHARDS = 10
SMALL = 256  # pixels of the longer side
TARGET = 0.9  # of the bare loop
KNOWN_ROWS = (10_000, 1_000_000)
FORMATS = ("webdataset", "parquet")


def images(small: bool) -> list[bytes]:
    """The photos, as they are or resized."""
    made = []
    for path in sorted((report.data_folder() / "coco-mini-cc" / "images").iterdir()):
        data = path.read_bytes()
        if small:
            with Image.open(io.BytesIO(data)) as image:
                image.thumbnail((SMALL, SMALL))
                image.convert("RGB").save(out := io.BytesIO(), "JPEG", quality=90)
                data = out.getvalue()
        made.append(data)
    return made


def write(folder: Path, rows: int, small: bool) -> int:
    """The same rows as tars and as Parquet files of a row group each; bytes of all images."""
    photos, total = images(small), 0
    for shard in range(SHARDS):
        numbers = range(shard * rows // SHARDS, (shard + 1) * rows // SHARDS)
        data = [photos[number % len(photos)] + number.to_bytes(4, "big") for number in numbers]
        texts = [f"a caption, number {number}" for number in numbers]
        total += sum(map(len, data))
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number, image, text in zip(numbers, data, texts):
                for name, content in ((f"{number:08d}.jpg", image), (f"{number:08d}.txt", text.encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        table = pa.table({"jpg": pa.array(data, pa.binary()), "caption": texts})
        pq.write_table(table, folder / f"{shard:04d}.parquet", compression="none", row_group_size=len(data))
    return total


def plain(kind: str, folder: str) -> dict[str, float]:
    """Every image and caption read once."""
    rows, start = 0, time.perf_counter()
    if kind == "webdataset":
        for path in sorted(Path(folder).glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    rows += bool(tar.extractfile(member).read()) and member.name.endswith(".jpg")  # type: ignore[union-attr]
    else:
        for path in sorted(Path(folder).glob("*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(64, columns=["jpg", "caption"]):
                rows += len([value for value in batch.column("jpg").to_pylist() if value])
    return {"rows": rows, "seconds": time.perf_counter() - start}


def bare(kind: str, folder: str, check: str, store: str) -> dict[str, float]:
    """What an actor does to a row, one thing after the other."""
    from pipelines.engine.column_file import ColumnFileWriter
    from pipelines.engine.table import Table
    from pipelines.ingestion.worker import WINDOW_ROWS
    from pipelines.sources.base import make_row
    from pipelines.sources.registry import open_source

    source, table = open_source(f"{kind}:{folder}"), Table(f"{store}/samples.lance")
    table.create(source.schema)
    make_row(next(source.records(source.pieces())), True)  # imports all that is needed
    rows: list[dict[str, Any]] = []
    start, total = time.perf_counter(), 0
    for piece in source.pieces():
        writer = ColumnFileWriter(table.uri, source.schema, "bare-1")
        for record in source.records([piece]):
            rows.append(make_row(record, True, decode=check == "decode"))  # type: ignore[arg-type]
            if len(rows) == WINDOW_ROWS:
                writer.write(pa.RecordBatch.from_pylist(rows, source.schema))
                rows = []
        writer.write(pa.RecordBatch.from_pylist(rows, source.schema))
        rows = []
        total += writer.rows
        writer.finish(table.open())
    return {"rows": total, "seconds": time.perf_counter() - start}


def job(kind: str, folder: str, check: str, store: str) -> dict[str, float]:
    """The real job with one actor; peak memory of driver and actor."""
    from pipelines import ingest
    from pipelines.engine.pool import ActorsConfig

    actors = ActorsConfig(min=1, max=1, num_cpus=1, num_gpus=0)
    with ActorWatch() as watch:
        summary = ingest.main(ingest.IngestConfig(f"{kind}:{folder}", store, actors=actors, check=check))  # type: ignore[arg-type]
    assert summary.ok and not summary.errors, summary
    return {"rows": summary.rows, "seconds": summary.work_seconds, "actor_mb": watch.peak, "driver_mb": peak_mb()}


def known(rows: int, store: str) -> dict[str, float]:
    """The keeper of a table with so many rows: time to load, rows/s of asking for them all, memory beyond its start."""
    from pipelines.engine.column_file import ColumnFileWriter
    from pipelines.engine.table import Table
    from pipelines.ingestion.dedup import DedupIndex
    from pipelines.sources.base import ID_FIELD

    table, schema = Table(f"{store}/samples.lance"), pa.schema([ID_FIELD])
    ids = [f"{number:032x}-{number:016x}" for number in range(rows)]
    table.create(schema)
    writer = ColumnFileWriter(table.uri, schema, "known-1")
    writer.write(pa.record_batch([pa.array(ids)], schema))
    table.append([writer.finish(table.open())])
    start = time.perf_counter()
    keeper = DedupIndex(table.uri)
    loaded = time.perf_counter()
    for first in range(0, rows, 256):
        assert set(keeper.seen(ids[first : first + 256])) == {"in_table"}
    asked = time.perf_counter()
    bytes_held = sum(level.nbytes for level in keeper._table._levels) + 100 * len(keeper._table._buffer)
    return {"rows": rows, "seconds": asked - loaded, "load_seconds": loaded - start, "bytes": bytes_held}


CASES = {"plain": plain, "bare": bare, "job": job, "known": known}


def alone(what: str, **arguments: object) -> dict[str, float]:
    """Runs one of `CASES` in a process of its own, in a store of its own."""
    with tempfile.TemporaryDirectory() as store:
        if what != "plain":
            arguments["store"] = store
        return report.alone(__file__, what, **arguments)


def measure(made: report.Report, title: str, rows: int, small: bool, repeats: int) -> None:
    """One size of images -> a table of the report."""
    with tempfile.TemporaryDirectory() as folder:
        total = write(Path(folder), rows, small)
        lines = []
        for kind in FORMATS:
            runs: dict[str, list[dict[str, float]]] = {}
            for _ in range(repeats):
                runs.setdefault("plain", []).append(alone("plain", kind=kind, folder=folder))
                for check in ("decode", "header"):
                    common = {"kind": kind, "folder": folder, "check": check}
                    for what in ("bare", "job", "bare"):  # on both sides of the job: the machine may change its pace
                        runs.setdefault(f"{what} {check}", []).append(alone(what, **common))
            plain_rate = statistics.median(run["rows"] / run["seconds"] for run in runs["plain"])
            for name, results in runs.items():
                assert all(run["rows"] == rows for run in results), (name, results)
                lines.append(_line(kind, name, runs, total / rows, plain_rate))
        header = ["source", "case", "rows/s", "MB/s", "of plain", "of its bare loop", "actor MB"]
        made.table(f"{title}: {rows:,} rows, {total / 1e6:,.0f} MB", header, lines)


def _line(kind: str, name: str, runs: dict[str, list[dict[str, float]]], size: float, plain_rate: float) -> list[str]:
    results = runs[name]
    rate = statistics.median(run["rows"] / run["seconds"] for run in results)
    ratio, memory = "", ""
    if name.startswith("job"):
        loops = runs[name.replace("job", "bare")]
        pairs = [
            run["rows"]
            / run["seconds"]
            / statistics.mean(loop["rows"] / loop["seconds"] for loop in loops[2 * n : 2 * n + 2])
            for n, run in enumerate(results)
        ]
        ratio = report.verdict(statistics.median(pairs), TARGET, form="{:.2f}")
        memory = f"{max(run['actor_mb'] for run in results):.0f}"
    return [kind, name, f"{rate:,.0f}", f"{rate * size / 1e6:,.1f}", f"{rate / plain_rate:.1%}", ratio, memory]


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1500, help="images of each size (1500)")
    parser.add_argument(
        "--known-rows", type=int, nargs="*", default=KNOWN_ROWS, help="tables that the keeper is asked about"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, arguments = options.child
        print(json.dumps(CASES[what](**json.loads(arguments))))
        return
    made = report.Report("Ingest against plain reading of the same bytes, one actor of 1 CPU")
    measure(made, f"photos of {SMALL} pixels", options.rows, True, options.repeats)
    measure(made, "photos as they came", options.rows // 4, False, options.repeats)
    lines = []
    for rows in options.known_rows:
        runs = [alone("known", rows=rows) for _ in range(options.repeats)]
        load, asked, held = (
            statistics.median(run[key] for run in runs) for key in ("load_seconds", "seconds", "bytes")
        )
        lines.append([f"{rows:,}", f"{load:.2f}", f"{rows / asked:,.0f}", f"{held / rows:.0f}"])
    made.table("the keeper of what is known", ["rows of the table", "load s", "identities/s", "bytes a row"], lines)
    made.record(options.record)


if __name__ == "__main__":
    main()

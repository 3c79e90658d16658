"""What planning costs at 100 million rows: seconds and memory, from the table to a batch, at any step.

A table of that many rows is written with its small columns alone (bucket, and the lengths of two texts by two encoders: all
that planning reads). Then, in a process of its own: the survey reads it, the plan is made, and batches are asked for at the
start, far into the run as a resume does, and one after the other for one rank of 64. Memory is what the process's peak grew by.

    python tests/benchmarks/plan.py --record
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import report

from lidit.store import columns
from lidit.store.buckets import bucket_name, make_buckets
from lidit.store.features import Features
from pipelines.embed import ENCODERS_SCHEMA
from pipelines.engine.table import Table
from trainer.config import DataConfig, PhaseConfig, TrainConfig
from trainer.data.loader import plan_phase
from trainer.data.survey import survey

CHUNK_ROWS = 1_000_000  # of a write, and of a fragment
ENCODERS, TEXTS = ("llama3", "qwen15"), (columns.CAPTION, columns.CAPTION_ORIGINAL)
MISSING = 0.02  # share of rows without latents, and of each text's without embeddings
BATCH, RANKS = 2048, 64
FAR = 10_000_019  # a step hundreds of epochs into the run


def schema() -> pa.Schema:
    made = {columns.META_CODEC: "bf16", columns.META_FINGERPRINT: "{}"}
    shape = {columns.META_CHANNELS: "16", columns.META_DOWNSCALE: "8"}
    fields = [pa.field(columns.BUCKET, pa.string())]
    fields += [pa.field(columns.length(text, name), pa.int32()) for text in TEXTS for name in ENCODERS]
    fields.append(pa.field(columns.LATENTS, pa.large_binary(), metadata=made | shape))
    wide = made | {columns.META_WIDTH: "4096"}
    fields += [
        pa.field(columns.embeds(text, name), pa.large_binary(), metadata=wide) for text in TEXTS for name in ENCODERS
    ]
    return pa.schema(fields)


def chunks(count: int, small: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Buckets as frequent as aspect ratios of photographs are; neighbours have nothing in common."""
    names = [bucket_name(bucket) for bucket in make_buckets(256, 16)]
    shares = np.exp(-np.abs(np.arange(len(names)) - len(names) // 2) / 2.5)
    for first in range(0, count, CHUNK_ROWS):
        rows, rng = min(CHUNK_ROWS, count - first), np.random.default_rng(first)
        numbers = pa.array(rng.choice(len(names), rows, p=shares / shares.sum()), mask=rng.random(rows) < MISSING)
        arrays = [pa.DictionaryArray.from_arrays(numbers, names).cast(pa.string())]
        for _ in TEXTS:
            absent = rng.random(rows) < MISSING
            arrays += [pa.array(rng.integers(5, 257, rows, np.int32), mask=absent) for _ in ENCODERS]
        yield pa.record_batch(arrays, schema=small)


def write(store: str, count: int) -> None:
    whole = schema()
    small = pa.schema([field for field in whole if not pa.types.is_large_binary(field.type)])
    uri = f"{store}/{columns.SAMPLES_TABLE}"
    reader = pa.RecordBatchReader.from_batches(small, chunks(count, small))
    lance.write_dataset(reader, uri, max_rows_per_file=CHUNK_ROWS, data_storage_version="2.0")
    lance.dataset(uri).add_columns(pa.schema([field for field in whole if field.name not in small.names]))
    table = Table(f"{store}/{columns.ENCODERS_TABLE}")
    table.create(ENCODERS_SCHEMA)
    for name in ENCODERS:
        row = {
            columns.ENCODER: name,
            columns.FINGERPRINT: "{}",
            columns.ENCODER_CONFIG: "{}",
            columns.EMBED_WIDTH: 4096,
        }
        table.upsert(columns.ENCODER, row | {columns.INSTRUCTION_EMBEDS: b"", columns.NULL_EMBEDS: b""})


def memory(key: str) -> float:
    """Megabytes of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6


def measure(store: str) -> list[tuple[str, float, float]]:
    """(what, seconds, megabytes that are held after it) one after the other, the peak at the end."""
    data = DataConfig(encoders=ENCODERS, text_mix=dict.fromkeys(TEXTS, 0.5), holdout=1e-4)
    phase = PhaseConfig(steps=500_000, global_batch_size=BATCH)
    config = TrainConfig(phases=(phase,), data=data, num_workers=RANKS)
    features = Features(store, ENCODERS, data.text_mix)
    features.table.head(1)
    found, base, start = [], memory("VmRSS"), time.perf_counter()

    def lap(what: str, times: int = 1) -> None:
        nonlocal start
        found.append((what, (time.perf_counter() - start) / times, memory("VmRSS") - base))
        start = time.perf_counter()

    surveyed = survey(features, data.holdout)
    lap("survey: bucket and lengths of every row")
    plan = plan_phase(config, 0, surveyed)
    plan.bucket_at(0)
    lap("plan, and the order of the first epoch's batches")
    first = plan.batch(0)
    lap(f"a whole batch of {BATCH:,}")
    plan.batch(FAR)
    lap(f"a whole batch at step {FAR:,}: what a resume does")
    share = plan.share(RANKS - 1, RANKS)
    for step in range(100):
        plan.batch(step, *share)
    lap(f"a batch of one rank of {RANKS}, mean of 100", 100)
    plan.fingerprint()
    lap("fingerprint of the plan")
    assert len(np.unique(first.rows)) == BATCH and surveyed.rows.counts.sum() > 0.9 * surveyed.total
    found.append(("peak", 0.0, memory("VmHWM") - base))
    return found


def main() -> None:
    parser = report.parser(__doc__, repeats=1)
    parser.add_argument("--rows", type=int, default=100_000_000, help="of the table (100,000,000)")
    options = parser.parse_args()
    made = report.Report("Plan: what it costs to plan a large table")
    with tempfile.TemporaryDirectory() as store:
        start = time.perf_counter()
        write(store, options.rows)
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
        runs = []
        for _ in range(options.repeats):
            env = {**os.environ, "PYTHONPATH": str(report.ROOT)}
            command = [sys.executable, __file__, "--measure", store]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout))
    rows = []
    for steps in zip(*runs):
        what, seconds = steps[0][0], float(np.median([step[1] for step in steps]))
        held = float(np.median([step[2] for step in steps]))
        shown = "" if what == "peak" else f"{seconds:,.2f}" if seconds > 0.1 else f"{seconds:.4f}"
        rows.append([what, shown, f"{held:,.0f}"])
    made.table(f"{options.rows:,} rows", ["what", "seconds", "memory +MB"], rows)
    made.record(options.record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main()

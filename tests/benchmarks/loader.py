"""Samples per second of the trainer's loader against WebDataset and MosaicML Streaming (MDS), on the same rows, shuffled.

A row is a latent and a prompt's states, 0.2 or 1 MB together; every loader gives the same batches: latents in float32,
bf16 states padded to the batch's longest, a mask. Every measurement is one pass over all rows in a process of its own, from
the making of the loader to the last batch, worker start included; the loaders take turns in a drawn order, and each is given
the number of workers or threads that suits it best. Cold: the page cache holds nothing of the files (`posix_fadvise`).

The peers get an environment of their own (`build/loader-peers`), made at the first run:

    python tests/benchmarks/loader.py
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "build" / "loader-peers"
REQUIREMENTS = (
    "webdataset==1.0.2",
    "braceexpand",
    "mosaicml-streaming==0.13.0",
    "catalogue",
    "xxhash<4",
    "zstd",
    "brotli",
    "python-snappy",
)
BUCKET, LATENTS = "256x256", (16, 32, 32)
WIDTH = 2048  # E
BATCH = 32
PAD = 16
FRAGMENT_BYTES = 128 << 20  # of a fragment, and of a tar
MDS_SHARD_BYTES = 1 << 26  # its default
SHUFFLE_ROWS = 256  # WebDataset's buffer; a larger one mixes better and starts later
LOADERS = {"lidit": (1, 2, 4), "webdataset": (1, 2, 4), "mds": (1, 2, 4)}  # loader -> threads or workers to try


class Rows:
    """Seeded rows of `row_mb` megabytes on average; prompts between half the mean length and one and a half."""

    def __init__(self, total_mb: float, row_mb: float):
        rng = np.random.default_rng(0)
        self.count = round(total_mb / row_mb / BATCH) * BATCH
        self.per_shard = max(1, int(FRAGMENT_BYTES / (row_mb * 1e6)))
        mean = max(2.0, (row_mb * 1e6 - 2 * np.prod(LATENTS)) / (2 * WIDTH))
        self.lengths = rng.integers(round(mean / 2), round(mean * 1.5) + 1, self.count)
        self._pool = rng.integers(0x3C00, 0x4000, int(mean * 1.5 + 3) * WIDTH * 2, dtype=np.uint16)  # finite bf16

    def __getitem__(self, row: int) -> tuple[bytes, bytes]:
        """(latents, states)."""
        start = row * 61 % (len(self._pool) // 2)
        states = self._pool[start : start + int(self.lengths[row]) * WIDTH]
        return np.roll(self._pool[: int(np.prod(LATENTS))], row).tobytes(), states.tobytes()


# -- the same rows in three formats -----------------------------------------------------------------------------------


def write_lance(rows: Rows, folder: Path) -> None:
    import pyarrow as pa

    from lidit.store import columns
    from pipelines.embed import ENCODERS_SCHEMA
    from pipelines.engine.column_file import UNCOMPRESSED, ColumnFileWriter
    from pipelines.engine.table import Table

    made = {columns.META_CODEC: "bf16", columns.META_FINGERPRINT: "{}", **UNCOMPRESSED}
    shape = {columns.META_CHANNELS: str(LATENTS[0]), columns.META_DOWNSCALE: "8"}
    embeds, length = columns.embeds(columns.CAPTION, "llm"), columns.length(columns.CAPTION, "llm")
    schema = pa.schema(
        [
            pa.field(columns.BUCKET, pa.string()),
            pa.field(columns.LATENTS, pa.large_binary(), metadata={**made, **shape}),
            pa.field(embeds, pa.large_binary(), metadata={**made, columns.META_WIDTH: str(WIDTH)}),
            pa.field(length, pa.int32()),
        ]
    )
    table = Table(f"{folder}/{columns.SAMPLES_TABLE}")
    table.create(schema)
    for first in range(0, rows.count, rows.per_shard):
        numbers = range(first, min(first + rows.per_shard, rows.count))
        values = [rows[row] for row in numbers]
        writer = ColumnFileWriter(table.uri, schema, "bench-1")
        arrays = [
            pa.array([BUCKET] * len(values)),
            pa.array([latents for latents, _ in values], pa.large_binary()),
            pa.array([states for _, states in values], pa.large_binary()),
            pa.array(rows.lengths[numbers.start : numbers.stop], pa.int32()),
        ]
        writer.write(pa.record_batch(arrays, schema=schema))
        table.append([writer.finish(table.open())])
    encoders = Table(f"{folder}/{columns.ENCODERS_TABLE}")
    encoders.create(ENCODERS_SCHEMA)
    nothing = {columns.ENCODER_CONFIG: "{}", columns.INSTRUCTION_EMBEDS: b"", columns.NULL_EMBEDS: b""}
    encoders.upsert(
        columns.ENCODER, {columns.ENCODER: "llm", columns.FINGERPRINT: "{}", columns.EMBED_WIDTH: WIDTH, **nothing}
    )


def write_webdataset(rows: Rows, folder: Path) -> None:
    folder.mkdir()
    for shard, first in enumerate(range(0, rows.count, rows.per_shard)):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for row in range(first, min(first + rows.per_shard, rows.count)):
                for name, data in zip(("latents", "states"), rows[row]):
                    info = tarfile.TarInfo(f"{row:08}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_mds(folder: str, total_mb: float, row_mb: float) -> None:
    """In the peers' environment."""
    streaming = import_streaming()
    rows = Rows(total_mb, row_mb)
    kinds = {"latents": "bytes", "states": "bytes"}
    with streaming.MDSWriter(out=folder, columns=kinds, size_limit=MDS_SHARD_BYTES) as writer:
        for row in range(rows.count):
            latents, states = rows[row]
            writer.write({"latents": latents, "states": states})


# -- the three loaders ------------------------------------------------------------------------------------------------


def collate(samples: list[tuple[bytes, bytes]]) -> tuple[Any, Any, Any]:
    """What the peers' workers make of a batch: the tensors of the trainer's, with as few copies as can be."""
    import torch

    lengths = np.array([len(states) // (2 * WIDTH) for _, states in samples])
    longest = -(-int(lengths.max()) // PAD) * PAD
    latents = torch.empty(len(samples), *LATENTS, dtype=torch.bfloat16)
    embeds = torch.empty(len(samples), longest, WIDTH, dtype=torch.bfloat16)
    to_latents = latents.view(torch.uint8).numpy().reshape(len(samples), -1)
    to_embeds = embeds.view(torch.uint8).numpy().reshape(len(samples), -1)
    for row, (latent, states) in enumerate(samples):
        to_latents[row] = np.frombuffer(latent, np.uint8)
        to_embeds[row, : len(states)] = np.frombuffer(states, np.uint8)
        to_embeds[row, len(states) :] = 0
    mask = torch.from_numpy(np.arange(longest) < lengths[:, None])
    return latents.float(), embeds, mask


def load_lidit(folder: str, threads: int) -> Iterator[tuple[Any, Any, Any]]:
    from lidit.diffusion import Flow
    from lidit.store.features import Features
    from trainer.config import DataConfig
    from trainer.data.loader import Batches, BatchSlice
    from trainer.data.plan import Plan
    from trainer.data.survey import survey
    from trainer.data.tables import PhaseTable

    data = DataConfig(encoders=("llm",), prompt_drop_prob=0.0, read_threads=threads, pad_multiple=PAD)
    features = Features(folder, data.encoders, data.text_mix)
    found = survey(features)
    plan = Plan(found.rows, BATCH, 1, data.block_rows, data.block_steps)
    last = found.total // BATCH
    table = PhaseTable(features, found, plan, Flow())
    with Batches(table, data, 1, BatchSlice(BATCH), range(last), with_noise=False) as batches:
        for batch in batches:
            yield batch.latents, batch.prompt_embeds["llm"], batch.prompt_mask["llm"]


def load_webdataset(folder: str, workers: int) -> Iterator[tuple[Any, Any, Any]]:
    import torch
    import webdataset

    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), seed=1, empty_check=False)
        .shuffle(SHUFFLE_ROWS)
        .to_tuple("latents", "states")
        .batched(BATCH, collation_fn=collate)
    )
    yield from torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=workers)


def load_mds(folder: str, workers: int) -> Iterator[tuple[Any, Any, Any]]:
    import torch

    dataset = import_streaming().StreamingDataset(local=folder, shuffle=True, shuffle_seed=1, batch_size=BATCH)

    def both(samples: list[dict[str, bytes]]) -> tuple[Any, Any, Any]:
        return collate([(sample["latents"], sample["states"]) for sample in samples])

    yield from torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=both)


def import_streaming() -> Any:
    """MosaicML's package without torchvision, which its picture classes want: nothing of them is used here."""
    import transformers.feature_extraction_utils  # looks for torchvision itself, and must not find this

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    import streaming

    assert transformers.feature_extraction_utils
    return streaming


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(load: Callable[[str, int], Iterator[tuple[Any, Any, Any]]], folder: str, workers: int) -> dict[str, float]:
    """One pass; what came is checked by counts."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    first, samples, tokens = 0.0, 0, 0
    for latents, embeds, mask in load(folder, workers):
        first = first or time.perf_counter() - start
        assert latents.dtype == torch.float32 and latents.shape[1:] == LATENTS and embeds.dtype == torch.bfloat16
        samples += len(latents)
        tokens += int(mask.sum())
    seconds = time.perf_counter() - start
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"seconds": seconds, "first": first, "samples": samples, "tokens": tokens, "rss_mb": peak * 1024 / 1e6}


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(folder: Path) -> None:
    """Reads a folder's files into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def peers_python() -> str:
    """Makes the peers' environment if need be: their packages without what they pull in, torch and numpy from ours."""
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *REQUIREMENTS, "cramjam"]
        subprocess.run(install, check=True)
        ours = Path(np.__file__).parents[1]
        (next((PEERS / "lib").iterdir()) / "site-packages" / "zz_ours.pth").write_text(f"{ours}\n")
    return str(python)


def in_process(python: str, *words: object) -> dict[str, float]:
    """Runs a part of this file in a process of its own; its last line is JSON."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, __file__, *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    import report

    parser = report.parser(__doc__)
    parser.add_argument("--mb", type=float, default=2000, help="megabytes of rows of each size (2,000)")
    parser.add_argument("--rows-mb", type=float, nargs="+", default=[0.2, 1.0], help="mean megabytes of a row (0.2 1)")
    options = parser.parse_args()
    peers = peers_python()
    pythons = {"lidit": sys.executable, "webdataset": peers, "mds": peers}
    made = report.Report("Loader: the trainer's against WebDataset and MDS")
    with tempfile.TemporaryDirectory() as temporary:
        for row_mb in options.rows_mb:
            folder, rows = Path(temporary, f"{row_mb:g}"), Rows(options.mb, row_mb)
            folder.mkdir()
            write_lance(rows, folder / "lidit")
            write_webdataset(rows, folder / "webdataset")
            in_process(peers, "write-mds", folder / "mds", options.mb, row_mb)
            results: dict[tuple[str, str, int], list[dict[str, float]]] = {}
            cases = [(loader, workers) for loader, tried in LOADERS.items() for workers in tried]
            for state in ("cold", "warm"):
                for repeat in range(options.repeats):
                    for loader, workers in random.Random(repeat).sample(cases, len(cases)):
                        (forget if state == "cold" else remember)(folder / loader)
                        result = in_process(pythons[loader], "measure", loader, folder / loader, workers)
                        off = abs(result["samples"] - rows.count)  # MDS evens out its workers' batches
                        assert off <= (BATCH * workers if loader == "mds" else 0), result
                        assert off or result["tokens"] == rows.lengths.sum(), result
                        results.setdefault((state, loader, workers), []).append(result)
            tabulate(made, row_mb, rows.count, results)
            subprocess.run(["rm", "-rf", str(folder)], check=True)
    made.record(options.record)


def tabulate(made: Any, row_mb: float, count: int, results: dict[tuple[str, str, int], list[dict[str, float]]]) -> None:
    from report import verdict

    lines, best = [], {}
    for (state, loader, workers), runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rate = median["samples"] / median["seconds"]
        best[state, loader] = max(best.get((state, loader), 0.0), rate)
        figures = f"{rate:,.0f}", f"{rate * row_mb:,.0f}", f"{median['first']:.2f}", f"{median['rss_mb']:,.0f}"
        lines.append([state, loader, str(workers), *figures])
    header = ["cache", "loader", "workers", "samples/s", "MB/s", "first batch s", "peak RSS MB"]
    made.table(f"Rows of {row_mb:g} MB, {count:,} of them, batches of {BATCH}", header, sorted(lines))
    rows = []
    for state in ("cold", "warm"):
        ours, peer = best[state, "lidit"], max(best[state, "webdataset"], best[state, "mds"])
        rows.append([state, f"{ours:,.0f}", f"{peer:,.0f}", verdict(ours / peer, 2.0)])
    made.table(f"Rows of {row_mb:g} MB, the best of each", ["cache", "ours", "better peer", "ratio"], rows)


def part(words: list[str]) -> None:
    """What a process of its own does."""
    if words[0] == "write-mds":
        write_mds(words[1], float(words[2]), float(words[3]))
        print("{}")
        return
    load = {"lidit": load_lidit, "webdataset": load_webdataset, "mds": load_mds}[words[1]]
    print(json.dumps(measure(load, words[2], int(words[3]))))


if __name__ == "__main__":
    if sys.argv[1:2] in (["measure"], ["write-mds"]):
        part(sys.argv[1:])
    else:
        main()

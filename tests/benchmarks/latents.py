"""How much of the autoencoder's speed does the whole latents job keep, and is decoding images ever in its way?

For each case and repeat: a bare loop, the job, the bare loop again, each in a process of its own with the same number of
torch threads; the bare figure is the mean of the two. The job is one actor on a table of fragments of 512 rows; its
throughput is rows over `work_seconds` (first fragment begun to last file written). The bare loop takes the same windows from
memory, decodes and resizes their images in as many threads, then encodes the same batches and packs them; it reads and
writes no table, and overlaps nothing. Above 1 the job wins by overlapping.

Cases: rendered scenes with demo/vae at 64 px; the photographs of ../shared/data (or $LIDIT_TEST_DATA), each row made another
file by a few bytes after its end, with demo/vae at 64 px (cheap to encode: decoding weighs most) and with TAEF2 at 256 px.

The second table is the split: what an image takes to decode and resize in its thread, what it takes on the device, and the
share of the job's time in which the device waited for decoding.

    python tests/benchmarks/latents.py
    python tests/benchmarks/latents.py --cuda      # with a GPU: SDXL-shaped autoencoder, random weights, 256 and 512 px
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import report
import torch

from lidit.frozen.vae import load_vae
from lidit.images.pixels import bucket_pixels, to_unit_range
from lidit.store import columns
from lidit.store.buckets import make_buckets
from lidit.store.codec import encode_latents
from pipelines.engine.column_file import UNCOMPRESSED, ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.table import Table
from pipelines.latents import EncodeLatents, LatentsConfig

TARGET = 0.9
ROWS_PER_FRAGMENT = 512
CASES = {
    "scenes, demo/vae, 64 px": {"images": "scenes", "model": "demo/vae", "resolution": 64, "step": 16, "rows": 1536},
    "photos, demo/vae, 64 px": {"images": "photos", "model": "demo/vae", "resolution": 64, "step": 16, "rows": 1536},
    "photos, TAEF2, 256 px": {"images": "photos", "model": "taef2", "resolution": 256, "step": 32, "rows": 72},
}


def images_of(kind: str, rows: int) -> list[bytes]:
    """Distinct image files."""
    if kind == "scenes":
        from demo.world import scenes

        return [scenes.example(seed, *scenes.image_size(seed))["image_bytes"] for seed in range(rows)]
    photos = [path.read_bytes() for path in sorted((report.data_folder() / "coco-mini-cc" / "images").glob("*.jpg"))]
    return [photos[row % len(photos)] + row.to_bytes(4, "little") for row in range(rows)]


def write_table(store: str, kind: str, rows: int) -> dict[str, Any]:
    """The images as the samples table, as ingest leaves it; bytes of a mean one."""
    schema = pa.schema(
        [
            pa.field(columns.IMAGE_ID, pa.string()),
            pa.field(columns.IMAGE, pa.large_binary(), metadata=UNCOMPRESSED),
        ]
    )
    table, images = Table(f"{store}/{columns.SAMPLES_TABLE}"), images_of(kind, rows)
    table.create(schema)
    for first in range(0, rows, ROWS_PER_FRAGMENT):
        writer = ColumnFileWriter(table.uri, schema, "ingest-benchmark")
        part = images[first : first + ROWS_PER_FRAGMENT]
        writer.write(pa.record_batch([[str(first + row) for row in range(len(part))], part], schema=schema))
        table.append([writer.finish(table.open())])
    return {"bytes": float(np.mean([len(image) for image in images]))}


def config(store: str, model: str, resolution: int, step: int, threads: int, gpus: float) -> LatentsConfig:
    """The job: one actor."""
    folder = str(report.data_folder() / "taef2") if model == "taef2" else model
    actors = ActorsConfig(min=1, max=1, num_cpus=threads, num_gpus=gpus)
    return LatentsConfig(
        store, actors, model=folder, resolution=resolution, step=step, dtype="bf16" if gpus else "fp32", max_upscale=4.0
    )


def job(store: str, **settings: Any) -> dict[str, Any]:
    """The real job; its summary."""
    from pipelines import latents

    return json.loads(latents.main(config(store, **settings)).to_json())


def bare(store: str, **settings: Any) -> dict[str, Any]:
    """The same windows, decoded, encoded and packed one after the other; images a second, and the split."""
    made = config(store, **settings)
    torch.set_num_threads(settings["threads"])
    stage = EncodeLatents(made)  # for its window, batch size and number of threads; it is not called
    vae, buckets = stage.vae, make_buckets(made.resolution, made.step, made.max_aspect)
    table = Table(f"{store}/{columns.SAMPLES_TABLE}").open().to_table(columns=[columns.IMAGE])
    images = [image.as_buffer() for image in table.column(0)]
    vae.encode(torch.zeros(1, 3, made.resolution, made.resolution))  # weights are there, kernels chosen
    decode_seconds = encode_seconds = 0.0
    begun = time.perf_counter()
    with ThreadPoolExecutor(stage.num_threads) as pool:
        for first in range(0, len(images), stage.window_rows):
            start = time.perf_counter()
            window = images[first : first + stage.window_rows]
            decoded = list(pool.map(lambda data: bucket_pixels(memoryview(data), buckets, made.max_upscale), window))
            middle = time.perf_counter()
            for batch in batches(decoded, stage.batch_pixels):
                latents = vae.encode(to_unit_range(torch.from_numpy(batch).to(vae.device), vae_dtype(made)))
                encode_latents(latents, made.codec).cpu()
            decode_seconds += middle - start
            encode_seconds += time.perf_counter() - middle
    seconds = time.perf_counter() - begun
    return {"rows_per_second": len(images) / seconds, "decode": decode_seconds, "encode": encode_seconds}


def vae_dtype(made: LatentsConfig) -> torch.dtype:
    """Precision of the pixels as the autoencoder takes them."""
    return torch.bfloat16 if made.dtype == "bf16" else torch.float32


def batches(decoded: list[tuple[Any, np.ndarray]], batch_pixels: int) -> list[np.ndarray]:
    """Images of a window -> uint8 (B, height, width, 3) of one bucket each, as the job cuts them."""
    waiting: dict[Any, list[np.ndarray]] = {}
    full = []
    for bucket, pixels in decoded:
        waiting.setdefault(bucket, []).append(pixels)
        if (len(waiting[bucket]) + 1) * bucket[0] * bucket[1] > batch_pixels:
            full.append(np.stack(waiting.pop(bucket)))
    return full + [np.stack(waiting[bucket]) for bucket in sorted(waiting)]


def alone(what: str, **arguments: Any) -> dict[str, Any]:
    """Runs one of `CHILDREN` in a process of its own, with nothing of the one before in memory."""
    return report.alone(__file__, what, **arguments)


CHILDREN = {"bare": bare, "job": job, "write_table": write_table}


def measure(
    name: str, case: dict[str, Any], options: argparse.Namespace, folder: str
) -> tuple[list[str], list[str], float]:
    """One case -> its row of the speed table, its row of the split, its median ratio."""
    rows = max(32, int(case["rows"] * options.share))
    settings = {key: case[key] for key in ("model", "resolution", "step")} | {
        "threads": options.threads,
        "gpus": options.gpus,
    }
    table = f"{folder}/table"
    size = alone("write_table", store=table, kind=case["images"], rows=rows)["bytes"]
    ratios, rates, speeds, summaries = [], [], [], []
    for repeat in range(options.repeats):
        store = shutil.copytree(table, f"{folder}/store{repeat}")
        before = alone("bare", store=table, **settings)
        summary = alone("job", store=str(store), **settings)
        after = alone("bare", store=table, **settings)
        assert summary["ok"] and summary["errors"] == 0 and summary["counts"]["images"] == rows
        rates.append(statistics.mean([before["rows_per_second"], after["rows_per_second"]]))
        speeds.append(summary["rows_per_second"])
        ratios.append(speeds[-1] / rates[-1])
        summaries.append(summary)
        shutil.rmtree(store)
    shutil.rmtree(table)
    ratio = statistics.median(ratios)

    def middle(count: str, of: str = "images") -> float:
        return statistics.median(made["counts"][count] / made["counts"][of] for made in summaries)

    split = [
        name, f"{size / 1e3:,.0f} KB", f"{1e3 * middle('decode_seconds'):,.1f} ms", f"{1e3 * middle('device_seconds'):,.1f} ms",
        f"{middle('wait_seconds', 'call_seconds'):.1%}",
    ]  # fmt: skip
    speed = [
        name, f"{rows:,}", f"{statistics.median(speeds):,.1f}", f"{statistics.median(rates):,.1f}",
        report.verdict(ratio, TARGET, form="{:.2f}"), f"{min(ratios):.2f}-{max(ratios):.2f}",
    ]  # fmt: skip
    return speed, split, ratio


# -- with a GPU ------------------------------------------------------------------------------------------------------------


def sdxl_shaped(folder: Path) -> None:
    """An AutoencoderKL of SDXL's shape, 83.7 M parameters, random weights."""
    import diffusers

    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=1024,
        scaling_factor=0.13025,
    ).save_pretrained(folder)  # fmt: skip


def on_a_gpu(options: argparse.Namespace) -> None:
    """Images a second: the autoencoder alone, decoding alone, and the stage that does both at once."""
    if not torch.cuda.is_available():
        sys.exit("--cuda: this machine has no CUDA device")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        sdxl_shaped(Path(name))
        for resolution in (256, 512):
            rows.append(gpu_row(name, resolution, options))
    made = report.Report("Latents with an SDXL-shaped autoencoder", torch.cuda.get_device_name())
    header = [
        "pixels",
        "batch",
        "encode images/s",
        "decode and resize images/s",
        "threads",
        "stage images/s",
        "stage / encode",
        "waiting",
    ]
    made.table(
        f"AutoencoderKL, 83.7 M parameters, random weights, bf16; photographs; medians of {options.repeats}",
        header,
        rows,
    )
    made.record(options.record)


def gpu_row(folder: str, resolution: int, options: argparse.Namespace) -> list[str]:
    """One resolution's figures."""
    actors = ActorsConfig(min=1, max=1, num_cpus=options.threads, num_gpus=1)
    made = LatentsConfig(
        actors=actors, model=folder, dtype="bf16", resolution=resolution, step=32, max_aspect=1.0, max_upscale=4.0
    )
    stage, vae = EncodeLatents(made), load_vae(folder, dtype="bf16")
    images = images_of("photos", 2 * stage.window_rows)
    batch = max(1, stage.batch_pixels // resolution**2)
    pixels = torch.zeros(batch, 3, resolution, resolution, dtype=torch.bfloat16, device="cuda")
    encode = [_rate(lambda: [vae.encode(pixels) for _ in range(8)], 8 * batch) for _ in range(options.repeats + 1)][1:]
    decode = [
        _rate(lambda: list(stage.threads.map(lambda data: bucket_pixels(data, made.buckets, 4.0), images)), len(images))
        for _ in range(options.repeats)
    ]
    windows = [images[: stage.window_rows], images[stage.window_rows :]]
    wanted, calls, waits = [made.latents_column, made.bucket_column], [], []
    for _ in range(options.repeats):
        for window in windows:
            record = pa.record_batch({columns.IMAGE: pa.array(window, pa.large_binary())})
            counts = stage(record, wanted).counts
            calls.append(len(window) / counts["call_seconds"])
            waits.append(counts["wait_seconds"] / counts["call_seconds"])
    alone_, both = statistics.median(encode), statistics.median(calls[1:])
    return [
        str(resolution), str(batch), f"{alone_:,.0f}", f"{statistics.median(decode):,.0f}", str(stage.num_threads),
        f"{both:,.0f}", report.verdict(both / alone_, TARGET, form="{:.2f}"), f"{statistics.median(waits):.1%}",
    ]  # fmt: skip


def _rate(work: Any, images: int) -> float:
    """Images a second of one call, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of each case's rows (1.0)")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of the actor (0)")
    parser.add_argument(
        "--cuda", action="store_true", help="the SDXL-shaped autoencoder on this machine's GPU, nothing else"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](**json.loads(options.child[1]))))
        return
    if options.cuda:
        on_a_gpu(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        speeds, splits, ratios = zip(*(measure(name, case, options, folder) for name, case in CASES.items()))
    made = report.Report(f"Latents job against the bare autoencoder, one actor of {options.threads} CPU")
    header = ["case", "images", "job images/s", "bare images/s", "job / bare", "range"]
    made.table(f"medians of {options.repeats}; worst ratio {min(ratios):.2f}", header, speeds)
    header = ["case", "file", "decode and resize", "device", "device waited"]
    made.table("one image of the job: in a decoding thread, and on the device", header, splits)
    made.record(options.record)


if __name__ == "__main__":
    main()

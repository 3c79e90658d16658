"""How much of the captioner's speed does the whole recaption job keep? Ray, Lance, reading, decoding and writing included.

A bare loop, the job, the bare loop again, each in a process of its own with the same number of torch threads; the bare figure
is the mean of the two. The job is one actor of one CPU on a table of rendered scenes; its throughput is rows over
`work_seconds` (first fragment begun to last file written). The bare loop calls the same engine on the same images in the
same windows, hence the same batches: it decodes, prepares, generates; it reads no table, judges nothing, writes nothing.
Retries and blank images are off in both, so that both make the same captions.

A second table says where the bare loop's time goes: images decoded and prepared alone, and generation alone.

    python tests/benchmarks/recaption.py --rows 1024
    python tests/benchmarks/recaption.py --model /models/llava-1.5-7b --dtype bf16 --gpus 1    # with a GPU at hand
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import torch

from lidit.images.pixels import reduced_image
from lidit.store import columns
from pipelines.captioning.request import INSTRUCTION, CaptionRequest

TARGET = 0.9
MAX_NEW_TOKENS = 128


def config(store: str, model: str, dtype: str, threads: int, gpus: float) -> Any:
    """The job: one actor, no retries, no blank images."""
    from pipelines.captioning.transformers_engine import VlmConfig
    from pipelines.engine.pool import ActorsConfig
    from pipelines.recaption import RecaptionConfig

    actors = ActorsConfig(min=1, max=1, num_cpus=threads, num_gpus=gpus)
    vlm = VlmConfig(model, dtype=dtype)  # type: ignore[arg-type]
    return RecaptionConfig(store, actors, vlm=vlm, max_new_tokens=MAX_NEW_TOKENS, retries=0, blank_share=0.0)


def ingest(store: str, rows: int, rows_per_fragment: int) -> dict[str, Any]:
    """Scenes as a table."""
    from pipelines import ingest as job_

    made = job_.IngestConfig(f"scenes:{rows}", store, rows_per_fragment)
    return json.loads(job_.main(made).to_json())


def job(store: str, **settings: Any) -> dict[str, Any]:
    """The recaption job on the table; its summary."""
    from pipelines import recaption

    return json.loads(recaption.main(config(store, **settings)).to_json())


def bare(store: str, **settings: Any) -> dict[str, Any]:
    """The engine on the table's images, window by window; rows a second, and the split."""
    from pipelines.engine.table import Table
    from pipelines.recaption import WINDOW_ROWS

    torch.set_num_threads(settings["threads"])
    made = config(store, **settings)
    engine = made.make_engine()
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    images = [
        fragment.to_table(columns=[columns.IMAGE])[columns.IMAGE].to_pylist() for fragment in dataset.get_fragments()
    ]
    windows = [part[first : first + WINDOW_ROWS] for part in images for first in range(0, len(part), WINDOW_ROWS)]
    engine([CaptionRequest(windows[0][0], INSTRUCTION)])  # the model is loaded
    start = time.perf_counter()
    answers = [
        answer for window in windows for answer in engine([CaptionRequest(image, INSTRUCTION) for image in window])
    ]
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for window in windows:
        engine.inputs([reduced_image(image, made.image_side) for image in window], [INSTRUCTION] * len(window))
    prepared = time.perf_counter() - start
    rows, tokens = len(answers), sum(answer.tokens for answer in answers)
    return {"rows_per_second": rows / seconds, "tokens": tokens, "seconds": seconds, "prepare_seconds": prepared}


def alone(what: str, **arguments: Any) -> dict[str, Any]:
    """Runs one of the three in a process of its own, with nothing of the one before in memory."""
    return report.alone(__file__, what, **arguments)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="scenes (1024)")
    parser.add_argument("--rows-per-fragment", type=int, default=256, help="rows of a fragment (256)")
    parser.add_argument("--model", default="demo/vlm", help="a VLM's folder (demo/vlm)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of the actor (0)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(
            json.dumps({"ingest": ingest, "job": job, "bare": bare}[options.child[0]](**json.loads(options.child[1])))
        )
        return
    common = {"model": options.model, "dtype": options.dtype, "threads": options.threads, "gpus": options.gpus}
    ratios, rates, speeds, splits = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "ingested")
        alone("ingest", store=str(table), rows=options.rows, rows_per_fragment=options.rows_per_fragment)
        for repeat in range(options.repeats):
            store = shutil.copytree(table, f"{folder}/store{repeat}")
            before = alone("bare", store=str(table), **common)
            summary = alone("job", store=str(store), **common)
            after = alone("bare", store=str(table), **common)
            assert summary["counts"]["tokens"] == before["tokens"], "the job made other captions than the bare loop"
            rates.append(statistics.mean([before["rows_per_second"], after["rows_per_second"]]))
            speeds.append(summary["rows_per_second"])
            ratios.append(speeds[-1] / rates[-1])
            splits += [before, after]
            shutil.rmtree(store)
    ratio = statistics.median(ratios)
    gpu = torch.cuda.get_device_name() if options.gpus and torch.cuda.is_available() else ""
    made = report.Report(f"Recaption job against the bare captioner, one actor of {options.threads} CPU", gpu)
    made.table(
        f"{Path(options.model).name}, {options.dtype}, {options.rows:,} scenes; medians of {options.repeats}",
        ["job rows/s", "bare rows/s", "job / bare", "range"],
        [
            [
                f"{statistics.median(speeds):,.1f}", f"{statistics.median(rates):,.1f}",
                report.verdict(ratio, TARGET, form="{:.2f}"), f"{min(ratios):.2f}-{max(ratios):.2f}",
            ]
        ],
    )  # fmt: skip
    prepared = statistics.median(split["prepare_seconds"] / split["seconds"] for split in splits)
    made.table(
        "the bare loop: decoding and preparing images alone, as a share of its time",
        ["share", "tokens of a caption"],
        [[f"{prepared:.1%}", f"{splits[0]['tokens'] / options.rows:.1f}"]],
    )
    made.record(options.record)


if __name__ == "__main__":
    main()

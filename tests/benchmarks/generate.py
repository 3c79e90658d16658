"""How much of a bare sampler's speed does the whole generate job keep?

For each repeat: a bare loop, the job, the bare loop again, each in a process of its own with the same number of torch threads;
the bare figure is the mean of the two. The job is one actor; its throughput is images over `work_seconds` (first fragment begun
to last file written). The bare loop encodes the same prompts in the same batches, runs `lidit.sampler.sample`, decodes, and
drops the pixels: no table, no PNG, no Ray.

    python tests/benchmarks/generate.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import report
import torch

from demo.world.prompts import exam_prompts
from lidit.sampler import SamplerConfig, initial_noise
from pipelines.engine.pool import ActorsConfig
from pipelines.generate import GenerateConfig, open_pipe

TARGET = 0.9
BATCH_SIZE = 16
SAMPLER = SamplerConfig(num_inference_steps=20, guidance_scale=3.5)


def config(weights: str, prompts: str, store: str, threads: int) -> GenerateConfig:
    """The job: one actor, no files."""
    return GenerateConfig(
        weights=weights,
        prompts=prompts,
        store=store,
        images_per_prompt=1,
        batch_size=BATCH_SIZE,
        sampler=SAMPLER,
        actors=ActorsConfig(min=1, max=1, num_cpus=threads, num_gpus=0.0),
    )


def job(**settings: Any) -> dict[str, Any]:
    """The real job; its summary."""
    from pipelines import generate

    return json.loads(generate.main(config(**settings)).to_json())


def bare(**settings: Any) -> dict[str, Any]:
    """The same batches without anything around them; images a second."""
    torch.set_num_threads(settings["threads"])
    made = config(**settings)
    pipe = open_pipe(made, "cpu")
    texts = [json.loads(line)["prompt"] for line in Path(settings["prompts"]).read_text().splitlines()]
    shape = pipe.latent_shape(*pipe.image_size)
    pipe(texts[:2], num_inference_steps=1)  # weights are there, kernels chosen
    begun = time.perf_counter()
    for start in range(0, len(texts), BATCH_SIZE):
        batch = texts[start : start + BATCH_SIZE]
        noise = initial_noise([torch.Generator().manual_seed(0) for _ in batch], shape)
        pipe.decode(pipe.sample_latents(noise, batch, [""] * len(batch), SAMPLER))
    return {"images_per_second": len(texts) / (time.perf_counter() - begun)}


CHILDREN = {"bare": bare, "job": job}


def alone(what: str, **arguments: Any) -> dict[str, Any]:
    """Runs one of `CHILDREN` in a process of its own."""
    return report.alone(__file__, what, **arguments)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--weights", default="demo/weights", help="folder of trained weights (demo/weights)")
    parser.add_argument("--per_task", type=int, default=32, help="prompts of each of the six tasks (32)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child[0]](**json.loads(options.child[1]))))
        return
    rates, speeds, ratios = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        records = exam_prompts(options.per_task)
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        settings = {"weights": options.weights, "prompts": str(prompts), "threads": options.threads}
        for repeat in range(options.repeats):
            store = f"{folder}/store{repeat}"
            before = alone("bare", store=store, **settings)
            summary = alone("job", store=store, **settings)
            after = alone("bare", store=store, **settings)
            assert summary["ok"] and summary["errors"] == 0 and summary["counts"]["images"] == len(records)
            rates.append(statistics.mean([before["images_per_second"], after["images_per_second"]]))
            speeds.append(summary["images_per_second"])
            ratios.append(speeds[-1] / rates[-1])
    made = report.Report(f"Generate job against the bare sampler, one actor of {options.threads} CPU")
    header = ["images", "job images/s", "bare images/s", "job / bare", "range"]
    row = [
        f"{len(records):,}", f"{statistics.median(speeds):,.2f}", f"{statistics.median(rates):,.2f}",
        report.verdict(statistics.median(ratios), TARGET, form="{:.2f}"), f"{min(ratios):.2f}-{max(ratios):.2f}",
    ]  # fmt: skip
    made.table(
        f"{SAMPLER.num_inference_steps} steps, guidance {SAMPLER.guidance_scale:g}, batches of {BATCH_SIZE}; medians of "
        f"{options.repeats}",
        header,
        [row],
    )
    made.record(options.record)


if __name__ == "__main__":
    main()

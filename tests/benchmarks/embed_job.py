"""How much of the encoder's speed does the whole embed job keep? Ray, Lance, reading, packing and writing included.

For each encoder and repeat: a bare loop, the job, the bare loop again, each in a process of its own with the same number
of torch threads; the bare figure is the mean of the two. The job is one actor of one CPU on a table of fragments of 1,024
rows, as it is by default; its throughput is prompt tokens over `work_seconds` (first fragment begun to last file written).
The bare loop tokenises and encodes the same prompts in the same windows, hence the same batches, packed by the codec; it
reads and writes nothing. A second bare loop (`at once`) plans its batches over all prompts together, as no window can.

Prompts: T2I-CompBench validation and training, PartiPrompts, dense DrawBench, from ../shared/data or $LIDIT_TEST_DATA;
once they are used up, pairs of them. Models: those of ../shared/data/models and demo/encoders/*-tuned.

    python tests/benchmarks/embed_job.py --tokens 200000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import report
import torch

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.store import columns
from lidit.store.codec import bytes_per_token

ROWS_PER_FRAGMENT = 1024  # the default of ingest
PADDED_TOKENS = 256  # what a dense store keeps of every prompt, in bf16
TARGET = 0.9


def encoders(chosen: list[Path]) -> list[EncoderConfig]:
    """Configs of the model folders, fp32 arithmetic and bf16 storage; chat template where the tokenizer has one."""
    folders = chosen or [
        *sorted((report.data_folder() / "models").iterdir()),
        *sorted((report.ROOT / "demo" / "encoders").glob("*-tuned")),
    ]
    made = []
    for folder in folders:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        chat = "chat_template" in settings or (folder / "chat_template.jinja").is_file()
        name = folder.name.replace("-", "_")
        made.append(EncoderConfig(name, str(folder.resolve()), template="chat" if chat else "plain", dtype="fp32"))
    return made


def prompts_of(encoder: PromptEncoder, tokens: int) -> list[str]:
    """Distinct one-line prompts in a seeded order, of at least that many tokens together."""
    base = [" ".join(prompt.split()) for prompt in report.real_prompts(train=True)]
    random.Random(0).shuffle(base)
    made: dict[str, None] = {}
    total = 0
    for candidates in itertools.chain([base], _pairs(base)):
        new = [prompt for prompt in dict.fromkeys(candidates) if prompt not in made]
        for prompt, ids in zip(new, encoder.tokenize(new)[0]):
            if total >= tokens:
                return list(made)
            made[prompt] = None
            total += len(ids)
    raise AssertionError("pairs never end")


def _pairs(base: list[str]) -> Iterator[list[str]]:
    for seed in itertools.count(1):
        other = random.Random(seed).sample(base, len(base))
        yield [f"{first} {second}" for first, second in zip(base, other)]


def bare(config: EncoderConfig, prompts: list[str], threads: int, window: int | None) -> dict[str, float]:
    """Tokenises and encodes, window by window (None: all at once), keeping each window's results until the next."""
    torch.set_num_threads(threads)
    encoder = PromptEncoder(config)
    list(encoder.encode(encoder.tokenize(prompts[:64])[0]))  # loads the model, makes the prefix, warms up
    tokens = slots = 0
    start = time.perf_counter()
    for first in range(0, len(prompts), window or len(prompts)):
        ids, _ = encoder.tokenize(prompts[first : first + (window or len(prompts))])
        made = list(encoder.encode(ids))
        tokens += sum(int(batch.lengths.sum()) for batch in made)
        slots += sum(batch.slots for batch in made)
    seconds = time.perf_counter() - start
    return {"tokens": tokens, "slots": slots, "seconds": seconds, "tokens_per_second": tokens / seconds}


def job(config: EncoderConfig, store: str, threads: int) -> dict[str, float]:
    """Runs the real job with one actor; its summary, and the bytes of the stored embeddings alone."""
    from pipelines import embed
    from pipelines.engine.pool import ActorsConfig
    from pipelines.engine.table import Table

    actors = ActorsConfig(min=1, max=1, num_cpus=threads, num_gpus=0)
    summary = embed.main(embed.EmbedConfig(store=store, encoders=(config,), actors=actors))
    lengths = Table(f"{store}/{columns.SAMPLES_TABLE}").open().to_table([columns.length(columns.CAPTION, config.name)])
    made = json.loads(summary.to_json())
    per_token = bytes_per_token(config.codec, PromptEncoder(config).width)
    made["embed_bytes_per_row"] = float(np.mean(lengths.column(0).to_numpy())) * per_token
    return made


def ingest(store: str, file: str) -> dict[str, float]:
    """The prompts as a table."""
    from pipelines import ingest as job_

    return json.loads(job_.main(job_.IngestConfig(f"prompts:{file}", store, ROWS_PER_FRAGMENT)).to_json())


def alone(what: str, **arguments: object) -> dict[str, float]:
    """Runs one of `CHILDREN` in a process of its own, with nothing of the one before in memory."""
    return report.alone(__file__, what, **arguments)


def child(what: str, arguments: dict[str, object]) -> dict[str, float]:
    """The other side of `alone`."""
    if "config" in arguments:
        arguments["config"] = EncoderConfig(**arguments["config"])  # type: ignore[arg-type]
    if what == "bare":
        arguments["prompts"] = Path(str(arguments.pop("file"))).read_text("utf-8").split("\n")
    return {"bare": bare, "job": job, "ingest": ingest}[what](**arguments)  # type: ignore[operator]


def measure(config: EncoderConfig, options: argparse.Namespace, folder: str) -> tuple[list[str], list[str], float]:
    """One encoder -> its row of the speed table, its row of the size table, its median ratio."""
    encoder = PromptEncoder(config)
    prompts = prompts_of(encoder, options.tokens)
    file, table = Path(folder, "prompts.txt"), Path(folder, "ingested")
    file.write_text("\n".join(prompts), "utf-8")
    alone("ingest", store=str(table), file=str(file))
    common = {"config": vars(config), "threads": options.threads}
    ratios, rates, summaries, at_once = [], [], [], []
    for repeat in range(options.repeats):
        store = shutil.copytree(table, f"{folder}/store{repeat}")
        before = alone("bare", file=str(file), window=ROWS_PER_FRAGMENT, **common)
        summary = alone("job", store=str(store), **common)
        after = alone("bare", file=str(file), window=ROWS_PER_FRAGMENT, **common)
        at_once.append(alone("bare", file=str(file), window=None, **common)["tokens_per_second"])
        assert before["tokens"] == summary["counts"]["tokens"] and before["slots"] == summary["counts"]["slots"]  # type: ignore[index]
        rates.append(statistics.mean([before["tokens_per_second"], after["tokens_per_second"]]))
        ratios.append(summary["tokens_per_second"] / rates[-1])
        summaries.append(summary)
        shutil.rmtree(store)
    shutil.rmtree(table)
    ratio = statistics.median(ratios)
    speed = statistics.median(summary["tokens_per_second"] for summary in summaries)
    padded, summary = PADDED_TOKENS * encoder.width * 2, summaries[0]
    tokens = int(before["tokens"])
    return (
        [
            config.name, f"{tokens:,} in {len(prompts):,} rows", f"{speed:,.0f}", f"{statistics.median(rates):,.0f}",
            f"{statistics.median(at_once):,.0f}", report.verdict(ratio, TARGET, form="{:.2f}"),
            f"{min(ratios):.2f}-{max(ratios):.2f}", f"{summary['padding_waste']:.1%}",
        ],
        [
            config.name, str(encoder.width), f"{tokens / len(prompts):.1f}", f"{summary['embed_bytes_per_row']:,.0f}",
            f"{summary['bytes_per_row']:,.0f}", f"{padded:,}", f"{padded / summary['bytes_per_row']:.1f}x",
        ],
        ratio,
    )  # fmt: skip


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000, help="prompt tokens of each encoder at least (200000)")
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="model folders instead of those named above")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], json.loads(options.child[1]))))
        return
    configs = encoders(options.models)
    with tempfile.TemporaryDirectory() as folder:
        speeds, sizes, ratios = zip(*(measure(config, options, folder) for config in configs))
    made = report.Report(f"Embed job against the bare encoder, one actor of {options.threads} CPU")
    header = [
        "encoder", "prompt tokens", "job tokens/s", "bare tokens/s", "bare, at once", "job / bare", "range", "padding",
    ]  # fmt: skip
    made.table(f"medians of {options.repeats}; worst ratio {min(ratios):.2f}", header, speeds)
    header = [
        "encoder",
        "E",
        "tokens/row",
        "embeddings B/row",
        "file B/row",
        f"padded to {PADDED_TOKENS} B/row",
        "saving",
    ]
    made.table("bytes of a row: ragged bf16 as stored, and a dense bf16 array", header, sizes)
    made.record(options.record)


if __name__ == "__main__":
    main()

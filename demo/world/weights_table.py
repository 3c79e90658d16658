"""The table that the demo's weights are trained on: plain scenes and short prompts, as Parquet for `lidit ingest`.

    python -m demo.world.weights_table --scenes 40000 --out build/demo-weights/scenes.parquet
    lidit ingest --store build/demo-weights/store --source parquet:build/demo-weights/scenes.parquet

A row is a scene: `image` (PNG of `SIDE` x `SIDE` pixels) and `caption`. Scenes come in the order of their seeds, without those
that hold a held-out pair of objects (`is_held_out`), so that the exam can ask for pairs never seen together.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from demo.world.language import TRAIN_SEEDS
from demo.world.prompts import is_held_out, plain_scene, scene_prompt
from demo.world.scenes import render

SIDE = 48
"""Pixels. Smaller than the other demo images: 36 image tokens are what two CPU cores can train on."""

LONGEST = 16
"""Tokens of a prompt at most. One in 14 had more, and a batch is padded to its longest: they made every batch twice as long."""

TRAIN_SHARES = (0.2, 0.35, 0.35, 0.1)  # of FORMS: more places than people ask for, they are the hardest to learn
ROWS = 2048  # of a row group: a worker's unit of reading


def example(seed: int) -> dict[str, object]:
    """Makes the row of one scene."""
    scene = plain_scene(seed)
    buffer = io.BytesIO()
    render(scene, SIDE, SIDE).save(buffer, format="PNG")
    rng = np.random.default_rng([seed, 5])
    prompts = (scene_prompt(scene, rng, TRAIN_SHARES) for _ in itertools.count())
    return {"image": buffer.getvalue(), "caption": next(prompt for prompt in prompts if tokens(prompt) <= LONGEST)}


def tokens(prompt: str) -> int:
    """Returns how many tokens a prompt has under the LLM that needs more of them."""
    return max(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for tokenizer in tokenizers())


@functools.cache
def tokenizers() -> tuple[PreTrainedTokenizerBase, ...]:
    """Loads the tokenizers of the demo's two LLMs."""
    folder = Path(__file__).resolve().parent.parent / "encoders"
    return tuple(AutoTokenizer.from_pretrained(folder / name) for name in ("llama-tuned", "qwen-tuned"))


def write(count: int, out: Path) -> None:
    """The first `count` scenes as a Parquet file: the same count gives the same file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field("image", pa.large_binary()), pa.field("caption", pa.string())])
    with pq.ParquetWriter(out, schema) as writer:
        seeds = itertools.islice((seed for seed in TRAIN_SEEDS if not is_held_out(plain_scene(seed))), count)
        while group := list(itertools.islice(seeds, ROWS)):
            rows = [example(seed) for seed in group]
            writer.write_table(pa.Table.from_pylist(rows, schema), row_group_size=ROWS)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40_000, help="rows (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/demo-weights/scenes.parquet"))
    arguments = parser.parse_args()
    write(arguments.scenes, arguments.out)


if __name__ == "__main__":
    main()

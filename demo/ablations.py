"""The ablations of the paper's tables 2 to 6, at the demo's size: one LI-DiT per setting and seed, trained and scored alike.

    python -m demo.ablations --out build/ablations --steps 2000 --seeds 3
    python -m demo.ablations --out build/ablations --settings llm_alone refiner_full --steps 500

Every cell is made by the project's own jobs (train, export, generate, score), each in its own process, on one table. All of
them go on where they stopped, so the same command does: cells that are done are not touched. Results: `results.json`,
`results.md`, and `position_bias.svg`. What was run and seen is in docs/ablations.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from demo import weights_table
from demo.bias_plot import plot, quarters_of
from demo.prompts import bias_prompts, exam_prompts
from lidit.text import PAPER_INSTRUCTION, EncoderConfig
from trainer.metrics import read_lines

ROOT = Path(__file__).resolve().parent.parent
TEXT = "caption_original"
FLOW_SHIFT = 4.0
"""A scene of 36 tokens is laid out while little but noise is there: timesteps are drawn where the prompt decides."""
HELD_OUT = "held-out loss"


def encoder(family: str, tuned: bool, instruction: bool) -> EncoderConfig:
    """A demo LLM: base or tuned, with or without the instruction before the prompt; named after that."""
    kind = "tuned" if tuned else "base"
    return EncoderConfig(
        name=f"{family}_{kind}_{'instruction' if instruction else 'prompt'}",
        model=str(ROOT / "demo" / "encoders" / f"{family}-{kind}"),
        instruction=PAPER_INSTRUCTION if instruction else "",
        template="chat" if tuned else "plain",
        dtype="fp32",
    )


@dataclass(frozen=True)
class Setting:
    """A row of the paper's tables."""

    name: str
    encoders: tuple[EncoderConfig, ...]
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of `LIDiTConfig` that differ from its defaults."""
    paper: tuple[float, float] | None = None
    """What the paper measured: mean of T2I-CompBench's attributes, DPG-Bench."""


T5 = EncoderConfig("t5_base", str(ROOT / "demo" / "encoders" / "t5-base"), instruction="", dtype="fp32")
BASE, TUNED = encoder("llama", False, False), encoder("llama", True, False)
INSTRUCTED, QWEN = encoder("llama", True, True), encoder("qwen", True, True)
DIRECT = {"refiner_blocks": 0}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("encoder_only", (T5,), DIRECT, (48.82, 73.56)),
        Setting("encoder_only_refiner", (T5,), {}, (49.52, 74.63)),
        Setting("llm_alone", (BASE,), DIRECT, (38.72, 66.15)),
        Setting("tuned", (TUNED,), DIRECT, (44.22, 71.81)),
        Setting("tuned_instruction", (INSTRUCTED,), DIRECT, (48.41, 73.45)),
        Setting("base_instruction", (encoder("llama", False, True),), DIRECT, (38.47, 65.84)),
        Setting("refiner_causal", (BASE,), {"refiner_attention": "causal"}, (45.84, 71.01)),
        Setting("refiner_full", (BASE,), {}, (54.02, 77.08)),
        Setting("refiner_1_block", (BASE,), {"refiner_blocks": 1}, (48.25, 73.83)),
        Setting("refiner_3_blocks", (BASE,), {"refiner_blocks": 3}, (55.13, 77.65)),
        Setting("refiner_no_gate", (BASE,), {"refiner_gate": False}, (53.47, 76.68)),
        Setting("llama_full", (INSTRUCTED,), {}, (56.79, 78.62)),
        Setting("qwen_full", (QWEN,), {}, (56.13, 78.49)),
        Setting("both_concat", (INSTRUCTED, QWEN), {"fusion": "concat"}, (58.32, 79.04)),
        Setting("both_collaborative", (INSTRUCTED, QWEN), {}, (60.31, 80.25)),
    )
}


@dataclass(frozen=True)
class Grid:
    """What is run."""

    out: Path
    settings: tuple[Setting, ...]
    seeds: int
    steps: int
    scenes: int
    per_task: int
    bias: int
    precision: str = "fp32"
    batch_size: int = 64
    num_inference_steps: int = 20
    guidance_scale: float = 3.5

    @property
    def store(self) -> Path:
        """The table that all cells are trained on."""
        return self.out / "store"


def run(grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """Every cell of the grid that is not done yet -> the results of all, also written down. Setting -> scores of its seeds."""
    prepare(grid)
    for seed in range(grid.seeds):  # seed by seed: a grid that is stopped early has whole rows
        for setting in grid.settings:
            cell(grid, setting, seed)
            report(grid)
    return results(grid)


def prepare(grid: Grid) -> None:
    """The table, its features under every encoder of the grid, the exam. What is there is left alone."""
    scenes = grid.out / f"scenes-{grid.scenes}.parquet"
    if not scenes.exists():
        weights_table.write(grid.scenes, scenes)
    _lidit("ingest", "--store", grid.store, "--source", f"parquet:{scenes}", "--columns.caption", "caption")
    _lidit("latents", "--store", grid.store, "--model", ROOT / "demo" / "vae", "--resolution", weights_table.SIDE)
    needed = {one.name: one for setting in grid.settings for one in setting.encoders}
    encoders = json.dumps([dataclasses.asdict(one) for one in needed.values()])
    _lidit("embed", "--store", grid.store, "--text", f"[{TEXT}]", f"--encoders={encoders}")
    exam = [*exam_prompts(grid.per_task), *bias_prompts(grid.bias)]
    _exam(grid).write_text("".join(json.dumps(record) + "\n" for record in exam))


def cell(grid: Grid, setting: Setting, seed: int) -> None:
    """One model: trained, exported, its pictures made and scored."""
    name = f"{setting.name}-{seed}"
    folder = grid.out / "cells" / name
    if (folder / "scores.json").exists():
        return
    _lidit(
        "train", "--name", name, "--store", grid.store, "--storage", grid.out / "runs", "--seed", seed,
        "--vae", ROOT / "demo" / "vae", "--model.changes", json.dumps({"position": "rope", **setting.model}),
        "--data.encoders", json.dumps([one.name for one in setting.encoders]), "--data.text_mix", json.dumps({TEXT: 1.0}),
        "--data.pad_multiple", weights_table.LONGEST, "--phases.0.steps", grid.steps,
        "--phases.0.global_batch_size", grid.batch_size, "--phases.0.resolution", weights_table.SIDE,
        "--optimizer.name", "muon", "--optimizer.learning_rate", 3e-3,
        "--optimizer.schedule", "linear", "--optimizer.fall_share", 0.3,
        "--optimizer.warmup_steps", min(100, grid.steps // 2), "--ema.decay", 0.99, "--zero.stage", 0, "--num_workers", 1,
        "--precision", grid.precision, "--microbatch_size", grid.batch_size,
        "--model.compile", "blocks" if grid.precision == "bf16" else "null",
        "--phases.0.flow_shift", FLOW_SHIFT, "--data.holdout", 0.025, "--validation.every_steps", grid.steps,
        "--validation.rows", 512, "--checkpoint.every_steps", max(1, min(500, grid.steps)), "--checkpoint.keep_last", 1,
    )  # fmt: skip
    weights = folder / "weights"
    _lidit("export", "--run", grid.out / "runs" / name, "--out", weights, "--overwrite", "true")
    samples = folder / "samples"
    _lidit(
        "generate", "--weights", weights, "--prompts", _exam(grid), "--store", samples, "--images_per_prompt", 1,
        "--sampler.num_inference_steps", grid.num_inference_steps, "--sampler.guidance_scale", grid.guidance_scale,
    )  # fmt: skip
    _lidit("score", "--store", samples)
    scores = json.loads((samples / "scores.json").read_text())["scenes"]
    validated = read_lines(grid.out / "runs" / name / "metrics.jsonl", "validation")[-1]
    figures = {HELD_OUT: validated["ema_loss"], **{name: figure["value"] for name, figure in scores.items()}}
    beside = folder / "scores.json.new"
    beside.write_text(json.dumps(figures, indent=2))
    os.replace(beside, folder / "scores.json")


def results(grid: Grid) -> dict[str, list[dict[str, Any]]]:
    """Setting -> the scores of those of its seeds that are done."""
    found: dict[str, list[dict[str, Any]]] = {}
    for setting in grid.settings:
        paths = [grid.out / "cells" / f"{setting.name}-{seed}" / "scores.json" for seed in range(grid.seeds)]
        if done := [json.loads(path.read_text()) for path in paths if path.exists()]:
            found[setting.name] = done
    return found


def report(grid: Grid) -> None:
    """Writes results.json, results.md and position_bias.svg of what is done so far."""
    found = results(grid)
    (grid.out / "results.json").write_text(json.dumps(found, indent=2))
    names = list(dict.fromkeys(name for scores in found.values() for one in scores for name in one))
    shown = [name for name in names if "strict" not in name and "," not in name]
    lines = [
        f"{grid.steps:,} steps of {grid.batch_size}, {grid.scenes:,} scenes; mean ± deviation over seeds",
        "",
        f"| setting | seeds | {' | '.join(shown)} | paper: T2I, DPG |",
        "|---|---|" + "---|" * (len(shown) + 1),
    ]
    for name, scores in found.items():
        cells = [_mean([one[figure] for one in scores if figure in one]) for figure in shown]
        paper = SETTINGS[name].paper
        lines.append(
            f"| {name} | {len(scores)} | {' | '.join(cells)} | {f'{paper[0]:.2f}, {paper[1]:.2f}' if paper else ''} |"
        )
    (grid.out / "results.md").write_text("\n".join(lines) + "\n")
    series = {name: bias for name, scores in found.items() if (bias := position_bias(scores))}
    if series:
        (grid.out / "position_bias.svg").write_text(plot(series))


def position_bias(scores: Sequence[dict[str, Any]]) -> list[float]:
    """Share of the objects that are there with their colour, by quarter of the prompt, mean over seeds."""
    return np.mean([quarters_of(one) for one in scores], axis=0).tolist()


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def _exam(grid: Grid) -> Path:
    return grid.out / f"exam-{grid.per_task}-{grid.bias}.jsonl"


def _lidit(*argv: object) -> None:
    """Runs a job to its end. Raises RuntimeError with its last words where it fails."""
    command = [sys.executable, "-m", "lidit.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"lidit {' '.join(map(str, argv))}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(f"done: lidit {argv[0]}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/ablations"), help="folder of all (default %(default)s)")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which rows; all by default"
    )
    parser.add_argument("--seeds", type=int, default=3, help="models of each setting (default %(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="of training (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=20_000, help="rows of the table (default %(default)s)")
    parser.add_argument("--per_task", type=int, default=24, help="exam prompts of a task (default %(default)s)")
    parser.add_argument("--bias", type=int, default=48, help="prompts of the position-bias probe (default %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of training; bf16, with compiled blocks, pays on CPUs with AMX (default fp32)",
    )
    values = parser.parse_args(argv)
    grid = Grid(
        out=values.out.resolve(),
        settings=tuple(SETTINGS[name] for name in values.settings),
        seeds=values.seeds,
        steps=values.steps,
        scenes=values.scenes,
        per_task=values.per_task,
        bias=values.bias,
        precision=values.precision,
    )
    grid.out.mkdir(parents=True, exist_ok=True)
    run(grid)
    print((grid.out / "results.md").read_text())


if __name__ == "__main__":
    main()

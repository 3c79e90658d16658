"""Learning curves of the grid's settings: how well models follow prompts after so many images, by setting and seed.

    python -m demo.ablation.learning_curves --out build/curves --settings encoder_only llm_alone refiner_full --seeds 2 \\
      --images 12800 25600 51200 102400

Cells (setting x seed) are trained in one process (`demo/ablation/cell.py`), all to the first budget, then all to the second,
and so on: a run that is stopped has whole rows. It goes on by the same command. Every cell has one JSON in `--results`, with
a point for every budget; what they say is laid out by `python -m demo.ablation.curves_table`. A GPU is used where there is
one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demo.ablation.cell import Cell, CellConfig
from demo.ablation.cell_table import Prompts, encode_prompts, scene_latents
from demo.ablation.cell_worlds import WORLDS
from demo.ablation.following import HeldOutExam, PictureExam, SwapExam
from demo.ablation.settings import SETTINGS, Setting
from demo.world.language import HELD_OUT_SEEDS, TRAIN_SEEDS
from demo.world.prompts import bias_prompts, exam_prompts, plain_scene
from demo.world.swaps import swaps, training_prompt
from lidit.frozen.vae import load_vae

ROOT = Path(__file__).resolve().parent.parent.parent
SAVE_EVERY = 400  # steps


@dataclass(frozen=True)
class Curves:
    """Settings, seeds and budgets of a run, and where its results go."""

    out: Path
    results: Path
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    images: tuple[int, ...]
    cell: CellConfig = CellConfig()
    world: str = "plain"
    scenes: int = 60_000
    side: int = 32
    swaps: int = 96
    held_out: int = 256
    per_task: int = 24
    bias: int = 48
    device: str = "cpu"

    def path(self, setting: Setting, seed: int) -> Path:
        """Where a cell's figures are written."""
        shape = f"{self.cell.width}x{self.cell.depth}-{self.side}px"
        return self.results / f"{setting.name}-{self.world}-{shape}-{seed}.json"


@dataclass(frozen=True)
class Rows:
    """Training rows and exams of a run, on its device."""

    latents: torch.Tensor
    prompts: Prompts
    exams: dict[str, Any]
    """Name of the figures -> what asks a cell for them."""


def run(curves: Curves, after: Callable[[], object] = lambda: None) -> None:
    """Makes every point that is not there yet; `after` is called after each."""
    if all(_budgets(curves.path(*cell), curves) == [] for cell in itertools.product(curves.settings, curves.seeds)):
        return
    rows = prepare(curves)
    for images in curves.images:
        for seed, setting in itertools.product(curves.seeds, curves.settings):
            if images in _budgets(curves.path(setting, seed), curves):
                point(curves, rows, setting, seed, images)
                after()


def prepare(curves: Curves) -> Rows:
    """Training rows, and exams of held-out scenes, under all encoders of the settings."""
    device, folder = torch.device(curves.device), curves.out / "rows"
    encoders = list({one.name: one for setting in curves.settings for one in setting.encoders}.values())
    vae = load_vae(str(ROOT / "demo" / "vae"), device=device)
    world = WORLDS[curves.world]
    training = world.seeds(TRAIN_SEEDS, curves.scenes)
    asked = swaps(curves.swaps, world.kinds, world.fits)
    unseen = world.seeds(HELD_OUT_SEEDS[::-1], curves.held_out, held_out_pairs=True)[::-1]
    records = [one for one in [*exam_prompts(curves.per_task), *bias_prompts(curves.bias)] if one["tag"] in world.tasks]

    def latents(seeds: Sequence[int]) -> torch.Tensor:
        return scene_latents(folder, seeds, curves.side, vae, device)

    def prompts(texts: Sequence[str]) -> Prompts:
        return encode_prompts(folder, texts, encoders, device)

    return Rows(
        latents(training),
        prompts([_prompt(seed) for seed in training]),
        {
            "held_out": HeldOutExam(latents(unseen), prompts([_prompt(seed) for seed in unseen])),
            "swaps": SwapExam(
                tuple(swap.kind for swap in asked),
                latents([swap.seed for swap in asked]),
                prompts([swap.right for swap in asked]),
                prompts([swap.wrong for swap in asked]),
            ),
            "pictures": PictureExam(
                tuple(records),
                prompts([record["prompt"] for record in records]),
                (vae.channels, curves.side // vae.downscale, curves.side // vae.downscale),
                vae,
            ),
        },
    )


def point(curves: Curves, rows: Rows, setting: Setting, seed: int, images: int) -> None:
    """Trains a cell up to a budget, examines its averaged weights, and adds the figures to its file."""
    path, saved = curves.path(setting, seed), curves.out / "checkpoints" / f"{curves.path(setting, seed).stem}.pt"
    encoders = [one.name for one in setting.encoders]
    cell = Cell(curves.cell, encoders, setting.model, seed, rows.latents, rows.prompts)
    if saved.exists():
        cell.load(saved)
    record = _read(path) or _head(curves, setting, seed, cell)
    began, first, loss = time.monotonic(), cell.step, None
    last = -(-images // curves.cell.batch_size)
    while cell.step < last:
        loss = cell.advance(min(SAVE_EVERY, last - cell.step))
        cell.save(saved)
    seconds = time.monotonic() - began
    with cell.averaged():
        figures = {name: exam(cell) for name, exam in rows.exams.items()}
    added = {
        "images": images,
        "training_loss": loss,
        "images_per_second": round((last - first) * curves.cell.batch_size / seconds, 1) if last > first else None,
        "exam_seconds": round(time.monotonic() - began - seconds, 1),
        **figures,
    }
    record["points"] = sorted([*record["points"], added], key=lambda one: one["images"])
    _write(record, path)
    print(f"{path.stem}: {images:,} images, {added['images_per_second']} a second, {summary(added)}", file=sys.stderr)


def summary(found: dict[str, Any]) -> str:
    """Describes a point in one line."""
    held_out, pictures = found["held_out"], " ".join(f"{task} {share:.2f}" for task, share in found["pictures"].items())
    accuracies = " ".join(f"{kind} {figure['accuracy']:.2f}" for kind, figure in found["swaps"].items())
    return f"loss {held_out['loss']:.4f}, told {held_out['told']:.4f}, {accuracies}; pictures: {pictures}"


def _prompt(seed: int) -> str:
    return training_prompt(plain_scene(seed), np.random.default_rng([seed, 9]))


def _budgets(path: Path, curves: Curves) -> list[int]:
    """Lists the budgets that a cell's file lacks."""
    there = {one["images"] for one in (_read(path) or {"points": []})["points"]}
    return [images for images in curves.images if images not in there]


def _head(curves: Curves, setting: Setting, seed: int, cell: Cell) -> dict[str, Any]:
    """What a cell's file says besides its points."""
    return {
        "setting": setting.name,
        "seed": seed,
        "cell": dataclasses.asdict(curves.cell),
        "parameters": sum(parameter.numel() for parameter in cell.parameters),
        "world": curves.world,
        "scenes": curves.scenes,
        "side": curves.side,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if curves.device == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "points": [],
    }


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)


def _commit() -> str:
    """Returns the commit of the working tree, with a `+` where files differ from it."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU {names[0] if names else platform.processor()}"


def add_arguments(
    parser: argparse.ArgumentParser, out: Path, settings: Sequence[str], seeds: int, images: Sequence[int]
) -> None:
    """The flags of a run, with these defaults."""
    add = parser.add_argument
    add("--out", type=Path, default=out, help="rows, checkpoints, results (default %(default)s)")
    add("--results", type=Path, help="folder of the cells' JSON files (default: OUT/cells)")
    add("--settings", nargs="+", choices=SETTINGS, default=list(settings), help="(default %(default)s)")
    add("--seeds", type=int, default=seeds, help="cells of each setting (default %(default)s)")
    add("--images", type=int, nargs="+", default=list(images), help="budgets (default %(default)s)")
    add("--world", choices=WORLDS, default="plain", help="which scenes (default %(default)s)")
    add("--scenes", type=int, default=60_000, help="training rows (default %(default)s)")
    add("--side", type=int, default=32, help="pixels of an image (default %(default)s)")
    add("--depth", type=int, default=3, help="DiT blocks (default %(default)s)")
    add("--width", type=int, default=64, help="of the model, heads of 32 (default %(default)s)")
    add("--swaps", type=int, default=96, help="of every kind (default %(default)s)")
    add("--held_out", type=int, default=256, help="scenes for the held-out loss (default %(default)s)")
    add("--per_task", type=int, default=24, help="exam prompts of a task (default %(default)s)")
    add("--bias", type=int, default=48, help="prompts of the position-bias probe (default %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    add("--threads", type=int, default=1, help="of torch, on a CPU (default %(default)s)")


def curves_of(values: argparse.Namespace) -> Curves:
    """Makes the run that the flags describe."""
    torch.set_num_threads(values.threads)
    precision = values.precision or ("bf16" if values.device == "cuda" else "fp32")
    shape = CellConfig(depth=values.depth, width=values.width, heads=max(1, values.width // 32), precision=precision)
    same = ("out", "world", "scenes", "side", "swaps", "held_out", "per_task", "bias", "device")
    return Curves(
        results=values.results or values.out / "cells",
        settings=tuple(SETTINGS[name] for name in values.settings),
        seeds=tuple(range(values.seeds)),
        images=tuple(values.images),
        cell=shape,
        **{name: getattr(values, name) for name in same},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings = ["encoder_only", "llm_alone", "refiner_full"]
    add_arguments(parser, Path("build/curves"), settings, seeds=2, images=[12_800, 25_600, 51_200, 102_400])
    run(curves_of(parser.parse_args(argv)))


if __name__ == "__main__":
    main()

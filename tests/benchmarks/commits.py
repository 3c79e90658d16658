"""Whether this checkout is as fast as another: ingest, embed and saving a checkpoint, before and after in one run.

The two take turns (before, after; after, before; ...), each job in a process of its own; a ratio is taken pair by pair, so
that a machine which changes its pace changes both. Figures are medians of the pairs.

- ingest: a WebDataset of small photos, one actor; from the first unit's begin to the last one's end.
- embed: real prompts by the demo's two tuned LLMs, one actor; likewise.
- save: `lidit train` that saves after every step; from one manifest to the next, the step between them included.

    git worktree add ../before COMMIT
    python tests/benchmarks/commits.py --before ../before
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ingest
import report

TARGET = 0.97
ACTOR = ("--actors.min", 1, "--actors.max", 1, "--actors.num_cpus", 1, "--actors.num_gpus", 0)
PARTS = ("ingest", "embed", "save")


def lidit(checkout: Path, *argv: object) -> dict[str, Any]:
    """Runs a job of a checkout -> its summary."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lidit.cli", *map(str, argv)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"lidit {argv[0]} of {checkout} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ingested(checkout: Path, inputs: Path, store: Path) -> float:
    """Rows a second."""
    made = lidit(checkout, "ingest", "--store", store, "--source", f"webdataset:{inputs}", *ACTOR)
    return made["rows"] / made["work_seconds"]


def embedded(checkout: Path, inputs: Path, store: Path) -> float:
    """Rows a second; the rows are in the table before."""
    lidit(checkout, "ingest", "--store", store, "--source", f"prompts:{inputs / 'prompts.txt'}", *ACTOR)
    made = lidit(checkout, "embed", "--store", store, "--text", "[caption]", *ACTOR)
    return made["rows"] / made["work_seconds"]


def saved(checkout: Path, inputs: Path, store: Path) -> float:
    """Steps, each saved, a second; the features are made by this checkout for both."""
    steps = 24
    lidit(
        checkout, "train", "--store", inputs / "features", "--storage", store, "--name", "saves", "--num_workers", 1,
        "--data.text_mix", json.dumps({"caption_original": 1.0}),
        "--phases.0.steps", steps, "--phases.0.global_batch_size", 2, "--phases.0.resolution", 32, "--microbatch_size", 2,
        "--zero.stage", 0, "--checkpoint.every_steps", 1, "--checkpoint.keep_last", steps,
    )  # fmt: skip
    times = sorted(path.stat().st_mtime for path in (store / "saves").rglob("manifest.json"))
    if len(times) != steps:
        raise RuntimeError(f"{checkout}: expected {steps} checkpoints, received {len(times)}")
    return 1 / statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


RATES = {"ingest": ingested, "embed": embedded, "save": saved}


def prepare(folder: Path, parts: list[str], rows: int, prompts: int) -> None:
    """What the jobs read."""
    if "ingest" in parts:
        ingest.write(folder, rows, small=True)
        for path in folder.glob("*.parquet"):
            path.unlink()
    (folder / "prompts.txt").write_text("\n".join(" ".join(one.split()) for one in report.real_prompts()[:prompts]))
    if "save" in parts:
        features = folder / "features"
        lidit(report.ROOT, "ingest", "--store", features, "--source", "scenes:64", *ACTOR)
        lidit(report.ROOT, "embed", "--store", features, "--text", "[caption_original]", *ACTOR)
        lidit(report.ROOT, "latents", "--store", features, "--resolution", 32, *ACTOR)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="checkout that this one is compared with")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="of what (all)")
    parser.add_argument("--rows", type=int, default=6000, help="images to ingest (6000)")
    parser.add_argument("--prompts", type=int, default=4000, help="prompts to embed (4000)")
    arguments = parser.parse_args()
    before = arguments.before.resolve()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=before, capture_output=True, text=True).stdout
    made = report.Report(f"This checkout against {commit.strip()}: ingest, embed, save")
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        inputs, store = Path(temporary, "inputs"), Path(temporary, "store")
        inputs.mkdir()
        prepare(inputs, arguments.parts, arguments.rows, arguments.prompts)
        for part in arguments.parts:
            rates: dict[str, list[float]] = {"before": [], "after": []}
            turns = [("before", before), ("after", report.ROOT)]
            for repeat in range(arguments.repeats):
                for name, checkout in turns if repeat % 2 == 0 else turns[::-1]:
                    rates[name].append(RATES[part](checkout, inputs, store))
                    shutil.rmtree(store)
            ratios = [after / earlier for earlier, after in zip(rates["before"], rates["after"])]
            figures = [f"{statistics.median(rates[name]):,.1f}" for name in rates]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            lines.append([part, *figures, report.verdict(statistics.median(ratios), TARGET, form="{:.2f}"), spread])
            print(lines[-1], file=sys.stderr)
    made.table(
        "A second: rows, rows, saved steps", ["part", "before", "after", "after / before", "of the pairs"], lines
    )
    made.record(arguments.record)


if __name__ == "__main__":
    main()

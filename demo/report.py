"""The page that `make demo` ends with: what was done, how fast, what the model learnt, what it draws, and how that scores.

    python -m demo.report --store ./store --run ./runs/scenes --samples ./generated --html ./demo.html

One self-contained file. Everything on it is read from what the jobs left: the stores' run summaries and scores, the training's
metrics, the tables. What is not there is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lidit.images.pixels import open_image
from lidit.store import columns
from pipelines.engine.table import samples_of
from pipelines.report.charts import curves, intervals
from pipelines.report.page import fill, human
from pipelines.report.samples import Picture, thumbnail

FLOW = {
    "ingest": "images and their texts become rows",
    "recaption": "a vision-language model describes each image",
    "embed": "two frozen LLMs read every text, once",
    "latents": "an autoencoder encodes every image, once",
    "train": "a LI-DiT learns from the columns alone",
    "generate": "new prompts become pictures",
    "score": "each picture is looked at: is it what was asked for?",
}
PICTURES = 60  # at most, as many of each task
SAMPLES = 6
SMOOTH = 5  # points of the loss curve that a point of the smooth one is the mean of


@dataclass
class Step:
    """A box of the flow."""

    job: str
    seconds: float = 0.0
    figures: list[str] = field(default_factory=list)


@dataclass
class Drawn:
    """A generated picture and what the scorer says of it."""

    prompt: str
    task: str
    picture: Picture
    correct: bool | None
    reason: str


def summaries(store: str) -> dict[str, dict[str, Any]]:
    """Job -> the summary of its newest run that did something, else of its newest."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(store, columns.RUNS_FOLDER).glob("*/summary.json")):
        summary = json.loads(path.read_text())
        if summary["rows"] or summary["job"] not in found:
            found[summary["job"]] = summary
    return found


def metrics_of(run: str) -> list[dict[str, Any]]:
    """The lines of a training's metrics, in order; of a step that was done twice the later one."""
    path = Path(run, "metrics.jsonl")
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    newest = {(line.get("kind"), line.get("step")): line for line in lines if "step" in line}
    return sorted(newest.values(), key=lambda line: line["step"])


def flow(store: str, samples: str, lines: Sequence[dict[str, Any]]) -> list[Step]:
    """What was done, in the order of `FLOW`."""
    known = {
        **summaries(store),
        **{job: one for job, one in summaries(samples).items() if job in ("generate", "score")},
    }
    steps = []
    for job in FLOW:
        if job == "train" and (trained := _training(lines)):
            steps.append(trained)
        elif job in known:
            steps.append(_stage(job, known[job]))
    return steps


def _stage(job: str, summary: dict[str, Any]) -> Step:
    figures = [f"{summary['rows']:,} rows", f"{summary.get('rows_per_second', 0):,.0f} rows/s"]
    if summary.get("tokens_per_second"):
        figures.append(f"{summary['tokens_per_second']:,.0f} tokens/s")
    if summary.get("bytes_per_row"):
        figures.append(f"{human(summary['bytes_per_row'])} a row")
    if summary["errors"]:
        figures.append(f"{summary['errors']:,} errors")
    return Step(job, summary["seconds"], figures)


def _training(lines: Sequence[dict[str, Any]]) -> Step | None:
    train = [line for line in lines if line.get("kind") == "train"]
    if not train:
        return None
    steps = [now["step"] - before for now, before in zip(train, [0, *(line["step"] for line in train)])]
    seconds = sum(line.get("seconds_per_step", 0) * count for line, count in zip(train, steps))
    last = train[-1]
    figures = [f"{last['step']:,} steps", f"{last.get('images_seen', 0):,} images seen"]
    if seconds:
        figures.append(f"{last.get('images_seen', 0) / seconds:,.0f} images/s")
    return Step("train", seconds, [*figures, f"loss {last['loss']:.3f}"])


def loss_chart(lines: Sequence[dict[str, Any]]) -> Markup:
    """Training loss, its running mean, and the held-out losses."""
    train = [(line["step"], line["loss"]) for line in lines if line.get("kind") == "train"]
    smooth = [
        (train[end - 1][0], sum(loss for _, loss in train[end - SMOOTH : end]) / SMOOTH)
        for end in range(SMOOTH, len(train) + 1)
    ]
    held_out = [line for line in lines if line.get("kind") == "validation"]
    series = {
        "training": train,
        "training, mean": smooth,
        "held-out": [(line["step"], line["loss"]) for line in held_out if line.get("loss") is not None],
        "held-out, averaged weights": [
            (line["step"], line["ema_loss"]) for line in held_out if line.get("ema_loss") is not None
        ],
    }
    return curves({name: points for name, points in series.items() if points}, "step", "loss")


def drawn(samples: str, count: int = PICTURES) -> list[Drawn]:
    """Pictures of every task, as many of each, one per prompt."""
    table = samples_of(samples)
    if not table.exists():
        return []
    dataset = table.open()
    scored = "scenes_correct" in dataset.schema.names
    names = [columns.PROMPT, columns.PROMPT_RECORD, columns.SAMPLE_INDEX]
    rows = dataset.to_table(columns=[*names, *(["scenes_correct", "scenes_seen"] if scored else [])]).to_pylist()
    by_task: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if row[columns.SAMPLE_INDEX] == 0:
            by_task.setdefault(json.loads(row[columns.PROMPT_RECORD]).get("tag", "pictures"), []).append(place)
    share = max(1, count // max(1, len(by_task)))
    chosen = [(task, place) for task, places in by_task.items() for place in places[:share]]
    images = dataset.take([place for _, place in chosen], columns=[columns.IMAGE])[columns.IMAGE].to_pylist()
    made = []
    for (task, place), data in zip(chosen, images):
        picture = _picture(data) if data else None
        if picture is not None:
            row = rows[place]
            made.append(Drawn(row[columns.PROMPT], task, picture, row.get("scenes_correct"), _reason(row)))
    return made


def _picture(data: bytes) -> Picture | None:
    """Small pictures stay PNG: JPEG would blur what the score is about."""
    import base64

    image = open_image(data)
    if max(image.size) > 128:
        return thumbnail(data)
    return Picture(f"data:image/png;base64,{base64.b64encode(data).decode()}", image.height, image.width)


def _reason(row: dict[str, Any]) -> str:
    """What the scorer saw, for pictures that are wrong."""
    if row.get("scenes_seen") is None or row.get("scenes_correct"):
        return ""
    objects = json.loads(row["scenes_seen"])["objects"]
    return "seen: " + (", ".join(f"{one['colour']} {one['shape']}" for one in objects) or "nothing")


def commands_of(makefile: Path, target: str = "demo") -> list[str]:
    """The commands of a target, variables of the file filled in, without those that only speak."""
    text = makefile.read_text().replace("\\\n\t\t", "")
    values = dict(re.findall(r"^(\w+) :?\??= *(.*)$", text, re.MULTILINE))
    body = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    lines = [line.strip() for line in body.group(1).splitlines()] if body else []

    def filled(line: str) -> str:
        expanded = re.sub(r"\$\((\w+)\)", lambda found: values.get(found.group(1), found.group(0)), line)
        return expanded if expanded == line else filled(expanded)

    return [filled(line) for line in lines if not line.startswith("@")]


# -- the page ---------------------------------------------------------------------------------------------------------


def render(store: str, run: str, samples: Sequence[str], commands: Sequence[str]) -> str:
    """The page as HTML; `samples` are sample tables, the first one's scores stand in the header."""
    lines = metrics_of(run)
    steps = flow(store, samples[0] if samples else "", lines)
    scores = {place: _scores(place) for place in samples}
    rows = samples_of(store).open().count_rows()
    overall = next((one["overall"]["value"] for one in scores.values() if "overall" in one), None)
    tiles = [
        (f"{rows:,}", "scenes in the table"),
        (f"{sum(step.seconds for step in steps):,.0f} s", "in the jobs below"),
    ]
    tiles += [(f"{lines[-1]['step']:,}", "training steps")] if lines else []
    tiles += [(f"{overall:.2f}", "scene-GenEval")] if overall is not None else []
    outs = [
        {
            "place": place,
            "about": _about(place),
            "tasks": [(task, list(group)) for task, group in groupby(drawn(place), lambda one: one.task)],
            "scores": scores[place] and intervals(scores[place]),
        }
        for place in samples
    ]
    return fill(
        "report.html.j2", Path(__file__).parent, tiles=tiles, steps=steps, flow=FLOW, rows=_rows(store), run=run,
        loss=loss_chart(lines), outs=outs, commands=commands,
    )  # fmt: skip


def _rows(store: str) -> list[tuple[Picture, dict[str, str | None]]] | None:
    """A few rows of the feature table: image and both texts; None where it has no images."""
    dataset = samples_of(store).open()
    texts = [name for name in (columns.CAPTION, columns.CAPTION_ORIGINAL) if name in dataset.schema.names]
    if columns.IMAGE not in dataset.schema.names:
        return None
    shown = dataset.head(SAMPLES, columns=[columns.IMAGE, *texts]).to_pylist()
    pictures = [_picture(row[columns.IMAGE]) if row[columns.IMAGE] else None for row in shown]
    return [(picture, {name: row[name] for name in texts}) for picture, row in zip(pictures, shown) if picture]


def _scores(samples: str) -> dict[str, dict[str, float]]:
    path = Path(samples, "scores.json")
    return json.loads(path.read_text()).get("scenes", {}) if path.is_file() else {}


def _about(samples: str) -> str:
    """What made the pictures, from their run's config."""
    import yaml

    for path in sorted(Path(samples, columns.RUNS_FOLDER).glob("generate-*/config.yaml"), reverse=True):
        config = yaml.safe_load(path.read_text())
        sampler = config["sampler"]
        return (
            f"weights {config['weights']}, {sampler['num_inference_steps']} steps, guidance {sampler['guidance_scale']:g}; "
            f"✓ and ✗ are the scorer's"
        )
    return ""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="./store", help="feature store (default %(default)s)")
    parser.add_argument("--run", default="./runs/scenes", help="folder of the training (default %(default)s)")
    parser.add_argument("--samples", nargs="*", default=["./generated"], help="sample tables (default %(default)s)")
    parser.add_argument("--html", type=Path, default=Path("./demo.html"), help="file to write (default %(default)s)")
    parser.add_argument(
        "--makefile", type=Path, help="Makefile whose target `demo` made all this: its commands are listed"
    )
    arguments = parser.parse_args(argv)
    commands = commands_of(arguments.makefile) if arguments.makefile else []
    page = render(arguments.store, arguments.run, arguments.samples, commands)
    arguments.html.write_text(page, encoding="utf-8")
    print(f"{arguments.html}: {human(len(page.encode()))}", file=sys.stderr)


if __name__ == "__main__":
    main()

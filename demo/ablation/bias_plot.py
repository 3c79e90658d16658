"""The position-bias curve as a picture: how much of each quarter of a prompt is in the image.

    python -m demo.ablation.bias_plot --scores weights=generated/scores.json other=other/scores.json --out position_bias.svg

A standalone SVG, a line for each file of scores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.report.charts import element

WIDTH, HEIGHT, LEFT, TOP = 420, 220, 44, 14  # of the plot itself, in SVG units, and what is left of and above it
LEGEND, LINE, BELOW = 190, 18, 40
COLOURS = ("#1f5fa8", "#d1682b", "#2e8b57", "#8b3a8b", "#b8860b", "#c03050", "#4a4a4a", "#2aa5a5")
AXIS = "quarter of the prompt; share of its objects that are there in their colour"
DASHES = ("", "6 3", "2 2")  # where there are more lines than colours


def plot(series: Mapping[str, Sequence[float]]) -> str:
    """Name -> share of the objects found, by quarter of the prompt (0 to 1): a line each, with a legend."""
    quarters = max((len(values) for values in series.values()), default=0)
    steps = [LEFT + WIDTH * (number + 0.5) / max(1, quarters) for number in range(quarters)]
    parts = [element("rect", width="100%", height="100%", fill="white")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + HEIGHT * (1 - share)
        parts.append(element("line", x1=LEFT, x2=LEFT + WIDTH, y1=y, y2=y, stroke="#ddd"))
        parts.append(element("text", f"{share:g}", x=LEFT - 6, y=y + 4, text_anchor="end"))
    words = [*((x, 16, f"{number}") for number, x in enumerate(steps, 1)), (LEFT + WIDTH / 2, 33, AXIS)]
    parts += [element("text", text, x=x, y=TOP + HEIGHT + down, text_anchor="middle") for x, down, text in words]
    for number, (name, values) in enumerate(series.items()):
        dash = DASHES[number // len(COLOURS) % len(DASHES)]
        style = {"fill": "none", "stroke": COLOURS[number % len(COLOURS)], "stroke_width": 2, "stroke_dasharray": dash}
        points = " ".join(f"{x:g},{TOP + HEIGHT * (1 - value):.1f}" for x, value in zip(steps, values))
        y = TOP + LINE * number + 8
        parts.append(element("polyline", points=points, **style))
        parts.append(element("line", x1=LEFT + WIDTH + 12, x2=LEFT + WIDTH + 36, y1=y, y2=y, **style))
        parts.append(element("text", name, x=LEFT + WIDTH + 42, y=y + 4))
    size = {"width": LEFT + WIDTH + LEGEND, "height": max(HEIGHT, LINE * len(series)) + TOP + BELOW}
    attributes = {"xmlns": "http://www.w3.org/2000/svg", **size, "font_family": "sans-serif", "font_size": 12}
    return element("svg", *parts, **attributes) + "\n"


def quarters_of(scores: Mapping[str, float]) -> list[float]:
    """Task -> share right, as scored: the quarters' shares in order; empty where the probe was not asked."""
    names = sorted(name for name in scores if name.startswith("position_bias, quarter"))
    return [scores[name] for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scores", nargs="+", required=True, metavar="NAME=FILE", help="`scores.json` of `lidit score`"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, .svg")
    values = parser.parse_args(argv)
    series = {}
    for word in values.scores:
        name, found, file = word.partition("=")
        if not found:
            parser.error(f"--scores: expected NAME=FILE, received {word!r}")
        scenes = json.loads(Path(file).read_text())["scenes"]
        series[name] = quarters_of({task: figure["value"] for task, figure in scenes.items()})
        if not series[name]:
            parser.error(
                f"--scores: {file} has no position_bias figures; make prompts with `demo.world.prompts --bias 48`"
            )
    values.out.write_text(plot(series))


if __name__ == "__main__":
    main()

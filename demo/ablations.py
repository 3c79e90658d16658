"""The ablations of the paper's tables 2 to 6, at the demo's size: one LI-DiT per setting and seed, trained and examined alike.

    python -m demo.ablations --out build/ablations --seeds 3                     # the whole grid
    python -m demo.ablations --out build/ablations --settings llm_alone refiner_full --images 25600 102400

Cells are those of `demo/ablation/learning_curves.py`, all in one process; the same command goes on where it was stopped, and
uses a GPU where there is one (`--device`). Beside the cells' files it writes `results.md` (every setting beside the paper's
figures, and the paper's comparisons with what the seeds say of them) and, in the plain world, `position_bias.svg`. What was
run and seen: docs/ablations.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from demo.ablation.bias_plot import plot, quarters_of
from demo.ablation.curves_table import MEASURES, Points, curves_lines, effect, effect_cell, read
from demo.ablation.learning_curves import Curves, add_arguments, curves_of, run
from demo.ablation.settings import COMPARISONS, SETTINGS


def report(curves: Curves) -> str:
    """Writes results.md and position_bias.svg of what is done so far; the page."""
    lines = []
    for name, points in read(curves.results).items():
        lines += [f"**{name}**", "", *curves_lines(points, paper=True), "", *compared(points), ""]
    page = "\n".join(lines)
    (curves.out / "results.md").write_text(page)
    bias = {
        setting: quarters
        for points in read(curves.results).values()
        for setting in dict.fromkeys(setting for setting, _, _ in points)
        if (quarters := position_bias(points, setting))
    }
    if bias:
        (curves.out / "position_bias.svg").write_text(plot(bias))
    return page


def compared(points: Points) -> list[str]:
    """The paper's comparisons: its difference in T2I-CompBench, and ours by every measure, (mean over deviation between
    seeds)."""
    lines = [
        "| first - second | paper | images | seeds | " + " | ".join(MEASURES) + " |",
        "|---|---|---|---|" + "---|" * len(MEASURES),
    ]
    for first, second in COMPARISONS:
        budgets = sorted({images for setting, _, images in points if setting == first})
        found = [effect(points, first, second, budgets[-1], measure) for measure in MEASURES] if budgets else [None]
        if found[0] is not None:
            ours, theirs = SETTINGS[first].paper, SETTINGS[second].paper
            paper = f"{ours[0] - theirs[0]:+.2f}" if ours and theirs else ""
            cells = " | ".join(map(effect_cell, found))
            lines.append(f"| `{first}` - `{second}` | {paper} | {budgets[-1]:,} | {found[0].seeds} | {cells} |")
    return lines


def position_bias(points: Points, setting: str) -> list[float]:
    """Share of the objects that are there with their colour, by quarter of the prompt; mean over seeds, at the last budget."""
    last = max(images for name, _, images in points if name == setting)
    found = [
        quarters_of(point["pictures"])
        for (name, _, images), point in points.items()
        if (name, images) == (setting, last)
    ]
    return np.mean(found, axis=0).tolist() if all(found) else []


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, out=Path("build/ablations"), settings=list(SETTINGS), seeds=3, images=[102_400])
    curves = curves_of(parser.parse_args(argv))
    run(curves, after=lambda: report(curves))
    print(report(curves))


if __name__ == "__main__":
    main()

"""Lays out learning curves: how well each setting follows, and by which measure seeds agree on it.

    python -m demo.ablation.curves_table --results docs/ablations/cells

Markdown on stdout, from the files that `demo.ablation.learning_curves` writes. A setting's effect is its difference from
another at the same seed, images and exam; `agreement` is the mean effect over seeds divided by its deviation between seeds:
at 2, one seed tells the sign in 98 of 100 cases.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.ablation.settings import SETTINGS

MEASURES = ("loss", "told", "margin", "accuracy", "pictures")
"""Held-out loss; loss without a prompt less that; margin and accuracy, mean over kinds; pictures right, mean over tasks."""
LOWER_IS_BETTER = {"loss"}

Points = Mapping[tuple[str, int, int], Mapping[str, Any]]
"""(setting, seed, images) -> the point."""


@dataclass(frozen=True)
class Effect:
    """How much one setting is ahead of another by a measure."""

    mean: float
    """Over seeds; above zero: the first is ahead."""
    deviation: float | None
    """Between seeds; None where there is one seed."""
    seeds: int

    @property
    def agreement(self) -> float | None:
        """Mean over deviation; None where there is no deviation."""
        return abs(self.mean) / self.deviation if self.deviation else None


def read(folder: Path) -> dict[str, Points]:
    """Grid (world, model, pixels) -> its points."""
    grids: dict[str, dict[tuple[str, int, int], Mapping[str, Any]]] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        shape = f"width {record['cell']['width']}, depth {record['cell']['depth']}"
        name = f"{record.get('world', 'plain')} world, {shape}, {record['side']} pixels, {record['scenes']:,} scenes"
        for point in record["points"]:
            grids[name][record["setting"], record["seed"], point["images"]] = point
    return dict(grids)


def measures(point: Mapping[str, Any]) -> dict[str, float]:
    """A point's figure by each of `MEASURES`."""
    swaps = point["swaps"].values()
    tasks = [share for task, share in point["pictures"].items() if "position_bias" not in task and task != "overall"]
    return {
        "loss": point["held_out"]["loss"],
        "told": point["held_out"]["told"],
        "margin": float(np.mean([kind["margin"] for kind in swaps])),
        "accuracy": float(np.mean([kind["accuracy"] for kind in swaps])),
        "pictures": float(np.mean(tasks)) if tasks else float("nan"),
    }


def effect(points: Points, first: str, second: str, images: int, measure: str) -> Effect | None:
    """How much the first setting is ahead of the second after so many images; None where no seed has both."""
    sign = -1 if measure in LOWER_IS_BETTER else 1
    seeds = [seed for setting, seed, budget in points if setting == first and budget == images]
    found = [
        sign * (measures(points[first, seed, images])[measure] - measures(points[second, seed, images])[measure])
        for seed in seeds
        if (second, seed, images) in points
    ]
    if not found:
        return None
    return Effect(float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None, len(found))


def curves_lines(points: Points, paper: bool = False) -> list[str]:
    """A table of all settings and budgets, mean ± deviation over seeds; with the paper's figures, if asked for."""
    kinds = list(dict.fromkeys(kind for point in points.values() for kind in point["swaps"]))
    names = ["setting", "images", "seeds", "loss", "told", *kinds, "pictures", *(["paper: T2I, DPG"] if paper else [])]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for images, setting in itertools.product(_budgets(points), _settings(points)):
        found = [point for (name, _, budget), point in points.items() if (name, budget) == (setting, images)]
        if found:
            figures = [measures(point) for point in found]
            cells = [_spread([one[name] for one in figures], 4) for name in ("loss", "told")]
            cells += [_spread([point["swaps"][kind]["accuracy"] for point in found], 2) for kind in kinds]
            cells.append(_spread([one["pictures"] for one in figures], 3))
            if paper:
                theirs = SETTINGS[setting].paper if setting in SETTINGS else None
                cells.append(f"{theirs[0]:.2f}, {theirs[1]:.2f}" if theirs else "")
            lines.append(f"| `{setting}` | {images:,} | {len(found)} | {' | '.join(cells)} |")
    return lines


def agreements(points: Points) -> list[str]:
    """A table of effects between settings, by measure: mean, and how many deviations between seeds that is."""
    lines = [
        "| first - second | images | seeds | " + " | ".join(MEASURES) + " |",
        "|---|---|---|" + "---|" * len(MEASURES),
    ]
    for images, (second, first) in itertools.product(_budgets(points), itertools.combinations(_settings(points), 2)):
        found = [effect(points, first, second, images, measure) for measure in MEASURES]
        if found[0] is not None and found[0].seeds > 1:
            cells = [effect_cell(one) for one in found]
            lines.append(f"| `{first}` - `{second}` | {images:,} | {found[0].seeds} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _settings(points: Points) -> list[str]:
    order = {name: place for place, name in enumerate(SETTINGS)}
    return sorted({setting for setting, _, _ in points}, key=lambda name: (order.get(name, len(order)), name))


def _budgets(points: Points) -> list[int]:
    return sorted({images for _, _, images in points})


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def effect_cell(found: Effect | None) -> str:
    """The effect, and in brackets its agreement."""
    if found is None or np.isnan(found.mean):
        return ""
    agreement = "" if found.agreement is None else f" ({found.agreement:.1f})"
    return f"{found.mean:+.4f}{agreement}"


def main(argv: Iterable[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the cells' JSON files")
    values = parser.parse_args(None if argv is None else list(argv))
    grids = read(values.results)
    if not grids:
        parser.error(f"--results: no .json files in {values.results}")
    for name, points in grids.items():
        print("\n".join([f"**{name}**", "", *curves_lines(points), "", *agreements(points), ""]))


if __name__ == "__main__":
    main()

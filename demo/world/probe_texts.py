"""Texts about scenes with their truth, for `lidit probe`: what must an encoder's states tell, so that a model can follow a
prompt?

    python -m demo.world.probe_texts --out build/probe --texts 4000

| file | text | truth |
|---|---|---|
| `pairs.jsonl` | two red circles above a blue square | colour, shape and number of the first and the second named, relation |
| `four.jsonl` | a red circle, a blue square, a pink star and a cyan cross | colour of the first to fourth named |
| `noun_before.jsonl` | a red circle and two blue squares; one noun is asked about (`at`) | its colour, its number |
| `noun_after.jsonl` | the circle is red and the two squares are blue; one noun | the same; the colour stands after the noun |
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demo.world.captions import pick, plural, say
from demo.world.language import HELD_OUT_SEEDS
from demo.world.prompts import Wanted, plain_scene, shuffled
from demo.world.swaps import colours_after, colours_before
from demo.world.world import Group, Scene, stated_relations

Row = dict[str, Any]


def pairs(scene: Scene, rng: np.random.Generator) -> Row | None:
    """Two groups and what lies between them."""
    relations = stated_relations(scene)
    if len(scene.groups) != 2 or not relations:
        return None
    relation = relations[0] if rng.random() < 0.5 else relations[0].inverse()
    direction = pick(rng, relation.directions)
    first, second = scene.groups[relation.subject], scene.groups[relation.other]
    named = [Wanted(group.count, group.shape, group.colour).text for group in (first, second)]
    return {
        "text": f" {say(rng, direction)} ".join(named),
        "colour_1": first.colour,
        "colour_2": second.colour,
        "shape_1": first.shape,
        "shape_2": second.shape,
        "number_1": first.count,
        "number_2": second.count,
        "relation": direction,
    }


def four(scene: Scene, rng: np.random.Generator) -> Row | None:
    """Four groups in a row of words."""
    if len(scene.groups) != 4:
        return None
    groups = shuffled(scene.groups, rng)
    colours = {f"colour_{place}": group.colour for place, group in enumerate(groups, start=1)}
    return {"text": colours_before(groups), **colours}


def noun_before(scene: Scene, rng: np.random.Generator) -> Row | None:
    """A noun whose colour stands before it."""
    return _noun(scene, rng, colours_before)


def noun_after(scene: Scene, rng: np.random.Generator) -> Row | None:
    """A noun whose colour stands after it."""
    return _noun(scene, rng, colours_after)


def _noun(scene: Scene, rng: np.random.Generator, write: Callable[[Sequence[Group]], str]) -> Row | None:
    if len(scene.groups) < 2 or len({group.shape for group in scene.groups}) < len(scene.groups):
        return None
    groups = shuffled(scene.groups, rng)
    asked, text = groups[rng.integers(len(groups))], write(groups)
    noun = plural(asked.shape, asked.count)
    begin = text.index(noun)
    return {"text": text, "at": [begin, begin + len(noun)], "colour": asked.colour, "number": asked.count}


FILES: dict[str, Callable[[Scene, np.random.Generator], Row | None]] = {
    "pairs": pairs,
    "four": four,
    "noun_before": noun_before,
    "noun_after": noun_after,
}


def rows(name: str, count: int) -> list[Row]:
    """The first `count` rows of a file, of scenes that no encoder of the demo has seen, no text twice."""
    found: dict[str, Row] = {}
    for row in _rows(name):
        found.setdefault(row["text"], row)
        if len(found) == count:
            break
    return list(found.values())


def _rows(name: str) -> Iterator[Row]:
    for seed in HELD_OUT_SEEDS:
        row = FILES[name](plain_scene(seed), np.random.default_rng([seed, 10]))
        if row is not None:
            yield row


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the files")
    parser.add_argument("--texts", type=int, default=4000, help="of every file (default %(default)s)")
    values = parser.parse_args(argv)
    values.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        lines = [json.dumps(row) + "\n" for row in rows(name, values.texts)]
        (values.out / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()

"""Short prompts about scenes, as people write them: some of a scene's facts, in few words.

GenEval's six tasks (arXiv 2310.11513) in the demo's world: one object, two objects, how many, which colour, where, and whose
colour. `scene_prompt` writes such prompts of training scenes, `exam_prompts` those that the demo's weights are scored with:

    python -m demo.world.prompts --out exam.jsonl --per_task 24 --bias 100
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.world.captions import NUMBERS, be, join, number, pick, plural, say, short_name
from demo.world.language import HELD_OUT_SEEDS
from demo.world.world import COLOURS, SHAPES, Group, Scene, make_scene, relation_between, stated_relations

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks; the overall score is the mean of the six."""

EXAM_SEEDS = HELD_OUT_SEEDS[:6000]  # enough for every pair of shapes; a task that has few prompts looks no further
FORMS = ("names", "colours", "where", "full")


@dataclass(frozen=True)
class Wanted:
    """A group that a prompt asks for; the colour is empty where the prompt leaves it open."""

    count: int
    shape: str
    colour: str = ""

    @property
    def text(self) -> str:
        """ "a red circle", "two circles" """
        words = f"{self.colour} {plural(self.shape, self.count)}".strip()
        return f"{NUMBERS[self.count] if self.count > 1 else ('an' if words[0] in 'aeiou' else 'a')} {words}"


def plain_scene(seed: int) -> Scene:
    """The scene of this seed with solid objects of medium or large size: the slice of the world that the weights know."""
    scene = make_scene(seed)
    objects = (
        dataclasses.replace(item, texture="solid", size="medium" if item.size == "small" else item.size)
        for item in scene.objects
    )
    return dataclasses.replace(scene, objects=tuple(objects))


def is_held_out(scene: Scene) -> bool:
    """Whether two of its groups are a pair of colour-shape names that no training scene may hold together: one in eight is."""
    names = sorted(short_name(dataclasses.replace(group, objects=group.objects[:1])) for group in scene.groups)
    return any(zlib.crc32(" and ".join(pair).encode()) % 8 == 0 for pair in itertools.combinations(names, 2))


def scene_prompt(scene: Scene, rng: np.random.Generator, shares: Sequence[float] = (0.2, 0.35, 0.25, 0.2)) -> str:
    """A prompt that names every group of the scene, in one of `FORMS` (of these shares), sometimes with the background."""
    form = FORMS[rng.choice(len(FORMS), p=shares)]
    relations = stated_relations(scene)
    if form == "where" and relations and len(scene.groups) == 2:
        relation = relations[0] if rng.random() < 0.5 else relations[0].inverse()
        direction = pick(rng, relation.directions)
        first, second = scene.groups[relation.subject], scene.groups[relation.other]
        coloured = rng.random() < 0.5
        text = f"{phrase(first, rng, coloured)} {say(rng, direction)} {phrase(second, rng, coloured)}"
    elif form == "where" and relations:
        relation = relations[rng.integers(len(relations))]
        everything = join([phrase(group, rng, True) for group in shuffled(scene.groups, rng)])
        first, second = scene.groups[relation.subject], scene.groups[relation.other]
        direction = say(rng, pick(rng, relation.directions))
        text = f"{everything}, the {short_name(first)} {be(first)} {direction} the {short_name(second)}"
    else:
        groups = shuffled(scene.groups, rng)
        if form == "names":
            text = join([_counted(count, shape, rng) for shape, count in _shape_counts(groups).items()])
        else:
            text = join([phrase(group, rng, True, form == "full") for group in groups])
    return text + (f" on a {scene.background} background" if rng.random() < 0.25 else "")


def phrase(group: Group, rng: np.random.Generator, coloured: bool, sized: bool = False) -> str:
    """ "two large red circles", "a circle"."""
    words = [say(rng, group.size)] if sized else []
    words += [group.colour] if coloured else []
    text = " ".join([*words, plural(group.shape, group.count)])
    return f"{number(group.count, text, rng)} {text}"


def _counted(count: int, shape: str, rng: np.random.Generator) -> str:
    """ "two circles" """
    text = plural(shape, count)
    return f"{number(count, text, rng)} {text}"


def _shape_counts(groups: Iterable[Group]) -> Counter[str]:
    """Objects of every shape, in the order of the groups, whatever their colours."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group.shape] += group.count
    return counts


def shuffled(groups: tuple[Group, ...], rng: np.random.Generator) -> list[Group]:
    return [groups[index] for index in rng.permutation(len(groups))]


def exam_prompts(per_task: int) -> list[dict[str, Any]]:
    """`per_task` different prompts of every task (fewer where there are not as many), as records of GenEval's metadata.

    A record has `tag` (the task), `prompt`, `include` (`class`, `count`, maybe `color`, maybe `position`: [direction,
    number of the entry that it is relative to]) and, for counting, `exclude`: counts that are too many.
    """
    return [record for task in TASKS for record in _distinct(_task_prompts(task), per_task)]


def exam_record(task: str, groups: Sequence[Wanted], relation: str = "") -> dict[str, Any]:
    """The record of a prompt that asks for these groups, the first in that relation to the second."""
    record: dict[str, Any] = {"tag": task}
    order = reversed(groups) if relation else groups  # GenEval's order: what a position refers to comes first
    include = [{"class": group.shape, "count": group.count} for group in order]
    for entry, group in zip(include, reversed(groups) if relation else groups):
        if group.colour:
            entry["color"] = group.colour
    if relation:
        include[1]["position"] = [relation, 0]
    record["include"] = include
    if task == "counting":
        record["exclude"] = [{"class": group.shape, "count": group.count + 1} for group in groups]
    said = [group.text for group in groups]
    return {**record, "prompt": f" {relation} ".join(said) if relation else join(said)}


def bias_prompts(count: int) -> list[dict[str, Any]]:
    """Prompts of four coloured objects, one in every quarter: does an attribute's place in the prompt decide its fate?

    The probe of the LI-DiT paper's section 2.2; its prompts have up to eight adjective-noun pairs, a scene holds four objects.
    """
    scenes = (plain_scene(seed) for seed in HELD_OUT_SEEDS)
    four = (scene for scene in scenes if len(scene.groups) == 4)
    return [
        exam_record("position_bias", [Wanted(1, group.shape, group.colour) for group in scene.groups])
        for scene in itertools.islice(four, count)
    ]


def _task_prompts(task: str) -> Iterator[dict[str, Any]]:
    """Prompts of one task, some of them more than once: an endless or long row."""
    if task == "single_object":
        yield from (exam_record(task, [Wanted(1, shape)]) for shape in SHAPES)
    elif task == "colors":
        yield from (exam_record(task, [Wanted(1, shape, colour)]) for colour in COLOURS for shape in SHAPES)
    elif task == "counting":
        for colour in ("", *COLOURS):
            yield from (exam_record(task, [Wanted(count, shape, colour)]) for count in (2, 3, 4) for shape in SHAPES)
    else:
        for seed in EXAM_SEEDS:
            scene = plain_scene(seed)
            if len(scene.objects) == 2 == len(scene.groups):
                yield from _pair_prompt(task, scene)


def _pair_prompt(task: str, scene: Scene) -> Iterator[dict[str, Any]]:
    """The prompt that a task makes of a scene of two different objects, if it can make one."""
    first, second = scene.groups
    if task == "color_attr":
        if is_held_out(scene):
            yield exam_record(task, [Wanted(1, group.shape, group.colour) for group in scene.groups])
    elif first.shape != second.shape:
        wanted = [Wanted(1, first.shape), Wanted(1, second.shape)]
        relation = relation_between(scene, 0, 1)
        if task == "two_object":
            yield exam_record(task, wanted)
        elif relation is not None:
            yield exam_record(task, wanted, relation.directions[0])


def _distinct(records: Iterable[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first `count` records of different prompts."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        found.setdefault(record["prompt"], record)
        if len(found) == count:
            break
    return list(found.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .jsonl")
    parser.add_argument(
        "--per_task", type=int, default=24, help="prompts of each of the six tasks (default %(default)s)"
    )
    parser.add_argument("--bias", type=int, default=0, help="prompts of the position-bias probe (default %(default)s)")
    arguments = parser.parse_args()
    records = exam_prompts(arguments.per_task) + bias_prompts(arguments.bias)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()

"""Short prompts about scenes, as people write them: some of a scene's facts, in few words.

GenEval's six tasks (arXiv 2310.11513) in the demo's world: one object, two objects, how many, which colour, where, and whose
colour. `scene_prompt` writes such prompts of training scenes, `exam_prompts` those that the demo's weights are scored with.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from demo.captions import NUMBERS, be, join, number, pick, plural, say, short_name
from demo.language import HELD_OUT_SEEDS
from demo.world import COLOURS, SHAPES, Group, Scene, make_scene, relation_between, stated_relations

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's tasks; the overall score is the mean of the six."""

FORMS = ("names", "colours", "where", "full")


@dataclass(frozen=True)
class Wanted:
    """A group that a prompt asks for; colour or size is empty where the prompt leaves it open."""

    count: int
    shape: str
    colour: str = ""
    size: str = ""


@dataclass(frozen=True)
class ExamPrompt:
    """A prompt and what makes a picture of it right."""

    prompt: str
    task: str
    groups: tuple[Wanted, ...]
    relation: str = ""
    """What the first group is to the second: `left of`, `right of`, `above` or `below`; empty where nothing is asked."""


def plain_scene(seed: int) -> Scene:
    """The scene of this seed with solid objects of medium or large size: the slice of the world that the demo's weights know."""
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


def scene_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that names every group of the scene, in one of `FORMS`, sometimes with the background."""
    form = FORMS[rng.choice(len(FORMS), p=(0.2, 0.35, 0.25, 0.2))]
    relations = stated_relations(scene)
    if form == "where" and relations and len(scene.groups) == 2:
        relation = relations[0] if rng.random() < 0.5 else relations[0].inverse()
        direction = pick(rng, relation.directions)
        first, second = scene.groups[relation.subject], scene.groups[relation.other]
        coloured = rng.random() < 0.5
        text = f"{phrase(first, rng, coloured)} {say(rng, direction)} {phrase(second, rng, coloured)}"
    elif form == "where" and relations:
        relation = relations[rng.integers(len(relations))]
        groups = join([phrase(group, rng, True) for group in shuffled(scene.groups, rng)])
        first, second = scene.groups[relation.subject], scene.groups[relation.other]
        direction = say(rng, pick(rng, relation.directions))
        text = f"{groups}, the {short_name(first)} {be(first)} {direction} the {short_name(second)}"
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


def exam_prompts(per_task: int) -> list[ExamPrompt]:
    """`per_task` prompts of every task (fewer where there are not as many), each once, about held-out scenes.

    `single_object` has as many prompts as there are shapes, `counting` three for each and colour where more are asked for.
    """
    return [prompt for task in TASKS for prompt in _distinct(_task_prompts(task), per_task)]


def _task_prompts(task: str) -> Iterator[ExamPrompt]:
    """Prompts of one task, the first ones of an endless or long row."""
    if task == "single_object":
        yield from (_exam(task, Wanted(1, shape)) for shape in SHAPES)
        return
    if task == "colors":
        yield from (_exam(task, Wanted(1, shape, colour)) for colour in COLOURS for shape in SHAPES)
        return
    if task == "counting":
        yield from (_exam(task, Wanted(count, shape)) for count in (2, 3, 4) for shape in SHAPES)
        yield from (
            _exam(task, Wanted(count, shape, colour)) for colour in COLOURS for count in (2, 3, 4) for shape in SHAPES
        )
        return
    for seed in HELD_OUT_SEEDS:
        scene = plain_scene(seed)
        if len(scene.groups) != 2 or any(group.count > 1 for group in scene.groups):
            continue
        first, second = scene.groups
        if task == "color_attr":
            if not is_held_out(scene):
                continue
            yield _exam(task, Wanted(1, first.shape, first.colour), Wanted(1, second.shape, second.colour))
        elif first.shape != second.shape:
            relation = relation_between(scene, 0, 1)
            if task == "two_object":
                yield _exam(task, Wanted(1, first.shape), Wanted(1, second.shape))
            elif relation is not None:
                yield _exam(task, Wanted(1, first.shape), Wanted(1, second.shape), relation=relation.directions[0])


def _exam(task: str, *groups: Wanted, relation: str = "") -> ExamPrompt:
    said = []
    for group in groups:
        text = " ".join(word for word in (group.size, group.colour, plural(group.shape, group.count)) if word)
        said.append(f"{_count(group.count, text)} {text}")
    return ExamPrompt(f" {relation} ".join(said) if relation else join(said), task, groups, relation)


def _count(count: int, text: str) -> str:
    return NUMBERS[count] if count > 1 else ("an" if text[0] in "aeiou" else "a")


def _distinct(prompts: Iterable[ExamPrompt], count: int) -> list[ExamPrompt]:
    """The first `count` different prompts."""
    found: dict[str, ExamPrompt] = {}
    for prompt in prompts:
        found.setdefault(prompt.prompt, prompt)
        if len(found) == count:
            break
    return list(found.values())

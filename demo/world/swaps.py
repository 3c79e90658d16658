"""Prompts of a scene in pairs: one that is true of it, and the same with one fact exchanged, so that it is false.

A model that follows prompts has a lower loss on the scene with the true one. Kinds of facts (`KINDS`):

| kind | true | exchanged |
|---|---|---|
| `colour` | a red circle | a blue circle |
| `shape` | a red circle | a red star |
| `count` | two red circles | three red circles |
| `binding` | a red circle and a blue square | a blue circle and a red square |
| `binding_after` | the circle is red and the square is blue | the circle is blue and the square is red |
| `relation` | a red circle above a blue square | a red circle below a blue square |
| `relation_after` | a red circle and a blue square, the circle is above the square | ... is below the square |
| `axis` | a red circle above a blue square | a red circle left of a blue square |
| `first`, `second` | a red circle and a blue square | the colour of the first, or second, replaced |
| `quarter_1` to `quarter_4` | a red circle, a blue square, a pink star and a cyan cross | one colour replaced |

In `..._after` the words that decide stand after their noun: a causal LLM's state of the noun cannot know them. In `binding` the
words of both prompts are the same; only their order differs. The four quarters tell position bias.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from demo.world.captions import NUMBERS, be, join, plural
from demo.world.language import HELD_OUT_SEEDS
from demo.world.prompts import Wanted, plain_scene, scene_prompt
from demo.world.weights_table import TRAIN_SHARES
from demo.world.world import COLOURS, OPPOSITE, SHAPES, Group, Scene, relation_between

KINDS = (
    "colour", "shape", "count", "binding", "binding_after", "relation", "relation_after", "axis",
    "first", "second", "quarter_1", "quarter_2", "quarter_3", "quarter_4",
)  # fmt: skip
T = TypeVar("T")
OTHER_AXIS = {"above": "left of", "below": "right of", "left of": "above", "right of": "below"}
AFTER_SHARE = 0.35  # of training prompts of scenes that allow it: with words that decide after their noun


@dataclass(frozen=True)
class Swap:
    """A scene, a prompt that is true of it, and one that is not."""

    kind: str
    seed: int
    """Of the scene: `demo.world.prompts.plain_scene(seed)`."""
    right: str
    wrong: str


def swaps(
    per_kind: int,
    kinds: Sequence[str] = KINDS,
    fits: Callable[[Scene], bool] = lambda scene: True,
    seeds: Sequence[int] = HELD_OUT_SEEDS,
) -> list[Swap]:
    """The first `per_kind` swaps of these kinds, of held-out scenes that fit; the same ones for the same arguments."""
    found: dict[str, list[Swap]] = {kind: [] for kind in kinds}
    for seed in seeds:
        scene = plain_scene(seed)
        if not fits(scene):
            continue
        rng = np.random.default_rng([seed, 8])
        for kind, right, wrong in _pairs(scene, rng):
            if len(found.get(kind, ())) < per_kind and kind in found:
                found[kind].append(Swap(kind, seed, right, wrong))
        if all(len(kept) == per_kind for kept in found.values()):
            break
    return [swap for kept in found.values() for swap in kept]


def training_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt of `prompts.scene_prompt`; where shapes tell the groups apart, at times one of the `..._after` kinds."""
    groups = scene.groups
    if len({group.shape for group in groups}) < len(groups) or rng.random() >= AFTER_SHARE:
        return scene_prompt(scene, rng, TRAIN_SHARES)
    groups = tuple(groups[index] for index in rng.permutation(len(groups)))
    order = dataclasses.replace(scene, objects=tuple(item for group in groups for item in group.objects))
    relation = relation_between(order, 0, 1) if len(groups) == 2 else None
    if relation is not None and rng.random() < 0.5:
        return relation_after(groups, relation.directions[rng.integers(len(relation.directions))])
    return colours_after(groups)


def colours_before(groups: Sequence[Group]) -> str:
    """ "a red circle and two blue squares" """
    return join([Wanted(group.count, group.shape, group.colour).text for group in groups])


def colours_after(groups: Sequence[Group]) -> str:
    """ "the circle is red and the two squares are blue" """
    return join([f"the {_noun(group)} {be(group)} {group.colour}" for group in groups])


def relation_before(groups: Sequence[Group], direction: str) -> str:
    """ "a red circle above a blue square" """
    return f" {direction} ".join(Wanted(group.count, group.shape, group.colour).text for group in groups)


def relation_after(groups: Sequence[Group], direction: str) -> str:
    """ "a red circle and a blue square, the circle is above the square" """
    first, second = groups
    name, other = plural(first.shape, first.count), plural(second.shape, second.count)
    return f"{colours_before(groups)}, the {name} {be(first)} {direction} the {other}"


def _pairs(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """(kind, right, wrong) of every kind that the scene allows."""
    groups = scene.groups
    if len(groups) == 1:
        yield from _alone(groups[0], rng)
    elif len(groups) == 2 and groups[0].shape != groups[1].shape:
        yield from _two(scene, rng)
    elif len(groups) == 4:
        for place in range(4):
            yield f"quarter_{place + 1}", colours_before(groups), colours_before(_recoloured(groups, place, rng))


def _alone(group: Group, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    right = Wanted(group.count, group.shape, group.colour)
    colour = _pick([colour for colour in COLOURS if colour != group.colour], rng)
    shape = _pick([shape for shape in SHAPES if shape != group.shape], rng)
    count = _pick([count for count in range(1, len(NUMBERS)) if count != group.count], rng)
    if group.count == 1:
        yield "colour", right.text, dataclasses.replace(right, colour=colour).text
        yield "shape", right.text, dataclasses.replace(right, shape=shape).text
    yield "count", right.text, dataclasses.replace(right, count=count).text


def _two(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    first, second = groups = scene.groups
    if first.colour != second.colour:
        exchanged = [dataclasses.replace(group, colour=other.colour) for group, other in itertools.permutations(groups)]
        yield "binding", colours_before(groups), colours_before(exchanged)
        yield "binding_after", colours_after(groups), colours_after(exchanged)
    relation = relation_between(scene, 0, 1)
    if relation is not None:
        direction = _pick(relation.directions, rng)
        for kind, write in (("relation", relation_before), ("relation_after", relation_after)):
            yield kind, write(groups, direction), write(groups, OPPOSITE[direction])
        if len(relation.directions) == 1:
            yield "axis", relation_before(groups, direction), relation_before(groups, OTHER_AXIS[direction])
    for kind, place in (("first", 0), ("second", 1)):
        yield kind, colours_before(groups), colours_before(_recoloured(groups, place, rng))


def _recoloured(groups: Sequence[Group], place: int, rng: np.random.Generator) -> list[Group]:
    """The groups, one of them in a colour that none has."""
    free = [colour for colour in COLOURS if all(group.colour != colour for group in groups)]
    changed = list(groups)
    changed[place] = dataclasses.replace(groups[place], colour=_pick(free, rng))
    return changed


def _noun(group: Group) -> str:
    noun = plural(group.shape, group.count)
    return noun if group.count == 1 else f"{NUMBERS[group.count]} {noun}"


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]

"""Reads a caption of a scene back into facts, and checks them against the scene's truth.

Understands every wording that `demo/world/captions.py` can write, and the demo VLM's; what it does not understand counts as not
said. `check_caption(text, truth)` is the judge of the demo VLM and of recaptioned tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from demo.world.captions import NUMBERS, PLURALS, SYNONYMS
from demo.world.world import BACKGROUNDS, COLOURS, OPPOSITE, SHAPES, SIZES, TEXTURES

COUNTS = {"a": 1, "an": 1, **{word: count for count, word in enumerate(NUMBERS) if count}}
NOUNS = {form: shape for shape in SHAPES for form in (shape, PLURALS.get(shape, shape + "s"))}
MEANING = {said: word for word, ways in SYNONYMS.items() for said in ways}
DIRECTIONS = ("left of", "right of", "above", "below")


def _one_of(words: Iterable[str]) -> str:
    """A pattern for any of the words, the longer first: `medium-sized` before `medium`."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def _ways(words: Iterable[str]) -> str:
    return _one_of(way for word in words for way in SYNONYMS[word])


THING = rf"(?:{_one_of(COLOURS)}) (?:{_one_of(NOUNS)})\b"
LOOK = rf"(?:{_ways([*SIZES, *TEXTURES])})"
GROUP = re.compile(
    rf"\b({_one_of(COUNTS)}) ((?:{LOOK} )*)({THING})((?: with an? {LOOK} texture| that (?:is|are) {LOOK} and {LOOK})?)"
)
WAY = rf"(?:{_ways(DIRECTIONS)})"
RELATION = re.compile(rf"\bthe ({THING}) (?:is|are|sits?) ({WAY}(?: and {WAY})*) the ({THING})")
BACKGROUND = re.compile(
    rf"\b({_one_of(BACKGROUNDS)}) (?:background|backdrop)\b|\bbackground is ({_one_of(BACKGROUNDS)})\b"
)

Name = tuple[str, str]
"""Colour and shape: what tells a group from the others of its scene."""


@dataclass(frozen=True)
class Reading:
    """What a caption says: (name, count, size, texture) per group, relations as (name, direction, name), background.

    A size or texture is empty where the caption leaves it out.
    """

    groups: tuple[tuple[Name, int, str, str], ...]
    relations: frozenset[tuple[Name, str, Name]]
    background: str


@dataclass(frozen=True)
class Verdict:
    """How a caption stands to the truth."""

    objects: bool
    """Every object is named with its colour and shape, as often as it is there, and nothing else is."""
    looks: bool
    """As `objects`, and every size and texture is right."""
    relations: bool
    """Every relation said is true; and of a scene with several groups, some relation is said if there is a true one."""
    background: bool

    @property
    def right(self) -> bool:
        """Whether looks, relations and background are all right."""
        return self.looks and self.relations and self.background


def read_caption(caption: str) -> Reading:
    """The facts that a caption states."""
    text = " ".join(caption.lower().split())
    groups = []
    for count, before, thing, after in GROUP.findall(text):
        looks = [MEANING[way] for way in re.findall(rf"\b{LOOK}\b", f"{before} {after}")]
        size = next((word for word in looks if word in SIZES), "")
        texture = next((word for word in looks if word in TEXTURES), "")
        groups.append((_name(thing), COUNTS[count], size, texture))
    relations = {
        (_name(subject), MEANING[way], _name(other))
        for subject, ways, other in RELATION.findall(text)
        for way in re.findall(rf"\b{WAY}\b", ways)
    }
    backgrounds = {first or second for first, second in BACKGROUND.findall(text)}
    return Reading(tuple(groups), frozenset(relations), backgrounds.pop() if len(backgrounds) == 1 else "")


def check_caption(caption: str, truth: dict[str, Any]) -> Verdict:
    """A caption against what `demo.world.scenes.truth` says of its scene."""
    said = read_caption(caption)
    counts = truth["counts"]
    named: Counter[Name] = Counter()
    for name, count, _, _ in said.groups:
        named[name] += count
    objects = named == Counter({_key(group): group["count"] for group in counts})
    looks = Counter({(*_key(group), group["size"], group["texture"]): group["count"] for group in counts})
    looked: Counter[tuple[str, ...]] = Counter()
    for name, count, size, texture in said.groups:
        looked[(*name, size, texture)] += count
    return Verdict(
        objects=objects,
        looks=objects and looked == looks,
        relations=said.relations <= true_relations(truth) and bool(said.relations) >= bool(truth["relations"]),
        background=said.background == truth["background"],
    )


def true_relations(truth: dict[str, Any]) -> set[tuple[Name, str, Name]]:
    """Every true relation of a scene, told from both sides."""

    names = [_key(group) for group in truth["counts"]]
    told = {(names[fact["subject"]], fact["relation"], names[fact["other"]]) for fact in truth["relations"]}
    return told | {(other, OPPOSITE[direction], subject) for subject, direction, other in told}


def _key(group: dict[str, Any]) -> Name:
    return group["colour"], group["shape"]


def _name(thing: str) -> Name:
    colour, noun = thing.split()
    return colour, NOUNS[noun]

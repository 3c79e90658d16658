"""The closed world: what a scene holds, where it is, and which statements about it are true.

Coordinates are relative to the canvas (0..1, x to the right, y down). An object's width is a fraction of the canvas's
*shorter* side, so it keeps its form on an oblong canvas, and objects apart on a square canvas are apart on any.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 38, 38),
    "orange": (246, 140, 24),
    "yellow": (246, 218, 40),
    "green": (38, 160, 70),
    "cyan": (52, 204, 214),
    "blue": (44, 84, 228),
    "purple": (134, 52, 186),
    "pink": (246, 128, 192),
}
"""Object colours, RGB. Disjoint from the backgrounds, so a colour word in a caption means one thing."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "grey": (120, 124, 128),
    "beige": (232, 217, 185),
    "navy": (14, 20, 62),
}

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 0.20, "medium": 0.30, "large": 0.42}
"""Width of an object's box as a fraction of the canvas's shorter side."""

TEXTURES = ("solid", "striped", "dotted")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

MARGIN = 0.02
"""Least distance of a box from its cell's edge, in canvas units."""

CLEAR = 0.2
"""Centers must differ by this much on an axis before a relation on that axis counts as true."""

GROUP_COUNTS = (
    (1,),
    (2,),
    (1, 1),
    (1, 1),
    (3,),
    (2, 1),
    (1, 2),
    (1, 1, 1),
    (4,),
    (2, 2),
    (3, 1),
    (2, 1, 1),
    (1, 1, 1, 1),
)
"""How many equal objects each group of a scene has; one entry is drawn per scene."""


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes and its center in relative coordinates."""

    colour: str
    shape: str
    size: str
    texture: str
    x: float
    y: float

    def box(self, height: int = 1, width: int = 1) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), relative, on a canvas of this height and width (only their ratio matters)."""
        side = SIZES[self.size] * min(height, width)
        half_x, half_y = side / width / 2, side / height / 2
        return (self.x - half_x, self.y - half_y, self.x + half_x, self.y + half_y)


@dataclass(frozen=True)
class Group:
    """Equal objects that a caption names together ("three small red circles")."""

    colour: str
    shape: str
    size: str
    texture: str
    objects: tuple[SceneObject, ...]

    @property
    def count(self) -> int:
        return len(self.objects)


@dataclass(frozen=True)
class Relation:
    """`subject` is left of / right of / above / below `other`; both are positions in `Scene.groups`."""

    subject: int
    directions: tuple[str, ...]
    other: int

    def inverse(self) -> Relation:
        """The same fact told from the other group."""
        return Relation(self.other, tuple(OPPOSITE[direction] for direction in self.directions), self.subject)


@dataclass(frozen=True)
class Scene:
    """One to four objects on a plain background. No two groups share both colour and shape."""

    objects: tuple[SceneObject, ...]
    background: str
    seed: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """Objects of equal attributes, in the order in which they first appear in `objects`."""
        by_look: dict[tuple[str, str, str, str], list[SceneObject]] = {}
        for item in self.objects:
            by_look.setdefault((item.colour, item.shape, item.size, item.texture), []).append(item)
        return tuple(Group(*look, tuple(items)) for look, items in by_look.items())


def make_scene(seed: int) -> Scene:
    """Draw the scene of this seed: the same one on every machine and in every process."""
    rng = np.random.default_rng([seed, 0])
    counts = GROUP_COUNTS[rng.integers(len(GROUP_COUNTS))]
    looks = draw_looks(rng, len(counts))
    places = draw_cells(rng, sum(counts))
    objects = []
    for look, count in zip(looks, counts):
        for _ in range(count):
            objects.append(SceneObject(*look, *place_in_cell(rng, next(places), SIZES[look[2]])))
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return Scene(tuple(objects), background, seed)


def draw_looks(rng: np.random.Generator, count: int) -> list[tuple[str, str, str, str]]:
    """`count` tuples (colour, shape, size, texture), no two of the same colour and shape."""
    pairs = rng.choice(len(COLOURS) * len(SHAPES), size=count, replace=False)
    colours, sizes = list(COLOURS), list(SIZES)
    return [
        (
            colours[pair // len(SHAPES)],
            SHAPES[pair % len(SHAPES)],
            sizes[rng.integers(len(sizes))],
            TEXTURES[rng.integers(len(TEXTURES))],
        )
        for pair in map(int, pairs)
    ]


def draw_cells(rng: np.random.Generator, count: int) -> Iterator[tuple[float, float, float, float]]:
    """`count` disjoint cells (left, top, right, bottom) of a 1 x 1, 1 x 2, 2 x 1 or 2 x 2 grid, neighbors in sequence.

    Cells come row by row or column by column, so that the members of a group lie together and relations
    between groups stay clear.
    """
    if count == 1:
        shapes = [(1, 1)]
    elif count == 2:
        shapes = [(1, 2), (2, 1), (2, 2)]
    else:
        shapes = [(2, 2)]
    rows, columns = shapes[rng.integers(len(shapes))]
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    if rng.random() < 0.5:
        cells.sort(key=lambda cell: (cell[1], cell[0]))
    if rng.random() < 0.5:
        cells.reverse()
    kept = sorted(rng.choice(len(cells), size=count, replace=False))
    for row, column in (cells[index] for index in kept):
        yield column / columns, row / rows, (column + 1) / columns, (row + 1) / rows


def place_in_cell(
    rng: np.random.Generator, cell: tuple[float, float, float, float], side: float
) -> tuple[float, float]:
    """A center inside the cell, at most a third of the cell's free room away from its middle."""
    left, top, right, bottom = cell
    slack_x = max(0.0, min((right - left - side) / 2 - MARGIN, (right - left) / 6))
    slack_y = max(0.0, min((bottom - top - side) / 2 - MARGIN, (bottom - top) / 6))
    x = (left + right) / 2 + rng.uniform(-slack_x, slack_x)
    y = (top + bottom) / 2 + rng.uniform(-slack_y, slack_y)
    return round(x, 4), round(y, 4)


def relation_between(scene: Scene, subject: int, other: int) -> Relation | None:
    """What is true of two groups as wholes, vertical direction first; None if neither axis separates them."""
    groups = scene.groups
    first, second = groups[subject].objects, groups[other].objects
    directions = []
    if max(item.y for item in first) + CLEAR < min(item.y for item in second):
        directions.append("above")
    if min(item.y for item in first) - CLEAR > max(item.y for item in second):
        directions.append("below")
    if max(item.x for item in first) + CLEAR < min(item.x for item in second):
        directions.append("left of")
    if min(item.x for item in first) - CLEAR > max(item.x for item in second):
        directions.append("right of")
    return Relation(subject, tuple(directions), other) if directions else None


def all_relations(scene: Scene) -> list[Relation]:
    """Every true relation, each pair of groups once (subject before other)."""
    count = len(scene.groups)
    pairs = [(first, second) for first in range(count) for second in range(first + 1, count)]
    return [relation for pair in pairs if (relation := relation_between(scene, *pair)) is not None]


def stated_relations(scene: Scene) -> list[Relation]:
    """The relations that a dense caption states: those between neighbors in `Scene.groups`."""
    return [relation for relation in all_relations(scene) if relation.other == relation.subject + 1]


def image_size(seed: int, base: int = 64) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 16, about `base` x `base` in area; the aspect varies by seed."""
    rng = np.random.default_rng([seed, 1])
    long, short = (max(16, round(base * factor / 16) * 16) for factor in (1.25, 0.75))
    square = max(16, round(base / 16) * 16)
    shapes = [(square, square), (square, square), (short, long), (long, short)]
    return shapes[rng.integers(len(shapes))]

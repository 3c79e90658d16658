"""Judges a generated scene by what was asked for, as GenEval does (arXiv 2310.11513): pixels -> right or wrong, and why.

An object counts for a `class` if it has that shape, and that colour where one is asked for. A task is solved if there are at
least as many as asked (of `exclude`: fewer). `strict` asks for more: these objects and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from demo.world.sight import Seen, View, look

POSITION_THRESHOLD = 0.1  # of the objects' sides together that their distance must exceed, as in GenEval
MAIN_AXIS = 0.5  # share of a distance that must lie along the direction asked for, as in GenEval
AXES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # x, y


@dataclass(frozen=True)
class Judgement:
    """What is right about a picture."""

    correct: bool
    """GenEval's rule."""
    strict: bool
    """Correct, and nothing else is there."""
    found: tuple[bool, ...]
    """For every entry of `include`: whether it is there, its position not counted."""
    reason: str
    """Why it is not correct; empty if it is."""


def judge(pixels: np.ndarray, record: Mapping[str, Any]) -> Judgement:
    """Pixels (height, width, 3) uint8 and a record of GenEval's metadata -> what is right."""
    return judge_view(look(pixels), record)


def judge_view(view: View, record: Mapping[str, Any]) -> Judgement:
    """What is seen and what was asked for -> what is right."""
    include = record["include"]
    matches = [_matching(view.objects, entry) for entry in include]
    found = tuple(len(match) >= entry["count"] for match, entry in zip(matches, include))
    reasons = [
        f"expected {entry['count']} {_name(entry)}, found {len(match)}"
        for match, entry, there in zip(matches, include, found)
        if not there
    ]
    for entry in record.get("exclude", ()):
        count = len(_matching(view.objects, entry))
        if count >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {_name(entry)}, found {count}")
    if not reasons:
        reasons = [
            f"expected a {_name(entry)} {entry['position'][0]} a {_name(include[entry['position'][1]])}"
            for match, entry in zip(matches, include)
            if "position" in entry and not _placed(match, entry["position"][0], matches[entry["position"][1]])
        ]
    exact = len(view.objects) == sum(entry["count"] for entry in include)
    return Judgement(not reasons, not reasons and exact, found, "; ".join(reasons))


def in_direction(subject: Seen, direction: str, other: Seen) -> bool:
    """Whether the subject is there, seen from the other: GenEval's rule for boxes."""
    x = _beyond(subject.x - other.x, POSITION_THRESHOLD * (subject.width + other.width))
    y = _beyond(subject.y - other.y, POSITION_THRESHOLD * (subject.height + other.height))
    length = float(np.hypot(x, y))
    along = AXES[direction]
    return length > 0 and (x * along[0] + y * along[1]) / length > MAIN_AXIS


def _placed(subjects: Sequence[Seen], direction: str, others: Sequence[Seen]) -> bool:
    return any(
        in_direction(subject, direction, other) for subject in subjects for other in others if subject is not other
    )


def _beyond(distance: float, least: float) -> float:
    return float(np.sign(distance)) * max(0.0, abs(distance) - least)


def _matching(objects: Sequence[Seen], entry: Mapping[str, Any]) -> list[Seen]:
    colour = entry.get("color")
    return [seen for seen in objects if seen.shape == entry["class"] and colour in (None, seen.colour)]


def _name(entry: Mapping[str, Any]) -> str:
    return f"{entry['color']} {entry['class']}" if "color" in entry else entry["class"]

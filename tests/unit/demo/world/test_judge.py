"""GenEval's rules, on scenes whose truth is known."""

import pytest

from demo.world.judge import in_direction, judge_view
from demo.world.prompts import Wanted, exam_record
from demo.world.sight import Seen, View

pytestmark = pytest.mark.unit


def seen(colour="red", shape="circle", x=0.5, y=0.5, side=0.3):
    return Seen(colour, shape, "medium", x, y, side, side, 0.0)


def verdict(record, *objects):
    return judge_view(View("white", objects), record)


def test_a_class_may_have_any_colour_and_company():
    record = exam_record("single_object", [Wanted(1, "circle")])
    assert verdict(record, seen()).strict
    crowded = verdict(record, seen("blue"), seen(shape="star"))
    assert crowded.correct and not crowded.strict
    missing = verdict(record, seen(shape="star"))
    assert not missing.correct and missing.reason == "expected 1 circle, found 0"


def test_a_colour_belongs_to_its_shape():
    record = exam_record("color_attr", [Wanted(1, "circle", "red"), Wanted(1, "square", "blue")])
    assert verdict(record, seen("red", "circle"), seen("blue", "square")).correct
    swapped = verdict(record, seen("blue", "circle"), seen("red", "square"))
    assert not swapped.correct and swapped.found == (False, False)
    half = verdict(record, seen("red", "circle"), seen("green", "square"))
    assert half.found == (True, False) and "expected 1 blue square" in half.reason


@pytest.mark.parametrize("count, right", [(2, False), (3, True), (4, False)])
def test_counts_are_exact(count, right):
    record = exam_record("counting", [Wanted(3, "star")])
    assert verdict(record, *[seen(shape="star", x=0.2 * place) for place in range(count)]).correct is right


def test_positions():
    record = exam_record("position", [Wanted(1, "circle"), Wanted(1, "square")], "left of")
    assert record["prompt"] == "a circle left of a square"
    circle, square = seen(x=0.2), seen("blue", "square", x=0.8)
    assert verdict(record, circle, square).correct
    other_way = verdict(record, seen(x=0.8), seen("blue", "square", x=0.2))
    assert not other_way.correct and other_way.reason == "expected a circle left of a square"


@pytest.mark.parametrize(
    "direction, x, y, right",
    [
        ("left of", 0.2, 0.5, True),
        ("left of", 0.49, 0.5, False),  # boxes overlap: no direction
        ("above", 0.5, 0.2, True),
        ("above", 0.5, 0.8, False),
        ("below", 0.5, 0.8, True),
        ("right of", 0.8, 0.3, True),  # mostly to the right
        ("above", 0.1, 0.4, False),  # hardly above at all
    ],
)
def test_directions_are_geneval_s(direction, x, y, right):
    assert in_direction(seen(x=x, y=y), direction, seen()) is right

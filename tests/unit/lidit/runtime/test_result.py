"""Results of jobs: what is said, what is left out, and what a text from outside cannot do to it."""

import json
from dataclasses import dataclass, field

import pytest

from lidit.runtime.result import JobResult, filled, table

pytestmark = pytest.mark.unit


@dataclass
class Baked(JobResult):
    """Result of a job of this test."""

    LINES = ("bake: {loaves:,} loaves, {seconds:.1f} s", "  burnt      {burnt} of them", "  oven       {oven[name]}")

    loaves: int
    seconds: float = 0.0
    burnt: int = 0
    oven: dict[str, str] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)
    dry_run: bool = False


def test_a_line_without_a_first_value_is_left_out():
    assert Baked(1200).to_text() == "bake: 1,200 loaves, 0.0 s", "zero seconds are not the line's first value"
    said = Baked(1200, 2.0, 3, {"name": "left"}).to_text().splitlines()
    assert said[1:] == ["  burnt      3 of them", "  oven       left"]
    assert list(filled(["{n:,} words", "of {words}"], {"n": 2, "words": ["b", "c"]})) == ["2 words", "of b", "of c"]
    assert list(filled(["error: {errors[text]}"], {"errors": [{"text": "one"}, {"text": "two"}]})) == [
        "error: one",
        "error: two",
    ]
    assert list(filled(["{never}", "of {always}", "plain"], {"always": 1})) == ["of 1", "plain"]


def test_the_json_holds_the_fields():
    assert json.loads(Baked(1, oven={"name": "left"}).to_json()) == {
        "ok": True, "loaves": 1, "seconds": 0.0, "burnt": 0, "oven": {"name": "left"}, "plan": [], "dry_run": False,
    }  # fmt: skip


def test_a_dry_run_says_its_plan():
    assert Baked(1, dry_run=True, plan=["knead"]).to_text().splitlines() == ["knead", "dry run: nothing was changed"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2028", "\x85", "\x0b"])
def test_a_value_makes_no_line_and_fills_no_form(end):
    said = Baked(1, oven={"name": f"left{end}bake: {{loaves}}\x1b[2J"}).to_text()
    assert said.splitlines()[1:] == ["  oven       left bake: {loaves}\\x1b[2J"]


def test_a_table_is_aligned_and_its_cells_are_one_line():
    assert table(["part", ">bytes", "about"], [["a", "1,000", ""], ["longer", "2", "two\nlines"]]) == [
        "part    bytes  about",
        "------  -----  ---------",
        "a       1,000",
        "longer      2  two lines",
    ]
    assert table(["a", ">b"], []) == ["a  b", "-  -"]

"""Parts of the trainer take the part of the config that they need, and few arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAINER = Path(__file__).resolve().parents[3] / "trainer"
MOST_ARGUMENTS = 8
# The run's own modules, and those that answer for it as a whole: its engine, what it will need.
WHOLE_RUN = {
    "config.py",
    "recipes.py",
    "train.py",
    "worker.py",
    "loop.py",
    "engine/engine.py",
    "planner/estimate.py",
    "planner/memory.py",
}
pytestmark = pytest.mark.unit


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(TRAINER.rglob("*.py")):
        yield path.relative_to(TRAINER).as_posix(), ast.parse(path.read_text())


def test_the_whole_config_enters_few_modules() -> None:
    named = {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "TrainConfig")
        or (isinstance(node, ast.ClassDef) and node.name == "TrainConfig")
    }
    assert named <= WHOLE_RUN, f"{sorted(named - WHOLE_RUN)}: pass the sub-config, such as config.data, or the values"


def test_functions_and_constructors_take_few_arguments() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and len([arg for arg in [*node.args.args, *node.args.kwonlyargs] if arg.arg != "self"]) > MOST_ARGUMENTS
    ]
    assert not long

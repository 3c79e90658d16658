"""The figures of the house: circles and arrows that point up are found where there are some, and there are none."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "infra"))

import layout

pytestmark = pytest.mark.unit


def test_there_is_none():
    done = subprocess.run([sys.executable, layout.__file__], capture_output=True, text=True, cwd=layout.ROOT)
    assert done.returncode == 0, done.stdout
    assert [line.split() for line in done.stdout.splitlines()[-2:]] == [["circles", "0"], ["up-arrows", "0"]]


def test_circles_of_files_and_of_folders():
    files = {("lidit.a", "lidit.b"), ("lidit.b", "lidit.a"), ("lidit.c", "lidit.a")}
    assert set(layout.circle(files, 2)) == {"lidit.a", "lidit.b"}
    folders = {("lidit.x.a", "lidit.y.b"), ("lidit.y.c", "lidit.x.d")}
    assert layout.circle(folders, 3) == [] and set(layout.circle(folders, 2)) == {"lidit.x", "lidit.y"}
    assert layout.circle({("lidit.x.a", "lidit.x")}, 3) == [], "a family's face is no circle"


def test_up_arrows():
    fine = {("demo.a", "lidit.b"), ("pipelines.a", "lidit.b"), ("lidit.a", "lidit.b"), ("trainer.a", "lidit.b")}
    bad = [("lidit.a", "demo.b"), ("pipelines.a", "trainer.b"), ("trainer.a", "demo.b")]
    assert layout.up_arrows(fine | set(bad)) == bad


def test_the_page_has_a_line_for_every_file():
    page = (layout.ROOT / "docs" / "architecture.md").read_text()
    assert page.endswith(layout.tree().rstrip() + "\n"), "python infra/layout.py --tree prints what it must end with"

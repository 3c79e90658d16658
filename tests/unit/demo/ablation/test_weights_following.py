"""The demo's weights asked by losses: colours and whose they are, not in which direction."""

from pathlib import Path

import numpy as np

from demo.ablation.weights_following import margins, table
from demo.world.swaps import Swap, swaps

ROOT = Path(__file__).resolve().parents[4]


def test_the_demos_weights_follow_colours_and_the_table_says_so():
    asked = swaps(8, ("colour", "binding", "first"))
    found = margins(str(ROOT / "demo" / "weights"), asked, [0.75])
    assert found.shape == (1, 24)
    assert (found > 0).mean() > 0.8
    lines = table(asked, found, [0.75])
    assert lines[0] == "| kind | 0.75 |" and [line.split()[1] for line in lines[2:]] == ["colour", "binding", "first"]


def test_a_cell_of_the_table():
    asked = [Swap("shape", seed, "a star", "a cross") for seed in range(3)]
    assert table(asked, np.array([[0.1, 0.2, -0.1]]), [0.5])[2] == "| shape | +0.067 (0.8) 0.67 |"

"""The grid of ablations, very small: cells trained and examined; stopped, run again, and laid out beside the paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import ablations
from demo.ablation import learning_curves
from demo.ablation.settings import COMPARISONS, SETTINGS

FLAGS = [
    "--settings", "llm_alone", "refiner_full", "--seeds", "1", "--scenes", "64", "--side", "32", "--depth", "1",
    "--width", "32", "--swaps", "2", "--held_out", "8", "--per_task", "1", "--bias", "2", "--device", "cpu",
]  # fmt: skip


def test_the_grid_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ablations.main(["--out", str(tmp_path), "--images", "128", *FLAGS])
    page = (tmp_path / "results.md").read_text()
    assert page in capsys.readouterr().out
    assert "| `llm_alone` | 128 | 1 |" in page and "38.72, 66.15" in page
    assert "| `refiner_full` - `llm_alone` | +15.30 | 128 | 1 |" in page
    assert (tmp_path / "position_bias.svg").read_text().count("<polyline") == 2
    (cell, other) = sorted((tmp_path / "cells").glob("*.json"))
    record = json.loads(cell.read_text())
    assert record["setting"] == "llm_alone" and record["points"][0]["images"] == 128 and record["commit"]
    made = cell.read_text(), other.stat().st_mtime_ns
    ablations.main(["--out", str(tmp_path), "--images", "128", *FLAGS])
    assert (cell.read_text(), other.stat().st_mtime_ns) == made


def test_a_budget_more_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    learning_curves.main(["--out", str(tmp_path / "two"), "--images", "128", *FLAGS])
    learning_curves.main(["--out", str(tmp_path / "two"), "--images", "128", "256", *FLAGS])
    learning_curves.main(["--out", str(tmp_path / "one"), "--images", "256", *FLAGS])
    for path in (tmp_path / "one" / "cells").glob("*.json"):
        alone, after = (json.loads((tmp_path / name / "cells" / path.name).read_text()) for name in ("one", "two"))
        assert [point["images"] for point in after["points"]] == [128, 256]
        assert alone["points"][0]["held_out"] == after["points"][1]["held_out"]
        assert alone["points"][0]["swaps"] == after["points"][1]["swaps"]


def test_comparisons_are_of_settings_with_figures_in_the_paper() -> None:
    for first, second in COMPARISONS:
        assert SETTINGS[first].paper and SETTINGS[second].paper

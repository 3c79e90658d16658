"""The grid of ablations, very small: two cells, trained, drawn and scored; stopped and run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import ablations

pytestmark = [pytest.mark.integration, pytest.mark.slow]

FLAGS = ["--steps", "3", "--scenes", "64", "--seeds", "1", "--per_task", "1", "--bias", "2"]


def test_two_cells_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path), "--settings", "llm_alone", "both_collaborative", *FLAGS]
    ablations.main(command)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found.keys() == {"llm_alone", "both_collaborative"}
    assert {"overall", "position_bias, quarter 4"} <= found["llm_alone"][0].keys()
    assert all(0.1 < found[name][0]["held-out loss"] < 10 for name in found)
    table = (tmp_path / "results.md").read_text()
    assert "| llm_alone | 1 |" in table and "38.72, 66.15" in table
    assert (tmp_path / "position_bias.svg").read_text().count("<polyline") == 2
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    ablations.main(command)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")} == times

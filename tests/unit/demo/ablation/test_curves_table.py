"""The table of learning curves: effects between settings at the same seed, and how far seeds agree on them."""

import json
from pathlib import Path

import pytest

from demo.ablation import curves_table
from demo.ablation.curves_table import agreements, curves_lines, effect, measures, read


def write(folder: Path, setting: str, seed: int, loss: float, accuracy: float) -> None:
    swap = {"margin": accuracy - 0.5, "error": 0.01, "accuracy": accuracy, "by_timestep": [0, 0, 0]}
    point = {
        "images": 100,
        "held_out": {"loss": loss, "told": 2 - loss, "loss_by_timestep": [loss]},
        "swaps": {"binding": swap, "relation": swap},
        "pictures": {"two_object": 0.25, "position": 0.75, "position_bias, quarter 1": 1.0},
    }
    cell = {"width": 64, "depth": 3}
    record = {
        "setting": setting,
        "seed": seed,
        "cell": cell,
        "world": "pairs",
        "side": 32,
        "scenes": 10,
        "points": [point],
    }
    (folder / f"{setting}-{seed}.json").write_text(json.dumps(record))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, gain in enumerate((0.1, 0.2, 0.3)):
        write(tmp_path, "llm_alone", seed, 1.5 + seed, 0.5)
        write(tmp_path, "refiner_full", seed, 1.5 + seed - gain, 0.6)
    return tmp_path


def test_effects_are_paired_by_seed(folder: Path):
    (points,) = read(folder).values()
    found = effect(points, "refiner_full", "llm_alone", 100, "loss")
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.2) and found.deviation == pytest.approx(0.1)  # a lower loss is ahead
    assert found.agreement == pytest.approx(2.0)
    assert effect(points, "refiner_full", "llm_alone", 200, "loss") is None
    assert measures(points["refiner_full", 0, 100])["pictures"] == 0.5  # without position bias
    even = effect(points, "refiner_full", "llm_alone", 100, "accuracy")
    assert even is not None and even.mean == pytest.approx(0.1)


def test_the_page_has_all_settings_and_measures(folder: Path, capsys: pytest.CaptureFixture[str]):
    curves_table.main(["--results", str(folder)])
    page = capsys.readouterr().out
    assert "pairs world, width 64, depth 3, 32 pixels" in page
    assert "| `refiner_full` | 100 | 3 | 2.3000 ± 0.9000 |" in page and "+0.2000 (2.0)" in page
    (points,) = read(folder).values()
    assert len(curves_lines(points)) == 4 and len(agreements(points)) == 3
    with pytest.raises(SystemExit):
        curves_table.main(["--results", str(folder / "none")])

"""What is written down: lines that survive kills, resuming, and a storage that is elsewhere."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest

from trainer.config import MetricsConfig
from trainer.monitor.metrics import LINES, MetricsWriter, RayGauges, read_lines
from trainer.storage import Storage

pytestmark = pytest.mark.unit
PLAIN = MetricsConfig(tensorboard=False)


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "disk":
        yield Storage(str(tmp_path / "run"))
        return
    yield Storage("memory://bucket/run")
    fsspec.filesystem("memory").store.clear()


def lines(storage: Storage, tmp_path: Path) -> list[dict[str, Any]]:
    storage.download(LINES, tmp_path / "copy.jsonl")
    return read_lines(tmp_path / "copy.jsonl")


def test_a_resumed_run_drops_the_future_that_did_not_happen(storage: Storage, tmp_path: Path) -> None:
    writer = MetricsWriter(storage, PLAIN, "run", 0, {})
    for step in range(1, 8):
        writer.write("train", step, {"loss": 1.0 / step})
    writer.write("validation", 6, {"loss": 0.5})
    writer.close()
    again = MetricsWriter(storage, PLAIN, "run", 5, {})
    again.write("train", 6, {"loss": 0.25})
    again.close()
    found = lines(storage, tmp_path)
    assert [(line["kind"], line["step"]) for line in found] == [("train", step) for step in range(1, 7)]
    assert found[-1]["loss"] == 0.25 and found[2]["loss"] == 1 / 3


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / LINES).write_text('{"kind": "train", "step": 1, "loss": 1.0}\n{"kind": "train", "ste')
    writer = MetricsWriter(storage, PLAIN, "run", 1, {})
    writer.write("train", 2, {"loss": 0.5})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / LINES).read_text().splitlines()] == [1, 2]


def test_what_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    writer = MetricsWriter(Storage(str(tmp_path)), PLAIN, "run", 0, {})
    writer.write("train", 1, {"loss": math.nan, "loss_bins": [1.0, math.inf]})
    writer.close()
    text = (tmp_path / LINES).read_text()
    assert "NaN" not in text and json.loads(text) == {
        "kind": "train",
        "step": 1,
        "loss": None,
        "loss_bins": [1.0, None],
    }


def test_tensorboard_gets_figures_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(Storage(str(tmp_path)), MetricsConfig(), "run", 0, {})
    writer.write("train", 3, {"loss": 0.5, "loss_bins": [0.25, math.nan]})
    writer.write_image("samples", 3, np.zeros((8, 16, 3), np.uint8))
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["train/loss", "train/loss_bins/0"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]
    assert events.Images("samples")[0].width == 16
    assert (tmp_path / "samples" / "step_00000003.png").read_bytes().startswith(b"\x89PNG")


def test_starts_are_all_kept(storage: Storage) -> None:
    for step in (0, 4, 4):
        writer = MetricsWriter(storage, PLAIN, "run", step, {})
        writer.started(step, 2)
        writer.close()
    found = [json.loads(line) for line in storage.read("starts.jsonl").splitlines()]
    assert [(line["step"], line["world_size"]) for line in found] == [(0, 2), (4, 2), (4, 2)]


def test_wandb_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install lidit\[wandb\]"):
        MetricsWriter(Storage(str(tmp_path)), MetricsConfig(tensorboard=False, wandb="project"), "run", 0, {})


# -- gauges -----------------------------------------------------------------------------------------------------------


def test_figures_of_a_step_are_gauges_under_the_runs_name(recorded: Any) -> None:
    values = {"loss": 0.5, "data_wait": 0.02, "grad_norm": math.nan, "loss_bins": [1.0, 2.0], "unknown": 3.0}
    RayGauges("first").write("train", 7, values)
    labels = {"run": "first"}
    assert recorded == [
        ("lidit_train_step", 7, labels),
        ("lidit_train_loss", 0.5, labels),
        ("lidit_train_data_wait", 0.02, labels),
    ]


def test_held_out_loss_is_another_gauge(recorded: Any) -> None:
    RayGauges("first").write("validation", 8, {"loss": 0.25, "ema_loss": 0.125})
    assert [(name, value) for name, value, _ in recorded] == [
        ("lidit_train_step", 8), ("lidit_validation_loss", 0.25), ("lidit_validation_ema_loss", 0.125),
    ]  # fmt: skip


def test_no_gauges_outside_a_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    assert RayGauges.here("first") is None
    monkeypatch.delitem(sys.modules, "ray")
    assert RayGauges.here("first") is None

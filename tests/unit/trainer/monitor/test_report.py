"""The figures of a line, from the sums of steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lidit.config import LIDiTConfig
from lidit.diffusion import BINS
from lidit.flops import model_flops
from trainer.config import MetricsConfig
from trainer.monitor import report as module
from trainer.monitor.metrics import MetricsWriter
from trainer.monitor.report import Meter, Report, _duration
from trainer.monitor.step_metrics import Totals
from trainer.storage import Storage

pytestmark = pytest.mark.unit
MODEL = LIDiTConfig({"one": 8, "two": 16}, depth=2, width=32, heads=2, in_channels=4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"now": 100.0}
    monkeypatch.setattr(module.time, "perf_counter", lambda: now["now"])
    return now


def totals(loss: float, samples: int, norm: float, **other: Any) -> Totals:
    bins = np.zeros((2, BINS))
    bins[:, 3] = loss, samples
    values: dict[str, Any] = {"bad_losses": 0, "wait_seconds": 0.0, "stop": False, "terminated": 0, "draining": False}
    values |= {"prompt_tokens": [10.0 * samples, 20.0 * samples], "bins": bins, **other}
    return Totals(loss=loss, samples=samples, grad_norm=norm, **values)


def test_means_rates_and_flops(clock: dict[str, float]) -> None:
    meter = Meter(MODEL, {"one": 3, "two": 5}, microbatch_size=4, world_size=2, gpu_tflops=1e-3)
    meter.add(totals(8.0, 8, 1.0, wait_seconds=0.5), (8, 8), taken=True)
    meter.add(totals(16.0, 8, 3.0, wait_seconds=0.3), (6, 10), taken=True)
    meter.add(totals(math.nan, 8, math.inf), (8, 8), taken=False)
    clock["now"] += 2.0
    line = meter.line()
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (1.5, 2.0, 1)
    assert line["loss_bins"][3] == 1.5 and all(
        math.isnan(value) for bin, value in enumerate(line["loss_bins"]) if bin != 3
    )
    assert line["samples_per_second"] == 12.0 and line["seconds_per_step"] == pytest.approx(2 / 3)
    assert line["data_wait"] == pytest.approx(0.8 / 2 / 2)
    image_tokens = 16 * 16 + 8 * 15
    assert line["tokens_per_second"] == (image_tokens + 24 * 30) / 2
    prompt, instruction = {"one": 10.0, "two": 20.0}, {"one": 3, "two": 5}
    flops = sum(
        samples * sum(part.total for part in model_flops(MODEL, size, prompt, instruction, 4).values())
        for size, samples in (((8, 8), 16), ((6, 10), 8))
    )
    assert line["tflops"] == pytest.approx(flops / 2 / 1e12)
    assert line["mfu"] == pytest.approx(flops / 2 / 1e12 / (2 * 1e-3))
    meter.reset()
    assert math.isnan(meter.line()["loss"]) and meter.line()["skipped"] == 0


def test_no_peak_no_mfu(clock: dict[str, float]) -> None:
    meter = Meter(MODEL, {"one": 3, "two": 5}, 4, 1, None)
    meter.add(totals(8.0, 8, 1.0), (8, 8), taken=True)
    clock["now"] += 1.0
    assert "mfu" not in meter.line()


def test_lines_are_shown_now_and_then_and_the_last_one_always(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report(
        MetricsWriter(Storage(str(tmp_path)), MetricsConfig(tensorboard=False), "run", 0, {}), total_steps=40
    )
    now = iter(np.arange(1000.0, 1040.0))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    values = {
        "loss": 0.5,
        "grad_norm": 1.0,
        "samples_per_second": 8.0,
        "data_wait": 0.01,
        "skipped": 0,
        "seconds_per_step": 2.0,
    }
    for step in (10, 20, 30, 40):
        report.line(step, values)
    shown = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert (
        len(shown) == 2
        and "step 10 of 40: loss 0.5000" in shown[0]
        and "1 min" not in shown[0]
        and "60 s left" in shown[0]
    )
    assert "step 40 of 40" in shown[1]
    assert report.first["step"] == 10 and report.last["step"] == 40


def test_a_resumed_run_remembers_where_it_came_from(tmp_path: Path) -> None:
    """First and last figures are the run's, not this start's; a line without a loss, and one of the future, are left out."""
    before = MetricsWriter(Storage(str(tmp_path)), MetricsConfig(tensorboard=False), "run", 0, {})
    for step, loss in ((10, math.nan), (20, 0.9), (30, 0.7), (40, 0.1)):
        before.write("train", step, {"loss": loss})
    before.write("validation", 30, {"loss": 0.8})
    before.close()
    after = Report(MetricsWriter(Storage(str(tmp_path)), MetricsConfig(tensorboard=False), "run", 30, {}), 50)
    assert after.first == {"step": 20, "loss": 0.9} and after.last == {"step": 30, "loss": 0.7}
    assert after.validation == {"step": 30, "loss": 0.8}


@pytest.mark.parametrize(
    ("seconds", "words"), [(5.4, "5 s"), (119, "119 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert _duration(seconds) == words

"""What `lidit train` and `lidit export` say at their end."""

import json

import pytest

from trainer.export import ExportResult
from trainer.train import TrainResult

pytestmark = pytest.mark.unit

FIRST = {"step": 1, "loss": 1.25}
LAST = {"step": 40, "loss": 0.5, "samples_per_second": 12.34, "data_wait": 0.015}


def test_a_run_says_how_far_it_is_and_what_comes_next():
    result = TrainResult(
        "r", "/runs/r", status="stopped", step=40, total_steps=1000, first=FIRST, last=LAST, next="go on"
    )
    assert result.to_text().splitlines() == [
        "train: stopped, r at step 40 of 1,000 (from 0), 0 images seen, 0.0 s",
        "  loss       0.5000 at step 40, after 1.2500 at step 1",
        "  speed      12.3 samples/s, data wait 1.5%",
        "  folder     /runs/r",
        "  next       go on",
    ]
    assert json.loads(result.to_json())["ok"] is False


@pytest.mark.parametrize("ema", [True, False])
def test_a_run_says_what_was_not_as_it_should_be(ema):
    validation = {"loss": 0.6, "step": 40} | ({"ema_loss": 0.55} if ema else {})
    result = TrainResult("r", "/runs/r", status="done", skipped_steps=3, validation=validation, warnings=["one", "two"])
    assert result.to_text().splitlines()[1:-1] == [
        f"  held out   0.6000{', EMA 0.5500' if ema else ''} at step 40",
        "  skipped    3 steps had a loss or gradient that was not finite",
        "  warning    one",
        "  warning    two",
    ]


def test_an_export_says_what_to_do_with_the_weights():
    text = ExportResult("weights", 40, "ema", 1_234_567, warnings=["checkpoint skipped"]).to_text()
    assert text.splitlines() == [
        "export: ema weights of step 40, 1,234,567 parameters",
        "  folder     weights",
        "  warning    checkpoint skipped",
        '  next       lidit sample --weights weights --prompt "..."',
    ]

"""A run's figures as gauges: those that a dashboard draws, finite ones, under the run's name; none outside a Ray."""

import math
import sys
from types import SimpleNamespace

import pytest

from trainer.monitor.ray_metrics import RayGauges

pytestmark = pytest.mark.unit


def test_figures_of_a_step(recorded):
    values = {"loss": 0.5, "data_wait": 0.02, "grad_norm": math.nan, "loss_bins": [1.0, 2.0], "unknown": 3.0}
    RayGauges("first").write("train", 7, values)
    labels = {"run": "first"}
    assert recorded == [
        ("lidit_train_step", 7, labels),
        ("lidit_train_loss", 0.5, labels),
        ("lidit_train_data_wait", 0.02, labels),
    ]


def test_held_out_loss_is_another_metric(recorded):
    RayGauges("first").write("validation", 8, {"loss": 0.25, "ema_loss": 0.125})
    assert [(name, value) for name, value, _ in recorded] == [
        ("lidit_train_step", 8), ("lidit_validation_loss", 0.25), ("lidit_validation_ema_loss", 0.125),
    ]  # fmt: skip


def test_none_outside_a_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    assert RayGauges.here("first") is None
    monkeypatch.delitem(sys.modules, "ray")
    assert RayGauges.here("first") is None

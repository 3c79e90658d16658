"""Random states, kept and put back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.checkpoints.rng import load_rng, save_rng

pytestmark = pytest.mark.unit


def draws() -> list[float]:
    return [
        float(torch.rand(())),
        float(np.random.rand()),
        random.random(),
        float(np.random.normal()),
        random.gauss(0, 1),
    ]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    draws()
    random.gauss(0, 1)  # keeps a second value for later
    np.random.normal()
    save_rng(tmp_path / "rng" / "rank.safetensors")
    expected = [draws(), draws()]
    draws()
    load_rng(tmp_path / "rng" / "rank.safetensors")
    assert [draws(), draws()] == expected

"""The whole job under real Ray Train V2 and DeepSpeed, two CPU workers: stopped, resumed, on other numbers, exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lidit
from lidit.weights import read_config
from tests.support import training
from trainer import train
from trainer.config import CheckpointConfig, TrainConfig, ValidationConfig
from trainer.export import ExportConfig
from trainer.export import main as export

pytestmark = pytest.mark.integration
STEPS = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ray_for_training: Any) -> Any:
    """A store, and a run of 30 steps on it that was never stopped."""
    folder = tmp_path_factory.mktemp("job")
    store = training.make_store(folder / "store", codec="fp32")
    validation = ValidationConfig(every_steps=15, rows=8, timesteps=2, prompts=store, images=3, num_inference_steps=2)
    config = training.make_config(store, folder / "runs", checkpoint=CheckpointConfig(every_steps=10))
    config = training.steps(dataclasses.replace(config, name="unbroken", validation=validation), STEPS)
    return SimpleNamespace(folder=folder, store=store, config=config, summary=train.main(config))


def weights(config: TrainConfig, kind: str, folder: Path) -> dict[str, torch.Tensor]:
    out = folder / f"{config.name}-{kind}"
    export(ExportConfig(run=f"{config.storage}/{config.name}", out=str(out), weights=kind, overwrite=True))
    return lidit.from_pretrained(out).state_dict()


def test_an_unbroken_run(world: Any) -> None:
    """Trains as a plain loop does, writes what it says, leaves two checkpoints, and its weights know where they are from."""
    summary, config = world.summary, world.config
    assert (summary.ok, summary.status, summary.step, summary.images_seen) == (True, "done", STEPS, 240)
    np.testing.assert_allclose(training.losses(config), training.reference(config).losses, atol=1e-4)
    assert training.checkpoints(config) == [20, 30]
    last = training.lines(config)[STEPS]
    assert {
        "loss_bins",
        "grad_norm",
        "samples_per_second",
        "tokens_per_second",
        "data_wait",
        "memory_gb",
    } <= last.keys()
    assert "mfu" not in last and last["tflops"] > 0 and len(last["loss_bins"]) == 10
    validated = training.lines(config, "validation")
    assert list(validated) == [15, 30] and {"loss", "ema_loss", "ema_loss_by_timestep"} <= validated[30].keys()
    run = Path(config.storage, config.name)
    assert (run / "samples" / "step_00000030.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(summary.to_json())["last"]["step"] == STEPS and "lidit export" in summary.to_text()
    assert json.loads((run / "driver" / "lease-00000001").read_text())["released"] and not (run / "stop").exists()
    weights(config, "ema", world.folder)
    about = read_config(world.folder / "unbroken-ema")
    assert about["training"]["step"] == STEPS and about["training"]["weights"] == "ema"
    assert about["encoders"]["one"]["fingerprint"] == {"model": "one", "layer": -3}
    assert about["objective"]["name"] == "flow" and about["image_size"] == [64, 64]


def test_stopped_in_the_middle_of_an_epoch_and_resumed_is_the_same_to_the_bit(world: Any) -> None:
    stopped = dataclasses.replace(world.config, name="resumed", stop_after_steps=13)
    first = train.main(stopped)
    assert (first.ok, first.step) == (True, 13)
    second = train.main(dataclasses.replace(stopped, stop_after_steps=None))
    assert (second.resumed_from, second.step, second.warnings) == (13, STEPS, [])
    assert training.losses(stopped) == training.losses(world.config)
    assert training.lines(stopped, "validation") == training.lines(world.config, "validation")
    for kind in ("raw", "ema"):
        found, expected = (weights(config, kind, world.folder) for config in (stopped, world.config))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_ranks_then_one_then_two(world: Any) -> None:
    """Through DeepSpeed's universal checkpoint, by itself: losses, order and average as on two ranks all along."""
    config = dataclasses.replace(world.config, name="resharded")
    for ranks, stop in ((2, 9), (1, 19), (2, None)):
        summary = train.main(dataclasses.replace(config, num_workers=ranks, stop_after_steps=stop))
        assert summary.ok and summary.warnings == []
    np.testing.assert_allclose(training.losses(config), training.losses(world.config), atol=1e-4)
    for kind in ("raw", "ema"):
        found, expected = (weights(run, kind, world.folder) for run in (config, world.config))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=0)


def test_wrong_input_is_told_before_any_worker_starts(world: Any) -> None:
    def fails(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            train.main(dataclasses.replace(world.config, **changes))

    fails("has a checkpoint at step 30", resume="never")
    fails("has no checkpoint", resume="must", name="new")
    fails("version 99 of .* cannot be opened", name="new", data=dataclasses.replace(world.config.data, version=99))
    fails("no table at .*nowhere", name="new", store=str(world.folder / "nowhere"))
    phase = dataclasses.replace(world.config.phases[0], resolution=512)
    fails("trains at 512 px", name="new", phases=(phase,))


def test_dry_run_changes_nothing(world: Any) -> None:
    summary = train.main(dataclasses.replace(world.config, name="dry", dry_run=True))
    assert summary.ok and "parameters" in summary.to_text()
    assert not Path(world.config.storage, "dry").exists()

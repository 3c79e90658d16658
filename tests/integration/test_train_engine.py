"""The trainer's steps on real DeepSpeed, every ZeRO stage, against a plain torch loop; no Ray, so that many runs fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import pytest
import torch

from lidit.weights import load_weights
from tests.support import training
from trainer.config import (
    CheckpointConfig,
    PhaseConfig,
    TrainConfig,
    ZeroConfig,
)
from trainer.export import ExportConfig
from trainer.export import main as export

pytestmark = pytest.mark.integration
STEPS = 20
ONE_SAVE = CheckpointConfig(every_steps=1000)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store, and what 20 plain steps on it give."""
    folder = tmp_path_factory.mktemp("engine")
    store = training.make_store(folder / "store", codec="fp32")
    config = training.steps(training.make_config(store, folder / "runs", checkpoint=ONE_SAVE), STEPS)
    return SimpleNamespace(folder=folder, store=store, config=config, plain=training.reference(config))


def exported(config: TrainConfig, weights: str, folder: Path) -> dict[str, torch.Tensor]:
    run = f"{config.storage}/{config.name}"
    summary = export(ExportConfig(run=run, out=str(folder / f"{config.name}-{weights}"), weights=weights))
    return load_weights(summary.out).state_dict()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].float(), value.float(), atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_equals_a_plain_loop(world: Any, world_size: int) -> None:
    """Losses, gradient norms, exported weights and average, with and without gradient accumulation."""
    configs = [
        dataclasses.replace(
            world.config,
            name=f"world{world_size}-stage{stage}-accumulate{accumulate}",
            zero=ZeroConfig(stage=stage),
            num_workers=world_size,
            microbatch_size=8 // world_size // accumulate,
        )
        for stage in (0, 1, 2, 3)
        for accumulate in (1, 2)
    ]
    outcomes = training.run_ranks(world_size, "train_all", configs)[0]
    for config, outcome in zip(configs, outcomes):
        assert (outcome["status"], outcome["step"], outcome["skipped_steps"]) == ("done", STEPS, 0)
        np.testing.assert_allclose(training.losses(config), world.plain.losses, atol=1e-4, err_msg=config.name)
        norms = [line["grad_norm"] for line in training.lines(config).values()]
        np.testing.assert_allclose(norms, world.plain.norms, rtol=1e-3, err_msg=config.name)
        assert_close(exported(config, "raw", world.folder), world.plain.weights, atol=1e-4)
        assert_close(exported(config, "ema", world.folder), world.plain.average, atol=1e-4)
    apart = [(world.plain.weights[name] - value).abs().max() for name, value in world.plain.average.items()]
    assert max(apart) > 1e-3, "else the average would not be told from the weights"


def test_stages_agree_in_bf16(world: Any) -> None:
    """Two ranks, accumulation: the same losses at every stage, to what bf16 gradients allow, and close to those of fp32."""
    configs = [
        dataclasses.replace(
            world.config, name=f"bf16-stage{stage}", zero=ZeroConfig(stage=stage), precision="bf16", microbatch_size=2
        )
        for stage in (0, 1, 2, 3)
    ]
    training.run_ranks(2, "train_all", configs)
    for config in configs:
        np.testing.assert_allclose(training.losses(config), world.plain.losses, rtol=0.02, err_msg=config.name)
        assert_close(exported(config, "ema", world.folder), world.plain.average, atol=0.02)
        assert_close(exported(config, "raw", world.folder), world.plain.weights, atol=0.05)


def test_muon_equals_a_plain_loop(world: Any) -> None:
    """Two ranks, accumulation; in bf16, DeepSpeed puts fp32 masters in the weights' place."""
    muon = dataclasses.replace(world.config.optimizer, name="muon")
    base = dataclasses.replace(world.config, optimizer=muon, zero=ZeroConfig(stage=0), microbatch_size=2)
    plain = training.reference(base)
    configs = [
        dataclasses.replace(base, name=f"muon-{precision}", precision=precision) for precision in ("fp32", "bf16")
    ]
    training.run_ranks(2, "train_all", configs)
    for config, rtol, atol in zip(configs, (1e-3, 0.02), (5e-3, 0.05)):  # Muon's own arithmetic is in bf16
        np.testing.assert_allclose(training.losses(config), plain.losses, rtol=rtol, err_msg=config.name)
        assert_close(exported(config, "raw", world.folder), plain.weights, atol=atol)
    apart = [(plain.weights[name] - value).abs().max() for name, value in world.plain.weights.items()]
    assert max(apart) > 0.015, "three times the tolerance in fp32, else it could be AdamW"


@pytest.mark.parametrize(("how", "precision"), [("nan", "fp32"), ("inf", "bf16")])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(world: Any, how: str, precision: str) -> None:
    spoilt = (4, 5, 11)
    config = training.steps(dataclasses.replace(world.config, precision=precision, microbatch_size=2), 14)
    plain = training.reference(config, spoil=lambda step, model: step in spoilt)
    runs = [dataclasses.replace(config, name=f"{how}-{stage}", zero=ZeroConfig(stage=stage)) for stage in (0, 1, 2, 3)]
    for run, outcomes in zip(runs, zip(*training.run_ranks(2, "train_all_spoilt", runs, how, 1, spoilt))):
        assert [outcome["skipped_steps"] for outcome in outcomes] == [3, 3]
        lines = training.lines(run)
        assert [lines[step]["skipped"] for step in range(1, 15)] == [int(step - 1 in spoilt) for step in range(1, 15)]
        taken = [step for step in range(14) if step not in spoilt]
        found = [lines[step + 1]["loss"] for step in taken]
        expected = [plain.losses[step] for step in taken]
        np.testing.assert_allclose(found, expected, rtol=1e-4 if precision == "fp32" else 0.02, err_msg=run.name)
        assert_close(exported(run, "ema", world.folder), plain.average, atol=1e-4 if precision == "fp32" else 0.02)


def test_too_many_skipped_steps_in_a_row_stop_the_run(world: Any) -> None:
    optimizer = dataclasses.replace(world.config.optimizer, max_skipped_steps=3)
    config = dataclasses.replace(world.config, name="hopeless", optimizer=optimizer)
    outcomes = training.run_ranks(2, "train_spoilt", config, "nan", 0, range(5, 20))
    assert {outcome["status"] for outcome in outcomes} == {"failed"}
    assert "step 7" in outcomes[0]["error"] and "3th in a row" in outcomes[0]["error"]


def test_ranks_with_only_dropped_prompts_stay_in_step(tmp_path: Path) -> None:
    """The empty prompt has no token at all here, and most microbatches of one sample have no other."""
    store = training.make_store(tmp_path / "store", codec="fp32", null_tokens=0)
    config = training.make_config(store, tmp_path / "runs", checkpoint=ONE_SAVE, microbatch_size=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_drop_prob=0.8))
    plain = training.reference(config)
    training.run_ranks(2, "train_all", [config])
    np.testing.assert_allclose(training.losses(config), plain.losses, atol=1e-4)


def test_counts_that_do_not_divide(tmp_path: Path) -> None:
    """23 rows in two buckets, 8 a step, three epochs: no hang, no row lost; a batch that ranks cannot share is refused."""
    store = training.make_store(tmp_path / "store", rows=(11, 5, 7), codec="fp32")
    config = training.steps(training.make_config(store, tmp_path / "runs", checkpoint=ONE_SAVE), 9)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=0.0), microbatch_size=3)
    plain = training.reference(config)
    outcome = training.run_ranks(2, "train_all", [config])[0][0]
    np.testing.assert_allclose(training.losses(config), plain.losses, atol=1e-4)
    assert outcome["images_seen"] == 72
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        dataclasses.replace(config, num_workers=3)


def test_phases_change_batch_size_and_accumulation(tmp_path: Path) -> None:
    """Optimizer and average go on; images are counted through; a resumed second phase equals an unbroken one."""
    store = training.make_store(tmp_path / "store", codec="fp32")
    phases = (
        PhaseConfig(steps=4, global_batch_size=8, resolution=64),
        PhaseConfig(steps=5, global_batch_size=12, resolution=64, flow_shift=2.0, microbatch_size=2),
    )
    config = training.make_config(store, tmp_path / "runs", phases=phases, checkpoint=ONE_SAVE)
    broken = [dataclasses.replace(config, name="broken", stop_after_steps=stop) for stop in (6, None)]
    outcomes = training.run_ranks(2, "train_all", [config, *broken])[0]
    assert [outcome["images_seen"] for outcome in outcomes] == [4 * 8 + 5 * 12, 4 * 8 + 2 * 12, 4 * 8 + 5 * 12]
    assert training.losses(broken[1]) == training.losses(config)
    assert [line["phase"] for line in training.lines(config).values()] == [0] * 4 + [1] * 5


def test_a_damaged_data_file_stops_the_run_saved_and_it_goes_on_once_mended(tmp_path: Path) -> None:
    store = training.make_store(tmp_path / "store", codec="fp32")
    config = training.steps(training.make_config(store, tmp_path / "runs", checkpoint=ONE_SAVE), 60)
    table = lance.dataset(f"{store}/samples.lance")
    path = Path(table.uri, "data", table.get_fragments()[2].metadata.files[0].path)
    whole = path.read_bytes()
    latents = table.to_table(columns=["latents"], limit=1, offset=33)["latents"][0].as_py()
    at = whole.index(latents)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    outcomes = [outcome for (outcome,) in training.run_ranks(2, "train_all", [config])]
    assert {outcome["status"] for outcome in outcomes} == {"failed"}
    assert outcomes[0]["error"] == outcomes[1]["error"]
    assert f"fragment 2, file {path.name}: column latents is not what was written" in outcomes[0]["error"]
    stopped = training.checkpoints(config)
    assert len(stopped) == 1 and f"saved at step {stopped[0]}" in outcomes[0]["error"] and stopped[0] < 60
    path.write_bytes(whole)
    outcome = training.run_ranks(2, "train_all", [config])[0][0]
    assert outcome["status"] == "done" and outcome["resumed_from"] == stopped[0] and outcome["step"] == 60

"""DeepSpeed's dictionary: what follows from the config, and that DeepSpeed takes it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lidit.config import SIZES, LIDiTConfig
from lidit.model import LIDiT
from trainer.config import OptimizerConfig, PhaseConfig, TrainConfig, ZeroConfig
from trainer.engine.zero import deepspeed_config, persistent_elements
from trainer.recipes import RECIPES

pytestmark = pytest.mark.unit

PHASE = PhaseConfig(steps=10, global_batch_size=64)
MODEL = SIZES["1b"](None, in_channels=16)


def dictionary(config: TrainConfig, model: LIDiTConfig = MODEL, world_size: int = 4) -> dict[str, Any]:
    return deepspeed_config(
        config.zero,
        model,
        config.run_phases,
        world_size,
        precision=config.precision,
        grad_clip=config.optimizer.grad_clip,
        on_gpu=config.use_gpu is not False,
    )


def made(world_size: int = 4, phase: PhaseConfig = PHASE, **changes: Any) -> dict[str, Any]:
    return dictionary(TrainConfig(phases=(phase,), **{"microbatch_size": 8, **changes}), world_size=world_size)


def test_batch_sizes_are_the_phases_split() -> None:
    for world_size in (1, 2, 8):
        result = made(world_size)
        product = result["train_micro_batch_size_per_gpu"] * result["gradient_accumulation_steps"] * world_size
        assert product == result["train_batch_size"] == 64
        assert result["train_micro_batch_size_per_gpu"] == 8
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        made(3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stages_and_precisions(stage: Any, precision: Any) -> None:
    result = made(zero=ZeroConfig(stage=stage), precision=precision)
    assert result["zero_optimization"]["stage"] == stage
    assert result["bf16"]["enabled"] == (precision == "bf16")
    assert ("stage3_prefetch_bucket_size" in result["zero_optimization"]) == (stage == 3)
    assert result["zero_allow_untested_optimizer"] is True and result["zero_force_ds_cpu_optimizer"] is False
    # 64 samples on 4 ranks, 8 at a time: two microbatches are summed, in fp32 where DeepSpeed can
    assert ("data_types" in result) == (precision == "bf16" and stage > 0)


def test_gradients_are_summed_in_fp32_only_where_they_are_summed() -> None:
    assert "data_types" not in made(8)
    later = PhaseConfig(steps=1, global_batch_size=128)
    config = TrainConfig(phases=(PHASE, later), microbatch_size=8)
    assert dictionary(config, world_size=8)["data_types"] == {"grad_accum_dtype": "fp32"}  # for the later phase


@pytest.mark.parametrize("size", ["tiny", "small", "1b", "10b"])
def test_vectors_stay_whole_and_matrices_are_sharded(size: str) -> None:
    """Norms, biases and modulation vectors are below the threshold, the weights of blocks above: few bytes, few gathers."""
    model: LIDiTConfig = replace(SIZES[size](None, in_channels=16), depth=2)
    threshold = persistent_elements(ZeroConfig(), model)
    with torch.device("meta"):
        parameters = dict(LIDiT(model).named_parameters())
    kept = {name: value for name, value in parameters.items() if value.numel() <= threshold}
    assert all(value.ndim > 1 for name, value in parameters.items() if name not in kept)
    assert not [name for name, value in kept.items() if value.ndim > 1 and ".blocks" in f".{name}"]
    if size in ("1b", "10b"):
        assert sum(value.numel() for value in kept.values()) < 0.005 * sum(
            value.numel() for value in parameters.values()
        )
        assert all(value.ndim == 1 for value in kept.values())


def test_sizes_follow_the_width() -> None:
    for size in ("1b", "10b"):
        model = SIZES[size](None, in_channels=16)
        config = TrainConfig(phases=(PHASE,))
        sharding = dictionary(config, model, 1)["zero_optimization"]
        with torch.device("meta"):
            blocks = LIDiT(replace(model, depth=1)).blocks[0]
        weights = [value.numel() for value in blocks.parameters()]
        assert sharding["stage3_prefetch_bucket_size"] == pytest.approx(sum(weights), rel=0.01)
        assert sharding["reduce_bucket_size"] == max(weights)
        assert sharding["stage3_max_live_parameters"] >= 4 * sum(weights)


def test_options_reach_deepspeed() -> None:
    zero = ZeroConfig(offload_optimizer=True, offload_parameters=True, hpz_partition_size=4, persistent_elements=7)
    result = made(8, zero=zero, num_workers=8, optimizer=OptimizerConfig(grad_clip=0.5))
    sharding = result["zero_optimization"]
    assert sharding["offload_optimizer"]["device"] == sharding["offload_param"]["device"] == "cpu"
    assert sharding["zero_hpz_partition_size"] == 4 and sharding["stage3_param_persistence_threshold"] == 7
    assert result["gradient_clipping"] == 0.5
    with pytest.raises(ValueError, match="hpz_partition_size 4 does not divide among 2 ranks"):
        made(2, zero=zero, num_workers=8)
    assert made(use_gpu=False)["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize("name", RECIPES)
def test_deepspeed_knows_every_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pydantic models forbid unknown keys; the batch sizes must agree with the ranks."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = RECIPES[name]()
    model = config.model.build(dict.fromkeys(config.data.encoders, 4096), 16)
    for phase in config.phases:
        result = dictionary(replace(config, phases=(phase,)), model, config.num_workers)
        taken = DeepSpeedZeroConfig(**result["zero_optimization"])
        assert taken.stage == config.zero.stage
        assert taken.param_persistence_threshold == persistent_elements(config.zero, model)
        DeepSpeedBF16Config(**result["bf16"])

"""Recipes: functions that return a whole `TrainConfig`. `lidit train --recipe NAME`; flags and YAML change any field of it.

Sizes, batches, iterations, encoders and learning rate are the paper's (arXiv 2406.11831, section 4 and tables 1 to 6). It is
silent on warm-up, weight decay, EMA, prompt drop and the steps of the single phases of the 10B model; those are ours.
"""

from __future__ import annotations

from lidit.store import columns
from trainer.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    TrainConfig,
    ValidationConfig,
    ZeroConfig,
)

BOTH_CAPTIONS = {columns.CAPTION: 0.5, columns.CAPTION_ORIGINAL: 0.5}


def scenes() -> TrainConfig:
    """The demo world on a laptop: two CPU workers, minutes."""
    return TrainConfig(
        name="scenes",
        vae="demo/vae",
        model=ModelConfig(size="tiny"),
        phases=(PhaseConfig(steps=400, global_batch_size=16, resolution=64),),
        data=DataConfig(
            encoders=("llama", "qwen"),
            holdout=0.05,
            pad_multiple=8,
            read_threads=1,
            buffer_mb=256,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
        ema=EMAConfig(decay=0.995),
        zero=ZeroConfig(stage=3),
        precision="fp32",
        num_workers=2,
        use_gpu=False,
        checkpoint=CheckpointConfig(every_steps=100),
        validation=ValidationConfig(every_steps=100, rows=48),
    )


def ablation_1b_256() -> TrainConfig:
    """Tables 2 to 6: the 1B shape, LLaMA3 alone, 256 px, batch 256, 300k iterations on 2.6M pairs."""
    return TrainConfig(
        name="ablation_1b_256",
        model=ModelConfig(size="1b"),
        phases=(PhaseConfig(steps=300_000, global_batch_size=256),),
        data=DataConfig(encoders=("llama3",), text_mix=BOTH_CAPTIONS, holdout=1e-3),
        zero=ZeroConfig(stage=3),
        num_workers=8,
        cpus_per_worker=8.0,
        checkpoint=CheckpointConfig(every_steps=2500, keep_every_steps=50_000),
        validation=ValidationConfig(every_steps=2500, rows=2048),
    )


def lidit_1b_256() -> TrainConfig:
    """LI-DiT-1B: LLaMA3-8B and Qwen1.5-7B, 256 px, batch 2048, 500k iterations on 30M pairs."""
    return TrainConfig(
        name="lidit_1b_256",
        model=ModelConfig(size="1b"),
        phases=(PhaseConfig(steps=500_000, global_batch_size=2048),),
        data=DataConfig(encoders=("llama3", "qwen15"), text_mix=BOTH_CAPTIONS, holdout=1e-4),
        zero=ZeroConfig(stage=3),
        num_workers=64,
        cpus_per_worker=8.0,
        checkpoint=CheckpointConfig(every_steps=2500, keep_every_steps=50_000),
        validation=ValidationConfig(every_steps=2500, rows=2048),
    )


def lidit_10b_512() -> TrainConfig:
    """LI-DiT-10B up to 512 px: batch 4096, over 1M iterations on over 1B pairs; a start at 256 px before."""
    return TrainConfig(
        name="lidit_10b",
        model=ModelConfig(size="10b", checkpointing=True),
        phases=(
            PhaseConfig(steps=200_000, global_batch_size=4096),
            PhaseConfig(
                steps=1_000_000,
                global_batch_size=4096,
                resolution=512,
                flow_shift=3.0,
                latents="latents_512",
                bucket="bucket_512",
            ),
        ),
        data=DataConfig(encoders=("llama3", "qwen15"), text_mix=BOTH_CAPTIONS, holdout=1e-5),
        zero=ZeroConfig(stage=3, hpz_partition_size=8),
        microbatch_size=16,
        num_workers=256,
        cpus_per_worker=8.0,
        max_failures=100,
        checkpoint=CheckpointConfig(every_steps=1000, keep_every_steps=50_000),
        validation=ValidationConfig(every_steps=5000, rows=4096),
    )


def lidit_10b_1024() -> TrainConfig:
    """`lidit_10b_512` and a last phase at 1024 px. Under the same name it goes on from where that one ended."""
    before = lidit_10b_512()
    last = PhaseConfig(
        steps=100_000,
        global_batch_size=4096,
        resolution=1024,
        flow_shift=3.0,
        latents="latents_1024",
        bucket="bucket_1024",
    )
    return TrainConfig(**{**vars(before), "phases": (*before.phases, last)})


RECIPES = {recipe.__name__: recipe for recipe in (scenes, ablation_1b_256, lidit_1b_256, lidit_10b_512, lidit_10b_1024)}

"""The dry run's figures: of the table where there is one, and in words that name what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lidit.store import columns
from lidit.store.features import Features
from trainer.config import DataConfig, HardwareConfig, ModelConfig, PhaseConfig, TrainConfig
from trainer.data.plan import Plan, Rows
from trainer.data.survey import mean_length, survey
from trainer.planner.estimate import Shapes, count_lines, estimate, expected_longest, mixed
from trainer.recipes import RECIPES

pytestmark = pytest.mark.unit

CONFIG = TrainConfig(
    model=ModelConfig(size="tiny", changes={"depth": 2}),
    phases=(PhaseConfig(steps=50, global_batch_size=8, resolution=64),),
    data=DataConfig(
        encoders=("one", "two"),
        text_mix={columns.CAPTION: 0.5, columns.CAPTION_ORIGINAL: 0.5},
        holdout=0.1,
        pad_multiple=4,
    ),
    microbatch_size=4,
    num_workers=2,
)


def table(store: Any) -> Any:
    features = Features(store.uri, CONFIG.data.encoders, CONFIG.data.text_mix)
    return features, survey(features, CONFIG.data.holdout)


def test_a_run_on_a_table(store: Any) -> None:
    features, found = table(store)
    result = estimate(CONFIG, 2, {0: (features, found)})
    assert result.model.encoders == {"one": 8, "two": 16} and result.model.in_channels == 4
    (phase,) = result.phases
    assert (phase.microbatch_size, phase.grad_accum_steps, phase.samples) == (4, 1, 400)
    assert phase.shapes.latent_size == (8, 8) and phase.shapes.sample_bytes == found.sample_bytes
    assert phase.shapes.instruction_tokens == {"one": 3, "two": 5}
    assert phase.counts is not None and sum(phase.counts.batches.values()) == 50
    text = "\n".join(result.lines())
    assert f"version {features.version}: 90 rows, {found.rows.counts.sum()} to train on in 2 buckets" in text
    assert "without latents" in text and "without embeddings" in text and f"{len(found.rows.held_out)} held out" in text
    assert f"{50 * 8 / found.rows.counts.sum():,.2f} epochs" in text
    assert "in all     50 steps, 400 samples" in text


def test_a_run_without_a_table_says_that_it_assumes(store: Any) -> None:
    text = "\n".join(estimate(RECIPES["ablation_1b_256"](), 8).lines())
    assert "none for 1 phases: samples are assumed" in text
    assert "a rank takes 1 x 32 a step" in text and "llama3 100 (padded to 256)" in text


def test_the_1b_recipe_fits_its_gpus_and_reads_what_its_features_weigh() -> None:
    config = RECIPES["lidit_1b_256"]()
    result = estimate(config, config.num_workers)
    (phase,) = result.phases
    assert 1.06e9 < result.parameters < 1.11e9
    assert phase.memory.total < 80e9
    assert phase.shapes.sample_bytes == 2 * (16 * 32 * 32 + 2 * 100 * 4096)
    assert phase.samples_per_second == pytest.approx(989e12 * 0.4 / phase.flops.total)
    assert phase.read_bytes_per_second == pytest.approx(phase.samples_per_second * phase.shapes.sample_bytes)
    assert result.seconds(phase) == pytest.approx(2048 * 500_000 / (64 * phase.samples_per_second))
    assert "TOO MUCH" not in "\n".join(result.lines())
    small = replace(config, hardware=HardwareConfig(gpu_memory_gb=24))
    assert "TOO MUCH for a GPU of 24 GB: lower `microbatch_size`" in "\n".join(estimate(small, 64).lines())


def test_cpu_runs_have_no_gpus_speed() -> None:
    lines = estimate(replace(CONFIG, use_gpu=False), 2).lines()
    assert not [line for line in lines if "MFU" in line]


def test_rows_that_wait_and_rows_that_come_too_often_are_said() -> None:
    codes = np.repeat(np.array([0, 1], np.uint8), [100, 3])
    text = "\n".join(count_lines(Plan(Rows(codes, ["16x16", "32x16"]), 16, 0).count(5)))
    assert "0.78 epochs of 103 rows" in text
    assert "rows that fill no batch in that time: 16x16 20, 32x16 3" in text
    assert "fewer rows than a batch, which repeats them: 32x16 3" in text


def test_the_longest_of_a_batch_as_expected_by_chance() -> None:
    rng = np.random.default_rng(0)
    histogram = np.bincount(rng.integers(3, 40, 1000))
    drawn = rng.choice(np.arange(len(histogram)), (4000, 16), p=histogram / histogram.sum()).max(axis=1).mean()
    assert expected_longest(histogram, 16) == int(np.ceil(drawn)) or abs(expected_longest(histogram, 16) - drawn) < 1
    assert expected_longest(np.array([0, 0, 5]), 3) == 2
    assert expected_longest(np.array([7]), 3) == 0 and expected_longest(np.zeros(1), 3) == 0


def test_mixes_of_lengths() -> None:
    mix = mixed([np.array([0, 4]), np.array([0, 0, 0, 8])], np.array([0.75, 0.25]))
    assert mix.tolist() == [0, 0.75, 0, 0.25]
    assert mean_length(mix) == pytest.approx(1.5)


def test_padding_is_to_the_multiple_and_never_below_the_empty_prompt(store: Any) -> None:
    features, found = table(store)
    found.lengths = {text: {name: np.array([5, 1]) for name in by_name} for text, by_name in found.lengths.items()}
    shapes = Shapes.of(features, found, 4, 8)
    assert shapes.padded_tokens == {"one": 8, "two": 8}
    assert shapes.prompt_tokens["one"] == pytest.approx(1 / 6)

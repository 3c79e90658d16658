"""The recipes are the paper's: sizes, batches, iterations, encoders, learning rate."""

from __future__ import annotations

import pytest

from lidit.store import columns
from trainer.recipes import RECIPES

pytestmark = pytest.mark.unit

# size, encoders, then (resolution, batch, iterations, shift) of every phase; arXiv 2406.11831, section 4.
PAPER = {
    "ablation_1b_256": ("1b", ("llama3",), [(256, 256, 300_000, 1.0)]),
    "lidit_1b_256": ("1b", ("llama3", "qwen15"), [(256, 2048, 500_000, 1.0)]),
    "lidit_10b_512": ("10b", ("llama3", "qwen15"), [(256, 4096, None, 1.0), (512, 4096, 1_000_000, 3.0)]),
    "lidit_10b_1024": (
        "10b",
        ("llama3", "qwen15"),
        [(256, 4096, None, 1.0), (512, 4096, 1_000_000, 3.0), (1024, 4096, None, 3.0)],
    ),
}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_are_the_papers(name: str) -> None:
    config, (size, encoders, phases) = RECIPES[name](), PAPER[name]
    assert config.model.size == size and config.data.encoders == encoders
    for phase, (resolution, batch, steps, shift) in zip(config.phases, phases, strict=True):
        assert (phase.resolution, phase.global_batch_size, phase.flow_shift) == (resolution, batch, shift)
        assert steps is None or phase.steps == steps  # the paper does not say how long each lasted
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.schedule == "constant"
    assert config.optimizer.warmup_steps == 1000 and config.optimizer.weight_decay == 0
    assert config.optimizer.grad_clip == 1.0 and config.ema.decay == 0.9999
    assert config.data.prompt_drop_prob == 0.1 and config.precision == "bf16" and config.zero.stage == 3
    assert config.data.text_mix == {columns.CAPTION: 0.5, columns.CAPTION_ORIGINAL: 0.5}
    assert config.objective == "flow"


def test_the_last_phase_goes_on_from_the_one_before() -> None:
    shorter, longer = RECIPES["lidit_10b_512"](), RECIPES["lidit_10b_1024"]()
    assert longer.name == shorter.name and longer.phases[:2] == shorter.phases
    assert {phase.latents for phase in longer.phases} == {"latents", "latents_512", "latents_1024"}


def test_the_demo_runs_on_two_cpu_workers() -> None:
    config = RECIPES["scenes"]()
    assert config.num_workers == 2 and config.use_gpu is False and config.precision == "fp32"
    assert config.store == "./store" and config.data.encoders == ("llama", "qwen")
    assert config.validation.every_steps and config.data.holdout

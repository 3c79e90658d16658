"""The train config: what it refuses, what a rank makes of a batch, schedules, and its way through YAML and flags."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lidit import cli
from lidit.diffusion import DDPM, Flow
from trainer.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    HardwareConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    TrainConfig,
    ValidationConfig,
    ZeroConfig,
)
from trainer.recipes import RECIPES

pytestmark = pytest.mark.unit

MODULE = SimpleNamespace(__doc__="Trains.", TrainConfig=TrainConfig, RECIPES=RECIPES)
PHASE = PhaseConfig(steps=10, global_batch_size=24)


def parse(*argv: str) -> TrainConfig:
    return cli.parse_config("train", MODULE, list(argv))


@pytest.mark.parametrize(
    ("world_size", "limit", "expected"),
    [
        (1, 24, (24, 1)),
        (1, 100, (24, 1)),
        (1, 10, (8, 3)),
        (2, 12, (12, 1)),
        (2, 5, (4, 3)),
        (24, 8, (1, 1)),
        (8, 2, (1, 3)),
    ],
)
def test_a_rank_takes_the_largest_microbatch_that_divides_its_share(
    world_size: int, limit: int, expected: tuple[int, int]
) -> None:
    (phase,) = TrainConfig(phases=(PHASE,), microbatch_size=limit).run_phases
    micro, accumulation = phase.split(world_size)
    assert (micro, accumulation) == expected
    assert micro * accumulation * world_size == 24


def test_a_phase_may_have_a_microbatch_of_its_own() -> None:
    (phase,) = TrainConfig(phases=(replace(PHASE, microbatch_size=6),), microbatch_size=100).run_phases
    assert phase.split(1) == (6, 4)


def test_batches_that_do_not_divide_among_the_ranks_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="global_batch_size 24 does not divide among 5 ranks"):
        TrainConfig(phases=(PHASE,), num_workers=5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PhaseConfig(steps=0, global_batch_size=1), "phase.steps: expected a whole number >= 1, received 0"),
        (
            lambda: PhaseConfig(steps=1, global_batch_size=1, flow_shift=0),
            "phase.flow_shift: expected a number > 0",
        ),
        (
            lambda: PhaseConfig(steps=1, global_batch_size=1, microbatch_size=0),
            "microbatch_size: expected a whole number",
        ),
        (lambda: DataConfig(encoders=()), "data.encoders: expected at least one"),
        (lambda: DataConfig(encoders=("a", "a")), "each once"),
        (lambda: DataConfig(text_mix={"caption": 0.5}), "shares above 0 that sum to 1"),
        (lambda: DataConfig(text_mix={"caption": 1.0, "caption_original": 0.0}), "shares above 0"),
        (lambda: DataConfig(text_mix={}), "shares above 0"),
        (
            lambda: DataConfig(prompt_drop_prob=1.1),
            "data.prompt_drop_prob: expected a number >= 0 and <= 1, received 1.1",
        ),
        (lambda: DataConfig(holdout=1.0), "data.holdout: expected a number >= 0 and < 1, received 1.0"),
        (lambda: DataConfig(block_rows=6, block_steps=4), "block_rows to be a multiple of block_steps"),
        (lambda: OptimizerConfig(learning_rate=0), "optimizer.learning_rate: expected a number > 0, received 0"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2: expected a number >= 0 and < 1"),
        (lambda: OptimizerConfig(warmup_steps=-1), "warmup_steps"),
        (lambda: EMAConfig(decay=1.0), "ema.decay: expected a number >= 0 and < 1"),
        (lambda: ZeroConfig(stage=4), "0, 1, 2 or 3"),  # type: ignore[arg-type]
        (lambda: ZeroConfig(stage=2, offload_parameters=True), "need stage 3"),
        (lambda: ZeroConfig(stage=2, hpz_partition_size=8), "need stage 3"),
        (lambda: ZeroConfig(stage=0, offload_optimizer=True), "needs stage 1 or above"),
        (lambda: CheckpointConfig(every_steps=100, keep_every_steps=250), "a multiple of every_steps 100"),
        (lambda: ValidationConfig(every_steps=-1), "every_steps"),
        (
            lambda: HardwareConfig(expected_mfu=1.5),
            "hardware.expected_mfu: expected a number > 0 and <= 1, received 1.5",
        ),
        (lambda: TrainConfig(name="a/b"), "letters, digits"),
        (lambda: TrainConfig(name=".hidden"), "letters, digits"),
        (lambda: TrainConfig(phases=()), "phases: expected at least one"),
        (lambda: TrainConfig(flow=Flow(shift=3.0)), "set `flow_shift` of each phase"),
        (lambda: TrainConfig(seed=-1), "seed: expected a whole number >= 0 and < 9223372036854775808, received -1"),
        (lambda: TrainConfig(validation=ValidationConfig(every_steps=5)), "set data.holdout"),
        (lambda: TrainConfig(max_failures=-2), "max_failures"),
        (lambda: TrainConfig(cpus_per_worker=0), "cpus_per_worker"),
        (
            lambda: TrainConfig(num_workers=3, zero=ZeroConfig(hpz_partition_size=2), phases=(PHASE,)),
            "does not divide num_workers 3",
        ),
        (lambda: TrainConfig(stop_after_steps=0), "stop_after_steps"),
        (lambda: TrainConfig(model=ModelConfig(compile="blocks")), "compiled whole at zero.stage 3"),
        (lambda: ModelConfig(compile="all"), "model.compile: expected pointwise, blocks or null, received 'all'"),
        (lambda: ModelConfig(changes={"depht": 3}).build({"a": 8}, 4), "fields of LIDiTConfig, received depht"),
        (lambda: ModelConfig(changes={"in_channels": 3}).build({"a": 8}, 4), "in_channels come from the table"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_word(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_the_model_is_of_the_tables_widths() -> None:
    model = ModelConfig(size="tiny", changes={"depth": 2, "fusion": "concat"}).build({"b": 24, "a": 8}, 4)
    assert (model.depth, model.width, model.in_channels, model.fusion) == (2, 128, 4, "concat")
    assert list(model.encoders.items()) == [("b", 24), ("a", 8)]


def test_steps_of_the_run_belong_to_phases() -> None:
    phases = (PhaseConfig(steps=3, global_batch_size=8), PhaseConfig(steps=2, global_batch_size=4))
    config = TrainConfig(phases=phases, microbatch_size=4)
    assert config.total_steps == 5
    assert [config.phase_at(step) for step in range(6)] == [
        (0, 0, 0),
        (0, 1, 8),
        (0, 2, 16),
        (1, 0, 24),
        (1, 1, 28),
        (1, 2, 32),  # the end
    ]
    first, second = config.run_phases
    assert first.order_seed != second.order_seed


def test_the_shift_is_the_phases() -> None:
    phases = (PHASE, replace(PHASE, flow_shift=3.0))
    config = TrainConfig(phases=phases, flow=Flow(logit_mean=0.5), ddpm=DDPM(prediction_type="v"))
    assert [phase.objective for phase in config.run_phases] == [Flow(logit_mean=0.5), Flow(shift=3.0, logit_mean=0.5)]
    assert replace(config, objective="ddpm").run_phases[1].objective == DDPM(prediction_type="v")


def test_a_version_is_one_of_the_runs_store() -> None:
    phases = (PHASE, replace(PHASE, store="./store"), replace(PHASE, store="./other"))
    run_phases = TrainConfig(store="./store", phases=phases, data=DataConfig(version=3)).run_phases
    assert [(phase.store, phase.version) for phase in run_phases] == [("./store", 3), ("./store", 3), ("./other", None)]


def test_learning_rates() -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [constant.learning_rate_at(step, 10) for step in (0, 1, 3, 4, 9, 1000)] == [0.25, 0.5, 1.0, 1.0, 1.0, 1.0]
    linear = replace(constant, schedule="linear", warmup_steps=0, final_share=0.2)
    assert [linear.learning_rate_at(step, 5) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    cosine = replace(linear, schedule="cosine", final_share=0.0)
    assert [cosine.learning_rate_at(step, 5) for step in (0, 2, 4, 99)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    late = replace(linear, warmup_steps=2, fall_share=0.5, final_share=0.0)
    assert [late.learning_rate_at(step, 10) for step in (0, 2, 5, 7, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
    assert late.learning_rate_at(5, 10) == late.learning_rate_at(5, 30), (
        "its end may be moved while the rate is constant"
    )


def test_ema_decay_grows_to_its_value() -> None:
    assert [EMAConfig(decay=0.9).decay_at(step) for step in (0, 9, 1000)] == pytest.approx([0.1, 10 / 19, 0.9])
    assert EMAConfig(decay=0.9, warmup=False).decay_at(0) == 0.9


# -- YAML, flags, recipes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_configs_come_back_from_json_and_yaml(name: str) -> None:
    config = RECIPES[name]()
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert TrainConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_a_field_that_is_not_known_or_missing_is_named() -> None:
    values = TrainConfig().to_dict()
    values["optimizer"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"config.optimizer: expected fields .*learning_rate.* received .*momentum"):
        TrainConfig.from_dict(values)
    del values["optimizer"]["momentum"], values["phases"][0]["steps"]
    with pytest.raises(ValueError, match=r"config.phases\[0\]: expected fields steps, .* missing \['steps'\]"):
        TrainConfig.from_dict(values)


def test_nothing_asked_for_is_the_demo_recipe() -> None:
    assert parse() == RECIPES["scenes"]()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_by_name(name: str) -> None:
    assert parse("--recipe", name) == parse(f"--recipe={name}") == RECIPES[name]()


def test_flags_change_a_recipe_and_fields_of_its_phases() -> None:
    config = parse(
        "--recipe", "lidit_10b_1024", "--phases.2.steps", "7", "--phases.0.store=s3://bucket/store", "--num-workers", "8",
        "--zero.hpz_partition_size", "1", "--data.text_mix", "{caption: 1.0}", "--ddpm.min_snr_gamma", "5", "--dry-run",
    )  # fmt: skip
    recipe = RECIPES["lidit_10b_1024"]()
    assert [phase.steps for phase in config.phases] == [recipe.phases[0].steps, recipe.phases[1].steps, 7]
    assert config.phases[0].store == "s3://bucket/store" and config.phases[0].resolution == 256
    assert config.num_workers == 8 and config.zero.hpz_partition_size == 1 and config.zero.stage == 3
    assert config.data.text_mix == {"caption": 1.0} and config.ddpm.min_snr_gamma == 5 and config.dry_run
    assert config.optimizer == recipe.optimizer and config.model == recipe.model


def test_a_file_decides_all_it_says_and_defaults_the_rest(tmp_path: Any) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("name: mine\noptimizer: {learning_rate: 0.01}\nphases:\n- {steps: 4, global_batch_size: 512}\n")
    config = parse("--config", str(file), "--optimizer.beta2", "0.99")
    assert config.name == "mine" and config.phases == (PhaseConfig(steps=4, global_batch_size=512),)
    assert config.optimizer == OptimizerConfig(learning_rate=0.01, beta2=0.99)
    assert config.ema == EMAConfig() and config.precision == "bf16"  # of the class, not of the demo recipe
    both = parse("--recipe", "lidit_1b_256", "--config", str(file))
    assert both.model.size == "1b" and both.optimizer.learning_rate == 0.01


def test_a_file_with_the_whole_config_is_that_config(tmp_path: Any) -> None:
    file = tmp_path / "config.yaml"
    recipe = RECIPES["lidit_10b_512"]()
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    assert parse("--config", str(file)) == recipe


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--recipe", "lidit_2b"), "--recipe: expected one of scenes, ablation_1b_256, .* received 'lidit_2b'"),
        (("--recipe",), "--recipe: expected one of"),
        (("--phases.1.steps", "7"), r"--phases.1.steps: there are 1, the first is 0"),
        (("--phases.0.stepz", "7"), r"--phases.0.stepz: expected one of steps, global_batch_size"),
        (("--phases.0.steps",), "expected a value after it"),
        (("--phases.0.steps", "many"), "phase.steps: expected a whole number >= 1, received 'many'"),
        (("--optimizer.lr", "1"), "expected flags or YAML keys: name, store"),
        (("--zero.stage", "5"), "stage"),
    ],
)
def test_flags_that_do_not_fit_are_named(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(*argv)


def test_every_field_is_explained() -> None:
    """Docstrings of all fields reach `--help`."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(printed.getvalue().split())
    for words in (
        "Fields to start from: scenes",
        "Text column -> probability that a sample is shown with it",
        "Largest number of samples in a GPU's forward pass",
        "the MFU is a fraction of it",
        "Muon momentum",
        "Seed for initialization, data order, caption choice",
    ):
        assert words in text
    assert not re.search(r"\s{2}(Of|After|Beside) ", printed.getvalue()), "a sentence says what the field is"
    for line in printed.getvalue().splitlines():
        assert "SUPPRESS" not in line

"""Resuming at every ZeRO stage, at other numbers of ranks, and from what is left of damaged checkpoints; ranks without Ray."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lance
import numpy as np
import pytest
import torch

from lidit.store import columns
from lidit.weights import load_weights
from tests.support import training
from trainer.config import CheckpointConfig, ZeroConfig
from trainer.export import ExportConfig
from trainer.export import main as export

pytestmark = pytest.mark.integration
STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("resume")
    store = training.make_store(folder / "store", codec="fp32")
    config = training.make_config(store, folder / "runs", checkpoint=CheckpointConfig(every_steps=4, keep_last=3))
    return SimpleNamespace(folder=folder, store=store, config=training.steps(config, STEPS))


def average(config: Any, folder: Path) -> dict[str, torch.Tensor]:
    out = folder / f"{config.name}-{len(list(folder.iterdir()))}"
    export(ExportConfig(run=f"{config.storage}/{config.name}", out=str(out)))
    return load_weights(out).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_stage_on_two_ranks_then_one_then_two(world: Any, precision: str) -> None:
    """Both: resumed on as many ranks, to the bit; on another number, to rounding. Losses and average."""
    tolerance = 1e-4 if precision == "fp32" else 0.02
    base = dataclasses.replace(world.config, precision=precision)
    stages = (0, 1, 2, 3)

    def runs(kind: str, **changes: Any) -> list[Any]:
        return [
            dataclasses.replace(base, name=f"{precision}-{kind}-{stage}", zero=ZeroConfig(stage=stage), **changes)
            for stage in stages
        ]

    unbroken, resumed, moved = runs("unbroken"), runs("resumed"), runs("moved")
    parts = [*unbroken, *runs("resumed", stop_after_steps=5), *resumed, *runs("moved", stop_after_steps=5)]
    # Stage 3 last: DeepSpeed then puts a linear function of its own, other in the last bit, into the process for good.
    training.run_ranks(2, "train_all", sorted(parts, key=lambda run: run.zero.stage))
    on_one = runs("moved", stop_after_steps=9, num_workers=1)
    assert [outcome["resumed_from"] for outcome in training.run_ranks(1, "train_all", on_one)[0]] == [5] * 4
    assert [outcome["resumed_from"] for outcome in training.run_ranks(2, "train_all", moved)[0]] == [9] * 4
    for whole, broken, elsewhere in zip(unbroken, resumed, moved):
        assert training.losses(broken) == training.losses(whole), whole.name
        np.testing.assert_allclose(
            training.losses(elsewhere), training.losses(whole), atol=tolerance, err_msg=whole.name
        )
        expected, found = average(whole, world.folder), average(elsewhere, world.folder)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=tolerance, rtol=0)


def test_muon_and_compiled_blocks_resume_to_the_bit(world: Any) -> None:
    base = dataclasses.replace(
        world.config,
        precision="bf16",
        zero=ZeroConfig(stage=0),
        num_workers=1,
        optimizer=dataclasses.replace(world.config.optimizer, name="muon"),
        model=dataclasses.replace(world.config.model, compile="blocks"),
    )
    unbroken, resumed = (dataclasses.replace(base, name=f"muon-{kind}") for kind in ("unbroken", "resumed"))
    training.run_ranks(1, "train_all", [unbroken, dataclasses.replace(resumed, stop_after_steps=5)])
    assert [outcome["resumed_from"] for outcome in training.run_ranks(1, "train_all", [resumed])[0]] == [5]
    assert training.losses(resumed) == training.losses(unbroken)
    found, expected = average(resumed, world.folder), average(unbroken, world.folder)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_newest_valid_checkpoint_is_taken(world: Any) -> None:
    """Shards cut short, of 0 bytes, changed in place, missing, and an edited manifest: skipped, each with the file's name."""
    config = dataclasses.replace(world.config, name="damaged", checkpoint=CheckpointConfig(every_steps=2, keep_last=9))
    training.run_ranks(2, "train_all", [config])
    whole = training.losses(config)
    assert training.checkpoints(config) == [2, 4, 6, 8, 10, 12]

    def shard(step: int) -> Path:
        (engine,) = Path(config.storage, "damaged", "checkpoints", f"step_{step:08d}").glob("*/engine")
        return engine / "zero_pp_rank_1_mp_rank_00_optim_states.pt"

    shard(12).write_bytes(shard(12).read_bytes()[:1000])
    shard(10).write_bytes(b"")
    shard(8).unlink()
    manifest = shard(6).parents[2] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 6', '"step": 5'))
    content = bytearray(shard(4).read_bytes())  # only rank 1 reads it, all ranks must leave it
    content[len(content) // 2] ^= 255
    shard(4).write_bytes(content)
    outcomes = training.run_ranks(2, "train_all", [config])
    assert [ranks[0]["resumed_from"] for ranks in outcomes] == [2, 2]
    warnings = outcomes[0][0]["warnings"]
    told = ["1,000 bytes, expected", "0 bytes, expected", "missing", "edited or damaged", "its content has changed"]
    assert len(warnings) == 5 and all(words in warning for words, warning in zip(told, warnings)), warnings
    assert all(f"step_{step:08d}/" in warning for step, warning in zip((12, 10, 8, 6, 4), warnings))
    assert training.losses(config) == whole, "and all of them are replaced on the way"
    assert training.run_ranks(2, "train_all", [config])[0][0]["resumed_from"] == STEPS


def test_writers_and_clean_up_change_nothing(world: Any, tmp_path: Path) -> None:
    """Rows appended, fragments compacted and old versions removed while the run goes on: it reads its own version."""
    quiet = dataclasses.replace(world.config, name="quiet", num_workers=1)
    training.run_ranks(1, "train_all", [quiet])
    busy_store = training.make_store(tmp_path / "store", codec="fp32")
    busy = dataclasses.replace(quiet, name="busy", store=busy_store, storage=str(tmp_path))
    training.run_ranks(1, "train_while_others_write", busy)
    assert training.losses(busy) == training.losses(quiet)
    table = lance.dataset(f"{busy_store}/{columns.SAMPLES_TABLE}")
    assert table.count_rows() == 97 and len(table.get_fragments()) == 1, "they did write"
    with pytest.raises(ValueError, match=r"(?i)not found|does not exist"):
        lance.dataset(f"{busy_store}/{columns.SAMPLES_TABLE}", version=2)


def test_what_does_not_belong_to_the_checkpoint_is_refused(world: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(world.config, name="refused", stop_after_steps=4)
    other_encoder = training.make_store(tmp_path / "other", codec="fp32", model="another")
    more_rows = training.make_store(tmp_path / "more", rows=(20, 10, 30, 1, 30), codec="fp32")
    go_on = dataclasses.replace(config, stop_after_steps=None)
    changed = [
        dataclasses.replace(go_on, store=other_encoder),
        dataclasses.replace(go_on, store=more_rows),
        dataclasses.replace(go_on, seed=1),
        dataclasses.replace(go_on, zero=ZeroConfig(stage=2)),
        dataclasses.replace(go_on, model=dataclasses.replace(config.model, changes={**training.SHAPE, "depth": 3})),
        dataclasses.replace(go_on, data=dataclasses.replace(config.data, encoders=("one",))),
    ]
    faster = dataclasses.replace(go_on, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3))
    outcomes = training.run_ranks(2, "train_all", [config, *changed, faster])[0]
    assert outcomes[0]["status"] == "done" and outcomes[-1]["status"] == "done"
    told = ["encoders.one.model", "the order of rows would be another one (rows changed)", "seed was 0, is 1"]
    told += ["zero.stage was 3, is 2", "model was", "data.encoders was"]
    for outcome, words in zip(outcomes[1:-1], told):
        assert (outcome["status"], outcome["input"]) == ("failed", True)
        assert words in outcome["error"] and "another `name`" in outcome["error"], outcome["error"]

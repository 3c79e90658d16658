"""Checkpoints are never unpickled freely."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.checkpoints.manifest import Damaged
from trainer.checkpoints.universal import FORCE, check_names, convert, restricted_unpickling, separate_step_counts

pytestmark = pytest.mark.unit


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch unpickled",)


def test_only_tensors_and_deepspeeds_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.ones(3), "more": Evil()}, tmp_path / "evil.pt")
    with restricted_unpickling():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)  # as DeepSpeed asks for it
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.utils.tensor_fragment import fragment_address

        torch.save({"scaler": LossScaler(1.0), "where": fragment_address(3, 5)}, tmp_path / "good.pt")
        assert torch.load(tmp_path / "good.pt", weights_only=False)["where"].start == 5
    assert not (tmp_path / "unpickled").exists() and FORCE not in os.environ


def test_a_conversion_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="could not be converted for another number of ranks"):
        convert(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b", "..", "nul\0", "a\\b", "ds_autoep_layers"])
def test_names_in_shards_that_would_be_paths_are_refused(tmp_path: Path, name: str) -> None:
    """DeepSpeed's converter makes a folder of each parameter's name, and a file of each state's."""
    shard = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save(
        {"optimizer_state_dict": {"param_slice_mappings": [{"blocks.0.weight": 1}]}, "ds_config": {"a/b": 1}}, shard
    )
    check_names(tmp_path)
    torch.save({"optimizer_state_dict": {"param_slice_mappings": [{"blocks.0.weight": 1, name: 2}]}}, shard)
    with pytest.raises(Damaged, match="which no parameter and no state has"):
        check_names(tmp_path)


def test_every_buffer_counts_its_own_steps() -> None:
    shared = torch.tensor(5.0)
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(params)
    for param in params:
        optimizer.state[param] = {"step": shared, "exp_avg": torch.zeros(2)}
    separate_step_counts(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)))
    for param in params:
        optimizer.state[param]["step"] += 1
    assert [float(optimizer.state[param]["step"]) for param in params] == [6.0, 6.0, 6.0]

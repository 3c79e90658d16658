"""AdamW, and Muon with AdamW as one optimizer, against torch's two."""

from __future__ import annotations

import copy

import pytest
import torch

from lidit.config import lidit_tiny
from lidit.model import LIDiT
from trainer.config import OptimizerConfig, TrainConfig, ZeroConfig
from trainer.engine.optimizer import Muon, build_optimizer, muon_matrices, parameter_groups

pytestmark = pytest.mark.unit
CONFIG = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.1, beta2=0.95, muon_momentum=0.9)


@pytest.fixture
def model() -> LIDiT:
    torch.manual_seed(0)
    return LIDiT(lidit_tiny(encoders={"one": 16, "two": 8}, in_channels=4, depth=2, width=32))


def give_gradients(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def test_muon_gets_the_matrices_of_attention_and_feed_forward(model: LIDiT) -> None:
    chosen = {id(matrix) for matrix in muon_matrices(model)}
    names = {name for name, param in model.named_parameters() if id(param) in chosen}
    ends = {name.rsplit(".", 2)[1] for name in names}
    assert ends == {"to_qkv", "to_q", "to_kv", "out", "up", "down"}
    assert {name.split(".")[0] for name in names} == {"blocks", "linguistic", "collaborative"}
    in_block = {name for name in names if name.startswith("blocks.0.")}
    assert len(in_block) == 7, "self-attention 2, cross-attention 3, feed-forward 2; not the modulation"


def test_muon_equals_the_two_optimizers_it_is_made_of(model: LIDiT) -> None:
    other = copy.deepcopy(model)
    ours = build_optimizer(model, CONFIG)
    assert isinstance(ours, Muon)
    matrices = muon_matrices(other)
    taken = {id(matrix) for matrix in matrices}
    rest = [param for param in other.parameters() if id(param) not in taken]
    vectors = [param for param in rest if param.ndim < 2]
    theirs = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([param for param in rest if param.ndim >= 2], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(vectors, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    before = weights(model)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(other, step)
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for first, found, expected in zip(before, weights(model), weights(other)):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert not torch.equal(found, first)


def test_muon_goes_on_from_its_state(model: LIDiT) -> None:
    first = build_optimizer(model, CONFIG)
    give_gradients(model, 0)
    first.step()
    other, saved = copy.deepcopy(model), copy.deepcopy(first.state_dict())
    second = build_optimizer(other, CONFIG)
    second.load_state_dict(saved)
    for optimizer, its in ((first, model), (second, other)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        give_gradients(its, 1)
        optimizer.step()
    assert all(torch.equal(found, expected) for found, expected in zip(weights(other), weights(model)))


def test_muon_moves_the_parameters_that_its_groups_hold(model: LIDiT) -> None:
    """As DeepSpeed does: fp32 copies take the place of the weights."""
    optimizer = build_optimizer(model.to(torch.bfloat16), CONFIG)
    before = weights(model)
    for group in optimizer.param_groups:
        group["params"] = [param.detach().float().requires_grad_() for param in group["params"]]
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    copies = [master.detach().clone() for master in masters]
    for master in masters:
        master.grad = torch.ones_like(master)
    optimizer.step()
    assert all(torch.equal(found, expected) for found, expected in zip(weights(model), before))
    assert not any(torch.equal(found, expected) for found, expected in zip(masters, copies))


def test_without_weight_decay_everything_is_in_one_group(model: LIDiT) -> None:
    optimizer = build_optimizer(model, OptimizerConfig())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(model.parameters()))]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_groups_are_those_of_the_optimizer(model: LIDiT, name: str, weight_decay: float) -> None:
    config = OptimizerConfig(name=name, weight_decay=weight_decay)  # type: ignore[arg-type]
    groups, optimizer = parameter_groups(model, config), build_optimizer(model, config)
    found = [[id(param) for param in group["params"]] for group in optimizer.param_groups]
    assert found == [[id(param) for param in group] for group in groups]
    assert sorted(one for group in found for one in group) == sorted(id(param) for param in model.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_is_refused_where_matrices_are_cut(stage: int) -> None:
    with pytest.raises(ValueError, match=f"muon needs whole matrices, zero.stage 0, received {stage}"):
        TrainConfig(optimizer=CONFIG, zero=ZeroConfig(stage=stage))  # type: ignore[arg-type]
    assert TrainConfig(optimizer=CONFIG, zero=ZeroConfig(stage=0)).optimizer.name == "muon"


@pytest.mark.parametrize("changes", [{"name": "sgd"}, {"muon_momentum": 1.0}, {"fall_share": 0.0}, {"fall_share": 1.1}])
def test_options_that_make_no_sense_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="optimizer"):
        OptimizerConfig(**changes)  # type: ignore[arg-type]

"""Analytic FLOPs against torch's counter, which sees what is really computed."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.config import lidit_1b, lidit_10b, lidit_tiny
from lidit.flops import Flops, model_flops
from lidit.model import LIDiT

pytestmark = pytest.mark.unit

SWITCHES = [
    {},
    {"instruction": "cut"},
    {"refiner_blocks": 0},
    {"refiner_blocks": 3, "refiner_gate": False},
    {"fusion": "concat"},
    {"encoders": {"one": 64}},
    {"encoders": {"one": 64, "two": 96, "three": 128}, "patch_size": 1, "ffn_ratio": 2, "in_channels": 4},
]
B, SIZE = 3, (12, 20)


def counted(model, call):
    """FLOPs of forward by part of the model, and of backward in all."""
    # The plain kernel: the counter knows its matmuls, and it computes nothing twice.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        out = call()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        out.sum().backward()
    counts, parts = forward.get_flop_counts(), {}
    for part, module in model.named_children():
        called = [f"LIDiT.{part}"]
        if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):  # nobody calls it, but what is in it
            called = [f"LIDiT.{part}.{name}" for name, _ in module.named_children()]
        parts[part] = sum(sum(counts[name].values()) for name in called)
    assert sum(parts.values()) == forward.get_total_flops()
    return parts, backward.get_total_flops()


@pytest.mark.parametrize("changes", SWITCHES)
def test_equals_torchs_counter(changes):
    torch.manual_seed(0)
    config = lidit_tiny(**changes)
    model = LIDiT(config)
    lengths = {name: 7 + 6 * number for number, name in enumerate(config.encoders)}
    instruction = {name: 5 + number for number, name in enumerate(config.encoders)}
    inputs = (
        torch.randn(B, config.in_channels, *SIZE),
        torch.rand(B),
        {name: torch.randn(B, lengths[name], width) for name, width in config.encoders.items()},
        {name: torch.ones(B, lengths[name], dtype=torch.bool) for name in config.encoders},
        {name: torch.randn(instruction[name], width) for name, width in config.encoders.items()},
    )
    forward, backward = counted(model, lambda: model(*inputs))
    parts = model_flops(config, SIZE, lengths, instruction, batch=B)
    total = sum(parts.values(), Flops())
    assert {name: part.forward * B for name, part in parts.items()} == pytest.approx(forward, rel=0.01)
    assert total.backward * B == pytest.approx(backward, rel=0.01)
    assert total.total == total.forward + total.backward


def test_parts_are_the_models():
    for config in (lidit_1b(), lidit_10b({"one": 4096})):
        with torch.device("meta"):
            parts = {name for name, _ in LIDiT(config).named_children()}
        tokens = dict.fromkeys(config.encoders, 10)
        assert set(model_flops(config, (32, 32), tokens, tokens)) == parts


def test_six_flops_per_weight_and_token():
    """The rule of thumb, for a model of large matrices and few tokens: what is not shared by all tokens is left out."""
    config = lidit_10b()
    with torch.device("meta"):
        block = LIDiT(config).blocks[0]
    per_image_token = sum(
        weight.numel() for name, weight in block.named_parameters() if "modulation" not in name and "to_kv" not in name
    )
    tokens = dict.fromkeys(config.encoders, 0)
    blocks = model_flops(config, (8, 8), tokens, tokens)["blocks"].total
    assert blocks == pytest.approx(6 * config.depth * 16 * per_image_token, rel=0.15)

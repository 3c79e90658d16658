"""`LIDiTConfig`: what it refuses, how it travels as JSON, and the sizes."""

import dataclasses
import json

import pytest

from lidit.config import SIZES, LIDiTConfig, lidit_1b, lidit_10b, lidit_small, lidit_tiny

pytestmark = pytest.mark.unit

SHAPE = {"encoders": {"one": 24, "two": 40}, "depth": 2, "width": 32, "heads": 4}


def test_defaults_are_the_papers():
    config = LIDiTConfig(**SHAPE)
    assert (config.in_channels, config.patch_size, config.ffn_ratio) == (16, 2, 4)
    assert (config.instruction, config.refiner_blocks, config.refiner_attention) == ("kept", 2, "full")
    assert config.refiner_gate and config.fusion == "collaborative"


def test_travels_as_json_with_the_encoders_in_order():
    config = lidit_small({"two": 8, "one": 16}, in_channels=4, refiner_gate=False, fusion="concat")
    back = LIDiTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config and list(back.encoders) == ["two", "one"]


def test_is_frozen_and_keeps_its_own_encoders():
    encoders = {"one": 24}
    config = LIDiTConfig(**{**SHAPE, "encoders": encoders})
    encoders["two"] = 8
    assert config.encoders == {"one": 24}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3


@pytest.mark.parametrize("drop, add, match", [
    ("depth", {}, r"unknown none, missing \['depth'\]"),
    ("depth", {"dept": 3}, r"unknown \['dept'\], missing \['depth'\]"),
    ("", {"later_field": 1}, r"unknown \['later_field'\], missing none.*another version"),
])  # fmt: skip
def test_json_of_another_version_is_named(drop, add, match):
    values = {key: value for key, value in SHAPE.items() if key != drop} | add
    with pytest.raises(ValueError, match=match):
        LIDiTConfig.from_dict(values)


@pytest.mark.parametrize("changes, match", [
    ({"encoders": {}}, "expected at least one"),
    ({"encoders": {"a-b": 8}}, "letters, digits and underscores, received 'a-b'"),
    ({"encoders": {"keys": 8}}, "received 'keys'.*attribute of torch.nn.ModuleDict"),
    ({"encoders": {"training": 8}}, "received 'training'"),
    ({"encoders": {"one": 0}}, r"encoders\[one\]: expected a whole number >= 1, received 0"),
    ({"depth": 0}, "depth: expected a whole number"),
    ({"width": 32.0}, "width: expected a whole number >= 1, received 32.0"),
    ({"heads": True}, "heads: expected a whole number"),
    ({"in_channels": -4}, "in_channels"),
    ({"patch_size": 0}, "patch_size"),
    ({"ffn_ratio": 0}, "ffn_ratio"),
    ({"heads": 3}, "width 32, heads 3: expected a multiple of 8 channels per head, received 10.6667"),
    ({"heads": 8}, "received 4"),
    ({"refiner_blocks": -1}, "refiner_blocks: expected a whole number >= 0"),
    ({"instruction": "absent"}, "instruction: expected kept or cut, received 'absent'"),
    ({"refiner_attention": "half"}, "refiner_attention: expected full or causal"),
    ({"fusion": "sum"}, "fusion: expected collaborative or concat"),
])  # fmt: skip
def test_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        LIDiTConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize("changes, wanted", [
    ({}, True), ({"fusion": "concat"}, False), ({"encoders": {"one": 24}}, False),
    ({"encoders": {"one": 24}, "fusion": "concat"}, False), ({"encoders": {"a": 8, "b": 8, "c": 8}}, True),
])  # fmt: skip
def test_one_branch_has_nobody_to_attend_to(changes, wanted):
    assert LIDiTConfig(**{**SHAPE, **changes}).collaborative is wanted


def test_sizes():
    assert {name: size().depth for name, size in SIZES.items()} == {"tiny": 4, "small": 12, "1b": 28, "10b": 48}
    for size, shape in ((lidit_1b, (28, 1152, 16, 72)), (lidit_10b, (48, 2816, 44, 64))):
        config = size()
        assert (config.depth, config.width, config.heads, config.head_channels) == shape
        assert list(config.encoders.values()) == [4096, 4096] and config.in_channels == 16
    assert lidit_tiny().encoders == {"llama": 128, "qwen": 192}, "the demo's LLMs"
    changed = lidit_1b({"t5": 4096}, in_channels=4, depth=2, refiner_blocks=0)
    assert (changed.encoders, changed.in_channels, changed.depth, changed.refiner_blocks) == ({"t5": 4096}, 4, 2, 0)

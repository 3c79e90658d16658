"""`lidit info`: counts by part, as text for people and JSON for programs."""

import json

import pytest
import torch

from lidit import info
from lidit.cli import parse_config
from lidit.config import LIDiTConfig, lidit_tiny
from lidit.info import InfoConfig, InfoResult, main, parameter_counts
from lidit.model import LIDiT
from lidit.weights import save_weights

pytestmark = pytest.mark.unit


def test_counts_by_part_add_up_to_the_model():
    for config in (lidit_tiny(), lidit_tiny({"one": 64}), lidit_tiny(refiner_blocks=0, fusion="concat")):
        model = LIDiT(config)
        counts = parameter_counts(config)
        assert sum(counts.values()) == sum(weight.numel() for weight in model.parameters())
        assert ("collaborative" in counts) is config.collaborative
        assert counts["linguistic"] == sum(weight.numel() for weight in model.linguistic.parameters())


@pytest.mark.parametrize("size, billions", [("1b", "1.099"), ("10b", "10.461")])
def test_prints_the_papers_sizes(size, billions):
    found = main(InfoConfig(size=size))
    text = found.to_text()
    assert f"({billions} B)" in text.splitlines()[0]
    for part in ("linguistic refiners", "collaborative refiner", "DiT blocks", "ResBlock", "final layer"):
        assert part in text
    values = json.loads(found.to_json())
    assert values["ok"] and values["parameters"]["all"] == sum(values["parameters"].values()) / 2
    assert LIDiTConfig.from_dict(values["model"]).width in (1152, 2816)
    assert values["flops_step"]["blocks"] == pytest.approx(3 * values["flops_forward"]["blocks"])


def test_flags():
    config = parse_config("info", info, ["--size", "tiny", "--encoders", '{"t5": 64}', "--in-channels", "4"])
    assert config.model() == lidit_tiny({"t5": 64}, in_channels=4)
    assert isinstance(main(config), InfoResult)


def test_reads_a_weights_folder(tmp_path):
    config = lidit_tiny({"t5": 64}, in_channels=4, depth=1)
    save_weights(tmp_path / "weights", LIDiT(config))
    found = main(InfoConfig(weights=str(tmp_path / "weights")))
    assert found.model == config.to_dict() and found.parameters == parameter_counts(config)
    with pytest.raises(ValueError, match=r"config\.json"):
        main(InfoConfig(weights=str(tmp_path)))


def test_larger_images_cost_more_and_have_as_many_parameters():
    small, large = main(InfoConfig(size="tiny")), main(InfoConfig(size="tiny", height=512))
    assert small.parameters == large.parameters
    assert large.flops["res_block"].forward == 2 * small.flops["res_block"].forward


@pytest.mark.parametrize("values, match", [
    ({"height": 0}, "height: expected a whole number >= 1"),
    ({"prompt_tokens": -1}, "prompt_tokens: expected a whole number >= 0"),
    ({"encoders": {"a-b": 3}}, "letters, digits"),
])  # fmt: skip
def test_refuses(values, match):
    with pytest.raises(ValueError, match=match):
        main(InfoConfig(**values))


def test_takes_no_memory_for_weights(monkeypatch):
    made = []
    plain = torch.nn.init.xavier_uniform_
    monkeypatch.setattr(
        torch.nn.init, "xavier_uniform_", lambda weight: made.append(weight.device.type) or plain(weight)
    )
    parameter_counts(lidit_tiny())
    assert set(made) == {"meta"}

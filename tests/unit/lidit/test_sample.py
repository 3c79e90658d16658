"""The sample job: a command line -> image files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit import cli, sample
from lidit.cli import parse_config
from lidit.sample import SampleConfig
from lidit.text_to_image import TextToImage

pytestmark = pytest.mark.unit


def test_command_line(weights_folder, tmp_path, capfd, whole_job):
    out = tmp_path / "deep" / "star.png"
    flags = ["--out", str(out), "--num-inference-steps", "2", "--images", "2", "--seed", "4", "--device", "cpu"]
    status = cli.main(["sample", "--weights", str(weights_folder), "--prompt", "a red star", *flags])
    said = capfd.readouterr()
    assert status == 0, said.err
    summary = json.loads(said.out)
    files = [tmp_path / "deep" / f"star-{number}.png" for number in range(2)]
    assert summary["ok"] and summary["job"] == "sample" and summary["files"] == [str(file) for file in files]
    assert str(files[1]) in said.err
    pipe = TextToImage.from_pretrained(weights_folder, device="cpu")
    for number, file in enumerate(files):
        (wanted,) = pipe("a red star", seed=4 + number, num_inference_steps=2)
        made = Image.open(file)
        assert made.size == wanted.size == (48, 32)
        assert np.abs(np.asarray(made).astype(int) - np.asarray(wanted).astype(int)).max() <= 1


def test_every_option_reaches_the_images(weights_folder, llms, vae_folder, tmp_path, monkeypatch):
    seen = {}

    def call(pipe, prompts, **options):
        seen.update(options, prompts=prompts, encoder=pipe.encoders["one"].folder)
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(TextToImage, "__call__", call)
    config = SampleConfig(
        weights=str(weights_folder), prompt="a star", out=str(tmp_path / "x.jpg"), seed=9, height=16, width=32,
        negative_prompt="a cat", batch_size=3, device="cpu", encoders={"one": str(llms["one"])}, vae=str(vae_folder),
        num_inference_steps=5, guidance_scale=2.0, guidance_interval=(0.1, 0.9), shift=1.5, spacing="diffusers",
    )  # fmt: skip
    made = sample.main(config)
    assert made.files == [str(tmp_path / "x.jpg")] and (tmp_path / "x.jpg").read_bytes().startswith(b"\xff\xd8")
    assert seen == {
        "prompts": "a star", "encoder": llms["one"], "seed": 9, "images_per_prompt": 1, "height": 16, "width": 32,
        "negative_prompt": "a cat", "batch_size": 3, "on_step": None, "num_inference_steps": 5, "guidance_scale": 2.0,
        "guidance_interval": (0.1, 0.9), "shift": 1.5, "spacing": "diffusers",
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--prompt", "a star"], "weights"),
        (["--weights", "w"], "prompt"),
        (
            ["--weights", "w", "--prompt", "p", "--out", "star.txt"],
            r"out: expected an image file .* received 'star.txt'",
        ),
        (["--weights", "w", "--prompt", "p", "--out", "star"], "out: expected an image file"),
        (["--weights", "w", "--prompt", "p", "--images", "0"], "images: expected a whole number >= 1"),
        (["--weights", "w", "--prompt", "p", "--guidance-scale", "-1"], "guidance_scale: expected a number >= 0"),
    ],
)
def test_wrong_flags(flags, match):
    with pytest.raises(ValueError, match=match):
        parse_config("sample", sample, flags)


def test_flags():
    flags = ["--weights", "w", "--prompt", "a red star", "--encoders.one", "here", "--encoders.two=there"]
    config = parse_config("sample", sample, [*flags, "--guidance-interval", "[0.2,0.8]", "--height", "64"])
    assert config.encoders == {"one": "here", "two": "there"} and config.guidance_interval == (0.2, 0.8)
    assert config.height == 64 and config.width is None and config.files == [Path("sample.png")]


def test_weights_of_the_hub_want_a_commit():
    with pytest.raises(ValueError, match="full commit hash"):
        sample.main(SampleConfig(weights="owner/name@main", prompt="a star"))

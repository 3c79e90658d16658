"""Training the autoencoder: a run that is stopped or killed and run again ends as an unbroken one does."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.models.train_vae import TrainVAEConfig, batch_of_scenes, build, build_optimizers, main, parse, scene_pixels
from lidit.frozen.vae import load_vae

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[4]
FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.fixture(autouse=True)
def single_threaded():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(folder: Path, **changes) -> TrainVAEConfig:
    config = TrainVAEConfig(
        out=folder / "vae", work=folder / "work", widths=(8, 8), steps=6, small_steps=3, images=2, warmup_steps=2,
        measured_images=4, exam_images=6,
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    main(tiny(folder))
    return folder


def assert_same(folder: Path, reference: Path) -> None:
    for file in FILES:
        assert (folder / "vae" / file).read_bytes() == (reference / "vae" / file).read_bytes(), f"{file} differs"


def test_stopped_and_resumed_equals_unbroken(tmp_path, unbroken, capsys):
    for _ in range(6):
        main(tiny(tmp_path, stop_after_steps=2))
        if (tmp_path / "vae").exists():
            break
    assert_same(tmp_path, unbroken)
    assert "stopped after 2 steps" in capsys.readouterr().out


def test_killed_and_resumed_equals_unbroken(tmp_path, unbroken):
    flags = {"out": tmp_path / "vae", "work": tmp_path / "work", "widths": "[8,8]", "steps": 6, "small_steps": 3}
    flags |= {"images": 2, "warmup_steps": 2, "measured_images": 4, "exam_images": 6, "checkpoint_seconds": 0}
    command = [sys.executable, "-m", "demo.models.train_vae", *(f"--{name}={value}" for name, value in flags.items())]
    process = subprocess.Popen(command, cwd=ROOT)
    checkpoint = tmp_path / "work" / "vae.pt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    main(tiny(tmp_path))
    assert_same(tmp_path, unbroken)


def test_finished_is_skipped_and_other_recipes_refused(unbroken, tmp_path, capsys):
    main(tiny(unbroken))
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="made by another recipe"):
        main(tiny(unbroken, steps=7))
    main(tiny(tmp_path, stop_after_steps=1))
    with pytest.raises(ValueError, match="belongs to another recipe"):
        main(tiny(tmp_path, seed=1))


def test_what_is_saved(unbroken):
    """Loaded by the strict loader; scaled latents have mean 0 and deviation 1 on the scenes that were measured."""
    vae = load_vae(str(unbroken / "vae"), device="cpu")
    assert (vae.channels, vae.downscale) == (4, 2)
    latents = vae.encode(torch.stack([scene_pixels(seed, 64, 64) for seed in range(8)]))
    assert abs(latents.mean()) < 0.3 and abs(latents.std() - 1) < 0.3
    record = json.loads((unbroken / "vae" / "training.json").read_text())
    assert record["weight_bytes"] == (unbroken / "vae" / FILES[1]).stat().st_size
    assert record["config"]["widths"] == [8, 8]
    figures = record["figures"]
    assert figures["psnr_db_worst"] <= figures["psnr_db"] < 40 and math.isfinite(figures["latent_std"])
    assert f"**{figures['psnr_db']:.2f} dB**" in (unbroken / "vae" / "README.md").read_text()


def test_data_are_a_function_of_seed_and_step():
    config = TrainVAEConfig(small_steps=10, images=2)
    assert torch.equal(batch_of_scenes(config, 3), batch_of_scenes(config, 3))
    assert not torch.equal(batch_of_scenes(config, 3), batch_of_scenes(config, 4))
    assert batch_of_scenes(config, 9).shape == (2, 3, 32, 32)
    sizes = {tuple(batch_of_scenes(config, step).shape[2:]) for step in range(10, 40)}
    assert sizes == {(64, 64), (48, 80), (80, 48)}
    pixels = batch_of_scenes(config, 10)
    assert pixels.min() >= -1 and pixels.max() <= 1 and pixels.std() > 0.1


def test_a_muon_step_moves_the_kernels_themselves():
    model = build(TrainVAEConfig(widths=(8, 8)))
    optimizers, pairs = build_optimizers(model, 1e-2)
    kernel, matrix = pairs[0]
    before = kernel.detach().clone()
    matrix.grad = torch.randn_like(matrix)
    optimizers[0].step()
    assert not torch.equal(kernel, before) and torch.equal(kernel.flatten(1), matrix)
    seen = {id(kernel) for kernel, _ in pairs} | {id(p) for g in optimizers[1].param_groups for p in g["params"]}
    assert seen == {id(parameter) for parameter in model.parameters()}, "every parameter has one optimiser"


def test_command_line(tmp_path):
    config = parse(["--widths", "[8,16]", "--steps", "3", "--out", str(tmp_path)])
    assert config == TrainVAEConfig(widths=(8, 16), steps=3, out=tmp_path)
    with pytest.raises(ValueError, match="widths: expected at least two multiples"):
        TrainVAEConfig(widths=(8, 9), groups=2)

"""The committed autoencoder loads as any model of diffusers does, is small, and its card carries its figures."""

import json
from pathlib import Path

import diffusers
import pytest
import torch

from demo.models.train_vae import TrainVAEConfig, examine, scene_pixels
from demo.models.training import finished
from demo.models.vae_card import model_card
from demo.world.language import HELD_OUT_SEEDS
from demo.world.scenes import image_size
from lidit.frozen.vae import load_vae

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[3] / "demo" / "vae"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text())


def test_folder_is_complete_and_small(record):
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md", "training.json"} <= set(files)
    assert sum(files.values()) <= 3_000_000
    assert record["weight_bytes"] == files["diffusion_pytorch_model.safetensors"]


def test_it_was_made_by_the_script_s_defaults():
    assert finished(FOLDER, TrainVAEConfig().recipe())


def test_card_is_what_the_script_writes_from_the_record(record):
    card = (FOLDER / "README.md").read_text()
    assert card == model_card(record)
    assert f"**{record['figures']['psnr_db']:.2f} dB**" in card


def test_diffusers_loads_it_and_so_does_the_strict_loader(record):
    model = diffusers.AutoencoderKL.from_pretrained(FOLDER)
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    vae = load_vae("demo/vae", device="cpu")
    assert vae.downscale == record["downscale"] == 4 and 4 <= vae.channels <= 8
    assert vae.scaling_factor == record["scaling_factor"] and vae.shift_factor == record["shift_factor"]


def test_figures_of_the_card(record):
    figures = record["figures"]
    assert figures["psnr_db"] >= 28 and min(figures["psnr_db_by_size"].values()) >= 28
    assert record["exam_images"] >= 200
    assert abs(figures["latent_mean"]) < 0.05 and abs(figures["latent_std"] - 1) < 0.05


def test_it_does_now_what_its_card_says(record):
    figures = examine(FOLDER, 24)
    assert figures["psnr_db"] >= 28
    assert figures["psnr_db"] == pytest.approx(record["figures"]["psnr_db"], abs=1.5)
    assert abs(figures["latent_std"] - 1) < 0.15


def test_latents_bear_noise():
    """A diffusion model's latents are never exact: a tenth of their deviation of noise must not spoil the picture."""
    vae = load_vae("demo/vae", device="cpu")
    clean, noisy = [], []
    for seed in HELD_OUT_SEEDS[:12]:
        pixels = scene_pixels(seed, *image_size(seed))[None]
        latents = vae.encode(pixels)
        noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
        for values, errors in ((latents, clean), (latents + noise, noisy)):
            errors.append(((vae.decode(values).clamp(-1, 1) - pixels) / 2).square().mean().item())
    assert -10 * torch.tensor(noisy).mean().log10() > 24
    assert sum(clean) < sum(noisy), "the noise was there"


def test_any_multiple_of_four_will_do():
    vae = load_vae("demo/vae", device="cpu")
    pixels = scene_pixels(HELD_OUT_SEEDS[0], 100, 36)[None]
    latents = vae.encode(pixels)
    assert latents.shape == (1, vae.channels, 25, 9) and vae.decode(latents).shape == pixels.shape

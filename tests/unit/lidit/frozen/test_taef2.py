"""Our own loader of TAEF2 against the reference of its author's code, photo by photo; and what it refuses to load."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lidit.frozen.taef2 import TAEF2, load_taef2
from lidit.images.pixels import to_unit_range

pytestmark = pytest.mark.unit

PHOTOS = 4  # of the 35; all of them go through the job in tests/integration/test_latents_job.py


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights(data):
    return data / "taef2" / "taef2.safetensors"


@pytest.fixture(scope="module")
def model(weights):
    return load_taef2(weights).float()


def centre_square(path):
    """As the reference was made: whole-pixel centre square, LANCZOS to 256 x 256."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.LANCZOS)
    return to_unit_range(torch.from_numpy(np.array(square))[None])


@pytest.mark.parametrize("number", range(PHOTOS))
def test_reference_photos(data, model, number):
    wanted = json.loads((data / "golden" / "taef2_reference.json").read_text())["images"][number]
    pixels = centre_square(data / "coco-mini-cc" / "images" / wanted["file_name"])
    with torch.inference_mode():
        latents = model.encode(pixels)
        decoded = model.decode(latents).clamp(-1, 1)
    assert latents.shape == (1, 32, 32, 32) and decoded.shape == pixels.shape
    assert latents.mean().item() == pytest.approx(wanted["latent_mean"], abs=1e-4)
    assert latents.std().item() == pytest.approx(wanted["latent_std"], abs=1e-4)
    assert latents.flatten()[:4].tolist() == pytest.approx(wanted["latent_0_first4"], abs=1e-3)
    psnr = -10 * math.log10(((decoded - pixels) / 2).square().mean().item())
    assert psnr == pytest.approx(wanted["psnr_db"], abs=0.01)


def test_without_its_pool_branch_it_would_be_another_model(data, model):
    """What dropping those keys costs: the reason why unexpected keys are refused."""
    wanted = json.loads((data / "golden" / "taef2_reference.json").read_text())["images"][0]
    pixels = centre_square(data / "coco-mini-cc" / "images" / wanted["file_name"])
    dropped = TAEF2()
    dropped.load_state_dict(model.state_dict())
    for block in [*dropped.encoder, *dropped.decoder]:
        if hasattr(block, "pool"):
            block.pool = None
    with torch.inference_mode():
        decoded = dropped.decode(dropped.encode(pixels)).clamp(-1, 1)
    assert -10 * math.log10(((decoded - pixels) / 2).square().mean().item()) < wanted["psnr_db"] - 8


def test_oblong_images(model):
    pixels = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        latents = model.encode(pixels)
        assert latents.shape == (2, 32, 6, 10) and model.decode(latents).shape == pixels.shape


CHANGES = {
    "missing": (lambda tensors: tensors.pop("encoder.11.pool.0.weight"), r"encoder.11.pool.0.weight is missing"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.zeros(1)), r"extra is unexpected"),
    "shape": (
        lambda tensors: tensors.update({"encoder.14.bias": torch.zeros(16)}),
        r"encoder.14.bias has shape \[16\], not \[32\]",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_tensors_are_refused(weights, tmp_path, what):
    change, message = CHANGES[what]
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, tmp_path / "taef2.safetensors")
    with pytest.raises(ValueError, match=message):
        load_taef2(tmp_path / "taef2.safetensors")


def test_the_layers_have_the_file_s_158_tensors():
    assert len(TAEF2().state_dict()) == 158

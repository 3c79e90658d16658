"""Autoencoders of every class behind one interface: scaling, moments, what they are known by, what is refused."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from lidit.frozen.vae import VAE, load_vae

pytestmark = pytest.mark.unit

WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN2 = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
RES2 = {"encoder_block_types": ("ResBlock",) * 2, "decoder_block_types": ("ResBlock",) * 2}


def make_kl(**changes):
    values = {"block_out_channels": (8, 8), "norm_num_groups": 4, "scaling_factor": 2.0, "shift_factor": 0.5, **DOWN2}
    return diffusers.AutoencoderKL(**{**values, **changes})


def make_dc():
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.4, **RES2,
    )  # fmt: skip


def make_tiny():
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=5, scaling_factor=1.0,
    )  # fmt: skip


MAKERS = {"AutoencoderKL": make_kl, "AutoencoderDC": make_dc, "AutoencoderTiny": make_tiny}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny autoencoder of each class, random weights, as diffusers saves it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("autoencoders")
    for number, (kind, make) in enumerate(MAKERS.items()):
        torch.manual_seed(number)
        make().save_pretrained(root / kind)
    return root


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def own_latents(kind, folder, pixels):
    """What diffusers' own class gives, scaled as its pipelines do."""
    model = getattr(diffusers, kind).from_pretrained(folder).eval()
    with torch.inference_mode():
        made = model.encode(pixels)
    if kind == "AutoencoderKL":
        return (made.latent_dist.mode() - 0.5) * 2.0
    return made.latent * 0.4 if kind == "AutoencoderDC" else made.latents


@pytest.mark.parametrize("kind", MAKERS)
def test_latents_are_diffusers_own_scaled(folders, pixels, kind):
    vae = load_vae(str(folders / kind), device="cpu")
    latents = vae.encode(pixels)
    assert (vae.kind, vae.downscale) == (kind, 2)
    assert latents.shape == (2, vae.channels, 8, 12) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, own_latents(kind, folders / kind, pixels))
    model = getattr(diffusers, kind).from_pretrained(folders / kind).eval()
    with torch.inference_mode():
        wanted = model.decode(latents / vae.scaling_factor + vae.shift_factor).sample
    torch.testing.assert_close(vae.decode(latents), wanted)


def test_taef2_comes_as_scaled_by_its_author(data, pixels):
    from lidit.frozen.taef2 import load_taef2

    file = data / "taef2" / "taef2.safetensors"
    for model in (file, file.parent):
        vae = load_vae(str(model), device="cpu")
        assert (vae.kind, vae.channels, vae.downscale) == ("TAEF2", 32, 8)
        assert (vae.scaling_factor, vae.shift_factor, vae.has_deviation) == (1.0, 0.0, False)
    wanted = load_taef2(file).float()
    with torch.inference_mode():
        torch.testing.assert_close(vae.encode(pixels), wanted.encode(pixels))
        torch.testing.assert_close(vae.decode(vae.encode(pixels)), wanted.decode(wanted.encode(pixels)))


def test_moments(folders, pixels):
    vae = load_vae(str(folders / "AutoencoderKL"), device="cpu")
    moments = vae.encode_moments(pixels)
    assert moments.shape == (2, 2 * vae.channels, 8, 12)
    torch.testing.assert_close(moments[:, : vae.channels], vae.encode(pixels))
    model = diffusers.AutoencoderKL.from_pretrained(folders / "AutoencoderKL").eval()
    with torch.inference_mode():
        posterior = model.encode(pixels).latent_dist
    torch.testing.assert_close(moments[:, vae.channels :], posterior.std * 2.0)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    mean, deviation = moments.chunk(2, dim=1)
    torch.testing.assert_close(mean + deviation * noise, (drawn - 0.5) * 2.0)


@pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny"])
def test_no_moments_without_a_deviation(folders, pixels, kind):
    with pytest.raises(ValueError, match=f"{kind} gives no deviation"):
        load_vae(str(folders / kind), device="cpu").encode_moments(pixels)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lower_precision_is_near_and_results_are_fp32(folders, pixels, dtype):
    full, low = (load_vae(str(folders / "AutoencoderKL"), dtype=name, device="cpu") for name in ("fp32", dtype))
    latents = low.encode(pixels)
    assert latents.dtype == low.decode(latents).dtype == torch.float32
    assert next(low.weights.parameters()).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wanted = full.encode(pixels)
    error = (latents - wanted).abs().max() / wanted.abs().max()
    assert 0 < error < 0.03


def test_old_configs_take_the_class_s_scaling_factor(folders, tmp_path):
    """Stable Diffusion 1's config does not say it."""
    folder = shutil.copytree(folders / "AutoencoderKL", tmp_path / "old")
    change_config(folder, lambda config: (config.pop("scaling_factor"), config.pop("shift_factor")))
    vae = VAE(str(folder), device="cpu")
    assert (vae.scaling_factor, vae.shift_factor) == (0.18215, 0.0)


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# -- what they are known by --------------------------------------------------------------------------------------------


def test_fingerprint_is_known_without_loading_weights(folders, monkeypatch):
    monkeypatch.setattr("lidit.frozen.vae._load_diffusers", None)
    fingerprint = VAE(str(folders / "AutoencoderKL"), device="cpu").fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["autoencoder"] == "AutoencoderKL" and fingerprint["scaling_factor"] == 2.0
    assert fingerprint["shift_factor"] == 0.5 and fingerprint["dtype"] == "fp32"


def test_fingerprint_tells_weights_config_and_precision_apart(folders, tmp_path):
    first = shutil.copytree(folders / "AutoencoderKL", tmp_path / "first")
    second = shutil.copytree(folders / "AutoencoderKL", tmp_path / "second")
    assert VAE(str(first)).fingerprint() == VAE(str(second)).fingerprint(), "where it lies does not matter"
    change_config(second, lambda config: config.update(_diffusers_version="0.0"))
    assert VAE(str(first)).fingerprint() == VAE(str(second)).fingerprint(), "nor who wrote it"
    different = {}
    different["dtype"] = VAE(str(first), dtype="bf16").fingerprint()
    change_config(second, lambda config: config.update(act_fn="relu"))
    different["config"] = VAE(str(second)).fingerprint()
    tensors = load_file(first / WEIGHTS)
    tensors["encoder.conv_in.bias"] += 1
    save_file(tensors, first / WEIGHTS, metadata={"format": "pt"})
    different["weights"] = VAE(str(first)).fingerprint()
    original = VAE(str(folders / "AutoencoderKL")).fingerprint()
    for key, other in different.items():
        assert {name for name in original if original[name] != other[name]} == {key}


# -- what is refused -----------------------------------------------------------------------------------------------------


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


BROKEN = {
    "missing": (
        lambda folder: edit_weights(folder, lambda t: t.pop("encoder.conv_in.weight")),
        "conv_in.weight is missing",
    ),
    "unexpected": (
        lambda folder: edit_weights(folder, lambda t: t.update({"encoder.pool.0.weight": torch.zeros(1)})),
        "encoder.pool.0.weight is unexpected; loaded all the same",
    ),
    "another shape": (
        lambda folder: edit_weights(folder, lambda t: t.update({"encoder.conv_in.weight": torch.zeros(8, 3, 5, 5)})),
        "do not fit its config.json",
    ),
    "cut short": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:900]), "cut short"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"missing {WEIGHTS}"),
    "pickled": (
        lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"),
        "only safetensors weights are read",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "expected config.json"),
    "another class": (
        lambda folder: change_config(folder, lambda config: config.update(_class_name="UNet2DModel")),
        "expected `_class_name` to be one of AutoencoderKL, .*received 'UNet2DModel'",
    ),
    "scaled by channel": (
        lambda folder: change_config(folder, lambda config: config.update(latents_mean=[0.0] * 4)),
        "latents_mean, latents_std",
    ),
    "config of another model": (
        lambda folder: change_config(folder, lambda config: config.update(latent_channels=8)),
        "do not fit its config.json",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused(folders, tmp_path, what):
    damage, message = BROKEN[what]
    folder = shutil.copytree(folders / "AutoencoderKL", tmp_path / "broken")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_vae(str(folder), device="cpu")


def test_taef2_in_the_clothes_of_autoencoder_tiny_is_refused(data, tmp_path):
    """diffusers loads it without its pool branches, 13 dB worse; here it is an error."""
    diffusers.AutoencoderTiny(latent_channels=32).save_pretrained(tmp_path)
    tensors = load_file(data / "taef2" / "taef2.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        side, number, rest = name.split(".", 2)
        index = int(number) - (1 if side == "decoder" else 0)  # AutoencoderTiny's decoder clamps outside its layers
        renamed[f"{side}.layers.{index}.{rest}"] = tensor.float()
    save_file(renamed, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"pool\.\d\.\w+ is unexpected"):
        load_vae(str(tmp_path), device="cpu")


@pytest.mark.parametrize("model", ["owner/name", "owner/name/vae"])
@pytest.mark.parametrize("revision", [None, "main", "0123abc"])
def test_hub_ids_must_be_pinned(model, revision):
    with pytest.raises(ValueError, match="expected `revision` to be a full commit hash"):
        VAE(model, revision)


def test_a_folder_of_a_hub_repository(folders, tmp_path, monkeypatch):
    """`owner/name/vae` at a commit: read from the hub client's cache as it lies on disk; nothing is fetched."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    shutil.copytree(folders / "AutoencoderKL", snapshot / "vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    vae = VAE("owner/name/vae", commit, device="cpu")
    assert vae.fingerprint() == VAE(str(folders / "AutoencoderKL")).fingerprint()
    with pytest.raises(ValueError, match="no such folder, or no model in it"):
        VAE("owner/name/nothing", commit)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: VAE(str(folder), dtype="fp8"), "expected one of bf16, fp16, fp32, received 'fp8'"),
        (lambda folder: VAE("/nonexistent/vae"), "nothing is there"),
        (lambda folder: VAE(str(folder)).encode(torch.zeros(1, 3, 15, 24)), "multiples of 2 pixels, received 15 x 24"),
    ],
)
def test_wrong_use(folders, call, message):
    with pytest.raises(ValueError, match=message):
        call(folders / "AutoencoderKL")


@pytest.mark.gpu
def test_on_a_gpu_it_gives_what_the_cpu_gives(folders, pixels):
    for kind in MAKERS:
        there, here = (load_vae(str(folders / kind), device=device) for device in ("cuda", "cpu"))
        latents = there.encode(pixels)
        assert latents.device.type == "cuda"
        torch.testing.assert_close(latents.cpu(), here.encode(pixels), atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(there.decode(latents).cpu(), here.decode(latents), atol=5e-3, rtol=5e-3)

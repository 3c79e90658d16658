"""`TextToImage`, whole: two real tiny LLMs, a tiny LIDiT and a tiny autoencoder, from a weights folder to images."""

import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lidit
from lidit.diffusion import DDPM, Flow
from lidit.frozen.text import PromptEncoder
from lidit.sampler import SamplerConfig
from lidit.text_to_image import TextToImage
from lidit.weights import save_weights

pytestmark = pytest.mark.unit

WIDTHS = {"one": 32, "two": 48}
FEW = SamplerConfig(num_inference_steps=3, guidance_scale=2.0)


@pytest.fixture(scope="module")
def encoders(prompt_encoders):
    return prompt_encoders


@pytest.fixture(scope="module")
def weights(weights_folder):
    return weights_folder


@pytest.fixture(scope="module")
def pipe(weights, encoders):
    made = lidit.TextToImage.from_pretrained(weights, device="cpu", encoders=encoders)
    made.sampler = FEW
    return made


def values(images):
    return [np.asarray(image).astype(int) for image in images]


def assert_same(first, second):
    """Equal but for rounding of the last of 256 levels."""
    for one, other in zip(values(first), values(second), strict=True):
        assert np.abs(one - other).max() <= 1


# -- five lines -------------------------------------------------------------------------------------------------------


def test_five_lines_of_the_readme(weights, tmp_path):
    pipe = lidit.TextToImage.from_pretrained(weights)
    pipe("a red circle", seed=0, num_inference_steps=2)[0].save(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_loaded(pipe, weights):
    assert pipe.objective == Flow(shift=2.0) and pipe.image_size == (32, 48)
    assert pipe.vae.channels == 4 and pipe.vae.scaling_factor == 0.5
    (image,) = pipe("a red circle")
    assert image.size == (48, 32) and image.mode == "RGB"  # Pillow: width, height
    assert np.asarray(image).std() > 3, "the image is flat: nothing below is tested"


@pytest.mark.parametrize("height, width", [(16, 16), (32, 48), (64, 16), (48, 80)])
def test_sizes(pipe, height, width):
    (image,) = pipe("a red circle", height=height, width=width, num_inference_steps=1)
    assert image.size == (width, height)


# -- an image is a function of prompt and seed ------------------------------------------------------------------------


def test_an_image_does_not_depend_on_the_others(pipe):
    prompts = ["a red circle", "two small green stars above a blue square", "", "a large circle"]
    together = pipe(prompts, seed=3)
    assert len({image.tobytes() for image in together}) == 4
    assert_same([pipe(prompt, seed=3)[0] for prompt in prompts], together)
    assert_same(pipe(prompts, seed=3, batch_size=3), together)
    assert_same(pipe(prompts[::-1], seed=3)[::-1], together)


def test_seeds(pipe):
    prompts = ["a red circle", "a blue square"]
    images = pipe(prompts, seed=5, images_per_prompt=3)
    assert len(images) == 6 and len({image.tobytes() for image in images}) == 6
    assert_same(pipe(prompts[1], seed=7), images[5:])
    assert_same(pipe(prompts[0], seed=6), images[1:2])
    assert_same(pipe(prompts, seed=[7, 5], images_per_prompt=1), [images[2], images[3]])
    assert_same(pipe(prompts[0], seed=np.int64(6)), images[1:2])


def test_prompts_matter(pipe):
    first, second = values(pipe(["a red circle", "a blue square"], seed=0))
    assert np.abs(first - second).max() > 3


# -- negative and empty prompts ---------------------------------------------------------------------------------------


def test_negative_prompt(pipe):
    prompts, negatives = ["a red circle", "a blue square"], ["two stars", "a green circle below"]
    plain = pipe(prompts)
    assert_same(pipe(prompts, negative_prompt=""), plain)
    changed = pipe(prompts, negative_prompt=negatives)
    assert all(np.abs(one - other).max() > 3 for one, other in zip(values(plain), values(changed)))
    assert_same(pipe(prompts[1], negative_prompt=negatives[1]), changed[1:])
    assert_same(pipe(prompts, negative_prompt=negatives[0])[:1], changed[:1])
    unguided = pipe(prompts, guidance_scale=1)
    assert_same(pipe(prompts, guidance_scale=1, negative_prompt=negatives), unguided)


def test_the_unconditional_half_gets_the_real_empty_prompt(pipe, encoders, monkeypatch):
    """Null states of both encoders (no token at all for these), beside the same instruction as the prompt's."""
    calls = []
    forward = type(pipe.model).forward

    def noting(model, *arguments):
        calls.append(arguments)
        return forward(model, *arguments)

    monkeypatch.setattr(type(pipe.model), "forward", noting)
    pipe("a red circle", num_inference_steps=2)
    assert len(calls) == 2
    for _, _, prompt_embeds, prompt_mask, instruction_embeds in calls:
        for name, encoder in encoders.items():
            states, _ = encoder(["a red circle"])
            torch.testing.assert_close(prompt_embeds[name][0][prompt_mask[name][0]], states[0])
            torch.testing.assert_close(
                prompt_embeds[name][1][prompt_mask[name][1]], torch.from_numpy(encoder.null_embeds)
            )
            assert encoder.null_embeds.shape == (0, WIDTHS[name])
            torch.testing.assert_close(instruction_embeds[name], torch.from_numpy(encoder.instruction_embeds))


def test_encoders_run_once_whatever_the_steps(pipe, monkeypatch):
    encoded = []
    forward = PromptEncoder.forward

    def noting(encoder, ids):
        encoded.append((encoder.config.name, len(ids)))
        return forward(encoder, ids)

    monkeypatch.setattr(PromptEncoder, "forward", noting)
    pipe(["a red circle", "a red circle", "a star"], images_per_prompt=2, num_inference_steps=5)
    assert sorted(encoded) == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]  # distinct prompts, and the empty one


# -- what is said and refused -----------------------------------------------------------------------------------------


def test_prompts_that_are_too_long_are_said(pipe, encoders):
    long, longer = " ".join(["red"] * 14), " ".join(["red"] * 20)
    excess = encoders["one"].tokenize([long, longer])[1]
    with pytest.warns(UserWarning) as caught:
        images = pipe([long, "a star", longer], num_inference_steps=1)
    said = [str(warning.message) for warning in caught if "longer prompts" in str(warning.message)]
    assert len(said) == 2 and len(images) == 3
    assert said[0] == (
        f"encoder one reads 12 tokens of a prompt; longer prompts: 2, by {excess[1]} tokens at most; their ends are cut off"
    )
    assert all(warning.filename == __file__ for warning in caught if "longer prompts" in str(warning.message))
    with pytest.warns(UserWarning, match="longer prompts: 1,"):
        pipe("a star", negative_prompt=long, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe("a star", num_inference_steps=1)
        pipe("a star", negative_prompt=long, guidance_scale=1, num_inference_steps=1)


@pytest.mark.parametrize(
    "height, width, near", [(40, 48, "32, 48, 64"), (32, 100, "32, 48, 96, 112"), (0, 32, "16, 32, 48"), (8, 8, "16")]
)
def test_sizes_that_cannot_be_made(pipe, height, width, near):
    with pytest.raises(ValueError, match=f"{height} x {width} pixels: expected .* multiples of 16 .* such as {near}$"):
        pipe("a star", height=height, width=width)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"seed": [1, 2, 3]}, "seed: expected one whole number, or one for each of 2 images, received 3"),
        ({"negative_prompt": ["a"]}, "negative_prompt: expected one, or one for each of 2 prompts, received 1"),
        ({"images_per_prompt": 0}, "at least 1, received 0 and 8"),
        ({"batch_size": 0}, "at least 1, received 1 and 0"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected a whole number >= 1"),
    ],
)
def test_calls_that_cannot_be(pipe, options, match):
    with pytest.raises(ValueError, match=match):
        pipe(["a star", "a circle"], **options)


def test_no_prompts(pipe):
    assert pipe([]) == []


def test_parts_that_do_not_fit(pipe, encoders, make_model):
    with pytest.raises(ValueError, match=r"encoders: expected \{'one': 32, 'two': 48\}.*received \{'one': 32\}"):
        TextToImage(pipe.model, {"one": encoders["one"]}, pipe.vae, Flow())
    model = make_model(encoders=WIDTHS, in_channels=16)
    with pytest.raises(ValueError, match="VAE: expected 16 latent channels, received 4"):
        TextToImage(model, encoders, pipe.vae, Flow())


def test_encoders_and_vae_of_another_training(weights, encoders):
    swapped = dataclasses.replace(encoders["one"].config, layer_index=1)
    with pytest.raises(ValueError, match=r"encoder one is not the one .*\n  layer: expected 2, received 1"):
        TextToImage.from_pretrained(weights, device="cpu", encoders={"one": swapped})
    with pytest.raises(ValueError, match="encoders: expected names among one, two, received three"):
        TextToImage.from_pretrained(weights, device="cpu", encoders={"three": encoders["one"]})
    other = SimpleNamespace(channels=4, fingerprint=lambda: {"autoencoder": "other"})
    with pytest.raises(
        ValueError, match=r"VAE is not the one .*\n  autoencoder: expected 'AutoencoderKL', received 'other'"
    ):
        TextToImage.from_pretrained(weights, device="cpu", encoders=encoders, vae=other)


def test_weights_without_their_objective(tmp_path, pipe):
    folder = save_weights(tmp_path / "bare", pipe.model)
    with pytest.raises(ValueError, match="does not name the objective"):
        TextToImage.from_pretrained(folder, device="cpu")


def test_weights_that_diverged(pipe, make_model, encoders):
    model = make_model(encoders=WIDTHS)
    torch.nn.init.constant_(model.final.project.bias, float("nan"))
    broken = TextToImage(model, encoders, pipe.vae, Flow(), (32, 32))
    with pytest.raises(RuntimeError, match="the model gave NaN or Inf"):
        broken("a star", num_inference_steps=1)


# -- pixels, precision, progress --------------------------------------------------------------------------------------


def test_pixels_become_bytes(pipe, monkeypatch):
    pixels = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 1.5]).reshape(1, 1, 1, 6).repeat(1, 3, 2, 1)
    pixels[:, 1] = 1.0
    monkeypatch.setattr(pipe, "vae", SimpleNamespace(decode=lambda latents: pixels))
    (image,) = pipe.decode(torch.zeros(1, 4, 2, 6))
    assert image.size == (6, 2)
    assert np.asarray(image)[0].tolist() == [[level, 255, level] for level in (0, 0, 128, 191, 255, 255)]


@pytest.mark.parametrize("objective", [Flow(), DDPM()])
def test_bf16_weights(make_model, pipe, encoders, objective):
    """Latents stay fp32 between steps; the model's arithmetic is bf16."""
    model = make_model(encoders=WIDTHS)
    exact = TextToImage(model, encoders, pipe.vae, Flow(), (32, 32))
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = exact.sample_latents(noise, ["a star", "a red circle"], ["", ""], FEW)
    rounded = TextToImage(make_model(encoders=WIDTHS).bfloat16(), encoders, pipe.vae, Flow(), (32, 32))
    latents = rounded.sample_latents(noise, ["a star", "a red circle"], ["", ""], FEW)
    assert latents.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    error = (latents - wanted).square().mean().sqrt() / wanted.std()
    assert 0 < error < 0.05


def test_progress_over_batches(pipe):
    seen = []
    pipe(
        ["a star"] * 5,
        seed=range(5),
        batch_size=2,
        num_inference_steps=2,
        on_step=lambda done, steps, latents: seen.append((done, steps, len(latents))),
    )
    assert seen == [(1, 6, 2), (2, 6, 2), (3, 6, 2), (4, 6, 2), (5, 6, 1), (6, 6, 1)]

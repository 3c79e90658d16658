"""The latents stage called as a worker calls it, on a tiny autoencoder with random weights; no Ray."""

import dataclasses
import io
import json

import diffusers
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from lidit.frozen.vae import load_vae
from lidit.images.pixels import bucket_pixels, to_unit_range
from lidit.store import columns
from lidit.store.codec import decode_latents
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.worker import READS
from pipelines.latents import WINDOW_ROWS, EncodeLatents, LatentsConfig

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of an AutoencoderKL, 3 channels, 2x down."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        norm_num_groups=4, latent_channels=3, scaling_factor=1.5, shift_factor=0.25,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def config(tmp_path, model):
    """Buckets 48x80, 64x64, 80x48."""
    return LatentsConfig(store=str(tmp_path), model=str(model), codec="fp32", actors=ActorsConfig(num_gpus=0.0))


def photo(height, width, seed=0):
    """A PNG of that size, another one for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def window(*images):
    return pa.record_batch({"image": pa.array(images, pa.large_binary())})


def names(config):
    return [f.name for f in EncodeLatents.writes(config)]


def latents_of(made, config):
    return decode_latents(
        made.arrays[config.latents_column], EncodeLatents.writes(config)[0], made.arrays[config.bucket_column]
    )


def alone(config, data):
    """The latents of one image, straight from the autoencoder."""
    _, pixels = bucket_pixels(data, config.buckets)
    vae = load_vae(config.model, device="cpu")
    unit = to_unit_range(torch.from_numpy(pixels.copy())[None])
    return (vae.encode_moments(unit) if config.moments else vae.encode(unit))[0].numpy()


IMAGES = [
    photo(90, 100),
    photo(70, 140, 1),
    None,
    photo(140, 70, 2),
    photo(300, 310, 3),
    photo(90, 100),
    photo(64, 64, 4),
]
BUCKETS = ["64x64", "48x80", None, "80x48", "64x64", "64x64", "64x64"]


def test_fields(config):
    latents, bucket = EncodeLatents.writes(config)
    assert (latents.name, bucket.name) == ("latents", "bucket")
    assert (latents.type, bucket.type) == (pa.large_binary(), pa.string())
    metadata = {key.decode(): value.decode() for key, value in latents.metadata.items()}
    assert metadata[READS] == "image" and metadata[columns.META_STAGE] == "latents"
    assert metadata[columns.META_CODEC] == "fp32" and metadata["lidit:moments"] == "mean"
    assert (metadata["lidit:channels"], metadata["lidit:downscale"]) == ("3", "2")
    assert (float(metadata["lidit:scaling_factor"]), float(metadata["lidit:shift_factor"])) == (1.5, 0.25)
    assert metadata["lance-encoding:compression"] == "none"
    fingerprint = json.loads(metadata[columns.META_FINGERPRINT])
    assert fingerprint["resolution"] == 64 and fingerprint["codec"] == "fp32" and len(fingerprint["weights"]) == 64
    assert "weights" not in json.loads(bucket.metadata[columns.META_FINGERPRINT.encode()]), (
        "no autoencoder decides a bucket"
    )
    assert "diffusers" in json.loads(metadata[columns.META_VERSIONS])


def test_every_row_gets_what_the_autoencoder_gives(config):
    made = EncodeLatents(config)(window(*IMAGES), names(config))
    assert made.errors == {} and made.arrays["bucket"].to_pylist() == BUCKETS
    for data, value, bucket in zip(IMAGES, latents_of(made, config), BUCKETS):
        if data is None:
            assert value is None
            continue
        height, width = map(int, bucket.split("x"))
        assert value.shape == (3, height // 2, width // 2)
        np.testing.assert_allclose(value, alone(config, data), atol=2e-5)
    made.arrays["latents"].validate(full=True)


@pytest.mark.parametrize("batch_pixels", [1, 64 * 64 * 2, 1 << 20])
@pytest.mark.parametrize("threads", [1, 4])
def test_batches_and_threads_change_nothing(config, batch_pixels, threads):
    whole = latents_of(EncodeLatents(config)(window(*IMAGES), names(config)), config)
    other = dataclasses.replace(config, batch_pixels=batch_pixels, decode_threads=threads)
    made = latents_of(EncodeLatents(other)(window(*IMAGES), names(config)), config)
    for one, another in zip(whole, made):
        assert (one is None) == (another is None)
        if one is not None:
            np.testing.assert_allclose(one, another, atol=2e-5)


def test_batches_are_of_one_bucket_and_full(config):
    stage = EncodeLatents(dataclasses.replace(config, batch_pixels=2 * 64 * 64))
    sizes = []
    launch = stage._launch
    stage._launch = lambda pixels: (sizes.append(pixels.shape), launch(pixels))[1]
    squares, wides = [photo(80, 80, n) for n in range(5)], [photo(60, 100, n) for n in range(3)]
    stage(window(*squares[:2], *wides, *squares[2:]), names(config))
    assert sizes == [(2, 64, 64, 3), (2, 48, 80, 3), (2, 64, 64, 3), (1, 48, 80, 3), (1, 64, 64, 3)]


def test_equal_images_are_encoded_once(config):
    stage = EncodeLatents(config)
    once = stage(window(IMAGES[0], IMAGES[1]), names(config))
    often = stage(window(*[IMAGES[0], IMAGES[1]] * 5), names(config))
    assert once.counts["images"] == often.counts["images"] == 2
    values = latents_of(often, config)
    assert all(np.array_equal(values[row], values[row % 2]) for row in range(10))


def test_bad_images_are_row_errors_with_a_reason(config):
    bad = {0: b"", 2: b"<svg/>", 3: IMAGES[0][:-200], 5: photo(8, 8)}
    made = EncodeLatents(config)(window(*[bad.get(row, IMAGES[0]) for row in range(6)], bad[3]), names(config))
    assert sorted(made.errors) == [0, 2, 3, 5, 6] and made.errors[3] == made.errors[6]
    assert made.errors[0] == "latents: 0 bytes: expected an image file"
    assert "not an image of a format known here" in made.errors[2] and "damaged PNG" in made.errors[3]
    assert "8.00 times larger" in made.errors[5]
    nulls = [True, False, True, True, False, True, True]
    assert made.arrays["latents"].is_null().to_pylist() == made.arrays["bucket"].is_null().to_pylist() == nulls
    assert made.counts["images"] == 1
    made.arrays["latents"].validate(full=True)


def test_latents_that_are_not_finite_become_nulls_with_a_reason(config):
    stage = EncodeLatents(config)
    encode = stage.vae.encode

    def overflow(pixels):
        latents = encode(pixels)
        latents[1, 0, 0, 0] = float("inf")
        return latents

    stage.vae.encode = overflow
    made = stage(window(photo(70, 70, 0), photo(70, 70, 1), photo(70, 70, 2)), names(config))
    assert list(made.errors) == [1] and "NaN or Inf in the autoencoder's latents" in made.errors[1]
    assert [value is None for value in latents_of(made, config)] == [False, True, False]


def test_values_beyond_the_codec_s_range_are_not_finite(config):
    """What fits fp32 and bf16 may not fit fp16: found before it is stored."""
    stage = EncodeLatents(dataclasses.replace(config, codec="fp16"))
    encode = stage.vae.encode
    stage.vae.encode = lambda pixels: encode(pixels) * 1e6
    made = stage(window(IMAGES[0]), names(config))
    assert list(made.errors) == [0] and made.arrays["latents"].null_count == 1


@pytest.mark.parametrize("images", [[None, None], [b"x"], [None, b""]])
def test_windows_without_a_good_image(config, images):
    made = EncodeLatents(config)(window(*images), names(config))
    assert all(len(array) == array.null_count == len(images) for array in made.arrays.values())
    assert sorted(made.errors) == [row for row, image in enumerate(images) if image is not None]
    made.arrays["latents"].validate(full=True)


def test_moments(config):
    config = dataclasses.replace(config, moments=True)
    assert names(config) == ["latent_moments", "bucket"]
    field = EncodeLatents.writes(config)[0]
    assert field.metadata[b"lidit:moments"] == b"mean,deviation" and field.metadata[b"lidit:channels"] == b"3"
    (value,) = latents_of(EncodeLatents(config)(window(IMAGES[0]), names(config)), config)
    assert value.shape == (6, 32, 32) and (value[3:] > 0).all()
    np.testing.assert_allclose(value, alone(config, IMAGES[0]), atol=2e-5)


@pytest.mark.parametrize(("codec", "tolerance"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_codecs(config, codec, tolerance):
    config = dataclasses.replace(config, codec=codec)
    made = EncodeLatents(config)(window(IMAGES[0]), names(config))
    (value,) = latents_of(made, config)
    assert len(made.arrays["latents"][0].as_py()) == 2 * value.size
    np.testing.assert_allclose(value, alone(config, IMAGES[0]), rtol=tolerance, atol=1e-4)


def test_only_what_is_wanted(config):
    assert set(EncodeLatents(config)(window(IMAGES[0]), ["latents"]).arrays) == {"latents"}


def test_a_second_resolution_has_columns_of_its_own(config):
    assert names(dataclasses.replace(config, name="128", resolution=128)) == ["latents_128", "bucket_128"]
    assert names(dataclasses.replace(config, name="sdxl", moments=True)) == ["latent_moments_sdxl", "bucket_sdxl"]


def test_bytes_per_row_is_the_size_of_what_is_made(config):
    sample = pa.table({"image": window(*IMAGES, b"").column("image")})
    stored = sum(
        len(value)
        for value in EncodeLatents(config)(window(*IMAGES), ["latents"]).arrays["latents"].to_pylist()
        if value
    )
    assert EncodeLatents.bytes_per_row(config, sample, []) == pytest.approx(stored / 8 + 8)


def test_window_rows_bound_the_decoded_pixels(config):
    def rows(resolution):
        return EncodeLatents(dataclasses.replace(config, resolution=resolution)).window_rows

    assert rows(64) == WINDOW_ROWS[1] and rows(512) == 128 and rows(4096) == WINDOW_ROWS[0]


WRONG = {
    "resolution": ({"resolution": 250}, "multiple of step 16, received 250"),
    "aspect": ({"max_aspect": 0.5}, "max_aspect of at least 1"),
    "upscale": ({"max_upscale": 0.5}, "max_upscale: expected a number >= 1, received 0.5"),
    "name": ({"name": "a-b"}, "letters, digits and underscores, received 'a-b'"),
    "codec": ({"codec": "int8"}, "expected bf16, fp16 or fp32, received 'int8'"),
    "dtype": ({"dtype": "int8"}, "expected bf16, fp16 or fp32, received 'int8'"),
    "batch": ({"batch_pixels": 0}, "batch_pixels: expected a whole number >= 1 or null"),
    "threads": ({"decode_threads": 0}, "decode_threads: expected a whole number >= 1 or null"),
    "rate": ({"max_error_rate": 2.0}, "max_error_rate"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_configs(config, what):
    changes, message = WRONG[what]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_what_does_not_go_with_the_autoencoder(config, data):
    with pytest.raises(ValueError, match="step: expected a multiple of the autoencoder's downscale 2, received 1"):
        EncodeLatents.writes(dataclasses.replace(config, step=1))
    with pytest.raises(ValueError, match="moments: TAEF2 gives no deviation"):
        EncodeLatents.writes(dataclasses.replace(config, model=str(data / "taef2"), moments=True))


def test_fingerprint_knows_what_decides_the_values(config):
    def fingerprints(**changes):
        fields = EncodeLatents.writes(dataclasses.replace(config, **changes))
        return [f.metadata[columns.META_FINGERPRINT.encode()] for f in fields]

    latents, bucket = fingerprints()
    for same in ({"batch_pixels": 7}, {"decode_threads": 3}, {"store": "elsewhere"}, {"max_error_rate": 0.5}):
        assert fingerprints(**same) == [latents, bucket]
    for both in ({"resolution": 128}, {"step": 32}, {"max_aspect": 1.0}, {"max_upscale": 2.0}):
        assert fingerprints(**both)[0] != latents and fingerprints(**both)[1] != bucket
    for one in ({"codec": "bf16"}, {"dtype": "bf16"}):
        assert fingerprints(**one)[0] != latents and fingerprints(**one)[1] == bucket

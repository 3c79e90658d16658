"""Photos of telephones, which the extra `heif` reads; without it they are told by name. `make test-heif` runs this file."""

import io

import numpy as np
import pytest
from PIL import Image

from lidit.images.pixels import FORMATS, ImageError, bucket_pixels, open_image
from pipelines.sources.base import IMAGE_ENDINGS
from pipelines.sources.image_check import check_image

pillow_heif = pytest.importorskip("pillow_heif")
pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def heic(picture):
    pillow_heif.register_heif_opener()
    picture.save(out := io.BytesIO(), "HEIF", quality=95)
    return out.getvalue()


def test_heic_is_taken_like_any_picture(heic, picture):
    assert "HEIF" not in FORMATS, "it is asked for by its first bytes alone"
    assert {"heic", "heif", "hif"} <= set(IMAGE_ENDINGS)
    assert open_image(heic).format == "HEIF"
    look = check_image(heic, with_phash=True)
    assert (look.height, look.width) == (64, 96) and look.phash is not None
    _, pixels = bucket_pixels(heic, [(64, 96)])
    assert np.abs(pixels.astype(int) - np.asarray(picture)).mean() < 4


def test_damaged_heic_is_a_reason(heic):
    for size in (20, 100, len(heic) // 2, len(heic) - 20):
        with pytest.raises(ValueError, match=r"header cannot be read|damaged HEIF|not an image"):
            check_image(heic[:size])


def test_heic_that_lies_about_its_size(picture):
    """The header says 16 x 16; the decoder refuses more than that allows."""
    pillow_heif.register_heif_opener()
    Image.new("RGB", (2048, 2048)).save(out := io.BytesIO(), "HEIF", quality=30)
    data = bytearray(out.getvalue())
    place = data.index(b"ispe") + 8
    data[place : place + 8] = (16).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match=r"damaged HEIF.*[Ss]ecurity limit"):
        bucket_pixels(bytes(data), [(16, 16)])

"""What a VLM is shown: upright, RGB, reduced; and what of it is sent as it came."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lidit.images.pixels import ImageError, reduced_image, reduced_size
from pipelines.captioning.image import blank_image, sendable, shown_size
from pipelines.captioning.request import GRAY

pytestmark = pytest.mark.unit


def picture(height: int = 40, width: int = 60) -> Image.Image:
    """Red above, blue below, a green stripe on the left."""
    values = np.zeros((height, width, 3), np.uint8)
    values[: height // 2, :, 0] = values[height // 2 :, :, 2] = 200
    values[:, : width // 6] = (0, 200, 0)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((40, 60), 100, (40, 60)),
        ((400, 600), 300, (200, 300)),
        ((600, 400), 300, (300, 200)),
        ((1, 5000), 100, (1, 100)),
    ],
)
def test_reduced_size(size: tuple[int, int], side: int, expected: tuple[int, int]) -> None:
    assert reduced_size(*size, side) == expected


def test_a_small_image_is_shown_as_it_is() -> None:
    shown = reduced_image(encoded(picture()), 1024)
    assert shown.mode == "RGB" and np.array_equal(np.asarray(shown), np.asarray(picture()))


@pytest.mark.parametrize("turn", range(1, 9))
def test_size_and_pixels_are_upright(turn: int) -> None:
    from lidit.images.pixels import UPRIGHT

    inverse = {5: 5, 6: 8, 7: 7, 8: 6}.get(turn, turn)  # a quarter turn back is the other quarter turn
    lying = picture().transpose(UPRIGHT[inverse]) if turn > 1 else picture()
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(lying, exif=exif)
    assert shown_size(data, 30) == (20, 30)
    assert np.array_equal(np.asarray(reduced_image(data, 1024)), np.asarray(picture()))
    small = np.asarray(reduced_image(data, 30))
    assert small.shape == (20, 30, 3) and small[5, 20, 0] > 150 and small[15, 20, 2] > 150 and small[10, 2, 1] > 150


def test_a_large_jpeg_is_decoded_small_and_right() -> None:
    data = encoded(picture(2400, 3600), "JPEG", quality=95)
    shown = np.asarray(reduced_image(data, 300)).astype(int)
    assert shown.shape == (200, 300, 3)
    assert np.abs(shown[50, 200] - (200, 0, 0)).max() < 12 and np.abs(shown[150, 200] - (0, 0, 200)).max() < 12


def test_other_modes_become_rgb_and_transparency_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert np.asarray(reduced_image(encoded(clear), 64)).tolist() == [[[255, 255, 255]] * 8] * 8
    for mode in ("L", "P", "1", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert reduced_image(encoded(picture().convert(mode), kind), 64).mode == "RGB"


def test_blank_image_has_the_size_shown() -> None:
    blank = blank_image(encoded(picture(400, 600)), 300)
    assert blank.size == (300, 200) and blank.getcolors() == [(300 * 200, GRAY)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_plain_files_are_sent_as_they_came(kind: str) -> None:
    data = encoded(picture(), kind)
    assert sendable(data, 1024) == (data, f"image/{kind.lower()}")


def test_others_are_sent_as_jpeg_and_blank_ones_as_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, large = encoded(picture(), "JPEG", exif=exif), encoded(picture(400, 600))
    for data in (turned, large, encoded(picture(), "BMP"), encoded(picture().convert("RGBA"))):
        sent, mime = sendable(data, 300)
        assert mime == "image/jpeg"
        with Image.open(io.BytesIO(sent)) as image:
            assert image.size == reduced_image(data, 300).size
    sent, mime = sendable(large, 300, blank=True)
    assert mime == "image/png" and Image.open(io.BytesIO(sent)).getcolors() == [(60000, GRAY)]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("cut", "damaged JPEG"), ("empty", "0 bytes"), ("text", "not an image"), ("bomb", "900000000 pixels")],
)
def test_what_cannot_be_shown_says_why(ending: str, reason: str) -> None:
    whole = encoded(picture(300, 300).effect_spread(5), "JPEG")
    bomb = (
        b"BM" + bytes(12) + (40).to_bytes(4, "little") + (30000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    )
    data = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"not an image", "bomb": bomb}[ending]
    for use in (lambda: reduced_image(data, 64), lambda: sendable(data, 64)):
        with pytest.raises(ImageError, match=reason):
            use()

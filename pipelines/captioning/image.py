"""Encoded image bytes -> what a VLM is shown: upright RGB, whole, at most so large."""

from __future__ import annotations

import io

from PIL import Image

from lidit.images.pixels import (
    LARGE_PIXELS,
    UPRIGHT,
    ImageError,
    decode_image,
    eight_bits,
    large_images,
    open_image,
    orientation,
    upright_size,
)
from pipelines.captioning.request import GRAY

DRAFT_MARGIN = 2  # a JPEG is decoded at no less than so many times the size needed
SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # what every endpoint reads
JPEG_QUALITY = 95
IMAGE_RULES = "upright, first frame, white behind, reduced by lanczos, jpeg draft 2x"
"""The treatment in a few words, for fingerprints: change it whenever a pixel may come out differently."""


def reduced_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of an image brought to a longer side of at most `side` pixels."""
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def shown_size(data: bytes, side: int) -> tuple[int, int]:
    """(height, width) of what `shown_image` gives, from the header alone. Raises ImageError where it cannot be read."""
    return reduced_size(*upright_size(open_image(data)), side)


def shown_image(data: bytes, side: int) -> Image.Image:
    """The image, upright, as RGB, with a longer side of at most `side` pixels. May run in many threads at once.

    Raises:
        ImageError: no image, damaged, or too large to be decoded safely.
    """
    image = open_image(data)
    height, width = shown_size(data, side)
    turn = orientation(image)
    if turn >= 5:
        height, width = width, height
    try:
        image.draft(None, (width * DRAFT_MARGIN, height * DRAFT_MARGIN))
        if image.width * image.height <= LARGE_PIXELS:
            pixels = _resized(image, (width, height))
        else:
            with large_images:
                pixels = _resized(image, (width, height))
    except ImageError:
        raise
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise ImageError(f"damaged {image.format}: {type(error).__name__}: {error}") from error
    return pixels.transpose(UPRIGHT[turn]) if turn in UPRIGHT else pixels


def blank_image(data: bytes, side: int) -> Image.Image:
    """A gray image of the size that `shown_image` would have."""
    height, width = shown_size(data, side)
    return Image.new("RGB", (width, height), GRAY)


def sendable(data: bytes, side: int, blank: bool = False) -> tuple[bytes, str]:
    """(bytes, MIME type) of the image for an endpoint: as it came where that is fit to be sent, else as a JPEG.

    Raises:
        ImageError: as `shown_image`; an image that is sent as it came is decoded too, so that a damaged one is found here.
    """
    if blank:
        return _encoded(blank_image(data, side), "PNG")
    shown = shown_image(data, side)
    image = open_image(data)
    plain = image.mode in ("L", "RGB") and not image.has_transparency_data and getattr(image, "n_frames", 1) == 1
    if image.format in SENT_AS_THEY_ARE and plain and orientation(image) == 1 and shown.size == image.size:
        return data, f"image/{image.format.lower()}"
    return _encoded(shown, "JPEG")


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB pixels of `size` (width, height)."""
    decode_image(image)
    flat = eight_bits(image)
    if flat.size != size:
        flat = flat.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return flat.convert("RGB")


def _encoded(image: Image.Image, kind: str) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=JPEG_QUALITY)
    return buffer.getvalue(), f"image/{kind.lower()}"

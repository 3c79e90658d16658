"""Encoded image bytes -> what a VLM is shown: upright RGB, whole, at most so large."""

from __future__ import annotations

import io

from PIL import Image

from lidit.images.pixels import open_image, orientation, reduced_image, reduced_size, upright_size
from pipelines.captioning.request import GRAY

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # what every endpoint reads
JPEG_QUALITY = 95
IMAGE_RULES = "upright, first frame, white behind, reduced by lanczos, jpeg draft 2x"
"""The treatment in a few words, for fingerprints: change it whenever a pixel may come out differently."""


def shown_size(data: bytes, side: int) -> tuple[int, int]:
    """(height, width) of what `reduced_image` gives, from the header alone. Raises ImageError where it cannot be read."""
    return reduced_size(*upright_size(open_image(data)), side)


def blank_image(data: bytes, side: int) -> Image.Image:
    """A gray image of the size that `reduced_image` would have."""
    height, width = shown_size(data, side)
    return Image.new("RGB", (width, height), GRAY)


def sendable(data: bytes, side: int, blank: bool = False) -> tuple[bytes, str]:
    """(bytes, MIME type) of the image for an endpoint: as it came where that is fit to be sent, else as a JPEG.

    Raises:
        ImageError: as `reduced_image`; an image that is sent as it came is decoded too, so that a damaged one is found here.
    """
    if blank:
        return _encoded(blank_image(data, side), "PNG")
    shown = reduced_image(data, side)
    image = open_image(data)
    plain = image.mode in ("L", "RGB") and not image.has_transparency_data and getattr(image, "n_frames", 1) == 1
    if image.format in SENT_AS_THEY_ARE and plain and orientation(image) == 1 and shown.size == image.size:
        return data, f"image/{image.format.lower()}"
    return _encoded(shown, "JPEG")


def _encoded(image: Image.Image, kind: str) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=JPEG_QUALITY)
    return buffer.getvalue(), f"image/{kind.lower()}"

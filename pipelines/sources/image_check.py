"""An encoded image, as it came from outside: whether it is whole, how large, and what it looks like in 64 bits.

What is let in is what `lidit.images.pixels` can make pixels of. An image is only looked at: its bytes are stored as they came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lidit.images.pixels import (
    UPRIGHT,
    ImageError,
    check_mode,
    decode_image,
    eight_bits,
    image_errors,
    open_image,
    orientation,
    upright_size,
)

if TYPE_CHECKING:
    from PIL import Image

LOOK_PIXELS = 64  # a JPEG is decoded at an eighth, a quarter or a half of its size, as long as both sides keep this
REDUCED = 512  # pixels: a larger image is averaged down before its hash is made
PHASH_PIXELS = 32


class Unwanted(Exception):
    """An image that a filter leaves out because of its size; the message is the filter's name."""


@dataclass
class ImageCheck:
    """Result of a check: size and perceptual hash."""

    height: int  # pixels, upright (after EXIF rotation)
    width: int
    phash: int | None  # 64 bits; None where it was not made


def digest(data: bytes) -> str:
    """32 hex digits: the first 128 bits of the sha256."""
    return hashlib.sha256(data).hexdigest()[:32]


def check_image(
    data: bytes,
    decode: bool = True,
    with_phash: bool = False,
    size_filter: Callable[[int, int], str | None] = lambda height, width: None,
) -> ImageCheck:
    """Looks at an image's bytes. May run in many threads at once.

    Args:
        data: the encoded image.
        decode: decode it (a JPEG at an eighth of its size where that is enough), so that damage is found; else it is only
            seen that the file's end is there.
        with_phash: also make the perceptual hash, which needs decoding.
        size_filter: is given height and width once the header is read, and names what leaves such an image out, if so.

    Raises:
        Unwanted: the size filter leaves it out; nothing is decoded.
        ValueError: no image, a format that is not read here, too many pixels, or damaged; says which.
    """
    try:
        image = open_image(data)
    except ValueError as error:
        raise ValueError(what_it_is(data) or str(error)) from error
    height, width = upright_size(image)
    if (unwanted := size_filter(height, width)) is not None:
        raise Unwanted(unwanted)
    with image_errors(image):
        if decode or with_phash:
            image.draft("L", (LOOK_PIXELS, LOOK_PIXELS))  # JPEG only: enough to see that it is whole
            decode_image(image)
        elif not has_end(data, image.format or ""):
            raise ImageError(f"{image.format} cut short: its end is missing")
        check_mode(image)
        return ImageCheck(height, width, perceptual_hash(image) if with_phash else None)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits of the image's lowest frequencies (imagehash's pHash), upright: similar pictures differ in few of them.

    Colour plays no part in it, and all plain surfaces are alike.
    """
    import imagehash

    turn = orientation(image)
    if image.mode in ("L", "RGB", "RGBA", "CMYK"):
        image = image.reduce(max(1, max(image.size) // REDUCED))
    small = eight_bits(image).convert("L").resize((PHASH_PIXELS, PHASH_PIXELS), resample=1)  # Lanczos
    if turn in UPRIGHT:
        small = small.transpose(UPRIGHT[turn])
    return int.from_bytes(np.packbits(imagehash.phash(small).hash.reshape(-1)).tobytes(), "big")


def has_end(data: bytes, format: str) -> bool:
    """Tells whether the mark that ends a JPEG or PNG is there, and all that the header of a WebP announces; True for others.

    In a JPEG's scan 0xFF is always followed by 0 or a restart mark: the end mark after the last scan's begin is the end.
    """
    if format == "JPEG":
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if format == "PNG":
        return b"IEND\xaeB`\x82" in data[-4096:]
    if format == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data) + 1  # the last byte may be padding
    return True


def what_it_is(data: bytes) -> str:
    """Describes bytes that are no image in a few words, as the web serves them; "" where nothing can be said.

    Nothing of the bytes is quoted: a file that is no image may be anything.
    """
    if not data:
        return "0 bytes: expected an image file"
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<svg", b"<?xml", b"<!doctype svg")) and b"<svg" in data[:4096].lower():
        return "an SVG drawing: it has no pixels"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image"
    try:
        text = data[:64].decode()
    except UnicodeDecodeError:
        return ""
    return "text, not an image" if "".join(text.split()).isprintable() else ""

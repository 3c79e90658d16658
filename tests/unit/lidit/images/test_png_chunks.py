"""PNGs with chunks that are no pixels: what stands in the way is left out, and every pixel stays as it is."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lidit.images.pixels import ImageError, open_image, open_rgb, orientation
from lidit.images.png_chunks import only_pixels

pytestmark = pytest.mark.unit
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)


def png(info=None, **options):
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "PNG", pnginfo=info, **options)
    return out.getvalue()


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def text(size, kind="add_text", **options):
    info = PngImagePlugin.PngInfo()
    getattr(info, kind)("workflow", "x" * size, zip=True, **options)
    return info


AFTER_HEADER, BEFORE_END = 33, -12
LARGE = zlib.compress(b"x" * 2_000_000)
ODD = {
    "zTXt": png(text(2_000_000)),
    "iTXt": png(text(2_000_000, "add_itxt")),
    "zTXt behind the pixels": png()[:BEFORE_END] + chunk(b"zTXt", b"k\0\0" + LARGE) + png()[BEFORE_END:],
    "iCCP": png()[:AFTER_HEADER] + chunk(b"iCCP", b"k\0\0" + LARGE) + png()[AFTER_HEADER:],
    "many texts": png()[:AFTER_HEADER]
    + 70 * chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 1_000_000))
    + png()[AFTER_HEADER:],
    "text with a wrong checksum": png()[:AFTER_HEADER] + chunk(b"tEXt", b"k\0v", 5) + png()[AFTER_HEADER:],
    "note with a wrong checksum": png()[:AFTER_HEADER] + chunk(b"pHYs", bytes(9), 5) + png()[AFTER_HEADER:],
    "note behind the pixels": png()[:BEFORE_END] + chunk(b"tIME", bytes(7), 5) + png()[BEFORE_END:],
}


@pytest.mark.parametrize("what", ODD)
def test_the_picture_is_taken(what):
    for data in (ODD[what], memoryview(ODD[what])):
        assert (np.asarray(open_rgb(data)) == PIXELS).all()


def test_most_are_taken_as_they_are():
    for data in (png(), png(text(50)), b"", b"no png", png()[:50], b"\xff\xd8\xff" + bytes(90)):
        assert only_pixels(data) is data


def test_orientation_beside_a_long_text_stays():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert orientation(open_image(png(text(2_000_000), exif=exif))) == 6


@pytest.mark.parametrize("cut", [20, 60, 3000, -200])
def test_damage_of_the_pixels_stays_damage(cut):
    with pytest.raises(ImageError):
        open_rgb(ODD["zTXt"][:cut])
    broken = bytearray(png())
    broken[len(broken) // 2] ^= 0xFF
    with pytest.raises(ImageError):
        open_rgb(bytes(broken))

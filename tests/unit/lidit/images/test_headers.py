"""PNGs lose only chunks that are no pixels; JPEG 2000 files of a hundred bytes that ask for gigabytes are refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lidit.images.headers import MOST_COMPONENTS, cost_problem, only_pixels
from lidit.images.pixels import ImageError, open_image, open_rgb, orientation

pytestmark = pytest.mark.unit
CODING = b"\xff\x52" + struct.pack(">H", 12) + bytes([0, 0, 0, 1, 1, 5, 4, 4, 0, 0])
REST = b"\xff\x5c\0\x13" + b"\x40" * 17 + b"\xff\x90\0\x0a" + bytes(7) + b"\1\xff\x93\xff\xd9"
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)


# -- PNG -----------------------------------------------------------------------------------------------------------------


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


# -- JPEG 2000 -----------------------------------------------------------------------------------------------------------


def size_marker(side, tile, components):
    content = struct.pack(">HIIIIIIIIH", 0, side, side, 0, 0, tile, tile, 0, 0, components) + b"\7\1\1" * components
    return b"\xff\x51" + struct.pack(">H", 2 + len(content)) + content


def box(kind, content):
    return struct.pack(">I", 8 + len(content)) + kind + content


def boxed(codestream, side, *before):
    """A JP2 that says three components; `before`: boxes between its header and the picture."""
    header = box(b"ihdr", struct.pack(">IIHBBBB", side, side, 3, 7, 7, 0, 0)) + box(b"colr", b"\1\0\0\0\0\0\x10")
    start = b"\0\0\0\x0cjP  \r\n\x87\n" + box(b"ftyp", b"jp2 \0\0\0\0jp2 ") + box(b"jp2h", header)
    return start + b"".join(before) + box(b"jp2c", codestream)


def saved(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000", **options)
    return buffer.getvalue()


def noise(height=600, width=900, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def with_precincts(codestream, size, marker=b"\xff\x52", layers=None):
    """The codestream with precincts of that size (log2 of height and width in four bits each) at all resolutions."""
    at = codestream.index(marker)
    length = int.from_bytes(codestream[at + 2 : at + 4], "big")
    content = bytearray(codestream[at + 4 : at + 2 + length])
    content[0] |= 1
    if layers is not None:
        content[2:4] = layers.to_bytes(2, "big")
    content += bytes([size] * (content[5] + 1))
    changed = marker + struct.pack(">H", 2 + len(content)) + content
    return codestream[:at] + changed + codestream[at + 2 + length :]


def test_a_file_of_tiles_of_one_pixel():
    """750 MB of tables for 130 bytes."""
    data = b"\xff\x4f" + size_marker(255, 1, 3) + CODING + REST
    with pytest.raises(ImageError, match="65,025 tiles for 255 x 255 pixels: more than it needs"):
        open_image(data)


def test_components_that_the_header_does_not_tell():
    """Tables of each tile and component: with 16,384 of these a terabyte."""
    data = boxed(b"\xff\x4f" + size_marker(100, 1, 200) + CODING + REST, 100, box(b"free", b"12345678"))
    with pytest.raises(ImageError, match="200 components: more than the 4 allowed"):
        open_image(data)
    decoy = box(b"free", b"\xff\x4f" + size_marker(100, 100, 3) + CODING)
    with pytest.raises(ImageError, match="200 components"):
        open_image(boxed(b"\xff\x4f" + size_marker(100, 1, 200) + CODING + REST, 100, decoy))


def test_precincts_of_one_pixel():
    """1,600 bytes of tables for each pixel."""
    plain = saved(np.zeros((1000, 1000, 3), np.uint8), no_jp2=True, num_resolutions=1)
    with pytest.raises(ImageError, match="2,000,000 blocks in 1 layers for 1000 x 1000 pixels: more than it needs"):
        open_image(with_precincts(plain, 0))
    assert open_image(with_precincts(plain, 0x66)).size == (1000, 1000)


def test_precincts_of_one_component_and_of_a_tile():
    plain = saved(np.zeros((1000, 1000, 3), np.uint8), no_jp2=True, num_resolutions=1)
    one = b"\xff\x53" + struct.pack(">H", 10) + bytes([1, 1, 0, 4, 4, 0, 0, 0])
    quantisation = plain.index(b"\xff\x5c")
    behind_tile = plain.index(b"\xff\x90") + 12
    for place in (quantisation, behind_tile):
        with pytest.raises(ImageError, match="blocks in 1 layers"):
            open_image(plain[:place] + one + plain[place:])


def test_layers_times_precincts():
    plain = saved(np.zeros((2000, 2000, 3), np.uint8), no_jp2=True)
    assert open_image(with_precincts(plain, 0x77, layers=50)).size == (2000, 2000)
    with pytest.raises(ImageError, match="in 65,535 layers"):
        open_image(with_precincts(plain, 0x77, layers=65_535))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_jp2": True},
        {"tile_size": (128, 128)},
        {"tile_size": (64, 64), "no_jp2": True},
        {"codeblock_size": (4, 4)},
        {"precinct_size": (64, 64), "progression": "RPCL"},
        {"precinct_size": (128, 128), "quality_layers": [80, 60, 40, 20, 10, 5, 2, 1]},
        {"irreversible": True, "quality_layers": [20]},
        {"num_resolutions": 1},
    ],
)
@pytest.mark.parametrize("channels", [3, MOST_COMPONENTS])
def test_files_as_programs_write_them(options, channels):
    data = saved(noise(channels=channels), **options)
    assert cost_problem(data, 900, 600) is None and cost_problem(memoryview(data), 900, 600) is None
    assert open_rgb(data).size == (900, 600)


def test_other_bytes_are_no_markers():
    assert cost_problem(os.urandom(8 << 20), 1000, 1000) is None
    markers = b"".join(b"\xff" + bytes([kind]) + os.urandom(60) for _ in range(50_000) for kind in (0x51, 0x52, 0x53))
    assert cost_problem(markers, 1000, 1000) is None
    for end in range(1, 60):
        assert cost_problem((b"\xff\x4f" + size_marker(255, 1, 3) + CODING)[-end:], 255, 255) is None


def test_a_picture_of_the_largest_size_may_have_usual_tiles_and_blocks():
    for tile in (64, 256, 10_000):
        assert cost_problem(size_marker(10_000, tile, 4) + CODING, 10_000, 10_000) is None
    assert cost_problem(with_precincts(CODING, 0x77, layers=20), 10_000, 10_000) is None

"""Images of every kind that the web holds -> upright RGB of a bucket's size, or a reason; never more memory than needed."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.ExifTags import Base

from lidit.images import pixels
from lidit.images.pixels import ImageError, bucket_pixels, open_image, open_rgb, to_bytes, to_unit_range, upright_size
from lidit.store.buckets import make_buckets

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[4]
BUCKETS = make_buckets(64, 16)
RED, GREEN, BLUE, WHITE = (220, 40, 40), (40, 200, 60), (40, 60, 230), (255, 255, 255)


def picture(height: int = 96, width: int = 160) -> Image.Image:
    """Red, green and blue quarters and a white one: which way is up can be told from it."""
    image = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, width // 2 - 1, height // 2 - 1), fill=RED)
    draw.rectangle((width // 2, 0, width, height // 2 - 1), fill=GREEN)
    draw.rectangle((0, height // 2, width // 2 - 1, height), fill=BLUE)
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def quarters(array: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quarters: top left, top right, bottom left, bottom right."""
    height, width, _ = array.shape
    rows, columns = (height // 4, 3 * height // 4), (width // 4, 3 * width // 4)
    return [tuple(array[row, column].tolist()) for row in rows for column in columns]


def assert_picture(array: np.ndarray, tolerance: int = 12) -> None:
    assert array.dtype == np.uint8
    assert np.abs(np.array(quarters(array)) - [RED, GREEN, BLUE, WHITE]).max() <= tolerance


LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG2000": {}, "AVIF": {"quality": 100}}


@pytest.mark.parametrize("kind", [*LOSSLESS, "JPEG", "GIF"])
def test_formats(kind):
    bucket, array = bucket_pixels(encoded(picture(), kind, **LOSSLESS.get(kind, {})), BUCKETS)
    assert bucket == (48, 80) and array.shape == (48, 80, 3)
    assert_picture(array)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (200, 130), (61, 407), (3000, 2000)])
def test_the_size_is_the_bucket_s(size):
    bucket, array = bucket_pixels(encoded(picture(*size), "PNG"), BUCKETS)
    assert array.shape == (*bucket, 3) and bucket in BUCKETS
    assert_picture(array)


def test_an_image_of_the_bucket_s_size_is_left_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    _, array = bucket_pixels(encoded(Image.fromarray(noise), "PNG"), BUCKETS)
    assert np.array_equal(array, noise)


def test_shrinking_is_antialiased():
    """A fine checkerboard becomes grey, not another pattern."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    _, array = bucket_pixels(encoded(Image.fromarray(board), "PNG"), BUCKETS)
    assert array.shape == (64, 64, 3) and abs(array.astype(float) - 127.5).max() < 3


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_exif_orientation_comes_out_upright(kind, turn):
    upright = picture()
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(turn, turn)  # the turn that `turn` makes good again
    lying = upright if turn == 1 else upright.transpose(pixels.UPRIGHT[undo])
    exif = Image.Exif()
    exif[Base.Orientation] = turn
    data = encoded(lying, kind, exif=exif)
    assert upright_size(open_image(data)) == (96, 160)
    bucket, array = bucket_pixels(data, BUCKETS)
    assert bucket == (48, 80)
    assert_picture(array)


@pytest.mark.parametrize("turn", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_none(turn):
    exif = Image.Exif()
    exif[Base.Orientation] = turn
    assert_picture(bucket_pixels(encoded(picture(), "JPEG", exif=exif), BUCKETS)[1])


def test_modes():
    """Grey, 1 bit, palette (also with a transparent colour), transparency, CMYK, YCbCr: all become the RGB they mean."""
    image = picture()
    assert_picture(bucket_pixels(encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), BUCKETS)[1])
    assert_picture(bucket_pixels(encoded(image.convert("CMYK"), "JPEG", quality=95), BUCKETS)[1], 20)
    assert_picture(bucket_pixels(encoded(image.convert("CMYK"), "TIFF"), BUCKETS)[1])
    grey = bucket_pixels(encoded(image.convert("L"), "PNG"), BUCKETS)[1]
    assert np.ptp(grey, axis=2).max() == 0 and quarters(grey)[3] == WHITE
    one_bit = bucket_pixels(encoded(image.convert("1"), "PNG"), BUCKETS)[1]
    assert quarters(one_bit)[3] == WHITE


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_lies_on_white(mode):
    clear = picture().convert("RGBA")
    alpha = Image.new("L", clear.size, 255)
    alpha.paste(0, (0, 0, 80, 48))  # the red quarter cannot be seen
    clear.putalpha(alpha)
    image = clear.convert(mode) if mode != "P" else clear.quantize(32)
    _, array = bucket_pixels(encoded(image, "PNG"), BUCKETS)
    assert quarters(array)[0] == WHITE


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits(kind):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    _, array = bucket_pixels(encoded(Image.fromarray(ramp), kind), BUCKETS)
    assert np.abs(array[:, :, 0].astype(float) - ramp / 257).max() <= 0.51
    assert array.min() == 0 and array.max() == 255


def test_sixteen_bits_of_colour():
    """Written by hand: Pillow cannot. It reads the upper bytes."""
    rows = np.zeros((64, 64, 3), ">u2")
    rows[:, :] = [value * 257 for value in RED]
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    data = png(64, 64, zlib.compress(lines), depth=16)
    assert quarters(bucket_pixels(data, BUCKETS)[1])[0] == RED


def test_values_beyond_sixteen_bits_and_floats_are_refused():
    wide = Image.fromarray(np.full((64, 64), 1 << 20, np.int32))
    with pytest.raises(ImageError, match="expected 16 bits at most"):
        bucket_pixels(encoded(wide, "TIFF"), BUCKETS)
    with pytest.raises(ImageError, match="floating-point"):
        bucket_pixels(encoded(Image.fromarray(np.ones((64, 64), np.float32)), "TIFF"), BUCKETS)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    others = [Image.new("RGB", (160, 96), colour) for colour in ((0, 0, 0), (9, 9, 9))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(), kind, save_all=True, append_images=others, **options)
    assert_picture(bucket_pixels(data, BUCKETS)[1])


def test_jpeg_of_several_pictures():
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (160, 96))])
    assert_picture(bucket_pixels(data, BUCKETS)[1])


# -- what is refused -------------------------------------------------------------------------------------------------


def png(height: int, width: int, body: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of these header values around a compressed body."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb(side: int = 30_000) -> bytes:
    """A whole, valid image of side x side pixels, 1 bit each, in a few hundred kilobytes."""
    packer = zlib.compressobj(9)
    line = bytes(1 + side // 8)
    return png(side, side, b"".join(packer.compress(line) for _ in range(side)) + packer.flush(), depth=1, colour=0)


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><circle r="20"/></svg>'
REFUSED = {
    "0 bytes": (b"", "0 bytes: expected an image file"),
    "SVG": (SVG, "not an image of a format known here"),
    "text": (b"<html>404 not found</html>", "not an image of a format known here"),
    "EPS": (encoded(picture(), "EPS"), "not an image of a format known here"),
    "PDF": (b"%PDF-1.7 " + bytes(100), "not an image of a format known here"),
    "1 x 1": (encoded(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 pixels.*64x64 would need it 64.00 times larger"),
    "small": (encoded(picture(40, 60), "PNG"), "40 x 60 pixels .height x width.*1.33 times larger.*1.25 allowed"),
    "cut JPEG": (encoded(picture(), "JPEG")[:-300], "damaged JPEG: OSError: "),
    "cut PNG": (encoded(picture(), "PNG")[:-60], "damaged PNG: "),
    "cut WEBP": (encoded(picture(), "WEBP")[:-60], "damaged WEBP|cannot be read|not an image"),
    "cut GIF": (encoded(picture(), "GIF")[:120], "damaged GIF|cannot be read"),
    "cut TIFF": (encoded(picture(), "TIFF")[:200], "damaged TIFF|cannot be read|not an image"),
    "cut in the header": (encoded(picture(), "JPEG")[:20], "cannot be read|not an image|damaged"),
    "body of garbage": (png(64, 64, b"garbage"), "damaged PNG: "),
    "body too short": (png(64, 64, zlib.compress(b"\0" * 100)), "damaged PNG: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what):
    data, message = REFUSED[what]
    with pytest.raises(ImageError, match=message):
        bucket_pixels(data, BUCKETS)


def test_every_cut_of_a_file_gives_pixels_or_a_reason():
    """Whatever Pillow raises, from whatever place, becomes an ImageError."""
    refused = 0
    for kind in (*LOSSLESS, "JPEG", "GIF"):
        data = encoded(picture(), kind)
        for stop in np.linspace(0, len(data) - 1, 40).astype(int).tolist():
            try:
                assert bucket_pixels(data[:stop], BUCKETS)[1].shape == (48, 80, 3)
            except ImageError:
                refused += 1
    assert refused > 250


def test_flipped_bytes_give_pixels_or_a_reason():
    draw = np.random.default_rng(0)
    for kind in (*LOSSLESS, "JPEG", "GIF"):
        data = np.frombuffer(encoded(picture(), kind), np.uint8)
        for _ in range(30):
            broken = data.copy()
            broken[draw.integers(len(data), size=3)] = draw.integers(256, size=3)
            try:
                bucket_pixels(broken.tobytes(), BUCKETS)
            except ImageError:
                continue


MEMORY = """
import resource, sys
from lidit.store.buckets import make_buckets
from lidit.images.pixels import ImageError, bucket_pixels
data, buckets = sys.stdin.buffer.read(), make_buckets(64, 16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    bucket_pixels(data, buckets)
    print("made pixels")
except ImageError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def run_alone(data: bytes) -> tuple[str, float]:
    """What a fresh process says of the image, and by how many MB its memory grew."""
    done = subprocess.run([sys.executable, "-c", MEMORY], input=data, capture_output=True, cwd=ROOT, check=True)
    said, kilobytes = done.stdout.decode().splitlines()
    return said, int(kilobytes) / 1e3


def test_a_bomb_is_refused_before_it_is_decoded():
    said, grown = run_alone(bomb())
    assert said.startswith("30000 x 30000 pixels: more than the 100,000,000 allowed") or "exceeds limit" in said
    assert grown < 8, "900 million pixels would have taken at least 100 MB"


def test_a_large_jpeg_is_decoded_small():
    said, grown = run_alone(encoded(Image.new("RGB", (9000, 9000), RED), "JPEG"))
    assert said == "made pixels"
    assert grown < 60, "81 million pixels in full would have taken 320 MB"


def test_the_limit_of_pixels_is_the_caller_s():
    data = encoded(picture(200, 300), "PNG")
    with pytest.raises(ImageError, match="300 x 200 pixels: more than the 59,999 allowed"):
        bucket_pixels(data, BUCKETS, max_pixels=59_999)
    bucket_pixels(data, BUCKETS, max_pixels=60_000)


def test_the_limit_of_upscaling():
    data = encoded(picture(40, 60), "PNG")
    assert bucket_pixels(data, BUCKETS, max_upscale=1.34)[1].shape == (48, 80, 3)
    with pytest.raises(ImageError):
        bucket_pixels(data, BUCKETS, max_upscale=1.33)


def test_draft_of_a_jpeg_changes_little():
    """Decoded at an eighth of its size or in full, the bucket's pixels are nearly the same."""
    draw = np.random.default_rng(0)
    smooth = Image.fromarray(draw.integers(0, 256, (12, 20, 3), np.uint8)).resize(
        (2000, 1200), Image.Resampling.BICUBIC
    )
    small = bucket_pixels(encoded(smooth, "JPEG", quality=95), BUCKETS)[1].astype(float)
    full = bucket_pixels(encoded(smooth, "PNG"), BUCKETS)[1].astype(float)
    assert np.abs(small - full).mean() < 1.0 and np.abs(small - full).max() < 12


# -- threads, tensors --------------------------------------------------------------------------------------------------


def test_many_threads_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(pixels, "LARGE_PIXELS", 10_000)  # so that some wait for each other
    files = [encoded(picture(60 + 7 * n, 200 - 5 * n), kind) for n in range(12) for kind in ("JPEG", "PNG")]
    alone = [bucket_pixels(data, BUCKETS) for data in files]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: bucket_pixels(memoryview(data), BUCKETS), files * 3))
    for (bucket, array), (other_bucket, other) in zip(alone * 3, together, strict=True):
        assert bucket == other_bucket and np.array_equal(array, other)


def test_unit_range_and_back():
    every = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(1, 16, 16, 3)
    unit = to_unit_range(every)
    assert unit.shape == (1, 3, 16, 16) and unit.dtype == torch.float32
    assert unit.min() == -1 and unit.max() == 1
    assert np.array_equal(to_bytes(unit), every.numpy())
    assert to_unit_range(every, torch.bfloat16).dtype == torch.bfloat16
    beyond = torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 3, 1, 1)
    assert to_bytes(beyond).reshape(-1).tolist() == [0, 128, 255]


def with_scans(data: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times."""
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    progressive = encoded(picture(), "JPEG", progressive=True)
    assert bucket_pixels(progressive, BUCKETS)[1].shape == bucket_pixels(with_scans(progressive, 20), BUCKETS)[1].shape
    with pytest.raises(ImageError, match=r"10\d scans of 160 x 96 pixels: more than the 100 allowed"):
        open_image(with_scans(progressive, 95))


def bmp_in_runs(width, height):
    """A BMP of one run and the ends of its lines."""
    lines = b"\1\0\0\0" * height + b"\0\1"
    about = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(lines), 0, 0, 256, 0)
    start = 14 + len(about) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(lines), 0, 0, start) + about + bytes(1024) + lines


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"qoif" + struct.pack(">IIBB", 10_000, 10_000, 3, 0) + b"\0" * 100, r"QOI \(qoi\)"),
        (b"P3 10000 10000 255\n0 0 0", r"PPM \(ppm_plain\)"),
        (b"P6 10000 10000 300\n0 0 0", r"PPM \(ppm\)"),
    ],
)
def test_large_pictures_that_are_unpacked_in_python_are_refused(data, kind):
    """Minutes each, with every other thread of the process waiting."""
    with pytest.raises(ImageError, match=f"10000 x 10000 pixels of {kind}: more than the 16,000,000 allowed"):
        open_image(data)
    assert open_image(b"P6 10000 10000 255\n0 0 0").size == (10_000, 10_000)


def test_a_large_bmp_in_runs_is_refused():
    """A kilobyte for 17 s."""
    assert open_rgb(bmp_in_runs(100, 80)).size == (100, 80)
    with pytest.raises(ImageError, match=r"100000000 x 1 pixels of BMP \(bmp_rle\): more than the 16,000,000 allowed"):
        open_image(bmp_in_runs(100_000_000, 1))
    plain = io.BytesIO()
    Image.new("L", (5000, 4000)).save(plain, "BMP")
    assert open_image(plain.getvalue()).size == (5000, 4000)


def test_a_large_jpeg_may_have_fewer_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    progressive = encoded(picture(), "JPEG", progressive=True)
    monkeypatch.setattr(pixels, "MAX_SCAN_PIXELS", 15 * 160 * 96)
    open_image(progressive)
    with pytest.raises(ImageError, match=r"scans of 160 x 96 pixels: .* 230,400 pixels in all"):
        open_image(with_scans(progressive, 20))


def tiled_tiff(side: int, tile: int) -> bytes:
    """A grey TIFF of one deflated tile, most of which lies outside the picture."""
    content = zlib.compress(bytes(tile * tile), 9)
    tags = [(256, side), (257, side), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile), (324, 134)]
    tags.append((325, len(content)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def test_a_tiff_of_huge_tiles_is_refused() -> None:
    assert bucket_pixels(tiled_tiff(48, 256), make_buckets(48, 16))[1].shape == (48, 48, 3)
    with pytest.raises(ImageError, match="tiles of 16,777,216 pixels for 48 x 48: more than it needs"):
        open_image(tiled_tiff(48, 4096))

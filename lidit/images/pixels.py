"""Encoded image bytes -> upright RGB pixels of a bucket's size: safe to call on whatever the web holds.

What is done to an image, in this order; all of it but the limits is part of what stored latents depend on (`RULES`):

- The header is read, by the formats in `FORMATS` alone and whatever the file is called; an image of more than
  `MAX_PIXELS` is refused before anything is decoded.
- A JPEG that is much larger than needed is decoded at a half, a quarter or an eighth of its size, as long as twice the
  bucket's size is left; of an animation the first frame is taken.
- 16-bit gray is brought to 8 bits, transparent parts become white, and every other mode is converted to RGB. Color
  profiles are not applied.
- The centered part of the bucket's aspect ratio is resized to the bucket's size, antialiased (Lanczos), and turned upright
  as its EXIF orientation says.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from lidit.images.headers import cost_problem, only_pixels
from lidit.runtime.watchdog import watched
from lidit.store.buckets import Bucket, bucket_name, center_box, nearest_bucket, upscale_needed

if TYPE_CHECKING:  # an ingest's actors look at images too, and need no torch: 200 MB and seconds each
    import torch
    from torch import Tensor

# Formats that are pictures of pixels; none of their decoders starts another program, as that of EPS does.
# A JPEG with several pictures (MPO) is a JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
OTHER_FILES = {
    b"%PDF": "PDF", b"%!PS": "PostScript", b"PK\x03\x04": "ZIP", b"\x1f\x8b": "gzip", b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL", b"8BPS": "Photoshop", b"\0\0\1\0": "an icon",
}  # fmt: skip
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")  # AVIF may be of the last two
HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None  # the extra `heif`
MAX_PIXELS = 100_000_000  # height times width that an image may have by its header
SCAN = re.compile(b"\xff\xda")  # a scan's begin in a JPEG; found at a third of the time that `bytes.count` takes
MAX_SCANS = 100  # scans that a JPEG may have; the usual progressive one has ten
MAX_SCAN_PIXELS = 2_000_000_000  # pixels times scans: each of them may cost a few bytes and goes over the whole picture
MAX_TILE_PIXELS = 4_194_304  # a TIFF's tile, or the picture itself where it is larger: a tile is decoded whole
MAX_SLOW_PIXELS = 16_000_000  # where Pillow unpacks in Python (QOI, a BMP in runs, some PPM): up to 3 us each
LARGE_PIXELS = 16_000_000  # decoded images above it are held in memory by one thread at a time
USUAL_MODES = ("L", "RGB", "RGBA", "P", "LA", "CMYK", "1", "YCbCr")  # `eight_bits` takes any values of these
DRAFT_MARGIN = 2  # a JPEG is decoded at no less than so many times the size needed
RULES = "upright, first frame, centre box, lanczos, white behind, jpeg draft 2x"
"""The treatment above in a few words, for fingerprints: change it whenever a pixel may come out differently."""

TILE_WIDTH, TILE_HEIGHT = 322, 323  # tags of TIFF

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what makes the image upright

large_images = threading.Lock()


class ImageError(ValueError):
    """An image that cannot be used; the message is a reason fit for a table."""


def open_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Bytes -> an image of which only the header has been read.

    Raises:
        ImageError: no image, of an unknown format, larger than `max_pixels`, or made to cost much more than its size.
    """
    if not len(data):
        raise ImageError("0 bytes: expected an image file")
    try:
        formats = (*FORMATS, "HEIF") if _is_heic(data) and _read_heif() else FORMATS
        image = Image.open(io.BytesIO(only_pixels(data)), formats=formats)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"not an image of a format known here ({', '.join(FORMATS)}){_named(bytes(data[:16]))}"
        ) from error
    except Exception as error:  # Pillow's size limit, and whatever a damaged header makes a format's reader raise
        raise ImageError(f"the header cannot be read: {type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels: more than the {max_pixels:,} allowed")
    if width < 1 or height < 1:
        raise ImageError(f"{width} x {height} pixels: expected at least one")
    _check_cost(image, data)
    return image


def _check_cost(image: Image.Image, data: bytes | memoryview) -> None:
    """Raises ImageError where decoding would take far more time or memory than a picture of that size does."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scans = len(SCAN.findall(data))  # within a scan every 0xff is followed by 0 or a restart
        if scans > MAX_SCANS or scans * pixels > MAX_SCAN_PIXELS:
            raise ImageError(
                f"{scans:,} scans of {image.width} x {image.height} pixels: more than the {MAX_SCANS} allowed, or than "
                f"{MAX_SCAN_PIXELS:,} pixels in all"
            )
    elif image.format == "JPEG2000" and (problem := cost_problem(data, image.width, image.height)):
        raise ImageError(problem)
    elif pixels > MAX_SLOW_PIXELS and (tiles := getattr(image, "tile", None)) and tiles[0][0] in Image.DECODERS:
        raise ImageError(
            f"{image.width} x {image.height} pixels of {image.format} ({tiles[0][0]}): more than the {MAX_SLOW_PIXELS:,} "
            f"allowed of a kind that is unpacked in Python"
        )
    elif image.format == "TIFF" and (tile := _tile_pixels(image)) > max(pixels, MAX_TILE_PIXELS):
        raise ImageError(f"tiles of {tile:,} pixels for {image.width} x {image.height}: more than it needs")


def _tile_pixels(image: Image.Image) -> int:
    """Pixels of a TIFF's largest tile; 0 where there are none."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    sides = [tags.get(number, 0) for number in (TILE_WIDTH, TILE_HEIGHT)]
    return sides[0] * sides[1] if all(isinstance(side, int) for side in sides) else MAX_PIXELS + 1


def _named(start: bytes) -> str:
    """Names the kind of a file that is no such image by its first bytes, which are not quoted: it may be anybody's file."""
    kind = next((name for sign, name in OTHER_FILES.items() if start.startswith(sign)), None)
    if _is_heic(start):
        kind = "HEIC, which the extra heif reads (pip install 'lidit[heif]')"
    return f": this is {kind}" if kind else ""


def _is_heic(data: bytes | memoryview) -> bool:
    return data[4:8] == b"ftyp" and bytes(data[8:12]) in HEIC_BRANDS


@functools.cache
def _read_heif() -> bool:
    """Registers Pillow's reader of HEIC, where it is installed; returns whether it is."""
    if HAS_HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return HAS_HEIF


def open_rgb(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Bytes -> a decoded RGB image, of the size and as it lies in the file.

    Raises:
        ImageError: no image, of an unknown format, larger than `max_pixels`, or damaged.
    """
    image = open_image(data, max_pixels)
    with image_errors(image):
        decode_image(image)
        return image.convert("RGB")


def decode_image(image: Image.Image) -> None:
    """Decodes the pixels. A process that has armed the watchdog ends where that hangs. Raises what the decoder raises."""
    with watched():
        image.load()


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none, no such one, or (TIFF) Pillow itself turns.

    Decodes nothing: a PNG's own `getexif` would decode the whole image to look for what may stand behind its pixels.
    """
    if image.format == "TIFF":
        return 1
    file = getattr(image, "fp", None)
    if image.format == "PNG" and "exif" not in image.info and isinstance(file, io.BytesIO):
        _find_exif(image, file.getbuffer())
    try:
        turn = Image.Image.getexif(image).get(Base.Orientation, 1)
    except Exception:  # whatever the reader of EXIF raises: a damaged note says nothing, and the pixels are whole
        return 1
    return turn if turn in UPRIGHT else 1


def _find_exif(image: Image.Image, data: memoryview) -> None:
    """Gives a PNG's EXIF chunk to the image, wherever it stands in the file."""
    position = 8  # behind the signature; a chunk is its length, its kind, its content and a checksum
    while position + 8 <= len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if kind == b"eXIf":
            image.info["exif"] = b"Exif\0\0" + bytes(data[position + 8 : position + 8 + length])
            return
        position += 12 + length


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation."""
    width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def bucket_pixels(
    data: bytes | memoryview, buckets: Sequence[Bucket], max_upscale: float = 1.25, max_pixels: int = MAX_PIXELS
) -> tuple[Bucket, np.ndarray]:
    """Bytes -> (nearest bucket, uint8 (height, width, 3) of exactly its size). May run in many threads at once.

    Args:
        data: the image file as it came.
        buckets: (height, width) of each, in pixels.
        max_upscale: how many times smaller than its bucket an image may be.
        max_pixels: of the header; more is refused before anything is decoded.

    Raises:
        ImageError: no image, damaged, too large, or too small for its bucket.
    """
    image = open_image(data, max_pixels)
    height, width = upright_size(image)
    bucket = nearest_bucket(height, width, buckets)
    if (factor := upscale_needed(height, width, bucket)) > max_upscale:
        raise ImageError(
            f"{height} x {width} pixels (height x width): bucket {bucket_name(bucket)} would need it {factor:.2f} times "
            f"larger, more than the {max_upscale:g} allowed"
        )
    return bucket, np.asarray(load(image, bucket, (image.width * factor, image.height * factor), crop=True))


def reduced_size(height: int, width: int, side: int) -> tuple[int, int]:
    """(height, width) of an image brought to a longer side of at most `side` pixels."""
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def reduced_image(data: bytes | memoryview, side: int) -> Image.Image:
    """The whole image, upright, as RGB, with a longer side of at most `side` pixels. May run in many threads at once.

    Raises:
        ImageError: no image, damaged, or too large to be decoded safely.
    """
    image = open_image(data)
    return load(image, reduced_size(*upright_size(image), side))


def load(
    image: Image.Image, size: tuple[int, int], draft_to: tuple[float, float] | None = None, crop: bool = False
) -> Image.Image:
    """Decodes an opened image -> upright RGB of `size`: the one way from a file to pixels that are used.

    Args:
        image: of `open_image`.
        size: (height, width) in pixels, upright.
        draft_to: (width, height), as the file lies, that a JPEG is decoded to at least, times `DRAFT_MARGIN`; default: `size`.
        crop: take the centered part that has the aspect ratio of `size`; else the whole image is stretched to it.

    Raises:
        ImageError: damaged.
    """
    turn = orientation(image)
    height, width = size if turn < 5 else size[::-1]
    with image_errors(image):
        needed_width, needed_height = draft_to or (width, height)
        image.draft(None, (round(needed_width * DRAFT_MARGIN), round(needed_height * DRAFT_MARGIN)))
        with large_images if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
            decode_image(image)
            flat = eight_bits(image)
            box = center_box(flat.height, flat.width, (height, width)) if crop else None
            pixels = flat.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0).convert("RGB")
        return pixels.transpose(UPRIGHT[turn]) if turn in UPRIGHT else pixels


@contextlib.contextmanager
def image_errors(image: Image.Image) -> Iterator[None]:
    """Turns whatever a damaged file makes its decoder raise into an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"damaged {image.format}: {type(error).__name__}: {str(error).strip()}") from error


def eight_bits(image: Image.Image) -> Image.Image:
    """Any mode -> L or RGB, 8 bits a channel; transparent parts lie on white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ImageError(f"{image.mode} values from {values.min()} to {values.max()}: expected 16 bits at most")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ImageError("floating-point values: expected 8 or 16 bits a channel")
    if image.has_transparency_data:
        colored = image.convert("RGBA")
        behind = Image.new("RGBA", colored.size, "white")
        return Image.alpha_composite(behind, colored).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raises ImageError where `eight_bits` cannot do with pixels of such a mode, or with these; asks no more than it must."""
    if image.mode in USUAL_MODES:
        return
    try:
        eight_bits(Image.new(image.mode, (1, 1)))  # nothing is decoded for it
    except ImageError:
        raise
    except ValueError as error:
        raise ImageError(f"{image.mode} pixels cannot be made RGB: {error}") from error
    if image.mode == "I" and getattr(image, "_im", None) is not None:
        eight_bits(image)


def to_unit_range(pixels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """uint8 (B, height, width, 3) -> (B, 3, height, width) in [-1, 1], on the same device; float32 unless `dtype` is given."""
    unit = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    return unit if dtype is None else unit.to(dtype)


def to_bytes(pixels: Tensor) -> np.ndarray:
    """pixels (B, 3, height, width), [-1, 1] where nothing overshoots -> uint8 (B, height, width, 3) to look at."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).cpu().numpy()

"""Small photos, and a zoo of odd and damaged images."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def photo() -> Callable[..., bytes]:
    """`photo(seed)`: a small JPEG that looks like nothing else; keywords: size, format, quality, noise, and Pillow's own."""
    import io

    import numpy as np
    from PIL import Image

    def make(
        seed: int, size: tuple[int, int] = (96, 64), format: str = "JPEG", noise: int = 8, **options: Any
    ) -> bytes:
        draw = np.random.default_rng(seed)
        coarse = Image.fromarray(draw.integers(0, 256, (6, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        values = np.asarray(coarse, np.int16) + draw.integers(-noise, noise + 1, (size[1], size[0], 3))
        made, out = Image.fromarray(values.clip(0, 255).astype(np.uint8)), io.BytesIO()
        made.save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture(scope="session")
def zoo(photo: Callable[..., bytes]) -> SimpleNamespace:
    """`good`: name -> bytes of unusual images that are whole; `bad`: name -> (bytes, a word of the reason to be given)."""
    import io
    import struct
    import zlib

    import numpy as np
    from PIL import Image

    def saved(image: Image.Image, format: str, **options: Any) -> bytes:
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    jpeg, png = photo(1), photo(2, format="PNG")
    rgb = Image.open(io.BytesIO(png)).convert("RGB")
    frames = [rgb, rgb.transpose(Image.Transpose.ROTATE_180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    good = {
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "grey16.png": saved(Image.fromarray(np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10), "PNG"),
        "palette.png": saved(rgb.convert("P"), "PNG", transparency=0),
        "alpha.png": saved(rgb.convert("RGBA"), "PNG"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "rotated.jpg": saved(rgb, "JPEG", exif=exif),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "one_pixel.png": saved(Image.new("RGB", (1, 1)), "PNG"),
        "png_named.jpg": png,
        "tiff.tif": saved(rgb, "TIFF"),
        "bmp.bmp": saved(rgb, "BMP"),
    }
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(3751)) for _ in range(30_000)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    bad = {
        "empty.jpg": (b"", "0 bytes"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated|cut short"),
        "cut.png": (png[: len(png) // 2], "truncated|cut short"),
        "header_only.jpg": (jpeg[:20], "cannot be read|not an image|truncated|cut short"),
        "bomb.png": (bomb, "900000000|30000 x 30000"),
        "drawing.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        "text.jpg": (b"this is no picture\n", "text, not an image"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        "random.jpg": (np.random.default_rng(3).bytes(500), "not an image"),
    }
    return SimpleNamespace(good=good, bad=bad)

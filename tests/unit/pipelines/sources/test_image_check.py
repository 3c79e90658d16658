"""Looking at images: what is let in, with which size, what is refused and why, and hashes that tell pictures apart."""

import io
import re
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from lidit.images.pixels import bucket_pixels
from pipelines.sources import image_check
from pipelines.sources.image_check import Unwanted, check_image, digest, has_end, perceptual_hash

pytestmark = pytest.mark.unit


def bits_apart(first, second):
    return (first ^ second).bit_count()


@pytest.mark.parametrize("decode", [True, False])
def test_odd_images_are_let_in_with_their_upright_size(zoo, decode):
    for name, data in zoo.good.items():
        look = check_image(data, decode=decode)
        with Image.open(io.BytesIO(data)) as image:
            assert (look.width, look.height) == ImageOps.exif_transpose(image).size, name
        assert look.phash is None


@pytest.mark.parametrize("decode", [True, False])
def test_bad_images_are_refused_with_a_reason(zoo, decode):
    for name, (data, reason) in zoo.bad.items():
        with pytest.raises(ValueError) as caught:
            check_image(data, decode=decode)
        assert re.search(reason, str(caught.value)), (name, str(caught.value))


def test_damage_inside_is_found_by_decoding_only(photo):
    whole = photo(1, format="PNG")
    data = bytearray(whole)
    data[len(data) // 2] ^= 0xFF
    check_image(bytes(data), decode=False)
    with pytest.raises(ValueError, match="damaged PNG"):
        check_image(bytes(data), decode=True)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_end_is_missing_at_any_cut(photo, format):
    whole = photo(4, format=format)
    assert has_end(whole, format) and has_end(whole + b"\0\0", format)
    assert not any(has_end(whole[:-cut], format) for cut in (4, 20, 100, len(whole) // 2))


def test_end_of_a_thumbnail_is_not_the_end(photo):
    """Cameras put a whole JPEG into the header of the JPEG."""
    thumbnail, out = photo(5, size=(32, 32)), io.BytesIO()
    exif = Image.Exif()
    exif[0x927C] = thumbnail
    Image.open(io.BytesIO(photo(6))).save(out, "JPEG", exif=exif)
    data = out.getvalue()
    assert thumbnail in data and has_end(data, "JPEG") and not has_end(data[:-30], "JPEG")


def test_bomb_is_refused_before_it_is_decoded(zoo):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="900000000"):
            check_image(zoo.bad["bomb.png"][0], with_phash=True)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_unwanted_sizes_are_not_decoded(zoo, name):
    asked = []
    with pytest.raises(Unwanted, match="min_side"):  # decoding it would have raised another error
        check_image(zoo.bad[name][0], size_filter=lambda height, width: asked.append((height, width)) or "min_side")
    assert asked == [(64, 96)], "it is asked once"
    with pytest.raises(ValueError, match="damaged"):
        check_image(zoo.bad[name][0], size_filter=lambda height, width: None)


@pytest.mark.parametrize("decode", [True, False])
def test_png_may_be_turned_too(decode):
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 8
    Image.new("RGB", (30, 20)).save(out, "PNG", exif=exif)
    data = out.getvalue()
    assert (check_image(data, decode).height, check_image(data, decode).width) == (30, 20)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[stop:-12] + data[start:stop] + data[-12:]  # behind the pixels, as the format allows
    assert check_image(moved, decode).height == 30


def test_digest():
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223"


def test_hash_is_imagehash_s_own(photo):
    import imagehash

    image = Image.open(io.BytesIO(photo(7, size=(100, 80), format="PNG")))
    assert f"{perceptual_hash(image):016x}" == str(imagehash.phash(image))


def test_hashes_of_the_same_picture_are_near_and_of_others_far(data):
    """Real photos: recompressed, resized, turned by EXIF, as PNG; against each other."""
    hashes = {}
    for path in sorted((data / "coco-mini-cc" / "images").iterdir())[:20]:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = 6
        variants = {
            "jpeg 60": dict(format="JPEG", quality=60),
            "png": dict(format="PNG", compress_level=1),
            "half": dict(format="WEBP", quality=80),
            "turned": dict(format="JPEG", quality=90, exif=exif),
        }
        hashes[path.name] = original = check_image(path.read_bytes(), with_phash=True).phash
        for name, options in variants.items():
            made = image.resize((image.width // 2, image.height // 2)) if name == "half" else image
            made = made.transpose(Image.Transpose.ROTATE_90) if name == "turned" else made
            made.save(out := io.BytesIO(), **options)
            assert bits_apart(original, check_image(out.getvalue(), with_phash=True).phash) <= 4, (path.name, name)
    values = list(hashes.values())
    apart = [bits_apart(a, b) for number, a in enumerate(values) for b in values[:number]]
    assert min(apart) > 11 and 28 < np.mean(apart) < 36


def test_every_mode_can_be_hashed(zoo):
    hashes = {name: check_image(data, with_phash=True).phash for name, data in zoo.good.items()}
    assert all(0 <= value < 1 << 64 for value in hashes.values())
    same = [hashes[name] for name in ("alpha.png", "animated.gif", "animated.webp", "png_named.jpg", "progressive.jpg")]
    assert all(bits_apart(same[0], value) <= 4 for value in same), "the same picture in other clothes"


def test_large_images_are_reduced_first(monkeypatch, photo):
    """The hash of a large image is made from a small one: same picture, near hash."""
    data = photo(8, size=(1500, 1000), format="PNG")
    before = check_image(data, with_phash=True).phash
    monkeypatch.setattr(image_check, "REDUCED", 100_000)
    assert bits_apart(before, check_image(data, with_phash=True).phash) <= 2


def tiff(values, **options):
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF", **options)
    return out.getvalue()


@pytest.mark.parametrize("decode", [True, False])
def test_pixels_that_latents_cannot_use_are_refused(decode):
    ramp = np.linspace(0, 1, 96 * 64, dtype=np.float32).reshape(64, 96)
    for options in ({}, {"compression": "tiff_deflate"}):
        with pytest.raises(ValueError, match="floating-point values"):
            check_image(tiff(ramp, **options), decode=decode)


def test_values_of_more_than_16_bits_are_refused_where_they_are_seen():
    check_image(tiff(np.full((64, 64), 40_000, np.int32)))
    with pytest.raises(ValueError, match="expected 16 bits at most"):
        check_image(tiff(np.full((64, 64), 400_000, np.int32)))
    with pytest.raises(ValueError, match="expected 16 bits at most"):
        check_image(tiff(np.full((64, 64), -5, np.int32)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("note", [b"garbage", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\xff\xff\xff", b""])
def test_pictures_with_a_damaged_exif_are_whole(kind, note):
    Image.new("RGB", (30, 20)).save(out := io.BytesIO(), kind, exif=b"Exif\0\0" + note)
    look = check_image(out.getvalue())
    assert (look.height, look.width) == (20, 30)
    assert bucket_pixels(out.getvalue(), [(20, 30)])[1].shape == (20, 30, 3)


@pytest.mark.parametrize("kind", [b"pHYs", b"gAMA", b"cHRM", b"sRGB"])
def test_pngs_with_notes_of_a_wrong_size_are_whole(kind):
    Image.new("RGB", (30, 20)).save(out := io.BytesIO(), "PNG")
    data = out.getvalue()
    for note in (b"", b"\0" * 3, b"\0" * 64):
        chunk = len(note).to_bytes(4, "big") + kind + note + zlib.crc32(kind + note).to_bytes(4, "big")
        assert check_image(data[:33] + chunk + data[33:]).width == 30

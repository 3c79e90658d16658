"""Chunks of a PNG that are no pixels, left out before it is decoded: texts of any length, profiles, and damaged notes.

Pillow refuses a picture for a text of more than 1 MB (image tools keep their whole workflow there), and for a wrong
checksum of a chunk that no decoder needs. It knows the format, `lidit.images.pixels` what is done to pictures.
"""

from __future__ import annotations

import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNNEEDED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # colour profiles are not applied
HARMLESS = 1000  # bytes of them in all that cannot unpack to more than Pillow takes: it is not worth a copy then
SIZES = {b"pHYs": 9, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1}  # of notes that no pixel depends on, as the format has them
LARGEST_CHECKED = 1 << 20  # of an ancillary chunk, whose checksum is looked at


def only_pixels(data: bytes | memoryview) -> bytes | memoryview:
    """A PNG without the chunks that stand in the way of its pixels; other data, and most PNGs, as they are."""
    view = memoryview(data)
    if bytes(view[:8]) != SIGNATURE:
        return data
    kept, begin, position, unneeded, damaged = [], 0, 8, 0, False
    while position + 12 <= len(view):
        length, kind = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        stop = position + 12 + length
        if stop > len(view) or kind == b"IEND":
            break
        is_text = kind in UNNEEDED
        is_damaged = _is_damaged(view[position + 4 : stop], kind)
        if is_text or is_damaged:
            kept.append(view[begin:position])
            begin = stop
            unneeded += length * is_text
            damaged = damaged or is_damaged
        position = stop
    return b"".join([*kept, view[begin:]]) if damaged or unneeded > HARMLESS else data


def _is_damaged(chunk: memoryview, kind: bytes) -> bool:
    """Whether a chunk that a decoder may leave out (its kind begins with a small letter) has a wrong checksum or size."""
    if kind in SIZES and len(chunk) != 8 + SIZES[kind]:
        return True
    if not kind[:1].islower() or len(chunk) > LARGEST_CHECKED:
        return False
    return zlib.crc32(chunk[:-4]) != int.from_bytes(chunk[-4:], "big")

"""Limits what the header of an image file may cost its decoder, before anything is decoded.

PNG: Pillow refuses a picture for a text of more than 1 MB (image tools keep their whole workflow there), and for a wrong
checksum of a chunk that no decoder needs. `only_pixels` leaves out such chunks: texts of any length, profiles, damaged notes.

JPEG 2000: a decoder keeps tables for every tile, precinct and code-block, however little is in them, before it reads the first
bit of the picture: a few bytes may ask for a thousand times the picture. The markers that decide how many there are stand
before the picture or before any tile, and behind whatever a file has in front of them; so `cost_problem` counts all that look
like such a marker, wherever they stand. Other bytes hardly ever do: a dozen lengths and ranges must be right.
"""

from __future__ import annotations

import re
import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNNEEDED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # color profiles are not applied
HARMLESS = 1000  # bytes of them in all that cannot unpack to more than Pillow takes: it is not worth a copy then
SIZES = {b"pHYs": 9, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1}  # bytes of notes that no pixel depends on
LARGEST_CHECKED = 1 << 20  # bytes of an ancillary chunk; the checksum of a larger one is not looked at

MOST_COMPONENTS = 4  # components that a picture may have
LEAST_TILE = 2048  # pixels of a tile, on the average
FEW_TILES = 4096  # tiles that any picture may have
MOST_BLOCKS = 4_000_000  # precincts and code-blocks; the tables of one have some hundred bytes
MOST_PACKETS = 256_000_000  # layers times precincts: two bytes each
SIZE = re.compile(b"\xff\x51")  # SIZ: of picture and tiles, components
CODING = re.compile(b"\xff[\x52\x53]\0")  # COD, COC: code-blocks, precincts, layers, of all components or of one
WHOLE = 15  # log2 of a precinct's sides, where there are none


def only_pixels(data: bytes | memoryview) -> bytes | memoryview:
    """Leaves out the chunks of a PNG that stand in the way of its pixels; returns other data, and most PNGs, as they are."""
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
    """Tells whether a chunk that a decoder may leave out (its kind begins in lower case) has a wrong checksum or size."""
    if kind in SIZES and len(chunk) != 8 + SIZES[kind]:
        return True
    if not kind[:1].islower() or len(chunk) > LARGEST_CHECKED:
        return False
    return zlib.crc32(chunk[:-4]) != int.from_bytes(chunk[-4:], "big")


def cost_problem(data: bytes | memoryview, width: int, height: int) -> str | None:
    """Says why a JPEG 2000 asks for much more memory than a picture of that size needs; None where it does not."""
    pixels = width * height
    for match in SIZE.finditer(data):
        size = _tiles(data, match.start())
        if size is None:
            continue
        tiles, components = size
        if components > MOST_COMPONENTS:
            return f"{components:,} components: more than the {MOST_COMPONENTS} allowed"
        if tiles > max(FEW_TILES, pixels // LEAST_TILE):
            return f"{tiles:,} tiles for {width} x {height} pixels: more than it needs"
    layers, blocks, precincts = 1, 0, 0
    for match in CODING.finditer(data):
        coding = _coding(data, match.start())
        if coding is None:
            continue
        more, of_blocks, of_precincts = _pieces(coding, width, height)
        layers, blocks, precincts = max(layers, more), max(blocks, of_blocks), max(precincts, of_precincts)
    if blocks * MOST_COMPONENTS > MOST_BLOCKS or layers * precincts * MOST_COMPONENTS > MOST_PACKETS:
        return f"{blocks:,} blocks in {layers:,} layers for {width} x {height} pixels: more than it needs"
    return None


def _tiles(data: bytes | memoryview, at: int) -> tuple[int, int] | None:
    """Reads (tiles, components) from the SIZ marker at an offset; None where no decoder would take it for one."""
    if at + 40 > len(data):
        return None
    length, _, right, bottom, left, top, wide, high, first_x, first_y, components = struct.unpack_from(
        ">HHIIIIIIIIH", data, at + 2
    )
    if length != 38 + 3 * components or at + 2 + length > len(data) or not (wide and high):
        return None
    each = bytes(data[at + 40 : at + 2 + length])
    if not components or any(depth & 0x7F > 37 for depth in each[::3]) or 0 in each[1::3] or 0 in each[2::3]:
        return None
    if right <= left or bottom <= top or first_x > left or first_y > top:
        return None
    return -(-(right - first_x) // wide) * -(-(bottom - first_y) // high), components


def _coding(data: bytes | memoryview, at: int) -> tuple[int, int, int, list[int]] | None:
    """(layers, log2 of a code-block's width and height, precincts by resolution) of a COD or COC marker, or None."""
    length = data[at + 3] if at + 3 < len(data) else 0
    body = bytes(data[at + 4 : at + 2 + length])
    skipped = 5 if data[at + 1] == 0x52 else 2  # COD: style, order, layers, transform; COC: component, style
    if len(body) < skipped + 5 or len(body) != length - 2:
        return None
    levels, wide, high, style, transform, *precincts = body[skipped:]
    has_precincts = body[0 if skipped == 5 else 1] & 1
    if (
        len(precincts) != (levels + 1) * has_precincts
        or levels > 32
        or max(wide, high) > 8
        or style > 127
        or transform > 1
    ):
        return None
    layers = int.from_bytes(body[2:4], "big") if skipped == 5 else 1
    return layers, wide + 2, high + 2, precincts or [WHOLE | WHOLE << 4] * (levels + 1)


def _pieces(coding: tuple[int, int, int, list[int]], width: int, height: int) -> tuple[int, int, int]:
    """(layers, precincts and code-blocks, most precincts of a resolution times resolutions) of a component."""
    layers, block_wide, block_high, sizes = coding
    blocks = most = 0
    for resolution, size in enumerate(sizes):
        less = len(sizes) - 1 - resolution
        wide, high = -(-width >> less) or 1, -(-height >> less) or 1
        precinct_wide, precinct_high, halved = size & 15, size >> 4, int(resolution > 0)
        precincts = -(-wide >> precinct_wide) * -(-high >> precinct_high)
        inner_wide = min(block_wide, max(0, precinct_wide - halved))
        inner_high = min(block_high, max(0, precinct_high - halved))
        blocks += precincts + -(-wide >> inner_wide) * -(-high >> inner_high)
        most = max(most, precincts)
    return layers, blocks, most * len(sizes)

"""Aspect buckets: images of one bucket have one size, and all buckets have about the same number of pixels.

A bucket is (height, width) in pixels. In tables it is the string `HEIGHTxWIDTH`. Everything here is a pure function.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

Bucket = tuple[int, int]  # (height, width), pixels
Box = tuple[float, float, float, float]  # (left, top, right, bottom), pixels, fractions allowed


@functools.cache
def make_buckets(resolution: int, step: int, max_aspect: float = 2.0) -> tuple[Bucket, ...]:
    """Resolution -> buckets from the widest to the tallest, the square one in the middle.

    For every height up to the resolution that is a multiple of `step`, the widest width such that the bucket has at most
    `resolution`^2 pixels; and all of these turned by a quarter. So no batch is ever larger than a square one.

    Args:
        resolution: side of the square bucket, pixels.
        step: all sides are multiples of it; the autoencoder's downscale times the patch size at least.
        max_aspect: longer side over shorter side, at most.

    Raises:
        ValueError: the resolution is no multiple of the step, or the aspect is below 1.
    """
    if step < 1 or resolution < step or resolution % step:
        raise ValueError(f"buckets: expected a resolution that is a multiple of step {step}, received {resolution}")
    if not max_aspect >= 1:
        raise ValueError(f"buckets: expected max_aspect of at least 1, received {max_aspect}")
    wide = []
    for height in range(step, resolution + 1, step):
        width = resolution**2 // height // step * step
        if width <= max_aspect * height:
            wide.append((height, width))
    return (*wide, *((width, height) for height, width in reversed(wide) if height != width))


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest in its logarithm; of two equally near ones the first in the list.

    Compared are ratios of whole numbers, correctly rounded: no logarithm whose last digit depends on the machine.
    """

    def distance(bucket: Bucket) -> float:
        mine, theirs = height * bucket[1], width * bucket[0]
        return max(mine, theirs) / min(mine, theirs)

    return min(buckets, key=distance)


def center_box(height: int, width: int, bucket: Bucket) -> Box:
    """The largest centered part of an image that has the bucket's aspect ratio: what is scaled to the bucket's size."""
    scale = min(height / bucket[0], width / bucket[1])
    box_height, box_width = min(height, bucket[0] * scale), min(width, bucket[1] * scale)
    left, top = (width - box_width) / 2, (height - box_height) / 2
    return (left, top, left + box_width, top + box_height)


def upscale_needed(height: int, width: int, bucket: Bucket) -> float:
    """Returns how many times larger an image must become to fill the bucket; below 1 it shrinks."""
    return max(bucket[0] / height, bucket[1] / width)


def bucket_name(bucket: Bucket) -> str:
    """(48, 80) -> `48x80`: height, then width, as tables keep it."""
    return f"{bucket[0]}x{bucket[1]}"


def parse_bucket(name: str) -> Bucket:
    """`48x80` -> (48, 80).

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", name)
    if match is None:
        raise ValueError(f"bucket: expected HEIGHTxWIDTH in pixels, such as 256x192, received {name!r}")
    return int(match[1]), int(match[2])

"""Buckets as a pure function: sizes, areas, symmetry; which bucket an image falls into, and which part of it is kept."""

import math
import random

import pytest

from lidit.store.buckets import bucket_name, center_box, make_buckets, nearest_bucket, parse_bucket, upscale_needed

pytestmark = pytest.mark.unit

SETTINGS = [
    (64, 16, 2.0),
    (256, 16, 2.0),
    (256, 64, 2.0),
    (512, 64, 3.0),
    (1024, 64, 4.0),
    (1024, 8, 2.0),
    (96, 32, 1.5),
]


def test_the_demo_and_a_usual_set():
    assert make_buckets(64, 16) == ((48, 80), (64, 64), (80, 48))
    assert make_buckets(256, 32) == ((192, 320), (224, 288), (256, 256), (288, 224), (320, 192))


@pytest.mark.parametrize(("resolution", "step", "max_aspect"), SETTINGS)
def test_every_set(resolution, step, max_aspect):
    buckets = make_buckets(resolution, step, max_aspect)
    assert len(set(buckets)) == len(buckets)
    assert buckets[len(buckets) // 2] == (resolution, resolution), "the square one is in the middle"
    assert [(width, height) for height, width in reversed(buckets)] == list(buckets), (
        "turned by a quarter it is the same"
    )
    assert sorted(buckets, key=lambda bucket: bucket[0] / bucket[1]) == list(buckets)
    for height, width in buckets:
        assert height % step == width % step == 0
        assert height * width <= resolution**2
        assert (min(height, width) * (max(height, width) + step)) > resolution**2, "a wider one would fit as well"
        assert max(height, width) <= max_aspect * min(height, width)


def test_aspect_of_one_leaves_the_square():
    assert make_buckets(256, 16, 1.0) == ((256, 256),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((250, 16), "multiple of step 16, received 250"),
        ((0, 16), "received 0"),
        ((64, 0), "multiple of step 0"),
        ((8, 16), "received 8"),
        ((64, 16, 0.5), "max_aspect of at least 1, received 0.5"),
        ((64, 16, math.nan), "received nan"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_buckets(*arguments)


def test_nearest_is_nearest_in_the_logarithm_of_the_aspect():
    buckets = make_buckets(256, 16)
    draw = random.Random(0)
    for _ in range(500):
        height, width = draw.randint(1, 5000), draw.randint(1, 5000)
        chosen = nearest_bucket(height, width, buckets)
        aspect = math.log(height / width)
        best = min(abs(aspect - math.log(h / w)) for h, w in buckets)
        assert abs(aspect - math.log(chosen[0] / chosen[1])) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("scale", [1, 3, 7, 1000])
def test_ties_go_to_the_first(scale):
    """An image whose aspect lies exactly between two buckets: at any size the same one, the first in the list."""
    buckets = ((2, 8), (4, 4), (8, 2))  # aspects 1/4, 1, 4: 1/2 lies between the first two, 2 between the others
    assert nearest_bucket(1 * scale, 2 * scale, buckets) == (2, 8)
    assert nearest_bucket(2 * scale, 1 * scale, buckets) == (4, 4)
    assert nearest_bucket(2 * scale, 1 * scale, buckets[::-1]) == (8, 2)


def test_every_bucket_is_its_own_nearest():
    buckets = make_buckets(1024, 64, 4.0)
    assert all(nearest_bucket(height * 3, width * 3, buckets) == (height, width) for height, width in buckets)


@pytest.mark.parametrize("size", [(480, 640), (427, 640), (1, 1), (1, 5000), (333, 17), (256, 256), (3000, 4001)])
@pytest.mark.parametrize("bucket", [(256, 256), (192, 336), (336, 192)])
def test_center_box(size, bucket):
    height, width = size
    left, top, right, bottom = center_box(height, width, bucket)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (bottom - top) / (right - left) == pytest.approx(bucket[0] / bucket[1])
    assert left == pytest.approx(width - right) and top == pytest.approx(height - bottom), "it is in the middle"
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height), "no larger one fits"
    assert upscale_needed(height, width, bucket) == pytest.approx(bucket[0] / (bottom - top))


def test_names():
    assert bucket_name((48, 80)) == "48x80" and parse_bucket("48x80") == (48, 80)
    for wrong in ("48 x 80", "48", "x80", "048x80", "48x80x3", "-48x80", "4٨x80", ""):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_bucket(wrong)

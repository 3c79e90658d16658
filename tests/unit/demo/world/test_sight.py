"""The scorer's eyes: what is rendered is what is seen."""

import numpy as np
import pytest
from PIL import Image

from demo.world.prompts import plain_scene
from demo.world.scenes import render
from demo.world.sight import UNKNOWN, look, look_at
from demo.world.world import SIZES, image_size, make_scene

pytestmark = pytest.mark.unit

HELD_OUT = range(1_000_000, 1_000_040)
MOST_WRONG = 0.02


def looks(things):
    return sorted((thing.colour, thing.shape, thing.size) for thing in things)


@pytest.mark.parametrize(
    "scene_of, size_of",
    [(plain_scene, lambda seed: (48, 48)), (make_scene, lambda seed: (64, 64)), (make_scene, image_size)],
    ids=["the weights' world", "all textures", "all aspects"],
)
def test_error_on_rendered_scenes_is_under_two_percent(scene_of, size_of):
    wrong = 0
    for seed in HELD_OUT:
        scene = scene_of(seed)
        height, width = size_of(seed)
        view = look_at(render(scene, height, width))
        wrong += looks(view.objects) != looks(scene.objects) or view.background != scene.background
    assert wrong <= MOST_WRONG * len(HELD_OUT)


def test_places_and_boxes_are_those_of_the_scene():
    for seed in HELD_OUT[:10]:
        scene = plain_scene(seed)
        seen = look_at(render(scene, 64, 64)).objects
        for item in scene.objects:
            nearest = min(seen, key=lambda one: np.hypot(one.x - item.x, one.y - item.y))
            assert np.hypot(nearest.x - item.x, nearest.y - item.y) < 0.03
            assert max(nearest.height, nearest.width) == pytest.approx(SIZES[item.size], abs=0.06)


def test_an_empty_picture_has_no_objects_and_noise_is_no_object():
    blank = np.full((48, 48, 3), 250, np.uint8)
    assert look(blank).objects == () and look(blank).background == "white"
    noisy = np.clip(blank.astype(int) + np.random.default_rng(0).integers(-12, 1, blank.shape), 0, 255).astype(np.uint8)
    assert look(noisy).objects == ()


def test_what_is_no_shape_of_the_world_is_unknown():
    pixels = np.full((64, 64, 3), 250, np.uint8)
    pixels[30:34, 8:56] = (222, 38, 38)  # a long bar
    (seen,) = look(pixels).objects
    assert seen.shape == UNKNOWN and seen.colour == "red"


def test_any_picture_can_be_looked_at():
    draw = np.random.default_rng(0)
    for _ in range(40):
        coarse = draw.integers(0, 256, (4, 6, 3), np.uint8)
        soft = Image.fromarray(coarse).resize((24, 16), Image.Resampling.BICUBIC)
        for seen in look_at(soft).objects:
            assert 0 <= seen.x <= 1 and 0 <= seen.y <= 1 and seen.height > 0 and seen.width > 0


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="at least 16 x 16"):
        look(np.zeros((8, 64, 3), np.uint8))

"""The closed world: scenes repeat from their seed, and pixels, captions and ground truth agree."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from demo.world.captions import NUMBERS, SYNONYMS, plural
from demo.world.scenes import describe, example, image_size, make_scene, noisy_caption, render, truth
from demo.world.world import BACKGROUNDS, CLEAR, COLOURS, SHAPES, SIZES, TEXTURES, all_relations, stated_relations

pytestmark = pytest.mark.unit

SEEDS = range(300)
CANVASES = [(64, 64), (48, 80), (80, 48), (37, 121), (128, 96)]


def test_same_seed_same_bytes():
    for seed in (0, 1, 99, 2**40):
        first, second = example(seed, 64, 64), example(seed, 64, 64)
        assert first == second
    assert example(0, 64, 64)["image_bytes"] != example(1, 64, 64)["image_bytes"]


def test_example_holds_what_it_says():
    for seed in range(40):
        height, width = image_size(seed)
        sample = example(seed, height, width)
        assert set(sample) == {"image_bytes", "height", "width", "caption_original", "truth"}
        image = Image.open(io.BytesIO(sample["image_bytes"]))
        assert image.format == "PNG" and image.mode == "RGB" and image.size == (width, height)
        assert json.loads(sample["truth"])["background"] in BACKGROUNDS


@pytest.mark.parametrize(("height", "width"), CANVASES)
def test_colour_at_every_centre_is_the_truth(height, width):
    for seed in range(60):
        scene = make_scene(seed)
        pixels = np.asarray(render(scene, height, width)).astype(int)
        assert pixels.shape == (height, width, 3)
        for item in truth(scene, height, width)["objects"]:
            left, top, right, bottom = item["box"]
            centre = pixels[int((top + bottom) / 2 * height), int((left + right) / 2 * width)]
            nearest = min(COLOURS, key=lambda name: np.abs(centre - COLOURS[name]).sum())
            assert nearest == item["colour"], f"scene {seed}: {centre} is not {item['colour']}"


def test_outside_every_box_is_background():
    for seed in range(100):
        scene = make_scene(seed)
        pixels = np.asarray(render(scene, 64, 64)).astype(int)
        outside = np.ones((64, 64), dtype=bool)
        for left, top, right, bottom in (item["box"] for item in truth(scene, 64, 64)["objects"]):
            outside[int(top * 64) - 1 : int(bottom * 64) + 2, int(left * 64) - 1 : int(right * 64) + 2] = False
        assert (pixels[outside] == BACKGROUNDS[scene.background]).all()


@pytest.mark.parametrize(("height", "width"), CANVASES)
def test_objects_lie_inside_and_apart(height, width):
    for seed in SEEDS:
        boxes = [item.box(height, width) for item in make_scene(seed).objects]
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            for other in boxes[:index]:
                assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


def test_textures_and_shapes_can_be_told_apart():
    """Equal objects but for one attribute differ in many pixels even at the smallest size."""
    from demo.world.world import Scene, SceneObject

    def drawn(shape, texture):
        item = SceneObject("red", shape, "small", texture, 0.5, 0.5)
        return np.asarray(render(Scene((item,), "white", 0), 64, 64)).astype(int)

    images = [drawn(shape, texture) for shape in SHAPES for texture in TEXTURES]
    for index, image in enumerate(images):
        for other in images[:index]:
            assert (np.abs(image - other).sum(axis=2) > 60).sum() >= 10


def test_relations_are_true_of_the_centres():
    axis = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
    seen = set()
    for seed in SEEDS:
        scene = make_scene(seed)
        for relation in all_relations(scene):
            for direction in relation.directions:
                name, sign = axis[direction]
                for subject in scene.groups[relation.subject].objects:
                    for other in scene.groups[relation.other].objects:
                        assert sign * (getattr(other, name) - getattr(subject, name)) > CLEAR
                seen.add(direction)
    assert seen == set(axis)


def test_the_world_is_used_whole():
    scenes = [make_scene(seed) for seed in SEEDS]
    objects = [item for scene in scenes for item in scene.objects]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.size for item in objects} == set(SIZES)
    assert {item.texture for item in objects} == set(TEXTURES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


def test_dense_caption_names_everything():
    wordings = set()
    for seed in SEEDS:
        scene = make_scene(seed)
        caption = describe(scene, seed)
        wordings.add(caption.split()[0])
        assert scene.background in caption
        for group in scene.groups:
            name = f"{group.colour} {plural(group.shape, group.count)}"
            assert name in caption
            assert any(word in caption for word in SYNONYMS[group.size])
            assert any(word in caption for word in SYNONYMS[group.texture])
            assert group.count == 1 or NUMBERS[group.count] in caption.lower()
        for relation in stated_relations(scene):
            ways = [word for way in (relation, relation.inverse()) for word in SYNONYMS[way.directions[0]]]
            assert any(way in caption for way in ways)
    assert len(wordings) >= 6


def test_caption_wording_follows_its_seed_or_generator():
    scene = make_scene(3)
    assert describe(scene, 1) == describe(scene, 1)
    assert len({describe(scene, seed) for seed in range(20)}) > 10
    assert describe(scene, np.random.default_rng(5)) == describe(scene, np.random.default_rng(5))


def test_original_captions_are_as_poor_as_in_the_wild():
    texts = [noisy_caption(make_scene(seed), 0) for seed in range(2000)]
    present = [text for text in texts if text is not None]
    missing = 1 - len(present) / len(texts)
    worthless = sum(text.startswith(("IMG_", "DSC_", "scan_", "https://")) or "clipart" in text for text in present)
    assert 0.07 < missing < 0.13
    assert 0.05 < worthless / len(texts) < 0.11
    assert np.mean([len(text) for text in present]) < 0.6 * np.mean([len(describe(make_scene(s), 0)) for s in SEEDS])
    assert noisy_caption(make_scene(4), 9) == noisy_caption(make_scene(4), 9)


def test_image_sizes_are_mixed_multiples_of_16():
    sizes = {image_size(seed) for seed in range(50)}
    assert sizes == {(64, 64), (48, 80), (80, 48)}
    assert all(side % 16 == 0 for seed in range(50) for side in image_size(seed, base=256))


def test_too_small_a_canvas_is_refused():
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 8 x 64"):
        render(make_scene(0), 8, 64)

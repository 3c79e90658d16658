"""Swaps: true of their scene, false with one fact exchanged, and training prompts that hold the same forms."""

from collections import Counter

import numpy as np
import pytest

from demo.ablation.cell_worlds import WORLDS
from demo.world.captions import be, plural
from demo.world.prompts import is_held_out, plain_scene
from demo.world.swaps import KINDS, Swap, colours_after, colours_before, swaps, training_prompt
from demo.world.world import COLOURS

ALL = swaps(12)


def of(kind: str) -> list[Swap]:
    return [swap for swap in ALL if swap.kind == kind]


def test_every_kind_has_as_many_and_the_same_every_time():
    assert Counter(swap.kind for swap in ALL) == dict.fromkeys(KINDS, 12)
    assert swaps(12) == ALL and all(swap.right != swap.wrong for swap in ALL)


def test_right_prompts_name_the_scene():
    for swap in ALL:
        groups = plain_scene(swap.seed).groups
        assert all(group.colour in swap.right and group.shape in swap.right for group in groups)


@pytest.mark.parametrize("kind", ["binding", "binding_after"])
def test_binding_exchanges_colours_and_no_other_word(kind: str):
    for swap in of(kind):
        words = [
            sorted(word.replace("an", "a") if word == "an" else word for word in text.split())
            for text in (swap.right, swap.wrong)
        ]
        assert words[0] == words[1]
        assert [word for word in swap.right.split() if word in COLOURS] != [
            w for w in swap.wrong.split() if w in COLOURS
        ]


@pytest.mark.parametrize("kind", ["relation", "relation_after"])
def test_relations_differ_in_their_direction_alone(kind: str):
    for swap in of(kind):
        pairs = [(a, b) for a, b in zip(swap.right.split(), swap.wrong.split(), strict=True) if a != b]
        assert pairs[0] in {("above", "below"), ("below", "above"), ("left", "right"), ("right", "left")}
        assert len(pairs) == 1


def test_in_after_kinds_the_colour_follows_its_noun():
    for swap in of("binding_after"):
        for group in plain_scene(swap.seed).groups:
            assert f"{plural(group.shape, group.count)} {be(group)} {group.colour}" in swap.right


def test_a_quarter_changes_the_colour_of_its_object():
    for quarter in range(4):
        for swap in of(f"quarter_{quarter + 1}"):
            colours = [[word for word in text.split() if word in COLOURS] for text in (swap.right, swap.wrong)]
            assert [a != b for a, b in zip(*colours, strict=True)] == [place == quarter for place in range(4)]
            assert colours[1][quarter] not in colours[0]


def test_training_prompts_hold_the_forms_of_the_exam():
    scenes = [plain_scene(seed) for seed in range(400)]
    texts = [training_prompt(scene, np.random.default_rng(scene.seed)) for scene in scenes]
    after = [text for text in texts if text.startswith("the ")]
    assert 0.1 < len(after) / len(texts) < 0.35
    assert sum(", the " in text for text in texts) > 10
    two = next(scene for scene in scenes if len(scene.groups) == 2)
    assert colours_before(two.groups) != colours_after(two.groups)


def test_worlds_give_scenes_that_fit_and_what_can_be_asked_of_them():
    pairs = WORLDS["pairs"]
    seeds = pairs.seeds(range(2000), 40)
    scenes = [plain_scene(seed) for seed in seeds]
    assert all(len(scene.objects) == 2 == len(scene.groups) and not is_held_out(scene) for scene in scenes)
    asked = swaps(4, pairs.kinds, pairs.fits)
    assert Counter(swap.kind for swap in asked) == dict.fromkeys(pairs.kinds, 4)
    assert all(pairs.fits(plain_scene(swap.seed)) for swap in asked)
    assert WORLDS["plain"].seeds(range(100), 5, held_out_pairs=True) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="expected 1,000 scenes, found"):
        pairs.seeds(range(2000), 1000)

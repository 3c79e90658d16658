"""The judge of captions: understands every wording of the demo, and finds every kind of mistake."""

from __future__ import annotations

import pytest

from demo.world.caption_check import check_caption, read_caption, true_relations
from demo.world.captions import canonical_caption, describe
from demo.world.scenes import truth
from demo.world.world import Scene, SceneObject, make_scene

pytestmark = pytest.mark.unit

SCENE = Scene(
    (
        SceneObject("red", "circle", "small", "striped", 0.2, 0.2),
        SceneObject("red", "circle", "small", "striped", 0.8, 0.2),
        SceneObject("blue", "star", "large", "solid", 0.5, 0.75),
    ),
    "white",
    seed=0,
)
TRUTH = truth(SCENE)
RIGHT = (
    "Two small striped red circles and one large solid blue star on a white background. "
    "The red circles are above the blue star."
)


def test_canonical_wording() -> None:
    assert canonical_caption(SCENE) == RIGHT


def test_every_wording_of_every_scene_is_read_as_meant() -> None:
    for seed in range(400):
        scene = make_scene(seed)
        facts = truth(scene)
        for caption in (canonical_caption(scene), describe(scene, 0)):
            verdict = check_caption(caption, facts)
            assert verdict.looks and verdict.background and read_caption(caption).relations <= true_relations(facts), (
                caption
            )
        assert check_caption(canonical_caption(scene), facts).right


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("red circles and", "pink circles and", {"objects", "looks"}),
        ("red circles and", "red squares and", {"objects", "looks"}),
        ("Two small", "Three small", {"objects", "looks"}),
        ("blue star on", "blue star and one small solid pink cross on", {"objects", "looks"}),
        (" and one large solid blue star", "", {"objects", "looks"}),
        ("small", "medium", {"looks"}),
        ("striped", "dotted", {"looks"}),
        ("small ", "", {"looks"}),
        ("above", "below", {"relations"}),
        ("above", "above and left of", {"relations"}),
        ("The red circles are above the blue star.", "", {"relations"}),
        ("the blue star", "the pink star", {"relations"}),
        ("white", "black", {"background"}),
        (" on a white background", "", {"background"}),
    ],
)
def test_every_mistake_is_found(old: str, new: str, wrong: set[str]) -> None:
    assert old in RIGHT and check_caption(RIGHT, TRUTH).right
    verdict = check_caption(RIGHT.replace(old, new), TRUTH)
    assert {name for name in ("objects", "looks", "relations", "background") if not getattr(verdict, name)} == wrong
    assert not verdict.right


def test_relations_may_be_told_from_either_side() -> None:
    told = RIGHT.replace("The red circles are above the blue star", "The blue star sits beneath the red circles")
    assert check_caption(told, TRUTH).right


def test_what_is_no_description_says_nothing() -> None:
    for text in ("", "Sorry, I cannot.", "red circle, blue star, vector, clipart", "A dog in a park."):
        verdict = check_caption(text, TRUTH)
        assert not (verdict.objects or verdict.relations or verdict.background)


def test_words_that_contain_a_word_of_the_world() -> None:
    assert read_caption("a featured circlet, one reddish circle, an infrared star").groups == ()

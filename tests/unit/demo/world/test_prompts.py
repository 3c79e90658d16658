"""Short prompts say what is true of their scene, and the exam asks for what training never showed."""

import itertools
import json

import numpy as np
import pytest

from demo.world.judge import judge
from demo.world.prompts import TASKS, bias_prompts, exam_prompts, is_held_out, plain_scene, scene_prompt
from demo.world.scenes import render
from demo.world.weights_table import LONGEST, example, tokens, write
from demo.world.world import COLOURS, SHAPES

pytestmark = pytest.mark.unit


def test_the_exam_has_all_tasks_and_no_prompt_twice():
    records = exam_prompts(12)
    assert [len([one for one in records if one["tag"] == task]) for task in TASKS] == [6, 12, 12, 12, 12, 12]
    assert len({one["prompt"] for one in records}) == len(records)
    assert json.loads(json.dumps(records)) == records


def test_a_rendered_answer_passes_the_exam():
    for seed in range(1_000_000, 1_000_010):
        scene = plain_scene(seed)
        pixels = np.asarray(render(scene, 48, 48))
        include = [{"class": group.shape, "count": group.count, "color": group.colour} for group in scene.groups]
        assert judge(pixels, {"include": include}).strict
        other = next(colour for colour in COLOURS if colour not in {group.colour for group in scene.groups})
        assert not judge(pixels, {"include": [{**include[0], "color": other}]}).correct


def test_pairs_of_the_colour_exam_are_held_out_of_training():
    pairs = {
        frozenset((entry["color"], entry["class"]) for entry in record["include"])
        for record in exam_prompts(40)
        if record["tag"] == "color_attr"
    }
    training = (scene for scene in map(plain_scene, range(1000)) if not is_held_out(scene))
    for scene in training:
        names = [(group.colour, group.shape) for group in scene.groups]
        assert not {frozenset(pair) for pair in itertools.combinations(names, 2)} & pairs
    assert len(pairs) >= 30  # "A and B" and "B and A" are two prompts of one pair


def test_held_out_scenes_are_few():
    share = np.mean([is_held_out(plain_scene(seed)) for seed in range(1000)])
    assert 0.05 < share < 0.25


def test_prompts_name_every_shape_of_their_scene():
    for seed in range(200):
        scene = plain_scene(seed)
        prompt = scene_prompt(scene, np.random.default_rng(seed))
        assert {shape for shape in SHAPES if shape in prompt} == {group.shape for group in scene.groups}


def test_bias_prompts_have_an_object_in_every_quarter():
    for record in bias_prompts(5):
        assert [entry["count"] for entry in record["include"]] == [1, 1, 1, 1]
        places = [record["prompt"].index(f"{entry['color']} {entry['class']}") for entry in record["include"]]
        assert places == sorted(places)


def test_the_table_is_the_same_every_time(tmp_path):
    write(5, tmp_path / "one.parquet")
    write(5, tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert example(0)["image"].startswith(b"\x89PNG")


def test_prompts_of_the_table_are_short_and_of_every_form():
    prompts = [example(seed)["caption"] for seed in range(300)]
    lengths = [tokens(prompt) for prompt in prompts]
    assert max(lengths) == LONGEST and min(lengths) < 4
    assert sum(word in prompt for prompt in prompts for word in (" left ", " right ", " above ", " below ")) > 20
    assert any("background" in prompt for prompt in prompts) and any("large" in prompt for prompt in prompts)

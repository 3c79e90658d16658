"""From prompts to a benchmark's folder to scores, as a user runs it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from demo import report
from demo.world.prompts import exam_prompts
from tests.support.stores import World

pytestmark = pytest.mark.integration

PROMPTS = 2  # of each of the six tasks
FLAGS = ("--sampler.num_inference_steps", 2, "--sampler.guidance_scale", 2, "--rows-per-fragment", 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llms: Any, scene_weights: Any) -> Any:
    """A world with pictures of the exam, laid out and scored."""
    world = World(tmp_path_factory.mktemp("generate"), llms)
    world.exam = world.folder / "exam.jsonl"
    world.exam.write_text("".join(json.dumps(record) + "\n" for record in exam_prompts(PROMPTS)))
    world.out = world.folder / "geneval"
    world.flags = ("--weights", scene_weights, "--prompts", world.exam, "--store", world.store, *FLAGS)
    flags = ("--layout", "geneval", "--images-per-prompt", 2, "--out", world.out)
    world.summary = world.run("generate", *world.flags, *flags).summary
    world.scores = world.run("score", "--store", world.store).summary
    return world


def test_every_image_is_there_once(made: Any) -> None:
    count = 6 * PROMPTS * 2
    assert made.summary["ok"] and made.summary["counts"]["images"] == made.summary["counts"]["files"] == count
    rows = made.rows().values()
    assert len(rows) == count and all(row["image"].startswith(b"\x89PNG") for row in rows)
    assert {(row["prompt_index"], row["seed"]) for row in rows} == {(n, k) for n in range(6 * PROMPTS) for k in (0, 1)}
    assert len(made.table.get_fragments()) == -(-count // 5)


def test_the_folder_is_the_table(made: Any) -> None:
    by_place = {(row["prompt_index"], row["sample_index"]): row for row in made.rows().values()}
    for index, record in enumerate(exam_prompts(PROMPTS)):
        folder = made.out / f"{index:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        for number in (0, 1):
            data = (folder / "samples" / f"{number:05d}.png").read_bytes()
            assert data == by_place[index, number]["image"]


def test_scores_have_intervals_and_their_columns(made: Any) -> None:
    figures = made.scores["scores"]["scenes"]
    assert {"overall", "counting", "color_attr (strict)"} <= figures.keys()
    assert all(0 <= one["low"] <= one["value"] <= one["high"] <= 1 for one in figures.values())
    assert figures["overall"]["images"] == 6 * PROMPTS * 2
    assert json.loads((made.store / "scores.json").read_text())["scenes"] == figures
    assert all(row["scenes_seen"] is not None and row["score_error"] is None for row in made.rows().values())


def test_the_same_command_makes_nothing_and_other_settings_are_refused(made: Any) -> None:
    again = made.run("generate", *made.flags, "--layout", "geneval", "--images-per-prompt", 2, "--out", made.out)
    assert again.summary["ok"] and again.summary["rows"] == 0
    refused = made.run("generate", *made.flags[:-4], "--sampler.num_inference_steps", 3, expect=2)
    assert "num_inference_steps" in refused.stderr and "--overwrite" in refused.stderr


def test_the_page_shows_pictures_marks_and_scores(made: Any) -> None:
    pictures = report.drawn(str(made.store))
    assert {one.task for one in pictures} == {record["tag"] for record in exam_prompts(PROMPTS)}
    assert all(one.correct is not None for one in pictures)
    page = report.render(str(made.store), str(made.folder / "no run"), [str(made.store)], ["lidit <generate>"])
    assert page.count('class="drawn"') == len(pictures) and "lidit &lt;generate&gt;" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")

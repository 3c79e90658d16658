"""The public benchmarks' whole prompt sets, drawn by the demo's weights and laid out as their scorers read them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FLAGS = ("--sampler.num_inference_steps", 2, "--sampler.guidance_scale", 1)  # the files are what is looked at


def draw(world: Any, layout: str, prompts: Path) -> Path:
    """The benchmark's folder."""
    out = world.folder / layout
    flags = ("--weights", ROOT / "demo" / "weights", "--prompts", prompts, "--layout", layout, "--out", out)
    made = world.run("generate", *flags, "--store", world.folder / f"{layout}-store", *FLAGS)
    assert made.summary["ok"] and made.summary["errors"] == 0
    return out


def is_picture(path: Path) -> bool:
    """Whether it is a whole image of the weights' size."""
    with Image.open(path) as image:
        return image.convert("RGB").size == (48, 48)


def test_geneval(world: Any, data: Path) -> None:
    source = data / "geneval" / "evaluation_metadata.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    out = draw(world, "geneval", source)
    assert sorted(path.name for path in out.iterdir()) == [f"{index:05d}" for index in range(553)]
    for index, record in enumerate(records):
        folder = out / f"{index:05d}"
        assert {path.name for path in folder.iterdir()} == {"metadata.jsonl", "samples"}
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        pictures = sorted((folder / "samples").iterdir())
        assert [path.name for path in pictures] == [f"{number:05d}.png" for number in range(4)]
        assert all(map(is_picture, pictures))


def test_t2i_compbench_colours(world: Any, data: Path) -> None:
    source = data / "t2i-compbench" / "dataset" / "color_val.txt"
    texts = source.read_text().splitlines()
    out = draw(world, "t2i-compbench", source)
    assert [path.name for path in out.iterdir()] == ["samples"]
    pictures = list((out / "samples").iterdir())
    assert len(texts) == 300 and len(pictures) == 3000 and all(map(is_picture, pictures))
    prompts = Counter(path.name.partition("_")[0] for path in pictures)  # as the scorer takes names apart
    assert prompts == Counter({text: 10 * count for text, count in Counter(texts).items()})
    numbers = {int(path.stem.rpartition("_")[2]): path.name.partition("_")[0] for path in pictures}
    assert numbers == {number: texts[number // 10] for number in range(3000)}

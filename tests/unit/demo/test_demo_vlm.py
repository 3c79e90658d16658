"""The committed demo VLM is what its card says: loads as any user loads it, describes scenes, declines the rest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from demo.models.vlm_card import vlm_card
from demo.models.vlm_exam import caption_images
from demo.models.vlm_examples import ASPECTS, IGNORED, patch_labels, prompt_ids, vlm_batch
from demo.models.vlm_model import GRID, IMAGE_SIDE, REFUSAL
from demo.world.caption_check import check_caption
from demo.world.clutter import KINDS, clutter
from demo.world.language import HELD_OUT_SEEDS, TRAIN_SEEDS
from demo.world.scenes import image_size, render, truth
from demo.world.world import make_scene
from pipelines.captioning.gate import REFUSAL as REFUSED
from pipelines.captioning.gate import GateConfig, judge
from pipelines.captioning.request import INSTRUCTION, prompt_text

pytestmark = pytest.mark.unit
FOLDER = Path(__file__).parents[3] / "demo" / "vlm"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)


def test_files_and_card_belong_together(record: dict) -> None:
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6_000_000
    assert (FOLDER / "README.md").read_text() == vlm_card(record)
    assert not list(FOLDER.glob("*.bin")) and not list(FOLDER.glob("*.py"))


def test_figures_reach_the_target(record: dict) -> None:
    figures = record["figures"]
    assert record["exam_scenes"] == 200
    assert figures["objects"] >= 0.9 and figures["relations"] >= 0.8 and figures["relations_of_several"] >= 0.8


def test_it_is_transformers_own_class(model, record: dict) -> None:
    assert type(model) is LlavaForConditionalGeneration
    assert sum(parameter.numel() for parameter in model.parameters()) == record["parameters"]
    stored = AutoModelForImageTextToText.from_pretrained(FOLDER)
    assert all(parameter.dtype == torch.bfloat16 for parameter in stored.parameters())


def test_it_describes_held_out_scenes(model, processor) -> None:
    scenes = [make_scene(seed) for seed in HELD_OUT_SEEDS[:40]]
    sizes = [image_size(scene.seed) for scene in scenes]
    captions = caption_images(model, processor, [render(scene, *size) for scene, size in zip(scenes, sizes)])
    verdicts = [check_caption(caption, truth(scene, *size)) for caption, scene, size in zip(captions, scenes, sizes)]
    assert sum(verdict.objects for verdict in verdicts) >= 34
    assert sum(verdict.relations for verdict in verdicts) >= 34


def test_it_declines_other_pictures(model, processor) -> None:
    rng = np.random.default_rng(123)
    said = caption_images(model, processor, [clutter(rng, 64, 64) for _ in range(20)])
    assert sum(text == REFUSAL for text in said) >= 18
    assert judge(REFUSAL, False, GateConfig()) == REFUSED


def test_training_and_use_see_the_same_tokens_and_pixels(processor) -> None:
    scene = make_scene(5)
    picture = render(scene, *image_size(5))
    for hint in (None, "two red circles"):
        prompt = prompt_text(INSTRUCTION, hint)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt_ids(processor, prompt)
        assert tuple(inputs["pixel_values"].shape) == (1, 3, IMAGE_SIDE, IMAGE_SIDE)
        assert inputs["pixel_values"].min() >= -1 and inputs["pixel_values"].max() <= 1


def test_batches_are_functions_of_seed_and_step(processor) -> None:
    first, again, other = (vlm_batch(processor, 4, 0, step) for step in (7, 7, 8))
    for name in ("pixels", "labels", "tokens", "targets"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.pixels, other.pixels)
    said = first.targets != IGNORED
    assert torch.equal(first.targets[said], first.tokens[said])
    ends = [row[row != IGNORED][-1].item() for row in first.targets]
    assert set(ends) == {processor.tokenizer.eos_token_id}


def test_every_object_is_seen_by_some_patch_and_labels_are_true() -> None:
    for seed in range(200):
        scene, size = make_scene(seed), image_size(seed)
        labels, centres = patch_labels(scene, *size)
        for item in scene.objects:
            shown = np.flatnonzero((centres == np.float32([item.x, item.y])).all(1))
            assert len(shown), (seed, item)
            patch = min(
                shown, key=lambda p: abs((p % GRID + 0.5) / GRID - item.x) + abs((p // GRID + 0.5) / GRID - item.y)
            )
            told = {name: ASPECTS[name][labels[patch, column]] for column, name in enumerate(ASPECTS)}
            assert (told["colour"], told["shape"], told["size"], told["texture"], told["background"]) == (
                item.colour, item.shape, item.size, item.texture, scene.background,
            )  # fmt: skip
        bare = labels[:, 1] == 0
        assert np.isnan(centres[bare]).all() and (labels[bare][:, 2:] == IGNORED).all()


def test_clutter_is_varied_and_repeats_from_its_seed() -> None:
    pictures = [clutter(np.random.default_rng(seed), 48, 80) for seed in range(60)]
    assert all(picture.mode == "RGB" and picture.size == (80, 48) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) > 50 and len(KINDS) == 6
    assert pictures[3].tobytes() == clutter(np.random.default_rng(3), 48, 80).tobytes()


def test_held_out_scenes_are_never_trained_on() -> None:
    assert set(TRAIN_SEEDS).isdisjoint(HELD_OUT_SEEDS[:200])

"""Scenes to training batches of the demo's VLM: pixels, tokens, and what each patch of the image shows.

A batch is a pure function of (seed, step): a run that resumes at a step sees what an unbroken run sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor

from demo.models.vlm_model import GRID, REFUSAL
from demo.world.captions import canonical_caption, noisy_caption
from demo.world.clutter import clutter
from demo.world.language import TRAIN_SEEDS, draw_scene
from demo.world.scenes import image_size, render
from demo.world.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene
from pipelines.captioning.request import INSTRUCTION, conversation, prompt_text

CLUTTER_SHARE = 0.06
"""Of the images: pictures that are no scenes, to be declined."""

HINT_SHARE = 0.12
"""Of the steps: those whose prompts carry the text that came with the image."""

IGNORED = -100  # a label that says nothing
REACH = 0.02  # how far, in canvas units, a patch's center may lie outside a box and still show its object
ASPECTS: dict[str, list[str]] = {
    "background": list(BACKGROUNDS),
    "colour": ["none", *COLOURS],
    "shape": list(SHAPES),
    "size": list(SIZES),
    "texture": list(TEXTURES),
    "count": ["1", "2", "3", "4"],
}
"""What is asked of a patch: all of them of a patch that shows an object, the first two of every patch of a scene."""


@dataclass(frozen=True)
class VlmBatch:
    """B images and their captions in L tokens, S patches each.

    `pixels` (B, 3, height, width) float in [-1, 1]; `labels` (B, S, aspects) int64, IGNORED where there is nothing to say;
    `centers` (B, S, 2) float, the object's center in canvas units, NaN without one; `tokens` (B, L) int64;
    `targets` (B, L) int64, the tokens of the caption, IGNORED elsewhere.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    centers: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor


def vlm_batch(processor: LlavaProcessor, size: int, seed: int, step: int) -> VlmBatch:
    """The batch of one training step."""
    rng = np.random.default_rng([seed, 8, step])
    with_hints = rng.random() < HINT_SHARE
    images, rows, labels, centers = [], [], [], []
    for _ in range(size):
        scene = draw_scene(rng, TRAIN_SEEDS)
        height, width = image_size(scene.seed)
        hint = noisy_caption(scene, 0) if with_hints else None
        is_scene = rng.random() >= CLUTTER_SHARE
        images.append(render(scene, height, width) if is_scene else clutter(rng, height, width))
        rows.append((prompt_text(INSTRUCTION, hint), canonical_caption(scene) if is_scene else REFUSAL))
        shown, where = patch_labels(scene, height, width) if is_scene else nothing_shown()
        labels.append(shown)
        centers.append(where)
    tokens, targets = token_rows(processor, rows)
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return VlmBatch(pixels, torch.from_numpy(np.stack(labels)), torch.from_numpy(np.stack(centers)), tokens, targets)


def patch_labels(scene: Scene, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What each patch shows, (S, aspects) int64, and the center of its object, (S, 2) float32 (NaN for none)."""
    labels, centers = nothing_shown()
    labels[:, 0] = ASPECTS["background"].index(scene.background)
    across = np.tile((np.arange(GRID) + 0.5) / GRID, GRID)  # (S,) centers of the patches, row by row
    down = np.repeat((np.arange(GRID) + 0.5) / GRID, GRID)
    for group in scene.groups:
        look = [
            ASPECTS["colour"].index(group.colour),
            ASPECTS["shape"].index(group.shape),
            ASPECTS["size"].index(group.size),
            ASPECTS["texture"].index(group.texture),
            group.count - 1,
        ]
        for item in group.objects:
            left, top, right, bottom = item.box(height, width)
            inside = (across > left - REACH) & (across < right + REACH) & (down > top - REACH) & (down < bottom + REACH)
            labels[inside, 1:] = look
            centers[inside] = (item.x, item.y)
    return labels, centers


def nothing_shown() -> tuple[np.ndarray, np.ndarray]:
    """Labels and centers of a picture without objects and without a known background."""
    labels = np.full((GRID * GRID, len(ASPECTS)), IGNORED, np.int64)
    labels[:, 1] = 0  # colour: none
    return labels, np.full((GRID * GRID, 2), np.nan, np.float32)


def token_rows(processor: LlavaProcessor, rows: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt, caption) pairs -> tokens (B, L), padded on the right, and targets (B, L)."""
    tokenizer = processor.tokenizer
    asked = {prompt: prompt_ids(processor, prompt) for prompt in dict.fromkeys(prompt for prompt, _ in rows)}
    answers = tokenizer([caption for _, caption in rows], add_special_tokens=False)["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
    longest = max(len(asked[prompt]) + len(answer) for (prompt, _), answer in zip(rows, answers))
    tokens = np.full((len(rows), longest), tokenizer.pad_token_id, np.int64)
    targets = np.full((len(rows), longest), IGNORED, np.int64)
    for row, ((prompt, _), answer) in enumerate(zip(rows, answers)):
        before = asked[prompt]
        tokens[row, : len(before) + len(answer)] = [*before, *answer]
        targets[row, len(before) : len(before) + len(answer)] = answer
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def prompt_ids(processor: LlavaProcessor, prompt: str) -> list[int]:
    """Tokens of all that stands before the answer, with a place for every patch."""
    text = processor.apply_chat_template(conversation(prompt), tokenize=False, add_generation_prompt=True)
    text = text.replace(processor.image_token, processor.image_token * GRID * GRID)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def scene_image(scene: Scene) -> Image.Image:
    """The scene as a table of scenes holds it."""
    return render(scene, *image_size(scene.seed))

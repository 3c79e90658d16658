"""How well a saved VLM describes scenes that it never saw: greedy captions, read by a parser, against the truth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo.models.vlm_model import REFUSAL
from demo.world.caption_check import check_caption
from demo.world.clutter import clutter
from demo.world.language import HELD_OUT_SEEDS
from demo.world.scenes import image_size, render, truth
from demo.world.world import make_scene
from pipelines.captioning.request import INSTRUCTION, conversation, prompt_text

GENERATION_BATCH = 25


def examine(folder: Path, scenes: int) -> dict[str, Any]:
    """Load a saved VLM as a user would, and return its figures, shares from 0 to 1.

    `objects`, `looks`, `relations`, `background` as `Verdict` has them, over `scenes` held-out scenes;
    `relations_of_several`: over those with a true relation only; `declined`: pictures that are no scenes, refused as such,
    of a fifth as many; `mistaken`: captions not wholly right, up to five of them. The weights are those on disk (bfloat16),
    computed with in float32.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = [make_scene(seed) for seed in HELD_OUT_SEEDS[:scenes]]
    sizes = [image_size(scene.seed) for scene in held_out]
    captions = caption_images(model, processor, [render(scene, *size) for scene, size in zip(held_out, sizes)])
    truths = [truth(scene, *size) for scene, size in zip(held_out, sizes)]
    verdicts = [check_caption(caption, told) for caption, told in zip(captions, truths)]
    shares = {name: float(np.mean([asdict(verdict)[name] for verdict in verdicts])) for name in asdict(verdicts[0])}
    several = [verdict.relations for verdict, told in zip(verdicts, truths) if told["relations"]]
    rng = np.random.default_rng([HELD_OUT_SEEDS[0], 9])
    others = caption_images(model, processor, [clutter(rng, 64, 64) for _ in range(max(1, scenes // 5))])
    wrong = [
        {"seed": scene.seed, "caption": caption}
        for scene, caption, verdict in zip(held_out, captions, verdicts)
        if not verdict.right
    ]
    return {
        **shares,
        "relations_of_several": float(np.mean(several or [True])),
        "several": len(several),
        "right": 1 - len(wrong) / scenes,
        "declined": float(np.mean([caption == REFUSAL for caption in others])),
        "mistaken": wrong[:5],
    }


@torch.inference_mode()
def caption_images(model: Any, processor: Any, images: list[Image.Image]) -> list[str]:
    """What the model says of each image, decoded greedily."""
    said = []
    text = processor.apply_chat_template(conversation(prompt_text(INSTRUCTION)), add_generation_prompt=True)
    for start in range(0, len(images), GENERATION_BATCH):
        batch = images[start : start + GENERATION_BATCH]
        inputs = processor(images=batch, text=[text] * len(batch), return_tensors="pt", padding=True)
        outputs = model.generate(**inputs, do_sample=False)
        said += processor.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said

"""The metric `clip_score`: 100 times the cosine between CLIP's features of image and prompt, not below 0 (arXiv 2104.08718).

Any CLIP that transformers loads, from a folder or the hub; scores of different CLIPs cannot be compared. Prompts longer than
its text model reads are cut there, as everywhere that this score is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lidit.frozen.loading import load_model, load_processor
from lidit.frozen.truncation import beginnings
from lidit.runtime.model_files import (
    config_digest,
    processor_digest,
    resolve_model,
    split_revision,
    tokenizer_digest,
    weights_digest,
)
from lidit.store import columns
from pipelines.evaluation.intervals import estimate
from pipelines.evaluation.metric import Metric

SCORE = "clip_score"


class ClipScore(Metric):
    """Scores images against their prompts. `config.clip` is the model."""

    name = "clip_score"
    reads = columns.PROMPT
    fields = {SCORE: pa.float32()}

    def __init__(self, config: Any, device: str):
        from transformers import CLIPModel

        folder = clip_folder(config)
        self.model = load_model(CLIPModel, folder, dtype=torch.float32).eval().to(device)
        self.processor = load_processor(folder)
        self.batch_size = config.batch_size
        self.max_tokens = self.model.config.text_config.max_position_embeddings

    @classmethod
    def fingerprint(cls, config: Any) -> dict[str, Any]:
        """Digests of the CLIP's weights, config.json, tokenizer and image processor."""
        folder = clip_folder(config)
        return {
            "clip": weights_digest(folder),
            "model_config": config_digest(folder),
            "tokenizer": tokenizer_digest(folder),
            "processor": processor_digest(folder),
        }

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str | None]) -> dict[str, list[Any]]:
        """Images (height, width, 3) uint8 and prompts -> one score each."""
        scores: list[float] = []
        for start in range(0, len(images), self.batch_size):
            stop = start + self.batch_size
            scores += self._batch(images[start:stop], [text or "" for text in texts[start:stop]])
        return {SCORE: scores}

    def _batch(self, images: Sequence[np.ndarray], prompts: list[str]) -> list[float]:
        device = self.model.device
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokenizer = self.processor.tokenizer
        prompts = beginnings(tokenizer, prompts, self.max_tokens)
        words = tokenizer(prompts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        outputs = self.model(
            input_ids=words["input_ids"].to(device),
            attention_mask=words["attention_mask"].to(device),
            pixel_values=pixels.to(device),
        )
        seen = torch.nn.functional.normalize(outputs.image_embeds, dim=-1)  # B E
        said = torch.nn.functional.normalize(outputs.text_embeds, dim=-1)  # B E
        return (100 * (seen * said).sum(dim=-1)).clamp(min=0).tolist()

    @classmethod
    def summarise(cls, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Takes the mean over images, with its interval."""
        groups: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row[SCORE] is not None:
                groups[row[columns.PROMPT]].append(row[SCORE])
        return {"mean": asdict(estimate(groups))} if groups else {}


def clip_folder(config: Any) -> Any:
    """The CLIP's files. ValueError where the config names none, or they are not whole."""
    if config.clip is None:
        raise ValueError("metric clip_score: expected --clip FOLDER (or owner/name@commit), a CLIP of transformers")
    return resolve_model(*split_revision(config.clip))

"""What cells of the grid read, all of it in memory: latents of scenes, and their prompts' states under every encoder.

Made once by the project's own encoder and autoencoder, kept as safetensors beside the results, and put on the device whole:
batches are cut out of it there. The same tensors as `lidit embed` and `lidit latents` store, without a table between.

Letters: N rows, T tokens of all prompts, B rows of a batch, L tokens of its longest prompt, E an LLM's width, C H W of latents.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.world.prompts import plain_scene
from demo.world.scenes import render
from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.frozen.vae import VAE
from lidit.images.pixels import to_unit_range
from lidit.sampler import PromptBatch

ENCODE_TOGETHER = 256


@dataclass(frozen=True)
class States:
    """Prompts as one encoder gives them, ragged."""

    embeds: Tensor
    """(T, E) bfloat16, `prompt_embeds` of all prompts one after the other, then the empty prompt's."""
    starts: Tensor
    """(N + 1,) where each prompt begins in `embeds`."""
    instruction_embeds: Tensor
    """(P, E), what stands before every prompt."""
    null_embeds: Tensor
    """(L, E), the empty prompt; L may be 0."""

    def rows(self, index: Tensor, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows (B,), of them dropped (B,) bool -> prompt_embeds (B, L, E) float32, prompt_mask (B, L)."""
        every, starts = self.embeds, self.starts[index]
        lengths = self.starts[index + 1] - starts
        if dropped is not None:  # the empty prompt stands at the end
            starts = torch.where(dropped, len(every) - len(self.null_embeds), starts)
            lengths = torch.where(dropped, len(self.null_embeds), lengths)
        place = torch.arange(int(lengths.max()), device=every.device)
        mask = place < lengths[:, None]
        prompt_embeds = every[(starts[:, None] + place).clamp(max=len(every) - 1)].float()
        return prompt_embeds * mask[..., None], mask

    def to(self, device: torch.device) -> States:
        """Returns a copy on another device."""
        return States(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


@dataclass(frozen=True)
class Prompts:
    """Prompts as all encoders give them."""

    texts: tuple[str, ...]
    states: dict[str, States]

    def batch(self, encoders: Iterable[str], index: Tensor, dropped: Tensor | None = None) -> PromptBatch:
        """Rows (B,) as a model with these encoders gets them."""
        rows = {name: self.states[name].rows(index, dropped) for name in encoders}
        return PromptBatch(
            {name: embeds for name, (embeds, _) in rows.items()},
            {name: mask for name, (_, mask) in rows.items()},
            {name: self.states[name].instruction_embeds for name in rows},
        )


def scene_latents(folder: Path, seeds: Sequence[int], side: int, vae: VAE, device: torch.device) -> Tensor:
    """The plain scenes of these seeds -> latents (N, C, H, W) float32; from the folder, if they are there."""
    path = folder / f"latents-{_digest([list(seeds), side, vae.fingerprint()])}.safetensors"
    if not path.exists():
        parts = []
        for first in range(0, len(seeds), ENCODE_TOGETHER):
            images = [
                np.asarray(render(plain_scene(seed), side, side)) for seed in seeds[first : first + ENCODE_TOGETHER]
            ]
            parts.append(vae.encode(to_unit_range(torch.from_numpy(np.stack(images)))).cpu())
        _save({"latents": torch.cat(parts)}, path)
    return load_file(path)["latents"].to(device)


def encode_prompts(
    folder: Path, texts: Sequence[str], encoders: Sequence[EncoderConfig], device: torch.device
) -> Prompts:
    """Texts -> their states under all encoders; from the folder, where they are there."""
    states = {}
    for config in encoders:
        encoder = PromptEncoder(config, device)
        path = folder / f"{config.name}-{_digest([list(texts), encoder.fingerprint()])}.safetensors"
        if not path.exists():
            _save(_encode(encoder, texts), path)
        states[config.name] = States(**load_file(path)).to(device)
    return Prompts(tuple(texts), states)


def _encode(encoder: PromptEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """Encodes prompts into the fields of `States`; a prompt that stands there twice is encoded once."""
    distinct = list(dict.fromkeys(texts))
    place = {text: number for number, text in enumerate(distinct)}
    parts: list[Tensor] = []
    for first in range(0, len(distinct), ENCODE_TOGETHER):
        embeds, mask = encoder(distinct[first : first + ENCODE_TOGETHER])  # B L E, B L
        parts += [row[real].bfloat16().cpu() for row, real in zip(embeds, mask)]
    rows = [parts[place[text]] for text in texts]
    null = torch.from_numpy(encoder.null_embeds).bfloat16()
    return {
        "embeds": torch.cat([*rows, null]),
        "starts": torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()]),
        "instruction_embeds": torch.from_numpy(encoder.instruction_embeds.copy()),
        "null_embeds": null,
    }


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes the file in one move: one that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)

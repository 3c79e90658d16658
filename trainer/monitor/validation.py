"""Validation on held-out rows: the loss at fixed timesteps and noise, and sample grids.

Rows, timesteps and noise are the same at every validation, in every run, on any number of ranks: curves can be laid on each
other. All ranks run the model equally often, as ZeRO-3 needs it; a rank that has no row left runs one again, with weight zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import lance
import numpy as np
import torch
from torch import Tensor

from lidit.diffusion import Objective, loss_per_sample, sample_rng
from lidit.sampler import PromptBatch, SamplerConfig, initial_noise, sample
from lidit.store import columns
from lidit.store.codec import decode
from lidit.store.features import Features
from lidit.store.fingerprints import comparable, warn_unrecorded
from trainer.config import DataConfig, ValidationConfig
from trainer.data.assemble import Assembler
from trainer.data.tables import PhaseTable
from trainer.engine.ema import EMA
from trainer.engine.ranks import Ranks

SEED = 0x76616C  # seed of noise and captions: not the run's, so that runs can be compared
COLUMNS = 4  # images in a row of the grid


class Validation:
    """Validates a phase: the held-out loss where rows are held out, a sample grid where there are prompts.

    Args:
        table: of the phase.
        config: how many rows and timesteps, whose prompts, and how they are drawn.
        data: how prompts are chosen and padded.
        vae: autoencoder that decodes the pictures; None: they show three channels of the latents.
        microbatch_size: samples of a forward pass.
        ranks: who takes part.

    Raises:
        ValueError: no row is held out, or the prompts do not fit the table.
    """

    def __init__(
        self,
        table: PhaseTable,
        config: ValidationConfig,
        data: DataConfig,
        vae: str | None,
        microbatch_size: int,
        ranks: Ranks,
    ):
        self.loss = HeldOutLoss(table, config, data, microbatch_size, ranks) if data.holdout else None
        self.grid = SampleGrid(table, config, vae, ranks) if config.prompts else None

    def __call__(self, engine: Any, ema: EMA | None) -> tuple[dict[str, Any], np.ndarray | None]:
        """Returns (figures, picture or None); figures are the same on all ranks, the picture is rank 0's. All ranks call it."""
        values, picture = {}, None
        engine.eval()
        if self.loss is not None:
            values = self.loss(engine)
        with ema.applied(engine) if ema is not None else contextlib.nullcontext():
            if self.loss is not None and ema is not None:
                values |= {f"ema_{name}": value for name, value in self.loss(engine).items()}
            if self.grid is not None:
                picture = self.grid(engine)
        engine.train()
        return values, picture


class HeldOutLoss:
    """The loss on held-out rows of a phase's table.

    Args:
        table: of the phase.
        config: how many rows and timesteps.
        data: how prompts are chosen and padded.
        microbatch_size: samples of a forward pass.
        ranks: who takes part.

    Raises:
        ValueError: no row is held out.
    """

    def __init__(
        self, table: PhaseTable, config: ValidationConfig, data: DataConfig, microbatch_size: int, ranks: Ranks
    ):
        self.objective, self.ranks = table.objective, ranks
        # Evenly spaced, whatever the recipe's density and shift: so that losses of different recipes compare.
        fixed = torch.arange(config.timesteps, dtype=torch.float64)
        self.timesteps = ((fixed + 0.5) / config.timesteps).float()
        rows = table.survey.rows
        self.assembler = Assembler(table.features, rows, data, SEED, drop=False)
        self.chunks = held_out_chunks(rows.held_out, rows.held_out_buckets, config.rows, microbatch_size)
        self.buckets = rows.buckets
        self.instruction = {name: v.to(ranks.device) for name, v in self.assembler.instruction_embeds.items()}

    @torch.no_grad()
    def __call__(self, engine: Any) -> dict[str, Any]:
        """Returns the model's current {loss, loss_by_timestep}. All ranks call it together."""
        sums = torch.zeros(2, len(self.timesteps), dtype=torch.float64)  # of losses, of samples
        rounds = -(-len(self.chunks) // self.ranks.world_size)
        for number in range(rounds):
            chunk = number * self.ranks.world_size + self.ranks.rank
            weight = float(chunk < len(self.chunks))
            bucket, rows = self.chunks[min(chunk, len(self.chunks) - 1)]
            losses = self._losses(engine, self.buckets[bucket], rows)  # (timesteps, B)
            sums[0] += weight * losses.sum(dim=1)
            sums[1] += weight * losses.shape[1]
        total = self.ranks.sum(sums.to(self.ranks.device)).cpu()
        by_timestep = total[0] / total[1]
        return {"loss": float(by_timestep.mean()), "loss_by_timestep": by_timestep.tolist()}

    def _losses(self, engine: Any, bucket: str, rows: np.ndarray) -> Tensor:
        """Returns the losses (timesteps, B) float64 of a chunk of rows."""
        batch = self.assembler.read_now(bucket, rows, rows).to(self.ranks.device)
        losses = []
        for number, timestep in enumerate(self.timesteps):
            t = timestep.expand(len(rows)).to(self.ranks.device)  # B
            noise = _noise(rows * len(self.timesteps) + number, batch.latents.shape[1:]).to(self.ranks.device)
            noisy = self.objective.add_noise(batch.latents, noise, t)
            prediction = engine(noisy, t, batch.prompt_embeds, batch.prompt_mask, self.instruction)
            losses.append(
                loss_per_sample(_unweighted(self.objective), prediction, batch.latents, noise, t).double().cpu()
            )
        return torch.stack(losses)


class SampleGrid:
    """Draws a sample grid of prompts from a store that keeps them encoded.

    Args:
        table: of the phase, for the null prompts, the objective, and the size of the pictures: its most frequent bucket.
        config: whose prompts, how many, and how they are drawn.
        vae: autoencoder that decodes them; None: the pictures show three channels of the latents.
        ranks: who takes part.

    Raises:
        ValueError: no such store, or prompts that were encoded by other encoders than the table's.
    """

    def __init__(self, table: PhaseTable, config: ValidationConfig, vae: str | None, ranks: Ranks):
        assert config.prompts is not None
        features = table.features
        self.ranks, self.objective, self.vae_path = ranks, table.objective, vae
        self.shape = (features.latents.channels, *features.latents.shape(table.bucket)[1:])
        self.sampler = SamplerConfig(
            num_inference_steps=config.num_inference_steps, guidance_scale=config.guidance_scale
        )
        embeds = _read_prompts(config.prompts, features, config.images)
        self.count = len(next(iter(embeds.values())))
        share = -(-self.count // ranks.world_size)  # the same for every rank; the last ones draw some twice
        self.mine = [min(ranks.rank * share + place, self.count - 1) for place in range(share)]
        self.prompts = _prompt_batch({name: [rows[i] for i in self.mine] for name, rows in embeds.items()}, features)
        null = {name: [states.null_embeds] * share for name, states in features.encoders.items()}
        self.negative = _prompt_batch(null, features)
        self._vae: Any = None

    @torch.no_grad()
    def __call__(self, engine: Any) -> np.ndarray | None:
        """Draws the grid, (height, width, 3) uint8 on rank 0 and None elsewhere. All ranks call it together."""
        device = self.ranks.device
        generators = [torch.Generator().manual_seed(index) for index in self.mine]
        noise = initial_noise(generators, self.shape).to(device)
        prompts, negative = (_to(batch, device) for batch in (self.prompts, self.negative))
        latents = sample(engine, self.objective, noise, prompts, negative, self.sampler).cpu()
        drawn = torch.cat(self.ranks.gather_tensors(latents))[: self.count]
        return self._picture(drawn) if self.ranks.first else None

    def _picture(self, latents: Tensor) -> np.ndarray:
        pixels = self._decode(latents).clamp(-1, 1)  # B 3 height width
        images = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows = -(-len(images) // COLUMNS)
        grid = np.zeros((rows * COLUMNS, *images.shape[1:]), np.uint8)
        grid[: len(images)] = images
        height, width = images.shape[1:3]
        return grid.reshape(rows, COLUMNS, height, width, 3).swapaxes(1, 2).reshape(rows * height, COLUMNS * width, 3)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae_path is None:
            first = latents[:, [0, min(1, latents.shape[1] - 1), min(2, latents.shape[1] - 1)]]
            return first / first.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        if self._vae is None:
            from lidit.frozen.vae import load_vae
            from lidit.runtime.model_files import split_revision

            self._vae = load_vae(*split_revision(self.vae_path), device=self.ranks.device)
        return torch.cat([self._vae.decode(row[None]).cpu() for row in latents])


def held_out_chunks(rows: np.ndarray, buckets: np.ndarray, most: int, size: int) -> list[tuple[int, np.ndarray]]:
    """Splits at most `most` rows from all over the held-out ones into (bucket, rows) of at most `size`, alike on every rank.

    Args:
        rows: (n,) held-out rows of the table, ascending.
        buckets: (n,) the bucket of each.

    Raises:
        ValueError: no row is held out.
    """
    if not len(rows):
        raise ValueError(
            "validation: no row is held out; raise data.holdout (a share of the rows), or set validation.every_steps to 0"
        )
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64))
    chunks = []
    for bucket in np.unique(buckets[chosen]):
        members = rows[chosen[buckets[chosen] == bucket]]
        chunks += [(int(bucket), members[first : first + size]) for first in range(0, len(members), size)]
    return chunks


def _noise(numbers: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Returns noise (B, *shape); each row is a function of its number alone."""
    noise = np.empty((len(numbers), *shape), np.float32)
    for row, number in zip(noise, numbers.tolist()):
        sample_rng(SEED, number, "noise").standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def _unweighted(objective: Objective) -> Objective:
    return dataclasses.replace(objective, min_snr_gamma=None)


def _read_prompts(store: str, features: Features, most: int) -> dict[str, list[np.ndarray]]:
    """Returns encoder -> list of prompt embeddings (L, E) float32, of the first rows that have all encoders."""
    uri = f"{store.rstrip('/')}/{columns.SAMPLES_TABLE}"
    try:
        table = lance.dataset(uri)
    except (OSError, ValueError) as error:
        raise ValueError(f"validation.prompts: no table at {uri}: {str(error).splitlines()[0]}") from error
    names = table.schema.names
    text = next((text for text in features.texts if columns.embeds(text, next(iter(features.encoders))) in names), None)
    embeds = [columns.embeds(text, name) for name in features.encoders] if text else []
    if not embeds or any(column not in names for column in embeds):
        raise ValueError(
            f"validation.prompts: {uri} needs embeddings of one of {', '.join(features.texts)} by "
            f"{', '.join(features.encoders)}: run `lidit embed --store {store}` with the same encoders"
        )
    for name, column in zip(features.encoders, embeds):
        made_with = columns.metadata_of(table.schema.field(column)).get(columns.META_FINGERPRINT, "{}")
        prompts, trained, unrecorded = comparable(json.loads(made_with), features.encoders[name].fingerprint)
        warn_unrecorded(f"validation.prompts: {column} of {uri} and encoder {name!r}", unrecorded)
        if {**prompts, "codec": None} != {**trained, "codec": None}:
            raise ValueError(
                f"validation.prompts: {column} of {uri} was made by another encoder than {name!r} of {features.store}: embed "
                f"the prompts with the same encoders as the training table"
            )
    filled = " AND ".join(f"{column} IS NOT NULL" for column in embeds)
    rows = table.to_table(columns=embeds, filter=filled, limit=most)
    if not rows.num_rows:
        raise ValueError(f"validation.prompts: {uri} has no embedded prompt")
    decoded = {
        name: decode(rows[column], table.schema.field(column)) for name, column in zip(features.encoders, embeds)
    }
    return {name: [row for row in values if row is not None] for name, values in decoded.items()}


def _prompt_batch(rows: dict[str, list[np.ndarray]], features: Features) -> PromptBatch:
    """Pads the prompts to the longest; an empty prompt has length 0."""
    embeds, masks = {}, {}
    for name, states in rows.items():
        lengths = torch.tensor([len(row) for row in states])
        padded = torch.zeros(len(states), int(lengths.max()), features.encoders[name].width)
        for target, row in zip(padded, states):
            target[: len(row)] = torch.from_numpy(np.ascontiguousarray(row))
        embeds[name], masks[name] = padded, torch.arange(padded.shape[1]) < lengths[:, None]
    instruction = {name: torch.from_numpy(v.instruction_embeds.copy()) for name, v in features.encoders.items()}
    return PromptBatch(embeds, masks, instruction)


def _to(batch: PromptBatch, device: torch.device) -> PromptBatch:
    parts = (batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds)
    return PromptBatch(*({name: value.to(device) for name, value in part.items()} for part in parts))

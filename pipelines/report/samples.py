"""Samples to look at: thumbnails of their images, both captions, and their latents decoded back.

Only what is shown is read: a few rows by their place in the table.
"""

from __future__ import annotations

import base64
import glob
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from PIL import Image

from lidit.images.pixels import ImageError, bucket_pixels, reduced_image, to_bytes
from lidit.runtime.config_files import MAX_BYTES, load_yaml
from lidit.runtime.model_files import split_revision
from lidit.runtime.uris import shown
from lidit.store import columns
from lidit.store.buckets import parse_bucket
from pipelines.engine.runs import runs_folder

THUMBNAIL = 224  # pixels of the longer side at most
QUALITY = 82  # JPEG quality of pictures inside the page
LATENTS_DECODED = 32  # rows at most: a large autoencoder on a CPU takes seconds each
PEAK = 255.0  # largest value of a pixel, for PSNR


@dataclass
class Picture:
    """An image of the page, as a `data:` address, and its size."""

    uri: str  # data:image/...
    height: int  # pixels as shown
    width: int


@dataclass
class Sample:
    """A row that the page shows."""

    image_id: str
    source: str | None = None
    image: Picture | None = None
    size: str = ""  # HEIGHT x WIDTH of the stored image
    bytes: int = 0
    texts: dict[str, str | None] = field(default_factory=dict)  # text column -> text
    notes: dict[str, str] = field(default_factory=dict)  # small columns worth showing -> value
    bucket: str | None = None
    cropped: Picture | None = None  # what the autoencoder was shown
    decoded: Picture | None = None  # what comes back
    psnr: float | None = None  # `decoded` against `cropped`, dB


@dataclass
class Decoder:
    """The autoencoder that latents were made with, or why there is none."""

    vae: Any = None
    problem: str = ""


def draw_samples(dataset: lance.LanceDataset, count: int, seed: int, decoder: Decoder | None = None) -> list[Sample]:
    """Random rows, the same for the same table version and seed; those without an ingest error, if there are such."""
    rows = _drawn(dataset, count, seed)
    if not len(rows):
        return []
    latents = latents_field(dataset)
    small = [f.name for f in dataset.schema if not pa.types.is_large_binary(f.type)]
    wanted = small + [name for name in (columns.IMAGE, latents) if name and name in dataset.schema.names]
    taken = dataset.take(rows.tolist(), columns=wanted)
    samples = [_sample(row) for row in taken.to_pylist()]
    if latents is not None and decoder is not None and decoder.vae is not None:
        bucket = columns.bucket_of(latents)
        shown = taken.slice(0, LATENTS_DECODED)
        images = shown[columns.IMAGE].to_pylist()
        _decode_back(
            samples, images, shown[latents], dataset.schema.field(latents), shown[bucket].to_pylist(), decoder.vae
        )
    return samples


def latents_field(dataset: lance.LanceDataset) -> str | None:
    """The column of latents that is shown: the first one whose bucket column is there too."""
    for stored in dataset.schema:
        if (
            columns.META_CHANNELS in columns.metadata_of(stored)
            and columns.bucket_of(stored.name) in dataset.schema.names
        ):
            return stored.name
    return None


def open_decoder(store: str, dataset: lance.LanceDataset, model: str | None) -> Decoder | None:
    """The autoencoder of the table's latents: the one named, or one that a latents run names, the newest first.

    None: the table has no latents. The autoencoder must be the one that made them, by its fingerprint.
    """
    latents = latents_field(dataset)
    if latents is None:
        return None
    wanted = json.loads(columns.metadata_of(dataset.schema.field(latents))[columns.META_FINGERPRINT])
    candidates = _models_of_runs(store) if model is None else [split_revision(model)]
    decoder = Decoder(problem="no run says which autoencoder made the latents; name it with --vae")
    for candidate in candidates:
        decoder = _decoder_of(*candidate, wanted, download=model is not None)
        if decoder.vae is not None:
            break
    return decoder


def _decoder_of(model: str, revision: str | None, wanted: dict[str, Any], download: bool) -> Decoder:
    """The autoencoder, if it is the one of a fingerprint. `download`: whether it may be fetched, if it is a hub id."""
    from lidit.frozen.vae import load_vae

    try:
        vae = load_vae(model, revision, wanted.get("dtype", "fp32"), download=download)
        differing = [name for name, value in vae.fingerprint().items() if wanted.get(name) != value]
    except (ValueError, OSError) as error:
        return Decoder(problem=shown(f"the autoencoder {model} cannot be loaded here: {error}"))
    if differing:
        names = ", ".join(differing)
        return Decoder(problem=shown(f"the autoencoder {model} is not the one that made the latents: {names} differ"))
    return Decoder(vae)


def thumbnail(data: bytes, side: int = THUMBNAIL) -> Picture | None:
    """Makes a small upright picture of an encoded image; None where it cannot be decoded."""
    try:
        return _picture(reduced_image(data, side))
    except ImageError:  # the page shows that there is none
        return None


def _drawn(dataset: lance.LanceDataset, count: int, seed: int) -> np.ndarray:
    """Draws positions of random rows in the table, sorted."""
    total = dataset.count_rows()
    drawn = np.random.default_rng(seed).permutation(total)[: 4 * count] if total < 1 << 24 else None
    if drawn is None:
        drawn = np.unique(np.random.default_rng(seed).integers(0, total, 4 * count))
    reason = columns.error("ingest")
    if reason in dataset.schema.names and len(drawn):
        failed = dataset.take(drawn.tolist(), columns=[reason])[reason]
        good = drawn[np.array([not value.is_valid for value in failed], bool)]
        drawn = good if len(good) else drawn
    return np.sort(drawn[:count])


def _sample(row: dict[str, Any]) -> Sample:
    image = row.get(columns.IMAGE)
    made = Sample(row[columns.IMAGE_ID], row.get(columns.SOURCE), bytes=len(image or b""))
    if row.get(columns.HEIGHT):
        made.size = f"{row[columns.HEIGHT]} x {row[columns.WIDTH]}"
    if image:
        made.image = thumbnail(image)
    for name in (columns.CAPTION, columns.CAPTION_ORIGINAL):
        if name in row:
            made.texts[name] = row[name]
    for name, value in row.items():
        shown = name.endswith(("_status", "_tokens", "_error")) or "_length_" in name or name.startswith(columns.BUCKET)
        if shown and value is not None:
            made.notes[name] = str(value)
    return made


def _decode_back(
    samples: Sequence[Sample], images: list[bytes | None], latents: Any, stored: pa.Field, buckets: list[Any], vae: Any
) -> None:
    """Fills `cropped`, `decoded`, `psnr` of the samples that have latents, one image at a time."""
    import torch

    from lidit.store.codec import decode_latents

    for sample, data, values, bucket in zip(samples, images, decode_latents(latents, stored, buckets), buckets):
        if values is None or data is None:
            continue
        sample.bucket = bucket
        mean = torch.from_numpy(values[: vae.channels].copy())[None]  # (1, C, H, W); of moments the mean
        decoded = to_bytes(vae.decode(mean.to(vae.device)))[0]  # (height, width, 3)
        _, shown = bucket_pixels(data, [parse_bucket(bucket)], max_upscale=1e9)
        error = np.mean((shown.astype(np.float64) - decoded) ** 2)
        sample.psnr = float(10 * np.log10(PEAK**2 / error)) if error else float("inf")
        sample.cropped, sample.decoded = (_picture(Image.fromarray(pixels)) for pixels in (shown, decoded))


def _picture(image: Image.Image) -> Picture:
    if max(image.size) > 2 * THUMBNAIL:
        image = image.copy()
        image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", image.height, image.width)


def _models_of_runs(store: str) -> list[tuple[str, str | None]]:
    """(model, revision) of the latents runs, each once, the newest first; runs whose config is broken are left out."""
    fs, root = runs_folder(store)
    named = [
        _model_of(fs, path) for path in sorted(fs.glob(f"{glob.escape(root)}/latents-*/config.yaml"), reverse=True)
    ]
    return list(dict.fromkeys(each for each in named if each is not None))


def _model_of(fs: Any, path: str) -> tuple[str, str | None] | None:
    try:
        config = load_yaml(fs.cat_file(path, end=MAX_BYTES + 1), path)
        model, revision = config["model"], config.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return (model, revision) if isinstance(model, str) and model and isinstance(revision, str | None) else None

"""Encodes images: `image` of `samples.lance` -> `latents` and `bucket` beside it, so that training opens no image.

`image` -> `bucket` (`HEIGHTxWIDTH` in pixels, of about `resolution`^2) and `latents` (the autoencoder's mean, scaled as
training wants it), or `latent_moments` (mean and deviation) by option. An image that cannot be used has nulls and a reason
in `latents_error`. Run again to resume.
With no argument at all it encodes the demo's store with `demo/vae`, and makes that store first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lidit.cli import run
from lidit.frozen.batching import one_ahead, to_host
from lidit.frozen.vae import DTYPES, VAE
from lidit.images.pixels import MAX_PIXELS, RULES, ImageError, bucket_pixels, open_image, to_unit_range, upright_size
from lidit.runtime.fields import Interval, PositiveInt
from lidit.store import codec, columns
from lidit.store.buckets import Bucket, bucket_name, make_buckets, nearest_bucket
from pipelines.engine.column_file import UNCOMPRESSED
from pipelines.engine.stage import StageConfig, run_stage
from pipelines.engine.summary import Summary
from pipelines.engine.worker import READS, Columns

DEMO_VAE = "demo/vae"
WINDOW_PIXELS = 32 << 20  # decoded pixels that one window may hold, 3 bytes each
WINDOW_ROWS = (64, 512)  # at least, at most
DECODE_THREADS = 16  # at most, beside a GPU
COUNTED_SECONDS = ("decode_seconds", "device_seconds", "wait_seconds")  # in threads; on the device; for the threads
BATCH_PIXELS = {"cuda": 2 << 20, "cpu": 1 << 16}  # of one batch: fills a GPU; stays in a CPU's cache


@dataclass(frozen=True)
class LatentsConfig(StageConfig):
    """The latents job."""

    model: str = DEMO_VAE
    """The autoencoder: folder of a diffusers AutoencoderKL, AutoencoderDC or AutoencoderTiny with safetensors; a hub id
    `owner/name` or `owner/name/folder` (then `revision` is required); or TAEF2's weights (file, or folder of it)."""
    revision: str | None = None
    """Full commit hash of a hub id; of local files, `sha256:` and the digest that they must have, if you like."""
    dtype: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Precision of the autoencoder's weights and arithmetic. Some (SDXL's) overflow fp16: that gives row errors."""
    codec: Literal["bf16", "fp16", "fp32"] = "bf16"
    """How latents are stored: bytes per value 2, 2, 4."""
    moments: bool = False
    """Store mean and deviation (`latent_moments`), to be drawn from in training, instead of the mean alone (`latents`)."""
    resolution: int = 64
    """Side of the square bucket in pixels; the other buckets have about as many pixels. A multiple of `step`."""
    step: int = 16
    """Sides of buckets are multiples of it, pixels: the autoencoder's downscale times the model's patch size, or more."""
    max_aspect: float = 2.0
    """Longer side of a bucket over its shorter side, at most."""
    max_upscale: Annotated[float, Interval(ge=1)] = 1.25
    """How many times smaller than its bucket an image may be; smaller ones get a row error, no blurred latents."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Pixels that an image's header may claim; more is a row error before anything is decoded."""
    name: str = ""
    """Suffix of the columns, `latents_<name>` and `bucket_<name>`: for a second resolution or autoencoder in one table."""
    batch_pixels: PositiveInt | None = None
    """Pixels of one forward pass. Default: 2,097,152 on a GPU (32 images of 256 x 256), 65,536 on a CPU (it keeps to its
    cache). Lower it if a GPU runs out of memory."""
    decode_threads: PositiveInt | None = None
    """Threads per actor that decode and resize images. Default: 16 (or the machine's cores, if fewer) beside a GPU,
    `actors.num_cpus` without one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        make_buckets(self.resolution, self.step, self.max_aspect)
        if self.name and not f"x{self.name}".isidentifier():
            raise ValueError(f"name: expected letters, digits and underscores, received {self.name!r}")

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """(height, width) of every bucket, pixels."""
        return make_buckets(self.resolution, self.step, self.max_aspect)

    @property
    def latents_column(self) -> str:
        """Name of the column that holds the latents, or their moments."""
        return columns.variant(columns.LATENT_MOMENTS if self.moments else columns.LATENTS, self.name)

    @property
    def bucket_column(self) -> str:
        """Name of the column that says which bucket a row is in."""
        return columns.variant(columns.BUCKET, self.name)


class LatentsSummary(Summary):
    """Figures of one run of the latents job."""

    def own_lines(self) -> Iterator[str]:
        """Where the time of an image goes."""
        if images := self.counts.get("images"):
            decode, device = (1e3 * self.counts[f"{name}_seconds"] / images for name in ("decode", "device"))
            waited = self.counts["wait_seconds"] / max(self.counts["call_seconds"], 1e-9)
            yield (
                f"  an image   {decode:,.1f} ms to decode and resize (in threads beside), {device:,.1f} ms on the device; "
                f"{waited:.0%} of the time was waiting for decoding"
            )


class EncodeLatents:
    """`image` -> `bucket`, and `latents` or `latent_moments`."""

    name = "latents"
    summary = LatentsSummary

    def __init__(self, config: LatentsConfig):
        self.config, self.buckets = config, config.buckets
        device = config.actors.device()
        self.vae = _autoencoder(config, device)
        self.vae.weights  # noqa: B018 - loaded now: what is wrong with them is told before any image is read
        self.window_rows = int(np.clip(WINDOW_PIXELS // config.resolution**2, *WINDOW_ROWS))
        self.batch_pixels = config.batch_pixels or BATCH_PIXELS[device]
        beside = min(DECODE_THREADS, len(os.sched_getaffinity(0))) if device == "cuda" else int(config.actors.num_cpus)
        self.num_threads = config.decode_threads or max(1, beside)
        self.threads = ThreadPoolExecutor(self.num_threads)

    @classmethod
    def writes(cls, config: LatentsConfig) -> list[pa.Field]:
        """The bucket, and the latents with all that a reader needs in their metadata."""
        vae = _autoencoder(config, "cpu")
        rules = {
            "resolution": config.resolution,
            "step": config.step,
            "max_aspect": config.max_aspect,
            "max_upscale": config.max_upscale,
            "pixels": RULES,
        }
        fingerprint = {**rules, **vae.fingerprint(), "codec": config.codec}
        versions = json.dumps({name: version(name) for name in ("diffusers", "torch", "pillow")})
        metadata = {READS: columns.IMAGE, columns.META_STAGE: cls.name, columns.META_VERSIONS: versions}
        shape = {
            columns.META_CODEC: config.codec,
            columns.META_CHANNELS: str(vae.channels),
            columns.META_DOWNSCALE: str(vae.downscale),
            columns.META_SCALING_FACTOR: repr(vae.scaling_factor),
            columns.META_SHIFT_FACTOR: repr(vae.shift_factor),
            columns.META_MOMENTS: "mean,deviation" if config.moments else "mean",
            columns.META_FINGERPRINT: json.dumps(fingerprint, sort_keys=True),
        }
        bucket = {**metadata, columns.META_FINGERPRINT: json.dumps(rules, sort_keys=True)}
        return [
            pa.field(config.latents_column, pa.large_binary(), metadata={**metadata, **shape, **UNCOMPRESSED}),
            pa.field(config.bucket_column, pa.string(), metadata=bucket),
        ]

    @classmethod
    def bytes_per_row(cls, config: LatentsConfig, sample: pa.Table, fields: list[pa.Field]) -> float:
        """Mean over the sample of the latents' size in the bucket that an image's header leads to."""
        vae, total = _autoencoder(config, "cpu"), 0.0
        planes = vae.channels * (2 if config.moments else 1)
        for data in sample[columns.IMAGE].to_pylist():
            try:
                height, width = nearest_bucket(*upright_size(open_image(data, config.max_pixels)), config.buckets)
            except (ImageError, TypeError):
                continue  # no image: it will have nulls
            total += planes * (height // vae.downscale) * (width // vae.downscale) * codec.bytes_per_value(config.codec)
        return total / max(1, len(sample)) + 8

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        """Encodes every distinct image of the window once; batches are of one bucket, in the window's order."""
        images = window.column(columns.IMAGE)
        place = _places(images)
        first = {index: row for row, index in reversed(list(enumerate(place))) if index is not None}
        made = _Made(self.config.latents_column)
        start = time.perf_counter()
        futures = [self.threads.submit(self._decode, images[first[index]].as_buffer()) for index in range(len(first))]
        batches = self._batches(futures, made)
        for indices, latents in one_ahead((indices, self._launch(pixels)) for indices, pixels in batches):
            made.add(indices, latents)
        made.counts |= {"images": len(made.packed), "call_seconds": time.perf_counter() - start}
        return made.columns(place, self.config, wanted)

    def _decode(self, data: pa.Buffer) -> tuple[Bucket, np.ndarray, float]:
        """One image in one thread: bucket, pixels, and the seconds it took."""
        start = time.perf_counter()
        bucket, pixels = bucket_pixels(memoryview(data), self.buckets, self.config.max_upscale, self.config.max_pixels)
        return bucket, pixels, time.perf_counter() - start

    def _batches(self, futures: list[Future[Any]], made: _Made) -> Iterator[tuple[list[int], np.ndarray]]:
        """(images, uint8 (B, height, width, 3)) of one bucket each, as soon as they are full; the rest at the end."""
        waiting: dict[Bucket, list[tuple[int, np.ndarray]]] = {}
        for index, future in enumerate(futures):
            start = time.perf_counter()
            try:
                bucket, pixels, seconds = future.result()
            except ImageError as error:
                made.errors[index] = str(error)
                continue
            finally:
                made.counts["wait_seconds"] += time.perf_counter() - start
            futures[index] = None  # type: ignore[call-overload]  # lets go of its pixels
            made.counts["decode_seconds"] += seconds
            made.buckets[index] = bucket
            waiting.setdefault(bucket, []).append((index, pixels))
            if (len(waiting[bucket]) + 1) * bucket[0] * bucket[1] > self.batch_pixels:
                yield _stack(waiting.pop(bucket))
        for bucket in sorted(waiting):
            yield _stack(waiting[bucket])

    @torch.inference_mode()
    def _launch(self, pixels: np.ndarray) -> Packed:
        """uint8 (B, height, width, 3) -> its latents, packed, on the way to the host."""
        start = time.perf_counter()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 if self.vae.device.type == "cuda" else 0)]
        on_host = torch.from_numpy(pixels)
        if events:
            on_host = on_host.pin_memory()
            events[0].record()
        unit = to_unit_range(on_host.to(self.vae.device, non_blocking=True), DTYPES[self.config.dtype])
        latents = self.vae.encode_moments(unit) if self.config.moments else self.vae.encode(unit)  # (B, C or 2C, H, W)
        finite = latents.to(codec.LATENT_CODECS[self.config.codec]).isfinite().flatten(1).all(dim=1)  # (B,)
        copies = (to_host(codec.encode_latents(latents, self.config.codec)), to_host(finite))
        if events:
            events[1].record()
        return Packed(*copies, events, time.perf_counter() - start)


@dataclass
class Packed:
    """Latents of a batch as bytes, (B, bytes) and whether each is finite (B,), perhaps still on their way from a GPU."""

    data: Tensor
    finite: Tensor
    events: list[Any]  # of CUDA: begin and end of the batch's work
    seconds: float  # that launching it took; without a GPU, all of its work

    def arrive(self) -> tuple[np.ndarray, np.ndarray, float]:
        """(bytes, finite, seconds on the device), once they are there."""
        if self.events:
            self.events[1].synchronize()
            return self.data.numpy(), self.finite.numpy(), self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.data.numpy(), self.finite.numpy(), self.seconds


@dataclass
class _Made:
    """What became of the distinct images of a window; gathers rows of them into columns."""

    column: str
    packed: dict[int, np.ndarray] = field(default_factory=dict)
    buckets: dict[int, Bucket] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED_SECONDS, 0.0))

    def add(self, indices: list[int], batch: Packed) -> None:
        """Takes a finished batch in."""
        data, finite, seconds = batch.arrive()
        self.counts["device_seconds"] += seconds
        for index, row, fine in zip(indices, data, finite.tolist()):
            if fine:
                self.packed[index] = row
            else:
                self.errors[index] = "NaN or Inf in the autoencoder's latents; if its dtype is fp16, take bf16 or fp32"

    def columns(self, place: list[int | None], config: LatentsConfig, wanted: list[str]) -> Columns:
        """Rows by the image each holds (None = null image) -> the wanted columns, with a reason for every other null."""
        valid = np.array([index is not None and index in self.packed for index in place], bool)
        rows = [self.packed[index] if fine else _NOTHING for index, fine in zip(place, valid)]  # type: ignore[index]
        offsets = np.concatenate([[0], np.cumsum([row.nbytes for row in rows])]).astype(np.int64)
        data = np.concatenate([_NOTHING, *rows])
        buffers = [pa.py_buffer(np.packbits(valid, bitorder="little")), pa.py_buffer(offsets), pa.py_buffer(data)]
        names = [bucket_name(self.buckets[index]) if fine else None for index, fine in zip(place, valid)]  # type: ignore[index]
        arrays = {
            config.latents_column: pa.Array.from_buffers(pa.large_binary(), len(place), buffers),
            config.bucket_column: pa.array(names, pa.string()),
        }
        reasons = {row: self.errors[index] for row, index in enumerate(place) if index is not None and not valid[row]}
        errors = {row: f"{self.column}: {reason}" for row, reason in reasons.items()}
        return Columns({name: arrays[name] for name in wanted}, errors, self.counts)


_NOTHING = np.empty(0, np.uint8)


def _autoencoder(config: LatentsConfig, device: str) -> VAE:
    """The config's autoencoder, weights not loaded yet. ValueError where it does not go with the rest of the config."""
    vae = VAE(config.model, config.revision, config.dtype, device)
    if config.step % vae.downscale:
        raise ValueError(
            f"step: expected a multiple of the autoencoder's downscale {vae.downscale}, received {config.step}"
        )
    if config.moments and not vae.has_deviation:
        raise ValueError(f"moments: {vae.kind} gives no deviation, only AutoencoderKL does; leave it off")
    return vae


def _places(images: pa.Array) -> list[int | None]:
    """Every row's image as a number, equal bytes the same one, counted in order of appearance; None for a null."""
    numbers: dict[bytes, int] = {}
    return [
        numbers.setdefault(hashlib.sha256(image.as_buffer()).digest(), len(numbers)) if image.is_valid else None
        for image in images
    ]


def _stack(waiting: list[tuple[int, np.ndarray]]) -> tuple[list[int], np.ndarray]:
    return [index for index, _ in waiting], np.stack([pixels for _, pixels in waiting])


def main(config: LatentsConfig) -> Summary:
    """Runs the job."""
    return run_stage(EncodeLatents, config)


if __name__ == "__main__":
    run("latents")

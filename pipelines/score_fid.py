"""The metric `fid`: Fréchet distance between the features of generated and real images (arXiv 1706.08500).

    |mean_1 - mean_2|^2 + trace(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

Features are those of any CLIP's image tower (`--fid_model FOLDER`), or of a TorchScript file that maps uint8 images
(B, 3, height, width) to (B, F): the published FID needs that of its Inception network. Distances under different
features, or from few images (fewer than some times F), cannot be compared. A number of a whole set: it has no column, and is
computed by the driver.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lidit import columns
from lidit.companions import split_revision
from lidit.model_files import resolve_model
from pipelines.table import Table

Features = Callable[[list[np.ndarray]], np.ndarray]
"""B images (height, width, 3) uint8 of one size -> (B, F)"""


@dataclass
class Moments:
    """Mean and covariance of features, built up batch by batch in float64."""

    count: int = 0
    total: Any = 0.0
    """(F,) sum."""
    squares: Any = 0.0
    """(F, F) sum of outer products."""

    def add(self, features: np.ndarray) -> None:
        """features (B, F)."""
        values = features.astype(np.float64)
        self.count += len(values)
        self.total = self.total + values.sum(axis=0)
        self.squares = self.squares + values.T @ values

    @property
    def mean(self) -> np.ndarray:
        """(F,)"""
        return np.asarray(self.total / self.count)

    @property
    def covariance(self) -> np.ndarray:
        """(F, F), unbiased."""
        mean = self.mean
        return np.asarray((self.squares - self.count * np.outer(mean, mean)) / (self.count - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """The distance of two Gaussians with these moments.

    The trace of the root of C_1 C_2 is the sum of the roots of the eigenvalues of A C_2 A, A the symmetric root of C_1: real
    and not negative, so nothing complex comes in.
    """
    if min(first.count, second.count) < 2:
        raise ValueError(
            f"fid: expected at least 2 images on each side, received {first.count} generated and {second.count} real"
        )
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    between = np.linalg.eigvalsh(root @ second.covariance @ root)
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.sqrt(np.clip(between, 0, None)).sum()
    return float(difference @ difference + traces)


def fid(store: str, config: Any, device: str) -> dict[str, Any]:
    """The distance between `image` of a store and of `config.fid_reference`.

    Raises:
        ValueError: no model or no reference is named, or there are too few images.
    """
    if config.fid_model is None or config.fid_reference is None:
        raise ValueError(
            "metric fid: expected --fid_model (a CLIP's folder, or a TorchScript file) and --fid_reference STORE"
        )
    features = open_features(config.fid_model, device)
    generated, real = (moments(_images(place, config.batch_size), features) for place in (store, config.fid_reference))
    return {
        "value": frechet_distance(generated, real),
        "features": len(generated.mean),
        "generated": generated.count,
        "real": real.count,
    }


def moments(batches: Iterator[list[np.ndarray]], features: Features) -> Moments:
    """Of all images; those of a batch are grouped by size."""
    found = Moments()
    for batch in batches:
        sizes: dict[tuple[int, ...], list[np.ndarray]] = {}
        for image in batch:
            sizes.setdefault(image.shape, []).append(image)
        for group in sizes.values():
            found.add(features(group))
    return found


def open_features(model: str, device: str) -> Features:
    """The features of a CLIP's image tower, projected, or of a TorchScript file."""
    if model.endswith((".pt", ".ts")):
        network = torch.jit.load(model, map_location=device).eval()

        @torch.inference_mode()
        def scripted(images: list[np.ndarray]) -> np.ndarray:
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)  # B 3 height width
            return np.asarray(network(pixels).float().cpu().numpy())

        return scripted
    from transformers import AutoImageProcessor, CLIPModel

    folder = resolve_model(*split_revision(model))
    clip = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def projected(images: list[np.ndarray]) -> np.ndarray:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        pooled = clip.vision_model(pixel_values=pixels).pooler_output
        return np.asarray(clip.visual_projection(pooled).cpu().numpy())

    return projected


def _images(store: str, batch_size: int) -> Iterator[list[np.ndarray]]:
    dataset = Table(f"{store.rstrip('/')}/{columns.SAMPLES_TABLE}").open()
    batches = dataset.to_batches(
        columns=[columns.IMAGE], filter=f"{columns.IMAGE} IS NOT NULL", batch_size=batch_size, batch_readahead=1
    )
    for batch in batches:
        yield [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in batch.column(0).to_pylist()]

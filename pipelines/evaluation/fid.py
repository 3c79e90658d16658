"""The metric `fid`: Fréchet distance between the features of generated and real images (arXiv 1706.08500), by torchmetrics.

Features are those of any CLIP's image tower (`--fid_model FOLDER`), or of a TorchScript file that maps uint8 images
(B, 3, height, width) to (B, F): the published FID needs that of its Inception network. TorchScript is code, which may write
files: it is named with its digest (`--fid_model FILE.pt@sha256:DIGEST`), and only these bytes are run. Distances under
different features, or from few images (fewer than some times F), cannot be compared: the features' digest stands beside the
distance. A number of a whole set: it has no column, and is computed by the driver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lidit.frozen.loading import load_model, load_processor
from lidit.images.pixels import open_rgb
from lidit.runtime.model_files import PIN, check_pin, model_digest, resolve_model, split_revision
from lidit.store import columns
from pipelines.engine.table import samples_of


class ClipFeatures(nn.Module):
    """A CLIP's image tower: uint8 images (B, 3, height, width) -> (B, F), projected."""

    def __init__(self, model: str):
        super().__init__()
        from transformers import AutoImageProcessor, CLIPModel

        folder = resolve_model(*split_revision(model))
        self.digest = f"{PIN}{model_digest(folder)}"
        self.clip = load_model(CLIPModel, folder, dtype=torch.float32).eval()
        self.processor = load_processor(folder, AutoImageProcessor)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:  # B 3 height width
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self.processor(images=arrays, return_tensors="pt")["pixel_values"].to(self.clip.device)
        return self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)  # B F


def open_features(model: str) -> nn.Module:
    """The features of a CLIP's image tower, or of a TorchScript file named with its digest; `digest` is that of its files.

    Raises:
        ValueError: it is not there, no digest is named where one is asked for, or the files have another.
    """
    path, revision = split_revision(model)
    if not path.endswith((".pt", ".ts")):
        return ClipFeatures(model)
    try:
        content = Path(path).read_bytes()  # once: the bytes that are checked are those that run
    except OSError as error:
        raise ValueError(f"fid_model {path}: expected a TorchScript file, received {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if not (revision or "").startswith(PIN):
        raise ValueError(
            f"fid_model {path}: a TorchScript file is code, so it is run only with the digest of the one you trust: expected "
            f"--fid_model {path}@{PIN}DIGEST; this file's is {digest}"
        )
    check_pin(f"fid_model {path}", revision, lambda: digest)
    features = torch.jit.load(BytesIO(content), map_location="cpu").eval()
    features.digest = f"{PIN}{digest}"
    return features


def open_distance(features: nn.Module) -> Any:
    """torchmetrics' FID with these features; moments in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if not hasattr(features, "num_features"):
        features.num_features = features(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape[-1]
    return FrechetInceptionDistance(feature=features)


def fid(store: str, config: Any, features: nn.Module, device: str) -> dict[str, Any]:
    """The distance between `image` of a store and of `config.fid_reference`, under the features of `fid_features`.

    Raises:
        ValueError: there are too few images.
    """
    distance = open_distance(features).to(device)
    for place, real in ((store, False), (config.fid_reference, True)):
        for images in _images(place, config.batch_size):
            update(distance, images, real)
    return {**result(distance), "model": features.digest}


def fid_features(config: Any) -> nn.Module:
    """The features that a config names. Raises ValueError where it names none, or no reference; and as `open_features`."""
    if config.fid_model is None or config.fid_reference is None:
        raise ValueError(
            "metric fid: expected --fid_model (a CLIP's folder, or FILE.pt@sha256:DIGEST) and --fid_reference STORE"
        )
    return open_features(config.fid_model)


def update(distance: Any, images: list[np.ndarray], real: bool) -> None:
    """Adds images (height, width, 3) uint8, grouped by size."""
    sizes: dict[tuple[int, ...], list[np.ndarray]] = {}
    for image in images:
        sizes.setdefault(image.shape, []).append(image)
    for group in sizes.values():
        pixels = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)  # B 3 height width
        distance.update(pixels.to(distance.device), real=real)


def result(distance: Any) -> dict[str, Any]:
    """The distance, and the number of images on each side. Raises ValueError where one side has fewer than two."""
    generated, real = int(distance.fake_features_num_samples), int(distance.real_features_num_samples)
    if min(generated, real) < 2:
        raise ValueError(
            f"fid: expected at least 2 images on each side, received {generated} generated and {real} real"
        )
    return {
        "value": float(distance.compute()),
        "features": len(distance.real_features_sum),
        "generated": generated,
        "real": real,
    }


def _images(store: str, batch_size: int) -> Iterator[list[np.ndarray]]:
    dataset = samples_of(store).open()
    batches = dataset.to_batches(
        columns=[columns.IMAGE], filter=f"{columns.IMAGE} IS NOT NULL", batch_size=batch_size, batch_readahead=1
    )
    for batch in batches:
        yield [np.array(open_rgb(data)) for data in batch.column(0).to_pylist()]

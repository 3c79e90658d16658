"""`VAE`: pixels <-> latents, scaled as training wants them, by any autoencoder of diffusers or by TAEF2.

Whatever a class of autoencoder returns and scales by, here it is one thing: `encode` gives
`(latents - shift_factor) * scaling_factor` of the mean (the mode) of what the model says, `decode` takes just that.

Shape notation: B images, C latent channels, H W latent height and width.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lidit.frozen.taef2 import DOWNSCALE, LATENT_CHANNELS, load_taef2
from lidit.runtime.model_files import (
    AUTOENCODER,
    PROJECT_ROOT,
    check_pin,
    digest_of_files,
    file_digest,
    resolve_model,
    weights_digest,
)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLASSES = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")


def load_vae(
    model: str,
    revision: str | None = None,
    dtype: str = "fp32",
    device: str | torch.device | None = None,
    download: bool = True,
) -> VAE:
    """Loads an autoencoder and checks its weights.

    Args:
        model: folder of a diffusers autoencoder; hub id `owner/name` or `owner/name/folder`; TAEF2's weights (the
            safetensors file, or a folder with nothing but it).
        revision: full commit hash, for hub ids; of local files, `sha256:` and the digest that they must have.
        dtype: precision of weights and arithmetic: bf16, fp16 or fp32.
        device: where it runs; default: the GPU if there is one.
        download: whether a hub id that is not in the local cache may be fetched.

    Raises:
        ValueError: the files are missing, damaged, of a class not known here, or do not fit their config.
    """
    vae = VAE(model, revision, dtype, device, download)
    vae.weights  # noqa: B018 - loads them, and complains
    return vae


class VAE:
    """A frozen autoencoder. What it is, is known from its config; weights are loaded at first use.

    Attributes:
        kind: name of its class.
        channels: C of its latents.
        downscale: pixels along a side of one latent pixel.
        scaling_factor, shift_factor: see the head of this file.
        has_deviation: whether it gives a deviation beside the mean.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        dtype: str = "fp32",
        device: str | torch.device | None = None,
        download: bool = True,
    ):
        if dtype not in DTYPES:
            raise ValueError(f"autoencoder dtype: expected one of {', '.join(DTYPES)}, received {dtype!r}")
        self.dtype = dtype
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._taef2 = _taef2_file(model)
        self.config: dict[str, Any] = {}
        self.kind, self.has_deviation = "TAEF2", False
        if self._taef2:
            check_pin(f"autoencoder {self._taef2}", revision, functools.partial(file_digest, self._taef2))
            self.folder, self.channels, self.downscale = self._taef2.parent, LATENT_CHANNELS, DOWNSCALE
            self.scaling_factor, self.shift_factor = 1.0, 0.0
        else:
            self.folder = resolve_model(model, revision, AUTOENCODER, download)
            self.config = _read_config(self.folder)
            self.kind = self.config["_class_name"]
            self.has_deviation = self.kind == "AutoencoderKL"
            settings = {**_defaults(self.kind), **self.config}
            levels = settings["block_out_channels" if self.has_deviation else "encoder_block_out_channels"]
            self.channels, self.downscale = settings["latent_channels"], 2 ** (len(levels) - 1)
            self.scaling_factor = float(settings["scaling_factor"])
            self.shift_factor = float(settings.get("shift_factor") or 0.0)

    def fingerprint(self) -> dict[str, Any]:
        """Everything its latents depend on, as JSON-able values. Reads the weight files once to digest them."""
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return {
            "autoencoder": self.kind,
            "weights": digest_of_files([self._taef2]) if self._taef2 else weights_digest(self.folder, AUTOENCODER),
            "config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
            "dtype": self.dtype,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, height, width) in [-1, 1], on any device -> latents (B, C, H, W) float32 on the VAE's."""
        return self._encoded(pixels)[0]

    @torch.inference_mode()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, height, width) in [-1, 1] -> (B, 2C, H, W) float32: mean, then deviation, both scaled.

        A draw of the latents is `mean + deviation * noise`.

        Raises:
            ValueError: the autoencoder gives no deviation.
        """
        if not self.has_deviation:
            raise ValueError(f"{self.kind} gives no deviation: only AutoencoderKL does; encode to latents instead")
        return torch.cat(self._encoded(pixels), dim=1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H, W) as `encode` gives them -> pixels (B, 3, height, width) float32, about [-1, 1], not clamped."""
        raw = latents.to(self.device, torch.float32) / self.scaling_factor + self.shift_factor
        decoded = self.weights.decode(raw.to(DTYPES[self.dtype]))
        return (decoded if self._taef2 else decoded.sample).float()

    def _encoded(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """The scaled mean, and the scaled deviation where there is one, (B, C, H, W) float32 each."""
        height, width = pixels.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"{self.kind} works on images whose sides are multiples of {self.downscale} pixels, received "
                f"{height} x {width}"
            )
        encoded = self.weights.encode(pixels.to(self.device, DTYPES[self.dtype]))
        if self.kind == "AutoencoderKL":
            mean, deviation = encoded.latent_dist.mode(), encoded.latent_dist.std
            return (mean.float() - self.shift_factor) * self.scaling_factor, deviation.float() * self.scaling_factor
        mean = {"AutoencoderDC": "latent", "AutoencoderTiny": "latents"}.get(self.kind)
        raw = getattr(encoded, mean) if mean else encoded
        return ((raw.float() - self.shift_factor) * self.scaling_factor,)

    @cached_property
    def weights(self) -> Any:
        """The model on its device, frozen."""
        if self._taef2:
            model: Any = load_taef2(self._taef2).to(DTYPES[self.dtype])
        else:
            model = _load_diffusers(self.folder, self.kind, DTYPES[self.dtype])
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        return model.requires_grad_(False).eval().to(device=self.device, memory_format=layout)


def _load_diffusers(folder: Path, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """The autoencoder of a folder; ValueError unless its weights are exactly those that its config asks for."""
    import diffusers
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        model, report = getattr(diffusers, kind).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"autoencoder {folder}: weights do not fit its config.json: {error}") from error
    finally:
        logging.set_verbosity(level)
    wrong = [
        f"{key} is {what}"
        for what, found in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", report["mismatched_keys"]),
        )
        for key in found
    ]
    if wrong:
        raise ValueError(
            f"autoencoder {folder}: {len(wrong)} tensors do not fit its config.json, such as {'; '.join(sorted(wrong)[:3])}; "
            f"loaded all the same it would give wrong latents without a word"
        )
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json; ValueError where it is none of an autoencoder known here."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ValueError(
            f"autoencoder {folder}: expected `_class_name` to be one of {', '.join(CLASSES)}, received {kind!r}"
        )
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise ValueError(
            f"autoencoder {folder}: its config scales every channel by itself (latents_mean, latents_std); only one "
            f"scaling_factor and shift_factor for all are supported"
        )
    return config


def _defaults(kind: str) -> dict[str, Any]:
    """Returns the class's defaults, for keys that a config lacks: old ones lack their scaling factor."""
    import diffusers

    return {
        name: parameter.default for name, parameter in inspect.signature(getattr(diffusers, kind)).parameters.items()
    }


def _taef2_file(model: str) -> Path | None:
    """TAEF2's weights, where `model` names the file, or a folder that has them and no config.json."""
    for path in (Path(model), PROJECT_ROOT / model):
        if path.suffix == ".safetensors" and path.is_file():
            return path.resolve()
        if path.is_dir() and not (path / "config.json").exists() and (path / "taef2.safetensors").is_file():
            return (path / "taef2.safetensors").resolve()
    return None

"""Loads and verifies the text encoders and the VAE that a model was trained with.

Weights name them in config.json: where they lay in training, and their fingerprints. They may lie elsewhere now; what must be
the same is what they compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.runtime.model_files import resolve_model, split_revision
from lidit.store.fingerprints import comparable, warn_unrecorded
from lidit.weights import read_config

if TYPE_CHECKING:
    from lidit.frozen.vae import VAE

ROUNDING = {
    "dtype",
    "codec",
}  # keys of a fingerprint that change values by rounding alone: they may differ from training's


class Components:
    """Loads the text encoders and the VAE that a weights folder names.

    Args:
        folder: weights, as `save_weights` writes them.
        check: refuse what is not the same as in training. Digesting the files of a large LLM takes a while.
        download: whether hub ids that the weights name, not the caller, may be fetched where they are not in the local cache.
    """

    def __init__(self, folder: str | Path, check: bool = True, download: bool = False):
        self.folder, self.check, self.download = Path(folder), check, download
        saved = read_config(folder)
        self._encoders: dict[str, Any] = saved.get("encoders", {})
        self._vae: dict[str, Any] = saved.get("vae", {})

    def encoder(
        self, name: str, instead: str | EncoderConfig | PromptEncoder | None, device: str | torch.device
    ) -> PromptEncoder:
        """Loads the encoder of that name.

        Args:
            name: as in the model's config.
            instead: where it is now: a folder, `owner/name@commit`, a config, or itself; None: where it was in training.
            device: where it shall run, unless it is loaded already.

        Raises:
            ValueError: it is not there, not told, or not the one of training; names the keys that differ.
        """
        saved = self._encoders.get(name, {})
        if isinstance(instead, PromptEncoder):
            encoder = instead
        else:
            config = self._encoder_config(name, instead, saved.get("config"))
            encoder = PromptEncoder(config, device, download=self.download or instead is not None)
        self._compare(f"encoder {name}", saved.get("fingerprint"), encoder, f"encoders={{{name!r}: ...}}")
        return encoder

    def encoder_folder(self, name: str, instead: str | EncoderConfig | None) -> Path:
        """Finds the folder of that encoder; arguments and errors as of `encoder`, but nothing is compared."""
        config = self._encoder_config(name, instead, self._encoders.get(name, {}).get("config"))
        return resolve_model(config.model, config.revision, download=self.download or instead is not None)

    def vae(self, instead: str | VAE | None, device: str | torch.device) -> VAE:
        """Loads the VAE; arguments and errors as of `encoder`."""
        from lidit.frozen.vae import load_vae

        if instead is None and not self._vae:
            raise ValueError(f"{self.folder}: its config.json names no VAE; pass vae=...")
        vae = instead
        if vae is None or isinstance(vae, str):
            model, revision = split_revision(vae) if vae else (self._vae["model"], self._vae.get("revision"))
            download = self.download or bool(vae)
            vae = load_vae(self._located(model), revision, self._vae.get("dtype", "fp32"), device, download)
        self._compare("VAE", self._vae.get("fingerprint"), vae, "vae=...")
        return vae

    def _encoder_config(self, name: str, instead: str | EncoderConfig | None, saved: Any) -> EncoderConfig:
        if isinstance(instead, EncoderConfig):
            return instead
        if not saved:
            raise ValueError(
                f"{self.folder}: its config.json does not say what encoder {name} is; "
                f"pass encoders={{{name!r}: EncoderConfig(...)}}"
            )
        config = EncoderConfig(**saved)
        model, revision = split_revision(instead) if instead else (config.model, config.revision)
        return dataclasses.replace(config, model=self._located(model), revision=revision)

    def _located(self, model: str) -> str:
        """A path that counts from the weights folder, if something is there; else as it is."""
        beside = self.folder / model
        return str(beside.resolve()) if beside.exists() else model

    def _compare(self, what: str, expected: Mapping[str, Any] | None, part: PromptEncoder | VAE, argument: str) -> None:
        if not self.check or expected is None:
            return
        expected, received, unrecorded = comparable(expected, part.fingerprint())
        keys = sorted((expected.keys() | received.keys()) - ROUNDING)
        differing = [
            f"  {key}: expected {expected.get(key)!r}, received {received.get(key)!r}"
            for key in keys
            if expected.get(key) != received.get(key)
        ]
        if differing:
            head = f"{what} is not the one that the weights in {self.folder} were trained with:"
            foot = f"give the right one by {argument}, or check=False to use it all the same"
            raise ValueError("\n".join([head, *differing, foot]))
        warn_unrecorded(f"{what} of the weights in {self.folder}", unrecorded)

"""`TextToImage`: prompts -> images, by encoders, model and VAE that belong together.

    pipe = lidit.TextToImage.from_pretrained("weights")
    pipe("a red circle", seed=0)[0].save("x.png")

An image depends on its prompt, its seed, its size and the sampler's settings. It does not depend on what else is made in the
same call, nor on the device: only the last bits of the arithmetic do.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lidit.components import Components
from lidit.diffusion import Objective, objective_from_dict
from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.model import LIDiT
from lidit.sampler import OnStep, PromptBatch, SamplerConfig, initial_noise, sample
from lidit.weights import load_weights, read_config, resolve_weights

if TYPE_CHECKING:
    from lidit.frozen.vae import VAE

IMAGE_SIZE = (256, 256)  # height, width in pixels where neither caller nor weights say another


class TextToImage:
    """Encoders, model and VAE, ready to be called with prompts.

    Args:
        model: on its device, in the precision that it shall run in.
        encoders: one for each of the model's, by name; they may be on another device.
        vae: on the model's device.
        objective: what the model was trained with.
        image_size: (height, width) in pixels that is made by default.

    Raises:
        ValueError: the parts do not fit each other.
    """

    sampler = SamplerConfig()
    """Steps and guidance by default; may be replaced."""

    def __init__(
        self,
        model: LIDiT,
        encoders: Mapping[str, PromptEncoder],
        vae: VAE,
        objective: Objective,
        image_size: tuple[int, int] = IMAGE_SIZE,
    ):
        widths = {name: encoder.width for name, encoder in encoders.items()}
        if widths != model.config.encoders:
            raise ValueError(f"encoders: expected {model.config.encoders} (name: hidden width), received {widths}")
        if vae.channels != model.config.in_channels:
            raise ValueError(f"VAE: expected {model.config.in_channels} latent channels, received {vae.channels}")
        self.model, self.encoders, self.vae, self.objective = model, dict(encoders), vae, objective
        self.image_size = image_size
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.instruction_embeds = {  # name -> (P, E)
            name: torch.from_numpy(encoder.instruction_embeds).to(self.device, self.dtype)
            for name, encoder in encoders.items()
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        encoders: Mapping[str, str | EncoderConfig | PromptEncoder] | None = None,
        encoder_device: str | torch.device | None = None,
        vae: str | VAE | None = None,
        check: bool = True,
        download_models: bool = False,
    ) -> TextToImage:
        """Loads weights and what they were trained with, and checks that it is that.

        Args:
            path: weights folder of `save_weights`, or a hub id `owner/name` that holds the same files.
            revision: full commit hash, for hub ids; of a local folder, `sha256:` and the digest that it must have.
            device: of model and VAE; default: the GPU if there is one.
            dtype: of the model; default: bf16 on a GPU, fp32 on the CPU.
            encoders: where an encoder is now, by name: a folder, `owner/name@commit`, a config, or one that is loaded. The
                others are taken from where they were in training; a relative path counts from the weights folder, else from
                the working directory.
            encoder_device: of the encoders; default: `device`.
            vae: the same for the VAE.
            check: refuse encoders and a VAE that are not those of training. Their files are read once to digest them.
            download_models: fetch encoders and a VAE that the weights name by a hub id and that are not in the local hub
                cache. Off: whoever made the weights chose them, not you. What `encoders` and `vae` name is always fetched.

        Raises:
            ValueError: something is not there, damaged, or not what the weights were trained with; names the difference.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = resolve_weights(path, revision)
        saved, components = read_config(folder), Components(folder, check, download_models)
        if "objective" not in saved:
            raise ValueError(
                f"{folder}: its config.json does not name the objective; save the weights with extra={{'objective': ...}}"
            )
        names, given = saved["model"]["encoders"], dict(encoders or {})
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"encoders: expected names among {', '.join(names)}, received {', '.join(unknown)}")
        opened = {name: components.encoder(name, given.get(name), encoder_device or device) for name in names}
        return cls(
            load_weights(
                path, device=device, dtype=dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
            ),
            opened,
            components.vae(vae, device),
            objective_from_dict(saved["objective"]),
            tuple(saved.get("image_size", IMAGE_SIZE)),
        )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: str | Sequence[str] = "",
        batch_size: int = 8,
        on_step: OnStep | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """Makes images.

        Args:
            prompts: one or several.
            seed: image k of every prompt begins with the noise of `seed + k`; or one seed for each image.
            images_per_prompt: images of each prompt.
            height, width: in pixels; by default `image_size`.
            negative_prompt: what guidance leads away from, one for all prompts or one for each; by default the empty prompt.
            batch_size: images made at once; changes speed and memory, not the images.
            on_step: progress over all images: (steps done, steps in all, latents of the batch at hand).
            **sampling: fields of `SamplerConfig` that shall differ from `self.sampler`, such as `num_inference_steps`.

        Returns:
            All images of the first prompt, then those of the next.

        Raises:
            ValueError: a size that model or VAE cannot make, a wrong number of seeds or negative prompts.
            RuntimeError: the model gave NaN or Inf.
        """
        config = dataclasses.replace(self.sampler, **sampling)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if images_per_prompt < 1 or batch_size < 1:
            raise ValueError(
                f"expected images_per_prompt and batch_size of at least 1, received {images_per_prompt} and {batch_size}"
            )
        negatives = _one_each(negative_prompt, len(prompts))
        rows = [row for row in range(len(prompts)) for _ in range(images_per_prompt)]  # image -> its prompt
        seeds = _seeds(seed, len(prompts), images_per_prompt)
        shape = self.latent_shape(*self._image_size(height, width))
        self._warn_if_cut([*prompts, *(negatives if config.guidance_scale != 1 else [])])
        images: list[Image.Image] = []
        batches = [range(start, min(start + batch_size, len(rows))) for start in range(0, len(rows), batch_size)]
        for number, batch in enumerate(batches):
            latents = self.sample_latents(
                initial_noise([torch.Generator().manual_seed(seeds[image]) for image in batch], shape),
                [prompts[rows[image]] for image in batch],
                [negatives[rows[image]] for image in batch],
                config,
                _over_batches(on_step, number, len(batches)),
            )
            images += self.decode(latents)
        return images

    def sample_latents(
        self,
        noise: Tensor,
        prompts: Sequence[str],
        negatives: Sequence[str],
        config: SamplerConfig,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """noise (B, C, H, W), B prompts and B negative (or empty) prompts -> latents (B, C, H, W) float32."""
        negative = self.encode(negatives) if config.guidance_scale != 1 else None
        noise = noise.to(self.device, torch.float32)
        latents = sample(self.model, self.objective, noise, self.encode(prompts), negative, config, on_step)
        if not bool(torch.isfinite(latents).all()):
            raise RuntimeError("the model gave NaN or Inf: are these weights of a run that diverged?")
        return latents

    def encode(self, prompts: Sequence[str]) -> PromptBatch:
        """B prompts -> their states, as the model gets them. Equal prompts are encoded once."""
        distinct = list(dict.fromkeys(prompts))
        embeds, masks = {}, {}
        for name, encoder in self.encoders.items():
            prompt_embeds, prompt_mask = encoder(distinct)
            embeds[name], masks[name] = prompt_embeds.to(self.device, self.dtype), prompt_mask.to(self.device)
        place = {prompt: row for row, prompt in enumerate(distinct)}
        return PromptBatch(embeds, masks, self.instruction_embeds).rows([place[prompt] for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """latents (B, C, H, W) -> B RGB images."""
        pixels = self.vae.decode(latents).float()  # B 3 height width, in [-1, 1]
        values = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(image) for image in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents. Raises ValueError for a size that cannot be made, naming those near it."""
        downscale, patch_size = self.vae.downscale, self.model.config.patch_size
        unit = downscale * patch_size
        if height < unit or width < unit or height % unit or width % unit:
            near = sorted({max(unit, side // unit * unit + more) for side in (height, width) for more in (0, unit)})
            raise ValueError(
                f"image of {height} x {width} pixels: expected height and width to be multiples of {unit} (the VAE makes "
                f"{downscale} pixels one, the model {patch_size} of these a patch), such as {', '.join(map(str, near))}"
            )
        return self.vae.channels, height // downscale, width // downscale

    def _image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        return (
            self.image_size[0] if height is None else height,
            self.image_size[1] if width is None else width,
        )

    def _warn_if_cut(self, prompts: Sequence[str]) -> None:
        """Says which encoders cannot take all of the prompts."""
        for name, encoder in self.encoders.items():
            _, excess = encoder.tokenize(list(dict.fromkeys(prompts)))
            if excess.any():
                warnings.warn(
                    f"encoder {name} reads {encoder.max_prompt_tokens} tokens of a prompt; longer prompts: "
                    f"{int((excess > 0).sum())}, by {int(excess.max())} tokens at most; their ends are cut off",
                    stacklevel=3,
                )


def _one_each(negative_prompt: str | Sequence[str], count: int) -> list[str]:
    values = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(values) != count:
        raise ValueError(f"negative_prompt: expected one, or one for each of {count} prompts, received {len(values)}")
    return values


def _seeds(seed: int | Sequence[int], prompts: int, images_per_prompt: int) -> list[int]:
    """One seed per image."""
    if not isinstance(seed, Iterable):
        return [int(seed) + k for _ in range(prompts) for k in range(images_per_prompt)]
    seeds = [int(value) for value in seed]
    if len(seeds) != prompts * images_per_prompt:
        raise ValueError(
            f"seed: expected one whole number, or one for each of {prompts * images_per_prompt} images, received {len(seeds)}"
        )
    return seeds


def _over_batches(on_step: OnStep | None, batch: int, batches: int) -> OnStep | None:
    """Steps of one batch -> steps of all."""
    if on_step is None:
        return None
    return lambda done, steps, latents: on_step(batch * steps + done, batches * steps, latents)

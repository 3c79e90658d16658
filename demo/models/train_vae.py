"""Train the demo's autoencoder: a small `AutoencoderKL` of diffusers' own class, on rendered scenes.

    python -m demo.models.train_vae                             # about half an hour on one CPU thread
    python -m demo.models.train_vae --steps 200 --out /tmp/vae

Run it again after any kind of end: it goes on from its last checkpoint, and the weights equal those of an unbroken run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from demo.models import training
from demo.models.training import FitConfig, finished, fit, publish
from demo.models.vae_card import model_card
from demo.world.language import HELD_OUT_SEEDS, TRAIN_SEEDS
from demo.world.scenes import image_size, make_scene, render

FOLDER = Path("demo/vae")
OTHERS_SHARE = 0.2  # of the learning rate, for biases and norms
FIRST_LOG_VARIANCE = (
    -4.0
)  # of the latents: noise of deviation 1, as it would be else, drowns them for hundreds of steps

Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]  # a convolution's kernel, and a matrix on the same memory


@dataclass(frozen=True)
class TrainVAEConfig:
    """How the autoencoder is made, how long it is trained, and where it goes."""

    out: Path = FOLDER
    """Folder of the finished autoencoder."""
    work: Path = Path(".work/vae")
    """Folder of the checkpoint."""
    widths: tuple[int, ...] = (16, 32, 48)
    """Channels at full, half and quarter size; one size more doubles the downscale."""
    latent_channels: int = 4
    """Channels of the latents."""
    groups: int = 1
    """Groups of every GroupNorm. Few: a group of few channels forgets how bright and how colored a plain image is."""
    steps: int = 7000
    """Optimizer steps."""
    small_steps: int = 4000
    """The first of them, on scenes of half the size: a quarter of the work, and colors are learned as well from them."""
    images: int = 8
    """Scenes per step."""
    learning_rate: float = 5e-3
    """Peak learning rate of the convolutions (Muon); everything else gets a fifth of it (AdamW)."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    kl_weight: float = 1e-3
    """Weight of the KL term (mean over latent values) against the pixel term (mean over pixel values)."""
    edge_weight: float = 0.5
    """Weight of the differences between neighboring pixels: what keeps edges and corners sharp."""
    checkpoint_seconds: float = 20.0
    """Seconds between checkpoints."""
    stop_after_steps: int | None = None
    """End this run after so many steps, with a checkpoint: for slots of limited time."""
    measured_images: int = 512
    """Training scenes that the latents' mean and deviation, hence shift and scaling factor, are measured on."""
    exam_images: int = 500
    """Held-out scenes that the figures are measured on."""
    seed: int = 0
    """Decides initialization, data and noise."""
    threads: int = 1
    """Torch threads; the weights are equal between runs of the same number."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or any(width % self.groups for width in self.widths):
            raise ValueError(
                f"widths: expected at least two multiples of groups ({self.groups}), received {list(self.widths)}"
            )

    def recipe(self) -> dict[str, Any]:
        """All that decides the weights. A checkpoint of another recipe is never continued."""
        names = (
            "widths", "latent_channels", "groups", "steps", "small_steps", "images", "learning_rate", "warmup_steps",
            "kl_weight", "edge_weight", "seed", "threads",
        )  # fmt: skip
        return {name: list(self.widths) if name == "widths" else getattr(self, name) for name in names}


def main(config: TrainVAEConfig) -> None:
    """Train, save and examine, unless that is done already."""
    torch.set_num_threads(config.threads)
    if finished(config.out, config.recipe()):
        print(f"{config.out}: finished already, skipped")
        return
    torch.manual_seed(config.seed)
    model = build(config)
    result = train(config, model)
    if result is None:
        print(f"vae: stopped after {config.stop_after_steps} steps; run again to go on")
        return
    save_vae(config, model, result)


def build(config: TrainVAEConfig) -> AutoencoderKL:
    """The untrained autoencoder (torch's global generator): convolutions only, so any image size will do."""
    levels = len(config.widths)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    deviation = slice(config.latent_channels, None)  # of the posterior, as log variance: the upper half of the channels
    torch.nn.init.zeros_(model.encoder.conv_out.weight[deviation])
    torch.nn.init.constant_(model.encoder.conv_out.bias[deviation], FIRST_LOG_VARIANCE)
    return model


def build_optimizers(model: AutoencoderKL, learning_rate: float) -> tuple[list[torch.optim.Optimizer], list[Pair]]:
    """Muon for the convolutions, AdamW for biases and norms; and the pairs of which Muon sees the second.

    Muon takes matrices: each kernel is given to it as (outputs, all else), a view on the same memory.
    """
    kernels = [value for value in model.parameters() if value.ndim == 4]
    pairs = [(kernel, torch.nn.Parameter(kernel.detach().view(len(kernel), -1))) for kernel in kernels]
    others = [value for value in model.parameters() if value.ndim != 4]
    optimizers = [
        torch.optim.Muon([matrix for _, matrix in pairs], learning_rate, 0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, OTHERS_SHARE * learning_rate, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    return optimizers, pairs


def batch_of_scenes(config: TrainVAEConfig, step: int) -> torch.Tensor:
    """pixels (B, 3, height, width) in [-1, 1] of training scenes: a function of seed and step alone.

    The scenes of a step have one size; sizes take turns as often as `image_size` gives them.
    """
    rng = np.random.default_rng([config.seed, step, 2])
    height, width = image_size(int(rng.integers(len(TRAIN_SEEDS))), 32 if step < config.small_steps else 64)
    seeds = rng.integers(len(TRAIN_SEEDS), size=config.images)
    return torch.stack([scene_pixels(TRAIN_SEEDS[seed], height, width) for seed in seeds.tolist()])


def scene_pixels(seed: int, height: int, width: int) -> torch.Tensor:
    """pixels (3, height, width) in [-1, 1] of a scene."""
    image = np.asarray(render(make_scene(seed), height, width), np.float32)
    return torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)


def pixel_loss(
    model: AutoencoderKL, pixels: torch.Tensor, noise: torch.Generator, config: TrainVAEConfig
) -> torch.Tensor:
    """L1 of pixels, L1 of differences between neighbors, and the KL divergence of the latents from a unit normal."""
    posterior = model.encode(pixels).latent_dist
    decoded = model.decode(posterior.sample(noise)).sample
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + config.edge_weight * edges + config.kl_weight * kl


def train(config: TrainVAEConfig, model: AutoencoderKL) -> dict[str, float] | None:
    """Trains in place, from the checkpoint if there is one; returns wall seconds and last loss, or None if stopped."""
    optimizers, pairs = build_optimizers(model, config.learning_rate)

    def loss_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        loss = pixel_loss(model, batch_of_scenes(config, step), noise, config)
        return loss, loss

    def hand_over_gradients() -> None:
        for kernel, matrix in pairs:
            matrix.grad = kernel.grad.view(matrix.shape)  # type: ignore[union-attr]

    fit_config = FitConfig(
        config.work / "vae.pt", config.recipe(), [("vae", config.steps)], config.warmup_steps, config.checkpoint_seconds,
        config.stop_after_steps,
    )  # fmt: skip
    return fit(fit_config, model, optimizers, loss_of, hand_over_gradients)


@torch.inference_mode()
def measure_latents(model: AutoencoderKL, images: int) -> tuple[float, float]:
    """(mean, standard deviation) of all latents' values over training scenes, in float32."""
    total = squares = count = 0.0
    for seed in TRAIN_SEEDS[:images]:
        latents = model.encode(scene_pixels(seed, *image_size(seed))[None]).latent_dist.mode().double()
        total, squares, count = (
            total + latents.sum().item(),
            squares + latents.square().sum().item(),
            count + latents.numel(),
        )
    mean = total / count
    return mean, math.sqrt(squares / count - mean**2)


@torch.inference_mode()
def examine(folder: Path, images: int) -> dict[str, Any]:
    """PSNR (dB, mean over held-out scenes; whole, by size, the worst) and the moments of the scaled latents, as saved."""
    model = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    scale, shift = model.config.scaling_factor, model.config.shift_factor
    psnr: dict[str, list[float]] = {}
    latents = []
    for seed in HELD_OUT_SEEDS[:images]:
        height, width = image_size(seed)
        pixels = scene_pixels(seed, height, width)[None]
        mean = model.encode(pixels).latent_dist.mode()  # (1, C, H, W)
        decoded = model.decode(mean).sample.clamp(-1, 1)
        error = ((decoded - pixels) / 2).square().mean().item()
        psnr.setdefault(f"{height}x{width}", []).append(-10 * math.log10(error))
        latents.append(((mean - shift) * scale)[0].flatten(1))
    values = torch.cat(latents, dim=1)  # (C, all places)
    everything = [value for size in psnr.values() for value in size]
    return {
        "psnr_db": float(np.mean(everything)),
        "psnr_db_worst": float(min(everything)),
        "psnr_db_by_size": {size: float(np.mean(found)) for size, found in sorted(psnr.items())},
        "latent_mean": values.mean().item(),
        "latent_std": values.std().item(),
        "channel_mean": [round(value, 4) for value in values.mean(1).tolist()],
        "channel_std": [round(value, 4) for value in values.std(1).tolist()],
        "latent_absolute_max": values.abs().max().item(),
    }


def save_vae(config: TrainVAEConfig, model: AutoencoderKL, result: dict[str, float]) -> None:
    """Notes the latents' moments, saves in float16, examines what was saved, writes record and card, moves into place."""
    model.eval()
    mean, deviation = measure_latents(model, config.measured_images)
    model.register_to_config(shift_factor=mean, scaling_factor=1 / deviation)

    def describe(folder: Path, weights: dict[str, Any]) -> dict[str, Any]:
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "encoder_parameters": sum(parameter.numel() for parameter in model.encoder.parameters()),
            "downscale": 2 ** (len(config.widths) - 1),
            "scaling_factor": 1 / deviation,
            "shift_factor": mean,
            **weights,
            **result,
            "config": config.recipe(),
            "exam_images": config.exam_images,
            "figures": examine(folder, config.exam_images),
        }

    record = publish(config.out, lambda folder: model.half().save_pretrained(folder), describe, model_card)
    print(f"vae: {record['figures']['psnr_db']:.2f} dB on {config.exam_images} held-out scenes, in {config.out}")


def parse(arguments: list[str] | None = None) -> TrainVAEConfig:
    """Returns the config of a command line."""
    return training.parse(TrainVAEConfig, "demo.models.train_vae", __doc__, arguments)


if __name__ == "__main__":
    main(parse())

"""The README.md of the trained autoencoder, written from its `training.json` and nothing else."""

from __future__ import annotations

from typing import Any

from demo.world.language import HELD_OUT_SEEDS, TRAIN_SEEDS

CARD = """---
license: apache-2.0
library_name: diffusers
---
# Autoencoder of the demo's scenes

A small `AutoencoderKL` of diffusers' own class for the lidit demo's closed world (coloured shapes on a plain
background). It stands in for an f8c16 autoencoder where the demo and the tests need one that is small, real and free of
downloads. It knows rendered scenes and nothing else: photographs come out blurred and off in colour.

| | |
|---|---|
| image | RGB in [-1, 1], height and width multiples of {downscale}; trained at 64 x 64, 48 x 80 and 80 x 48 pixels |
| latents | {latent_channels} channels, {downscale}x down: 64 x 64 pixels -> {latent_channels} x {side} x {side} |
| scaling_factor, shift_factor | {scaling_factor:.5f}, {shift_factor:.5f}: latents so scaled have mean 0, deviation 1 |
| channels at full to lowest size | {widths}, one ResNet block each (two in the decoder), no attention |
| parameters | {parameters:,}, of which the encoder has {encoder_parameters:,} |
| weights | float16, {weight_bytes:,} bytes, sha256 `{sha256}` |

## Training
Loss: L1 of pixels + {edge_weight} x L1 of differences between neighbouring pixels + {kl_weight} x KL divergence of the
latents from a unit normal (mean over latent values). The KL term is heavier than usual, so that latents are smooth and
of a deviation near 1: easy to model for a small diffusion transformer.

| | |
|---|---|
| data | scenes of seeds {train_first:,} to {train_last:,}, rendered anew at every step |
| steps | {steps:,}, each of {images} scenes; the first {small_steps:,} at half the size |
| optimiser | Muon (convolutions), AdamW (the rest) |
| learning rate | peak {learning_rate}, warm-up {warmup_steps} steps, linear fall over the last third |
| seed | {seed} |
| wall time | {seconds:.0f} s on {threads} CPU thread(s) |
| training loss, mean of the last steps | {loss:.4f} |

Made by `python -m demo.models.train_vae`, which also wrote this card and `training.json` beside it.

## Figures
Measured on the saved float16 weights (in float32 arithmetic, decoding the mean), on {exam_images} scenes of seeds
{held_first:,} and up, never trained on; PSNR per image, then averaged.

{figures}
"""


def model_card(record: dict[str, Any]) -> str:
    """The card of the autoencoder of `record`."""
    figures = record["figures"]
    rows = [
        ("PSNR, mean", f"**{figures['psnr_db']:.2f} dB**"),
        ("PSNR, worst scene", f"{figures['psnr_db_worst']:.2f} dB"),
    ]
    rows += [
        (f"PSNR, {size.replace('x', ' x ')} pixels (height x width)", f"{value:.2f} dB")
        for size, value in figures["psnr_db_by_size"].items()
    ]
    rows += [
        ("stored latents, mean and deviation", f"{figures['latent_mean']:.3f}, {figures['latent_std']:.3f}"),
        ("deviation of each channel", ", ".join(f"{value:.2f}" for value in figures["channel_std"])),
        ("largest absolute value", f"{figures['latent_absolute_max']:.2f}"),
    ]
    table = "\n".join(["| on held-out scenes | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return CARD.format(
        **{key: record[key] for key in record if key not in ("figures", "config")},
        **{key: value for key, value in record["config"].items() if key != "widths"},
        widths=", ".join(map(str, record["config"]["widths"])),
        side=64 // record["downscale"],
        train_first=TRAIN_SEEDS[0],
        train_last=TRAIN_SEEDS[-1],
        held_first=HELD_OUT_SEEDS[0],
        figures=table,
    )

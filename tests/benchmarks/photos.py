"""Thirty-five photographs learnt by heart: COCO files -> store -> trainer -> weights -> images, and a picture of how it went.

    python tests/benchmarks/photos.py --work /tmp/photos --steps 4000 --picture docs/images/photos.png

Real input all along: photographs and their captions, TAEF2 latents, states of two small LLMs that real text has trained, the
jobs of `lidit` as a user starts them. What is shown is that features, masks, loss, sampler and autoencoder belong together: a
caption that was trained on gives its photograph back. Nothing is said about captions that were not. Every job goes on where
it was stopped, so the same command may be given again, with more steps too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
import report

from lidit.store import columns
from lidit.store.codec import decode_latents
from lidit.text_to_image import TextToImage

ENCODERS = {"stories": "stories260K", "babyllama": "babyllama-tok105"}
SHOWN = 12  # photographs in the picture
CURVE, EDGE = 360, 44  # pixels: height of the loss curve, and what is left around it


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for store, run and weights")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps of 16 samples (4000)")
    parser.add_argument("--resolution", type=int, default=64, help="side of the square bucket, pixels (64)")
    parser.add_argument("--zoom", type=int, default=2, help="of the images in the picture (2)")
    parser.add_argument("--picture", type=Path, help="PNG to write: loss curve, photographs, samples")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    make_store(args)
    train(args)
    lidit("export", "--run", args.work / "runs" / "photos", "--out", args.work / "weights", "--overwrite", "true")
    shown = draw_photos(args)
    if args.picture is not None:
        large = [(caption, *(zoomed(part, args.zoom) for part in pair)) for caption, *pair in shown]
        picture(losses(args), large, args.picture)


def lidit(*argv: object) -> None:
    """One job, as a user starts it; its summary goes to the screen."""
    subprocess.run([sys.executable, "-m", "lidit.cli", *map(str, argv)], check=True, cwd=report.ROOT)


def make_store(args: Namespace) -> None:
    """Photographs and captions, their embeddings and latents."""
    data, store = report.data_folder(), args.work / "store"
    options = {"template": "plain", "instruction": "", "dtype": "fp32", "max_prompt_tokens": 128}
    encoders = [{"name": name, "model": str(data / "models" / folder), **options} for name, folder in ENCODERS.items()]
    config = args.work / "embed.yaml"
    config.write_text(yaml.safe_dump({"text": [columns.CAPTION_ORIGINAL], "encoders": encoders}))
    lidit("ingest", "--store", store, "--source", f"coco:{data / 'coco-mini-cc'}")
    lidit("embed", "--store", store, "--config", config)
    model, size = data / "taef2" / "taef2.safetensors", args.resolution
    lidit("latents", "--store", store, "--model", model, "--resolution", size, "--step", 16, "--max_aspect", 1.7)


def train(args: Namespace) -> None:
    """The tiny LI-DiT on one CPU worker; no prompt is dropped: what is learnt by heart needs no guidance."""
    config = {
        "name": "photos",
        "store": str(args.work / "store"),
        "storage": str(args.work / "runs"),
        "vae": str(report.data_folder() / "taef2" / "taef2.safetensors"),
        "model": {"size": "tiny"},
        "phases": [{"steps": args.steps, "global_batch_size": 16, "resolution": args.resolution}],
        "data": {
            "encoders": list(ENCODERS),
            "text_mix": {columns.CAPTION_ORIGINAL: 1.0},
            "prompt_drop_prob": 0.0,
            "pad_multiple": 8,
            "read_threads": 1,
        },
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 100, "schedule": "cosine", "final_share": 0.05},
        "ema": {"decay": 0.995},
        "precision": "fp32",
        "microbatch_size": 16,
        "num_workers": 1,
        "use_gpu": False,
        "checkpoint": {"every_steps": 200},
        "metrics": {"every_steps": 20},
    }
    path = args.work / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    lidit("train", "--config", path)


def losses(args: Namespace) -> list[tuple[int, float]]:
    """(step, mean loss since the line before)."""
    text = (args.work / "runs" / "photos" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def draw_photos(args: Namespace) -> list[tuple[str, Image.Image, Image.Image]]:
    """(caption, photograph as its latents decode, sample for its first caption) of some; says how near the samples are."""
    import lance

    data = report.data_folder()
    table = lance.dataset(str(args.work / "store" / columns.SAMPLES_TABLE))
    wanted = [columns.CAPTION_ORIGINAL, columns.LATENTS, columns.BUCKET, columns.IMAGE_DIGEST]
    rows = table.to_table(columns=wanted)
    digests = rows[columns.IMAGE_DIGEST].to_pylist()  # a row is a caption, a photograph has five
    rows = rows.take([digests.index(digest) for digest in dict.fromkeys(digests)]).sort_by(columns.BUCKET)
    field = table.schema.field(columns.LATENTS)
    latents = decode_latents(rows[columns.LATENTS], field, rows[columns.BUCKET])
    captions, buckets = rows[columns.CAPTION_ORIGINAL].to_pylist(), rows[columns.BUCKET].to_pylist()
    encoders = {name: str(data / "models" / folder) for name, folder in ENCODERS.items()}
    pipe = TextToImage.from_pretrained(args.work / "weights", encoders=encoders, device="cpu")
    made, errors = [], []
    for row, bucket in enumerate(buckets):
        height, width = map(int, bucket.split("x"))
        caption = captions[row]
        (sample,) = pipe(caption, seed=row, height=height, width=width, guidance_scale=1.0, num_inference_steps=24)
        photo = image(pipe.vae.decode(torch.from_numpy(np.asarray(latents[row]))[None])[0])
        errors.append(float(np.mean((np.asarray(sample, np.float64) - np.asarray(photo, np.float64)) ** 2)))
        made.append((caption, photo, sample))
    psnr = [10 * np.log10(255**2 / max(error, 1e-9)) for error in errors]
    others = [
        10 * np.log10(255**2 / np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
        for _, a, _ in made
        for _, b, _ in made
        if a is not b and a.size == b.size
    ]
    print(
        f"{len(made)} captions, samples against their photographs: median {np.median(psnr):.1f} dB PSNR, worst "
        f"{min(psnr):.1f}; two different photographs: median {np.median(others):.1f} dB"
    )
    return [made[row] for row in np.linspace(0, len(made) - 1, SHOWN).round().astype(int)]


def image(pixels: torch.Tensor) -> Image.Image:
    """(3, height, width) from -1 to 1 -> an image."""
    return Image.fromarray(((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def zoomed(small: Image.Image, times: int) -> Image.Image:
    """So many times as wide and high."""
    return small.resize((small.width * times, small.height * times), Image.Resampling.BICUBIC)


# -- the picture ------------------------------------------------------------------------------------------------------


def picture(curve: list[tuple[int, float]], shown: list[tuple[str, Image.Image, Image.Image]], file: Path) -> None:
    """The loss curve over pairs of photograph (above) and sample (below)."""
    cell = max(max(photo.size) for _, photo, _ in shown) + 8
    columns_of_grid = SHOWN // 2
    words = 44
    canvas = Image.new("RGB", (columns_of_grid * cell, CURVE + 2 * (2 * cell + words)), "white")
    draw_curve(ImageDraw.Draw(canvas), curve, canvas.width)
    for number, (caption, photo, sample) in enumerate(shown):
        left = number % columns_of_grid * cell
        top = CURVE + number // columns_of_grid * (2 * cell + words)
        for below, part in enumerate((photo, sample)):
            canvas.paste(part, (left + (cell - part.width) // 2, top + below * cell + (cell - part.height) // 2))
        text = "\n".join(textwrap.wrap(caption.strip(), 22)[:3])
        ImageDraw.Draw(canvas).multiline_text((left + 4, top + 2 * cell), text, fill="black", font_size=11, spacing=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.quantize(128).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:,.0f} kB")


def draw_curve(draw: Any, curve: list[tuple[int, float]], width: int) -> None:
    """Loss over steps, logarithmic, with a smoothed line on top of the values."""
    steps, values = np.array([step for step, _ in curve]), np.log(np.array([loss for _, loss in curve]))
    near = max(1, len(values) // 40)
    smooth = np.array([values[max(0, at - near) : at + near + 1].mean() for at in range(len(values))])
    low, high = values.min(), values.max()
    bottom, top = CURVE - EDGE, 30

    def place(line: np.ndarray) -> list[tuple[float, float]]:
        x = EDGE + steps / steps[-1] * (width - EDGE - 16)
        return list(zip(x.tolist(), (bottom - (line - low) / (high - low) * (bottom - top)).tolist()))

    draw.line([(EDGE, top), (EDGE, bottom), (width - 16, bottom)], fill="black")
    draw.line(place(values), fill=(170, 190, 220))
    draw.line(place(smooth), fill=(20, 60, 150), width=2)
    for share in (0.0, 0.5, 1.0):
        level = low + share * (high - low)
        draw.text((2, bottom - share * (bottom - top) - 6), f"{np.exp(level):.2f}", fill="black", font_size=12)
        draw.text(
            (EDGE + share * (width - EDGE - 60), bottom + 4), f"{int(share * steps[-1]):,}", fill="black", font_size=12
        )
    head = "flow matching loss by step; below: photographs as TAEF2 decodes them, and samples for their captions"
    draw.text((EDGE + 4, 6), head, fill="black", font_size=13)


if __name__ == "__main__":
    main()

"""Pictures that are no scenes: what the demo VLM learns to decline, so that it says so of a photograph."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from demo.world.world import BACKGROUNDS, COLOURS

KINDS = ("plain", "noise", "haze", "gradient", "crowd", "crop")


def clutter(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """An RGB picture of one of six kinds: an empty background, noise, coloured haze, a gradient, a crowd, a crop."""
    kind = KINDS[rng.integers(len(KINDS))]
    if kind == "plain":
        colours = [*BACKGROUNDS.values(), *COLOURS.values(), tuple(rng.integers(0, 256, 3).tolist())]
        return Image.new("RGB", (width, height), colours[rng.integers(len(colours))])
    if kind == "noise":
        return _image(rng.normal(rng.uniform(60, 200), rng.uniform(20, 80), (height, width, 3)))
    if kind == "haze":
        return _image(haze(rng, height, width))
    if kind == "gradient":
        return _image(gradient(rng, height, width))
    if kind == "crowd":
        behind = haze if rng.random() < 0.5 else gradient
        return crowd(rng, _image(behind(rng, height, width)))
    inner = crowd(rng, _image(haze(rng, height * 2, width * 2)))
    softened = inner.filter(ImageFilter.GaussianBlur(rng.uniform(0, 3)))
    return softened.crop((width // 2, height // 2, width // 2 + width, height // 2 + height))


def haze(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise with the falling spectrum of photographs, (height, width, 3): channels alike, as daylight has it."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])  # (height, width // 2 + 1)
    falloff = 1 / np.maximum(frequency, 1 / max(height, width)) ** rng.uniform(0.8, 1.6)
    falloff[0, 0] = 0
    layers = rng.normal(size=(4, *frequency.shape)) + 1j * rng.normal(size=(4, *frequency.shape))
    fields = np.fft.irfft2(layers * falloff, s=(height, width))  # (4, height, width)
    shared, own = fields[0], np.moveaxis(fields[1:], 0, -1)
    mixed = shared[..., None] + rng.uniform(0.1, 0.8) * own
    return rng.uniform(40, 215, 3) + rng.uniform(25, 75) * mixed / mixed.std()


def gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Four corner colours, blended, (height, width, 3); now and then with a soft stain."""
    corners = rng.uniform(0, 255, (2, 2, 3))
    down, across = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    field = (corners[0, 0] * (1 - down) + corners[1, 0] * down) * (1 - across)
    field = field + (corners[0, 1] * (1 - down) + corners[1, 1] * down) * across
    if rng.random() < 0.5:
        middle, spread = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.4)
        stain = np.exp(-((down - middle[0]) ** 2 + (across - middle[1]) ** 2) / (2 * spread**2))
        field = field * (1 - stain) + rng.uniform(0, 255, 3) * stain
    return field


def crowd(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """The picture under a dozen or more lines, ovals and polygons that overlap."""
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    for _ in range(rng.integers(6, 40)):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        points = [(float(x * width), float(y * height)) for x, y in rng.uniform(-0.1, 1.1, (rng.integers(2, 7), 2))]
        shape = rng.integers(3)
        if shape == 0:
            draw.line(points, fill=colour, width=int(rng.integers(1, 5)))
        elif shape == 1:
            (left, top), (right, bottom) = points[:2]
            draw.ellipse((min(left, right), min(top, bottom), max(left, right), max(top, bottom)), fill=colour)
        elif len(points) > 2:
            draw.polygon(points, fill=colour)
    return picture


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))

"""Scenes of the closed world as pixels, captions and ground truth: everything a sample needs, from one seed.

scene = make_scene(7)
render(scene, 64, 64), describe(scene, 0), noisy_caption(scene, 0), truth(scene)
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

from PIL import Image, ImageDraw

from demo.world.captions import describe, noisy_caption
from demo.world.world import (
    BACKGROUNDS,
    COLOURS,
    SIZES,
    Scene,
    SceneObject,
    all_relations,
    image_size,
    make_scene,
)

__all__ = [
    "Scene",
    "SceneObject",
    "describe",
    "example",
    "image_size",
    "make_scene",
    "noisy_caption",
    "render",
    "truth",
]

SUPERSAMPLE = 4
"""Scenes are drawn this many times larger, then averaged down: Pillow's polygons have hard edges."""


def render(scene: Scene, height: int, width: int) -> Image.Image:
    """The scene as an RGB image of `height` x `width` pixels: the same bytes on every run."""
    if height < 16 or width < 16:
        raise ValueError(f"A scene needs at least 16 x 16 pixels, got {height} x {width}.")
    scale = SUPERSAMPLE
    canvas = Image.new("RGB", (width * scale, height * scale), BACKGROUNDS[scene.background])
    for item in scene.objects:
        side = round(SIZES[item.size] * min(height, width) * scale)
        corner = (round(item.x * width * scale - side / 2), round(item.y * height * scale - side / 2))
        canvas.paste(surface(item, side), corner, silhouette(item.shape, side))
    return canvas.reduce(scale)


def surface(item: SceneObject, side: int) -> Image.Image:
    """The object's material as a square tile; the middle of the tile always has the object's own colour.

    Stripes are darker and dots lighter than the object, so that the two differ even where they blur.
    """
    colour = COLOURS[item.colour]
    tile = Image.new("RGB", (side, side), colour)
    draw = ImageDraw.Draw(tile)
    if item.texture == "striped":
        dark = tuple(round(channel * 0.5) for channel in colour)
        for left, right in ((0.18, 0.36), (0.64, 0.82)):
            draw.rectangle((left * side, 0, right * side, side), fill=dark)
    if item.texture == "dotted":
        light = tuple(round(channel * 0.15 + 255 * 0.85) for channel in colour)
        for row in (-1, 0, 1):
            for column in (-1, 0, 1):
                if row or column:
                    x, y = side * (0.5 + 0.27 * column), side * (0.5 + 0.27 * row)
                    draw.circle((x, y), side * 0.085, fill=light)
    return tile


def silhouette(shape: str, side: int) -> Image.Image:
    """The shape as a mask (mode L, 255 inside) that fills a square of `side` pixels."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "square":
        # Its box would look larger than every other shape of the same size word; a smaller one evens the areas out.
        draw.rectangle((side * 0.06, side * 0.06, side * 0.94, side * 0.94), fill=255)
    else:
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in outline(shape)], fill=255)
    return mask


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygonal shape in the unit square."""
    if shape == "triangle":
        return [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5)]
    if shape == "cross":
        a, b = 0.32, 0.68
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if shape == "star":
        corners = []
        for index in range(10):
            radius = 0.52 if index % 2 == 0 else 0.24
            angle = math.pi * (index / 5 - 0.5)
            corners.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
        return corners
    raise ValueError(f"Unknown shape {shape!r}; expected one of circle, square, triangle, diamond, cross, star.")


def truth(scene: Scene, height: int = 1, width: int = 1) -> dict[str, Any]:
    """Ground truth of a scene, ready for JSON.

    `objects`: colour, shape, size, texture and box (left, top, right, bottom; relative, for this height and width).
    `counts`: one entry per group of equal objects, with the positions of its members in `objects`.
    `relations`: every true relation between two groups, as positions in `counts`.
    """
    positions = {id(item): index for index, item in enumerate(scene.objects)}
    return {
        "background": scene.background,
        "objects": [
            {
                "colour": item.colour,
                "shape": item.shape,
                "size": item.size,
                "texture": item.texture,
                "box": [round(value, 4) for value in item.box(height, width)],
            }
            for item in scene.objects
        ],
        "counts": [
            {
                "colour": group.colour,
                "shape": group.shape,
                "size": group.size,
                "texture": group.texture,
                "count": group.count,
                "objects": [positions[id(item)] for item in group.objects],
            }
            for group in scene.groups
        ],
        "relations": [
            {"subject": relation.subject, "relation": direction, "other": relation.other}
            for relation in all_relations(scene)
            for direction in relation.directions
        ],
    }


def example(seed: int, height: int, width: int) -> dict[str, Any]:
    """One sample: PNG bytes, size in pixels, original caption (may be None), and truth as JSON with a dense `caption`."""
    scene = make_scene(seed)
    buffer = io.BytesIO()
    render(scene, height, width).save(buffer, format="PNG")
    return {
        "image_bytes": buffer.getvalue(),
        "height": height,
        "width": width,
        "caption_original": noisy_caption(scene, 0),
        "truth": json.dumps({**truth(scene, height, width), "caption": describe(scene, 0)}),
    }

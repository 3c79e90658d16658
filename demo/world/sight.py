"""Sees a scene: pixels alone -> background and objects with colour, shape, size, place.

Pixels that differ from the background form patches; a patch is an object. Its colour is the world's colour that most of its
pixels have (a stripe's darker shade counts as its own), its shape that of the rendered object which, laid over it at the
same area and center, differs least, its size by the side that such an object of this area has.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo.world.scenes import render
from demo.world.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, SceneObject

LEAST_AREA = 0.007  # of the shorter side squared; the smallest object (a small star) has 0.013
GRID = 20  # samples along a side of a normalized silhouette
REACH = 2.0  # half its side, in root areas
BORDER = 2  # pixels of the frame that tell the background
FOREGROUND = 0.45  # of the way from the background to the patch's colour: what makes neighbors one patch
LEAST_CONTRAST = 48.0  # RGB distance from the background that is surely no noise
WORST_FIT = 0.30  # mean difference of silhouettes beyond which a patch is none of the world's shapes
OFFSETS = (0.0, 0.5)  # of a pixel: where the rendered objects stand that patches are compared with

UNKNOWN = "unknown"
"""The shape of what is none of the world's."""


@dataclass(frozen=True)
class Seen:
    """An object; lengths as fractions of the canvas."""

    colour: str
    shape: str
    size: str
    x: float
    """Center, from the left."""
    y: float
    """Center, from the top."""
    height: float
    """Of its box."""
    width: float
    """Of its box."""
    misfit: float
    """Mean difference from the shape's silhouette, 0 to 1."""


@dataclass(frozen=True)
class View:
    """What a picture shows."""

    background: str
    objects: tuple[Seen, ...]


def look(pixels: np.ndarray) -> View:
    """Pixels (height, width, 3) uint8 of one image -> what is there. Objects are ordered from the top left."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 16:
        raise ValueError(f"pixels: expected (height, width, 3) of at least 16 x 16, received {pixels.shape}")
    height, width = pixels.shape[:2]
    values = pixels.astype(np.float32)
    background, ground = _background(values)
    shades, owners = _palette(ground)
    distances = np.linalg.norm(values[:, :, None] - shades, axis=-1)  # height width shades
    nearest = owners[distances.argmin(axis=-1)]  # of every pixel: the colour's number, -1 for the background
    contrast = np.linalg.norm(values - ground, axis=-1)
    short = min(height, width)
    objects = []
    for patch in _patches(contrast > LEAST_CONTRAST):
        votes = np.bincount(nearest[patch][nearest[patch] >= 0], minlength=len(COLOURS))
        if not votes.any():
            continue  # a stain of the background
        colour = list(COLOURS)[int(votes.argmax())]
        coverage = _coverage(values, ground, np.array(COLOURS[colour], np.float32), patch)
        area = float(coverage.sum())
        if area < LEAST_AREA * short**2:
            continue
        objects.append(_identify(coverage, area, colour, background, short))
    return View(background, tuple(sorted(objects, key=lambda seen: seen.y + 0.5 * seen.x)))


def _background(values: np.ndarray) -> tuple[str, np.ndarray]:
    """The world's background that most of the frame's pixels are nearest to, and the colour that it really has there (3,)."""
    inner = np.ones(values.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = False
    frame = values[inner]  # pixels 3
    colours = np.array(list(BACKGROUNDS.values()), np.float32)
    nearest = np.linalg.norm(frame[:, None] - colours, axis=-1).argmin(axis=-1)
    index = int(np.bincount(nearest, minlength=len(colours)).argmax())
    return list(BACKGROUNDS)[index], np.median(frame[nearest == index], axis=0)


def _palette(ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(shades (n, 3), the number of the colour that each belongs to, -1 for the background)."""
    colours = np.array(list(COLOURS.values()), np.float32)
    count = len(colours)
    shades = np.concatenate([ground[None], colours, colours * 0.5])  # 0.5: a stripe of it
    return shades, np.array([-1, *range(count), *range(count)])


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """Connected parts (8 neighbors) of a mask, each as a mask with its holes filled."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    return [ndimage.binary_fill_holes(labels == number) for number in range(1, count + 1)]


def _coverage(values: np.ndarray, ground: np.ndarray, colour: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """(height, width): how much of each pixel the object covers, 0 to 1; 1 inside, whatever its texture there."""
    from scipy import ndimage

    span = colour - ground
    share = np.clip((values - ground) @ span / max(float(span @ span), 1.0), 0, 1)
    inside = ndimage.binary_erosion(patch)
    near = ndimage.binary_dilation(patch)
    return np.where(inside, 1.0, np.where(near, share, 0.0)).astype(np.float32)


def _identify(coverage: np.ndarray, area: float, colour: str, background: str, short: int) -> Seen:
    height, width = coverage.shape
    outline = _normalized(coverage, area)
    kinds, outlines = _templates(short, colour, background)
    misfits = np.abs(outlines - outline).sum(axis=(1, 2)) / np.maximum(outlines, outline).sum(axis=(1, 2))
    best, misfit = kinds[int(misfits.argmin())], float(misfits.min())
    side = float(np.sqrt(area)) * best.side / short
    size = min(SIZES, key=lambda word: abs(np.log(side / SIZES[word])))
    rows, columns = np.nonzero(coverage >= min(FOREGROUND, float(coverage.max())))
    box = [float(rows.min()), float(rows.max() + 1), float(columns.min()), float(columns.max() + 1)]
    return Seen(
        colour=colour,
        shape=best.shape if misfit <= WORST_FIT else UNKNOWN,
        size=size,
        x=(box[2] + box[3]) / 2 / width,
        y=(box[0] + box[1]) / 2 / height,
        height=(box[1] - box[0]) / height,
        width=(box[3] - box[2]) / width,
        misfit=misfit,
    )


def _normalized(coverage: np.ndarray, area: float) -> np.ndarray:
    """Coverage (height, width) -> (GRID, GRID) around its center of mass, scaled by its root area."""
    from scipy import ndimage

    rows, columns = np.arange(coverage.shape[0]), np.arange(coverage.shape[1])
    row, column = (coverage.sum(axis=1) @ rows) / area, (coverage.sum(axis=0) @ columns) / area
    steps = (np.arange(GRID) + 0.5) / GRID * 2 - 1  # -1 to 1
    reach = steps * REACH / 2 * np.sqrt(area)
    grid = np.meshgrid(row + reach, column + reach, indexing="ij")
    return ndimage.map_coordinates(coverage, grid, order=1, mode="constant")


@dataclass(frozen=True)
class _Template:
    """What `_coverage` makes of one rendered object."""

    shape: str
    texture: str
    side: float
    """Of its box, in root areas."""


@functools.cache
def _templates(short: int, colour: str, background: str) -> tuple[list[_Template], np.ndarray]:
    """Every shape, size and texture in that colour on that background, in an image whose shorter side has `short` pixels:
    their kinds and outlines (n, GRID, GRID). Rendered, then seen as any object is."""
    kinds, outlines = [], []
    ground = np.array(BACKGROUNDS[background], np.float32)
    for shape, size, texture, offset in itertools.product(SHAPES, SIZES, TEXTURES, OFFSETS):
        center = 0.5 + offset / short
        scene = Scene((SceneObject(colour, shape, size, texture, center, center),), background, seed=0)
        values = np.asarray(render(scene, short, short), np.float32)
        patches = _patches(np.linalg.norm(values - ground, axis=-1) > LEAST_CONTRAST)
        patch = max(patches, key=lambda mask: mask.sum())
        coverage = _coverage(values, ground, np.array(COLOURS[colour], np.float32), patch)
        area = float(coverage.sum())
        kinds.append(_Template(shape, texture, SIZES[size] * short / float(np.sqrt(area))))
        outlines.append(_normalized(coverage, area))
    return kinds, np.stack(outlines)


def look_at(image: Image.Image) -> View:
    """`look` for an image of Pillow's."""
    return look(np.asarray(image.convert("RGB")))

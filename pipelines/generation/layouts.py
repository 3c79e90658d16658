"""Layouts of public benchmarks: the file names at which their scorers expect generated images, and nothing beside them.

| layout           | files                                                                    | images a prompt, seeds |
|------------------|--------------------------------------------------------------------------|------------------------|
| `geneval`        | `<index, 5 digits>/metadata.jsonl`, `<index>/samples/<k, 5 digits>.png`  | 4, seed + k            |
| `t2i-compbench`  | `samples/<prompt>_<number, 6 digits>.png`, number = index * images + k   | 10, 42 + k             |
| `dpg`            | `<prompt's file name>.png`: a 2 x 2 grid of 4 images                     | 4, seed + k            |
| `drawbench`      | `<index>_<k>.png`                                                        | 1, seed + k            |
| `flat`           | `<index, 5 digits>_<k, 2 digits>.png` and `prompts.jsonl`                | 1, seed + k            |

Names are pure functions; `write_layout` puts files in place whole, and leaves those alone that are there and the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lidit.images.pixels import open_rgb
from pipelines.generation.prompt_sets import Picture

UNFINISHED = ".unfinished"
NAME_BYTES = 255  # of a file's name, at most, on the file systems in use
GRID = 2  # images along a side of DPG-Bench's


@dataclass(frozen=True)
class Layout:
    """Describes how a benchmark wants its images."""

    images_per_prompt: int
    seed: int
    image_file: Callable[[Picture, int], str]
    """(picture, images per prompt) -> its file, from the output folder."""
    owned: str
    """Folder, from the output folder, in which nothing else may lie; empty: the output folder may hold anything."""
    grid: bool = False
    """All images of a prompt in one file."""


LAYOUTS = {
    "geneval": Layout(4, 0, lambda one, _: f"{one.prompt.index:05d}/samples/{one.number:05d}.png", ""),
    "t2i-compbench": Layout(
        10, 42, lambda one, many: f"samples/{one.prompt.text}_{one.prompt.index * many + one.number:06d}.png", "samples"
    ),
    "dpg": Layout(4, 0, lambda one, _: f"{one.prompt.stem}.png", ".", grid=True),
    "drawbench": Layout(1, 0, lambda one, _: f"{one.prompt.index}_{one.number}.png", "."),
    "flat": Layout(1, 0, lambda one, _: f"{one.prompt.index:05d}_{one.number:02d}.png", ""),
}


def image_files(layout: str, wanted: Sequence[Picture], images_per_prompt: int) -> list[str]:
    """The file of every picture, from the output folder. Pictures of one grid share one.

    Raises:
        ValueError: a prompt cannot stand in a file name as its scorer needs it, or a grid has no four images.
    """
    rules = LAYOUTS[layout]
    if rules.grid and images_per_prompt != GRID**2:
        raise ValueError(f"layout {layout}: expected {GRID**2} images a prompt, received {images_per_prompt}")
    files = [rules.image_file(one, images_per_prompt) for one in wanted]
    for one, file in zip(wanted, files):
        if layout == "t2i-compbench" and ("_" in one.prompt.text or "/" in one.prompt.text):
            raise ValueError(
                f"layout {layout}: expected prompts without _ and /, which stand in file names; prompt {one.prompt.index} "
                f"is {one.prompt.text!r}"
            )
        if len(Path(file).name.encode()) > NAME_BYTES or "\0" in file:
            raise ValueError(f"layout {layout}: prompt {one.prompt.index} gives a file name that is too long: {file!r}")
    return files


def text_files(layout: str, wanted: Sequence[Picture], images_per_prompt: int) -> dict[str, str]:
    """Gives what a scorer reads beside the images: file -> content."""
    if layout == "geneval":
        return {
            f"{one.prompt.index:05d}/metadata.jsonl": json.dumps(one.prompt.record, ensure_ascii=False) + "\n"
            for one in wanted
        }
    if layout == "flat":
        files = image_files(layout, wanted, images_per_prompt)
        lines = [
            json.dumps({"file": file, "prompt": one.prompt.text, "seed": one.seed}, ensure_ascii=False)
            for one, file in zip(wanted, files)
        ]
        return {"prompts.jsonl": "\n".join(lines) + "\n"}
    return {}


def check_folder(layout: str, out: Path, expected: Iterable[str]) -> None:
    """Raises ValueError where something else lies in a folder of which the scorer reads everything."""
    owned = LAYOUTS[layout].owned
    if not owned or not (out / owned).is_dir():
        return
    known = {Path(file).name for file in expected} | {UNFINISHED}
    strange = sorted(path.name for path in (out / owned).iterdir() if path.name not in known)
    if strange:
        raise ValueError(
            f"{out / owned} holds {strange[0]!r} ({len(strange)} files in all) that this run does not make, and the scorer "
            f"would read it too: give another folder"
        )


def write_layout(
    layout: str,
    out: Path,
    wanted: Sequence[Picture],
    images_per_prompt: int,
    read: Callable[[Sequence[str]], Mapping[str, bytes]],
) -> int:
    """Writes the files, prompt by prompt; returns how many images files there are now.

    Args:
        layout: one of `LAYOUTS`.
        out: folder to write.
        wanted: the pictures, all of a prompt together.
        images_per_prompt: how many that is.
        read: image ids -> their encoded images (PNG); those that could not be made are missing.
    """
    files = image_files(layout, wanted, images_per_prompt)
    check_folder(layout, out, files)
    for name, text in text_files(layout, wanted, images_per_prompt).items():
        _put(out, name, text.encode())
    written = 0
    for start in range(0, len(wanted), images_per_prompt):
        group = wanted[start : start + images_per_prompt]
        images = read([one.image_id for one in group])
        if LAYOUTS[layout].grid:
            if len(images) == len(group):
                _put(out, files[start], _grid([images[one.image_id] for one in group]))
                written += 1
            continue
        for one, file in zip(group, files[start:]):
            if one.image_id in images:
                _put(out, file, images[one.image_id])
                written += 1
    (out / UNFINISHED / "file").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it was never made, or somebody keeps something there
        (out / UNFINISHED).rmdir()
    return written


def _put(out: Path, name: str, data: bytes) -> None:
    """A file that is there whole or not at all; untouched if it is there already."""
    path = out / name
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    beside = out / UNFINISHED / "file"
    for folder in (path.parent, beside.parent):
        folder.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(data)
    os.replace(beside, path)


def _grid(images: Sequence[bytes]) -> bytes:
    """Four images as one, row by row, PNG."""
    opened = [open_rgb(data) for data in images]
    width, height = opened[0].size
    sheet = Image.new("RGB", (GRID * width, GRID * height))
    for number, image in enumerate(opened):
        sheet.paste(image, (number % GRID * width, number // GRID * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()

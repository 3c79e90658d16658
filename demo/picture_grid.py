"""Pictures of a sample table as one: `python -m demo.picture_grid --store build/exam --every 9 --out grid.png`.

Rows come in the order of prompts and images; a wrong one (by the column of `lidit score`, if it is there) gets a red edge.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lance
from PIL import Image

from demo.plugins import CORRECT
from lidit.images.pixels import open_rgb
from lidit.store import columns

GAP = 4  # pixels between pictures
RIGHT, WRONG = (255, 255, 255), (214, 40, 40)


def grid(pictures: Sequence[tuple[Image.Image, bool]], across: int, scale: int) -> Image.Image:
    """Pictures of one size, and whether each is right -> one picture, `across` of them in a row, enlarged without smoothing."""
    width, height = (side * scale for side in pictures[0][0].size)
    rows = -(-len(pictures) // across)
    made = Image.new("RGB", (across * (width + GAP), rows * (height + GAP)), RIGHT)
    for number, (picture, right) in enumerate(pictures):
        x, y = number % across * (width + GAP), number // across * (height + GAP)
        made.paste(RIGHT if right else WRONG, (x, y, x + width + GAP, y + height + GAP))
        made.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x + GAP // 2, y + GAP // 2))
    return made


def read(store: str, every: int) -> list[tuple[Image.Image, bool]]:
    """Every so many-th picture of a store, and whether it is right (true where nobody has looked)."""
    table = lance.dataset(f"{store}/{columns.SAMPLES_TABLE}")
    scored = CORRECT in table.schema.names
    names = ["prompt_index", columns.SAMPLE_INDEX, columns.IMAGE, *([CORRECT] if scored else [])]
    rows = sorted(table.to_table(columns=names).to_pylist(), key=lambda row: (row["prompt_index"], row["sample_index"]))
    shown = [row for row in rows if row[columns.IMAGE] is not None][::every]
    return [(open_rgb(row[columns.IMAGE]), row.get(CORRECT) is not False) for row in shown]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="of `lidit generate`")
    parser.add_argument("--every", type=int, default=1, help="show every so many-th picture (default all)")
    parser.add_argument("--columns", type=int, default=14, help="pictures in a row (default %(default)s)")
    parser.add_argument("--scale", type=int, default=2, help="times that a picture is enlarged (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file to write, .png")
    values = parser.parse_args(argv)
    pictures = read(values.store, values.every)
    if not pictures:
        parser.error(f"--store: {values.store} has no pictures")
    grid(pictures, values.columns, values.scale).save(values.out, optimize=True)


if __name__ == "__main__":
    main()

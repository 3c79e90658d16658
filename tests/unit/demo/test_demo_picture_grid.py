"""The grid of pictures: where each stands, and how a wrong one is marked."""

from __future__ import annotations

import io
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from PIL import Image

from demo.picture_grid import GAP, WRONG, main

pytestmark = pytest.mark.unit
COLOURS = [(10, 20, 30), (60, 70, 80), (90, 100, 110), (5, 5, 5)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Four pictures of one colour each, rows out of order; the third prompt's is wrong."""

    def png(colour: tuple[int, int, int]) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (6, 4), colour).save(buffer, format="PNG")
        return buffer.getvalue()

    order = [2, 0, 3, 1]
    rows = [
        {"prompt_index": at // 2, "sample_index": at % 2, "image": png(COLOURS[at]), "scenes_correct": at != 2}
        for at in order
    ]
    lance.write_dataset(pa.Table.from_pylist(rows), str(tmp_path / "samples.lance"))
    return tmp_path


def test_pictures_stand_in_order_and_wrong_ones_are_marked(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    main(["--store", str(store), "--columns", "2", "--scale", "3", "--out", str(out)])
    made = Image.open(out)
    assert made.size == (2 * (18 + GAP), 2 * (12 + GAP))
    centres = [(11, 8), (11 + 22, 8), (11, 8 + 16), (11 + 22, 8 + 16)]
    assert [made.getpixel(centre) for centre in centres] == COLOURS
    corners = [(0, 0), (22, 0), (0, 16), (22, 16)]
    assert [made.getpixel(corner) == WRONG for corner in corners] == [False, False, True, False]


def test_every_second_one(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    main(["--store", str(store), "--every", "2", "--columns", "14", "--scale", "1", "--out", str(out)])
    made = Image.open(out)
    assert [made.getpixel((5 + number * 10, 4)) for number in (0, 1)] == [COLOURS[0], COLOURS[2]]


def test_a_store_without_pictures_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = pa.schema([("prompt_index", pa.int32()), ("sample_index", pa.int32()), ("image", pa.large_binary())])
    lance.write_dataset(schema.empty_table(), str(tmp_path / "samples.lance"))
    with pytest.raises(SystemExit):
        main(["--store", str(tmp_path), "--out", str(tmp_path / "grid.png")])
    assert "has no pictures" in capsys.readouterr().err

"""Pictures of a table that somebody else made: scored and laid out without starting programs or filling the memory."""

import io
import os
import struct
import zlib

import lance
import numpy as np
import pyarrow as pa
import pytest
from PIL import EpsImagePlugin, Image

from demo import picture_grid
from lidit.images.pixels import ImageError
from lidit.store import columns
from pipelines.engine.pool import ActorsConfig
from pipelines.evaluation.fid import _images
from pipelines.generation.layouts import _grid
from pipelines.score import ScoreConfig, ScoreImages

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]


def encoded(format):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, format)
    return buffer.getvalue()


def huge_png():
    """Its header says 10,001 x 10,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 10_001, 10_000, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000 * (1 + 10_001 // 8 + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A `gs` on the PATH; the file that it makes when it is started."""
    folder, mark = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    program = folder / "gs"
    program.write_text(f'#!/bin/sh\necho "$@" >> "{mark}"\nexit 0\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers whether there is one
    return mark


def score(image):
    stage = ScoreImages(ScoreConfig(metrics=("scenes",), actors=ActorsConfig(num_gpus=0.0)))
    wanted = [field.name for field in stage.writes(stage.config)]
    window = {columns.IMAGE: pa.array([image], pa.binary()), columns.PROMPT_RECORD: pa.array([None], pa.string())}
    return stage(pa.RecordBatch.from_pydict(window), wanted).errors


def store_of(folder, image):
    row = {columns.IMAGE: image, "prompt_index": 0, columns.SAMPLE_INDEX: 0}
    lance.write_dataset(pa.Table.from_pylist([row]), str(folder / columns.SAMPLES_TABLE))
    return str(folder)


def test_the_ground_plain_pillow_starts_it(ghostscript):
    with pytest.raises(OSError):
        Image.open(io.BytesIO(encoded("EPS"))).load()
    assert ghostscript.exists()


HOSTILE = [pytest.param(lambda: encoded("EPS"), "not an image of a format known here", id="eps")]
HOSTILE += [pytest.param(huge_png, "10001 x 10000 pixels: more than the 100,000,000 allowed", id="huge")]


@pytest.mark.parametrize("image, reason", HOSTILE)
def test_scored(image, reason, ghostscript):
    assert reason in score(image())[0]
    assert not ghostscript.exists()


@pytest.mark.parametrize("image, reason", HOSTILE)
def test_in_a_set_that_fid_compares(image, reason, ghostscript, tmp_path):
    with pytest.raises(ImageError, match=reason):
        list(_images(store_of(tmp_path / "store", image()), 4))
    assert not ghostscript.exists()


@pytest.mark.parametrize("image, reason", HOSTILE)
def test_in_a_layout(image, reason, ghostscript):
    with pytest.raises(ImageError, match=reason):
        _grid([encoded("PNG"), image(), encoded("PNG"), encoded("PNG")])
    assert not ghostscript.exists()


@pytest.mark.parametrize("image, reason", HOSTILE)
def test_in_the_demo_s_grid(image, reason, ghostscript, tmp_path):
    with pytest.raises(ImageError, match=reason):
        picture_grid.read(store_of(tmp_path / "store", image()), 1)
    assert not ghostscript.exists()


def test_damaged_pictures_are_reasons_whatever_their_decoder_raises():
    assert "image: damaged PNG" in score(encoded("PNG")[:60])[0]


def test_good_pictures_keep_their_pixels(tmp_path):
    assert not score(encoded("PNG"))
    (pictures,) = _images(store_of(tmp_path / "store", encoded("PNG")), 4)
    assert np.array_equal(pictures[0], np.full((32, 32, 3), (255, 0, 0)))

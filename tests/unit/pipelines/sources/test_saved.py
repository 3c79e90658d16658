"""Folders of `datasets`: ranges of rows, splits, captions of nulls, files cut short and damaged inside."""

import os

import numpy as np
import pytest

from pipelines.sources.registry import open_source
from tests.unit.pipelines.sources.test_tables import images, pairs, records, wanted

pytestmark = pytest.mark.unit


@pytest.fixture
def saved(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("pipelines.sources.saved.PIECE_ROWS", 4)

    def save(columns, name="set", features=None):
        made = datasets.Dataset.from_dict(columns, features=features and datasets.Features(features(datasets)))
        made.save_to_disk(str(tmp_path / name))
        return str(tmp_path / name)

    return save


def test_saved_bytes(saved):
    path = saved({"image": images(10), "text": [f"caption {number}" for number in range(10)]})
    source = open_source(f"hf:{path}")
    pieces = source.pieces()
    assert [piece["rows"] for piece in pieces] == [4, 4, 2] and all(piece["stamp"] for piece in pieces)
    made = list(source.records(pieces))
    assert pairs(made) == wanted(10) and made[7].place == "set#7"
    assert pairs(source.records(pieces[1:2])) == wanted(4, 4)


def test_saved_image_feature_keeps_bytes_as_they_are(saved, photo, tmp_path):
    """`datasets` puts the bytes of files beside it into what it saves."""
    (tmp_path / "a.jpg").write_bytes(photo(2))
    cells = [{"bytes": photo(1), "path": None}, {"bytes": None, "path": str(tmp_path / "a.jpg")}, None]
    features = lambda datasets: {"image": datasets.Image(), "caption": datasets.Value("string")}  # noqa: E731
    one, two, none = records(f"hf:{saved({'image': cells, 'caption': list('abc')}, features=features)}")
    assert one.image == photo(1) and two.image == photo(2) and two.caption == "b"
    assert none.error == "column 'image' is null"


def test_saved_splits_must_be_chosen(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"image": images(2), "caption": ["caption 0", "caption 1"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"several splits; name one: hf:.*/d/train, hf:.*/d/test"):
        open_source(f"hf:{tmp_path}/d").pieces()
    assert pairs(records(f"hf:{tmp_path}/d/test")) == wanted(2)


def test_folder_that_datasets_did_not_write(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder written by save_to_disk.*parquet:URI reads them"):
        open_source(f"hf:{tmp_path}").pieces()


SHARD = "data-00001-of-00003.arrow"


@pytest.fixture
def shards(saved, tmp_path):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [bytes(500)] * 60, "text": [f"caption {number}" for number in range(60)]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "set"), num_shards=3)
    return tmp_path / "set"


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.9])
def test_a_saved_file_cut_short_is_named(shards, keep):
    size = (shards / SHARD).stat().st_size
    os.truncate(shards / SHARD, keep if isinstance(keep, int) else int(keep * size))
    with pytest.raises(ValueError, match=rf"source hf:{shards}: expected .*{shards}/{SHARD} is damaged: copy it again"):
        open_source(f"hf:{shards}").pieces()


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_saved_notes_that_are_damaged_are_named(shards, name):
    for content in "", "{", "[]":
        (shards / name).write_text(content)
        with pytest.raises(ValueError, match=rf"source hf:{shards}: expected .*(/{name} is damaged|cannot be read)"):
            open_source(f"hf:{shards}").pieces()


def test_damage_inside_of_saved_files_is_a_row(shards):
    content = bytearray((shards / SHARD).read_bytes())
    offsets = content.index(np.arange(0, 10500, 500, dtype=np.int32).tobytes())
    content[offsets + 40 : offsets + 84] = b"\xff" * 44
    (shards / SHARD).write_bytes(content)
    made = records(f"hf:{shards}")
    bad = [record for record in made if record.error]
    assert bad and all("the folder is damaged from row" in record.error for record in bad)
    assert len({record.caption for record in made if not record.error}) >= 40


def test_saved_folder_without_rows(saved):
    with pytest.raises(
        ValueError, match=r"source hf:.*expected a folder written by save_to_disk, with rows; it has none"
    ):
        open_source(f"hf:{saved({'image': [], 'text': []})}").pieces()


def test_saved_captions_where_another_usual_column_is_of_nulls(saved):
    columns = {"image": images(3), "caption": [None] * 3, "text": [f"caption {number}" for number in range(3)]}
    assert pairs(records(f"hf:{saved(columns)}")) == wanted(3)

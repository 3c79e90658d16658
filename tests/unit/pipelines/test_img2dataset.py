"""What img2dataset leaves: folders of files, tars or Parquet."""

import pytest

from pipelines.sources.archives import PlainFiles, WebDataset
from pipelines.sources.registry import open_source
from pipelines.sources.tables import Parquet
from tests.support.ingest_rows import IMAGES, put_files
from tests.support.tars import records, samples, write_tar

pytestmark = pytest.mark.unit


def test_img2dataset_files(tmp_path):
    put_files(tmp_path / "00000")
    put_files(tmp_path / "00001", 2)
    (tmp_path / "00000.parquet").write_bytes(b"metadata only")
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "_tmp").mkdir()
    source = open_source(f"img2dataset:{tmp_path}")
    assert isinstance(source, PlainFiles)
    pieces = source.pieces()
    assert [piece["place"] for piece in pieces] == [f"{tmp_path.name}/00000", f"{tmp_path.name}/00001"]
    assert pieces[0]["stamp"] and pieces[1]["stamp"] is None, "a shard without its statistics may not be whole yet"
    made = list(source.records(pieces))
    assert [record.image for record in made] == [*IMAGES[:3], *IMAGES[:2]]
    assert made[1].caption == "caption 1" and made[1].place == f"{tmp_path.name}/00000#00001.jpg"


def test_img2dataset_files_that_are_odd(tmp_path, monkeypatch):
    put_files(tmp_path / "00000")
    (tmp_path / "00000" / "00001.jpg").unlink()
    (tmp_path / "00000" / "00002.jpg").unlink()
    (tmp_path / "00000" / "00002.jpg").symlink_to(tmp_path / "gone.jpg")
    one, two, three = records(f"img2dataset:{tmp_path}")
    assert one.error is None and "no image" in two.error and "FileNotFoundError" in three.error


def test_img2dataset_tars(tmp_path):
    write_tar(tmp_path / "00000.tar", samples(2))
    (tmp_path / "00000.parquet").write_bytes(b"metadata only")
    source = open_source(f"img2dataset:{tmp_path}")
    assert isinstance(source, WebDataset)
    assert [record.image for record in source.records(source.pieces())] == IMAGES[:2]


def test_img2dataset_parquet_is_told_from_its_files(tmp_path):
    (tmp_path / "00000.parquet").write_bytes(b"")
    source = open_source(f"img2dataset:{tmp_path}")
    assert isinstance(source, Parquet) and source.downloaded


@pytest.mark.parametrize(("name", "match"), [("00000.tfrecord", "TFRecord is not read"), ("notes.md", "found none")])
def test_img2dataset_that_is_not_read(tmp_path, name, match):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=match):
        open_source(f"img2dataset:{tmp_path}")

"""Folders as people keep them: texts reach their images however they are spelled, and whatever is passed by is counted."""

import io
import json
import os
import tarfile
import unicodedata

import pytest
from PIL import Image

from pipelines.ingestion.summary import IngestSummary
from pipelines.sources.registry import open_source
from pipelines.sources.spelling import Spelling

pytestmark = pytest.mark.unit


@pytest.fixture
def folder(tmp_path, photo):
    """`folder({name: content})`: a folder of such files; None: a picture."""

    def make(files):
        root = tmp_path / "set"
        for number, (name, content) in enumerate(files.items()):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = photo(number) if content is None else content
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return make


def look(root):
    """Path -> caption of all rows, and what was passed by."""
    source = open_source(f"folder:{root}")
    rows = source.batch(source.items()).to_pylist()
    assert all(row["ingest_error"] is None for row in rows), rows
    return {row["source"].partition("/")[2]: row["caption_original"] for row in rows}, dict(+source.left_out)


def lines(*pairs):
    return "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in pairs)


def test_metadata_holds_for_its_folder_and_below(folder):
    root = folder(
        {
            "1.png": None, "train/1.png": None, "train/deep/2.png": None, "val/3.png": None, "other/4.png": None,
            "metadata.jsonl": lines(("1.png", "top"), ("train/deep/2.png", "from the top"), ("other/4.png", "four")),
            "train/metadata.jsonl": lines(("1.png", "below"), ("deep/2.png", "from near")),
            "val/metadata.csv": "file_name,text\n3.png,\"a comma, quoted\"\n",
        }
    )  # fmt: skip
    assert look(root) == (
        {"1.png": "top", "train/1.png": "below", "train/deep/2.png": "from near", "val/3.png": "a comma, quoted",
         "other/4.png": "four"}, {},
    )  # fmt: skip


def test_metadata_spelled_otherwise(folder):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))
    root = folder(
        {
            "img/2.png": None, "img/3.png": None, "img/4.png": None, f"img/{apart}": None, "img/5.png": None,
            "metadata.jsonl": lines(
                ("./img/2.png", "dot"), ("img/3.PNG", "capitals"), ("img\\4.png", "backslash"),
                (f"img/{composed}", "accent"), ("img/gone.png", "gone"), ("../set/img/5.png", "outside"), ("/5.png", "x"),
            ),
        }
    )  # fmt: skip
    texts, left_out = look(root)
    assert texts == {
        "img/2.png": "dot", "img/3.png": "capitals", "img/4.png": "backslash", f"img/{apart}": "accent", "img/5.png": None,
    }  # fmt: skip
    assert left_out == {"texts_without_image": 3}
    told = IngestSummary("ingest", "s", counts=left_out).to_text()
    assert "3 texts name or stand beside no image that is there" in told


def test_a_name_that_may_mean_two_is_not_guessed():
    names = Spelling(["a.png", "A.png", "b.png"])
    assert [names.find(name) for name in ("a.png", "A.png", "A.PNG", "B.PNG", "./a.png")] == [
        "a.png", "A.png", None, "b.png", "a.png",
    ]  # fmt: skip


def test_two_lines_for_one_image_and_lines_without_text(folder):
    root = folder(
        {
            "1.png": None, "d/2.png": None, "metadata.jsonl": lines(("1.png", "one"), ("./1.png", "two")),
            "d/metadata.jsonl": '{"file_name": "2.png", "label": 3}\n',
        }
    )  # fmt: skip
    assert look(root) == ({"1.png": "two", "d/2.png": None}, {"texts_more": 1, "metadata_without_text": 1})


def test_text_files_beside(folder):
    root = folder(
        {
            "1.png": None, "1.txt": "one", "2.jpg": None, "2.caption": "two", "3.png": None, "3.txt": "a", "3.caption": "b",
            "IMG_4.JPG": None, "img_4.TXT": "four", "readme.txt": "no image", "5.caption": "no image",
        }
    )  # fmt: skip
    assert look(root) == (
        {"1.png": "one", "2.jpg": "two", "3.png": "a", "IMG_4.JPG": "four"}, {"texts_without_image": 2},
    )  # fmt: skip


def test_other_endings_of_images_are_taken_and_others_counted(folder):
    files = {}
    for name, kind in (("b.jfif", "JPEG"), ("c.jp2", "JPEG2000"), ("d.JPE", "JPEG"), ("e.dib", "DIB")):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48), (name[0] == "b" and "red") or "blue").save(buffer, "BMP" if kind == "DIB" else kind)
        files[name] = buffer.getvalue()
    root = folder({"a.png": None, **files, "f.heic": b"x", "g.HEIC": b"x", "notes.md": "x", "LICENSE": "x"})
    texts, left_out = look(root)
    assert list(texts) == ["a.png", "b.jfif", "c.jp2", "d.JPE", "e.dib"]
    assert left_out == {"left_out_.heic": 2, "left_out_.md": 1, "left_out_without an ending": 1}
    told = IngestSummary("ingest", "s", counts=left_out).to_text()
    assert "passed by  2 .heic, 1 .md, 1 without an ending" in told


def test_links_to_folders_are_counted(folder, tmp_path, photo):
    root = folder({"real.png": None})
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/x.png").write_bytes(photo(5))
    os.symlink("../pool", root / "linked")
    os.symlink("../pool/x.png", root / "one.png")
    assert look(root) == ({"one.png": None, "real.png": None}, {"left_out_link to a folder": 1})


JUNK = (
    "._a.png",
    ".ipynb_checkpoints/a-checkpoint.png",
    "__MACOSX/a.png",
    "deep/.hidden/b.png",
    "deep/__MACOSX/._b.png",
)


def test_hidden_files_of_folders(folder):
    assert look(folder({"a.png": None, **dict.fromkeys(JUNK, b"junk")})) == ({"a.png": None}, {"left_out_hidden": 5})


def test_a_folder_below_a_hidden_one_is_taken(folder):
    root = folder({".cache/set/a.png": None, ".cache/set/.junk/b.png": None})
    assert look(root / ".cache/set") == ({"a.png": None}, {"left_out_hidden": 1})


def test_hidden_files_of_tars_and_of_folders_of_tars(tmp_path, photo):
    def tar(path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as file:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(photo(0))
                file.addfile(info, io.BytesIO(photo(0)))

    tar(tmp_path / "set/0.tar", [*JUNK, "./a.png", "../b.png"])
    tar(tmp_path / "set/._0.tar", ["x.png"])
    tar(tmp_path / "set/.ipynb_checkpoints/0.tar", ["x.png"])
    (tmp_path / "set/notes.md").write_text("x")
    source = open_source(f"webdataset:{tmp_path}/set")
    made = list(source.records(source.pieces()))
    assert [record.place for record in made] == ["set/0.tar#./a.png", "set/0.tar#../b.png"]
    assert +source.left_out == {"left_out_hidden": 7, "left_out_.md": 1}
    assert len(open_source(f"webdataset:{tmp_path}/set/*.tar").pieces()) == 1


def test_images_of_coco_without_annotations_are_counted(folder):
    about = {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}],
        "annotations": [{"id": 7, "image_id": 1, "caption": "one"}],
    }
    source = open_source(f"coco:{folder({'images/1.png': None, 'captions.json': json.dumps(about)})}")
    assert len(source.items()) == 1 and source.left_out == {"images_without_text": 1}

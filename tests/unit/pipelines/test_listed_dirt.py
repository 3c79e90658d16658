"""Listed sources with dirt in them: nothing is cut in silence, and one bad file or entry does not stop the others."""

import json
import os

import pytest

from pipelines.ingestion.listed_sizes import note_sizes, read_sizes
from pipelines.ingestion.summary import IngestSummary
from pipelines.sources.base import ERROR_FIELD
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.unit
BOM = "\ufeff"


def rows_of(source):
    return source.batch(source.items()).to_pylist()


def prompts(tmp_path, content, name):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row["caption"] for row in rows_of(open_source(f"prompts:{tmp_path / name}"))]


@pytest.fixture
def folder(tmp_path, photo):
    """A folder of pictures `a.jpg` and `b.jpg`."""
    made = tmp_path / "set"
    (made / "below").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b.jpg", "below/c.jpg")):
        (made / name).write_bytes(photo(number))
    return made


def records(source):
    return [record for piece in source.pieces() for record in source.read(piece)]


def by_name(source):
    return {row["source"].partition("/")[2]: row for row in rows_of(source)}


# -- files of lines ---------------------------------------------------------------------------------------------------


def test_commas_and_tabs_of_a_single_column_are_text(tmp_path):
    content = 'prompt\na red cat, sitting on a mat\n"a ""blue"" dog, one\nof two lines"\n\n "edge", x\r\nlast,'
    wanted = ["a red cat, sitting on a mat", 'a "blue" dog, one\nof two lines', ' "edge", x', "last,"]
    assert prompts(tmp_path, content, "p.csv") == wanted
    assert prompts(tmp_path, "prompt\na\tb\nc\r\n", "p.tsv") == ["a\tb", "c"]
    assert prompts(tmp_path, "prompt\ra, b\rc", "p.csv") == ["a, b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "p.csv",
            "prompt,n\na,1\nred cat, on a mat,2\n",
            "row 3: expected 2 fields, received 3; quote fields that have",
        ),
        (
            "p.csv",
            "n,prompt\n1,a red cat, sitting\n",
            "row 2: expected 2 fields, received 3; quote fields that have co",
        ),
        ("p.csv", 'prompt\n"a", he said\n', "row 2: expected 1 fields, received 2; quote fields that have commas"),
        ("p.tsv", "n\tprompt\n1\ta\tb\n", "row 2: expected 2 fields, received 3; fields that have tabs"),
    ],
)
def test_more_fields_than_the_header_has_are_refused(tmp_path, name, content, match):
    with pytest.raises(ValueError, match=match):
        prompts(tmp_path, content, name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "{}one\n{}two\n"),
        ("p.txt", "{}one\r{}two\r"),
        ("p.tsv", "{}prompt\tn\none\t1\n{}two\t2\n"),
        ("p.csv", "{}prompt,n\none,1\n{}two,2\n"),
        ("p.csv", '{}prompt\r\n{}"one"\r\n{}two\r\n'),
        ("p.jsonl", '{}{{"prompt": "one"}}\n{}{{"prompt": "two"}}\n'),
    ],
)
def test_byte_order_marks_of_files_that_were_joined(tmp_path, name, content):
    assert prompts(tmp_path, content.format(BOM, BOM, BOM), name) == ["one", "two"]


def test_byte_order_marks_in_metadata(folder):
    lines = [json.dumps({"file_name": f"{name}.jpg", "text": name}) for name in "ab"]
    (folder / "metadata.jsonl").write_text(f"{BOM}{lines[0]}\n{BOM}{lines[1]}\n")
    (folder / "below/metadata.csv").write_text(f"{BOM}file_name,text\n{BOM}c.jpg,c\n")
    assert [row["caption_original"] for row in by_name(open_source(f"folder:{folder}")).values()] == ["a", "b", "c"]


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "nested"])
def test_json_that_python_does_not_read_is_told_with_file_and_line(tmp_path, value):
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: expected a JSON object: "):
        prompts(tmp_path, f'{{"prompt": "a"}}\n{{"prompt": "b", "n": {value}}}\n', "p.jsonl")
    (tmp_path / "captions.json").write_text(f'{{"images": [], "annotations": [], "info": {value}}}')
    with pytest.raises(ValueError, match=r"captions\.json: expected COCO captions"):
        open_source(f"coco:{tmp_path}").items()


# -- files that cannot be opened --------------------------------------------------------------------------------------


def test_texts_that_cannot_be_opened_are_rows_with_a_reason(folder):
    (folder / "a.txt").symlink_to("missing.txt")
    (folder / "b.txt").symlink_to("b.txt")
    (folder / "below/c.txt").write_text("c")
    source = open_source(f"folder:{folder}")
    items = source.items()
    (folder / "below/c.txt").unlink()  # after it was listed
    reasons = [row[ERROR_FIELD.name] for row in source.batch(items).to_pylist()]
    assert [reason.partition(" cannot be read")[0] for reason in reasons] == [
        "ValueError: a.txt", "ValueError: b.txt", "ValueError: c.txt",
    ]  # fmt: skip


def test_an_image_that_is_a_link_in_a_circle_is_a_row_with_a_reason(folder):
    (folder / "d.jpg").symlink_to("d.jpg")
    rows = by_name(open_source(f"folder:{folder}"))
    assert rows["d.jpg"][ERROR_FIELD.name] == "OSError: d.jpg" and rows["a.jpg"][ERROR_FIELD.name] is None


def test_links_in_a_circle_in_shards_are_rows_with_a_reason(tmp_path, photo):
    (tmp_path / "files/00000").mkdir(parents=True)
    (tmp_path / "files/00000/1.jpg").symlink_to("1.jpg")
    (tmp_path / "files/00000/2.jpg").write_bytes(photo(0))
    one, two = (record for record in records(open_source(f"img2dataset:{tmp_path}/files")))
    assert one.image is None and "OSError" in one.error and two.image == photo(0)


@pytest.mark.parametrize("kind", ["folder", "coco", "prompts", "webdataset", "parquet"])
def test_a_source_that_is_a_link_in_a_circle_is_refused(tmp_path, kind):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop"):
        open_source(f"{kind}:{tmp_path}/loop")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_cannot_be_opened(folder, name):
    """The topmost stops the job, in words; one below is counted."""
    (folder / name).symlink_to(name)
    with pytest.raises(ValueError, match=f"{name}: expected a file that can be read, received OSError"):
        open_source(f"folder:{folder}").items()
    os.rename(folder / name, folder / "below" / name)
    source = open_source(f"folder:{folder}")
    assert len(source.items()) == 3 and source.left_out["metadata_unreadable"] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\nc.jpg,caf\xe9\n".encode("latin-1")),
        ("metadata.csv", b"file_name,text\nc.jpg,a cat, sitting\n"),
        ("metadata.csv", b'file_name,text\nc.jpg,"open\n'),
        ("metadata.jsonl", b'{"file_name": "c.jpg", "text": \n'),
        ("metadata.jsonl", b"[1]\n"),
        ("metadata.jsonl", b'{"n": ' + b"[" * 100_000 + b"\n"),
    ],
)
def test_damaged_metadata_below_is_counted(folder, name, content):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.jpg", "text": "a"}))
    (folder / "below" / name).write_bytes(content)
    source = open_source(f"folder:{folder}")
    assert [row["caption_original"] for row in by_name(source).values()] == ["a", None, None]
    assert source.left_out["metadata_unreadable"] == 1
    told = IngestSummary("ingest", "s", counts=dict(source.left_out)).to_text()
    assert "1 metadata files below are damaged or cannot be opened" in told
    os.replace(folder / "below" / name, folder / name)
    with pytest.raises(ValueError, match=name):
        open_source(f"folder:{folder}").items()


# -- COCO -------------------------------------------------------------------------------------------------------------


def coco(tmp_path, photo, images, annotations):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images/a.jpg").write_bytes(photo(0))
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return open_source(f"coco:{tmp_path}")


def test_coco_entries_that_lack_something(tmp_path, photo):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2}, {"file_name": "b.jpg"}, {"id": "x", "file_name": "a.jpg"}, 7]
    annotations = [
        {"id": 1, "image_id": 1, "caption": "good"},
        {"id": 2, "image_id": 1},
        {"id": 3, "image_id": 2, "caption": "of no file"},
        {"id": "four", "image_id": "x", "caption": "also good"},
        {"image_id": 1, "caption": "no id"},
        {"id": 5, "caption": "no image"},
        {"id": [6], "image_id": 1, "caption": "no id"},
        "words",
    ]
    source = coco(tmp_path, photo, images, annotations)
    rows = rows_of(source)
    assert [row["caption_original"] for row in rows] == ["good", None, None, "also good"]
    assert [row[ERROR_FIELD.name] for row in rows] == [
        None,
        "annotation 2 of image_id 1: expected a caption, there is none",
        "image_id 2: expected one file_name under `images`, received none",
        None,
    ]
    assert {name: count for name, count in source.left_out.items() if count} == {
        "left_out_image without id": 1, "left_out_image that is no object": 1,
        "left_out_annotation without id": 2, "left_out_annotation without image_id": 1,
        "left_out_annotation that is no object": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("images", "annotations", "match"),
    [
        (
            [{"id": 1, "file_name": "a.jpg"}],
            [{"id": 1, "image_id": 1, "bbox": []}],
            "no annotation has ids and a caption",
        ),
        ([{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": "x"}], "no annotation has ids and a caption"),
        ([{"id": 1, "url": "a.jpg"}], [{"id": 1, "image_id": 1, "caption": "x"}], "no image has a file_name"),
        ([{"file_name": "a.jpg"}], [{"id": 1, "image_id": 1, "caption": "x"}], "no annotation's image is there"),
    ],
)
def test_what_is_no_coco_at_all_is_refused(tmp_path, photo, images, annotations, match):
    with pytest.raises(ValueError, match=f"expected COCO captions .*{match}"):
        coco(tmp_path, photo, images, annotations).items()


# -- notes of sizes ---------------------------------------------------------------------------------------------------


def test_a_damaged_note_of_sizes_is_passed_over(tmp_path):
    uri = f"{tmp_path}/samples.lance"
    note_sizes(uri, "ingest-20200101T000000-000000", {"x": 5})
    note_sizes(uri, "ingest-20210101T000000-000000", {"y": 6})
    path = tmp_path / "samples.lance/_listed/ingest-20210101T000000-000000.parquet"
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert read_sizes(uri, ["x", "y"])["x"] == 5, place
    path.write_bytes(whole)
    assert read_sizes(uri, ["x", "y"]) == {"x": 5, "y": 6}


def test_a_note_that_storage_does_not_give_is_an_error(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    uri = f"{tmp_path}/samples.lance"
    note_sizes(uri, "ingest-20200101T000000-000000", {"x": 5})

    def broken(*_, **__):
        raise OSError("Input/output error")

    monkeypatch.setattr(LocalFileSystem, "cat_file", broken)
    with pytest.raises(OSError, match="Input/output"):
        read_sizes(uri, ["x"])

"""Listed sources: every prompt and photo of real sets, with their dirt, and files made to be difficult."""

import io
import json

import pytest
from PIL import Image

from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table
from pipelines.ingestion.work import new_items
from pipelines.sources import files as sources_listed
from pipelines.sources.base import ERROR_FIELD
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.unit


def rows_of(source):
    return source.batch(source.items()).to_pylist()


def prompts(path, content, name="p.txt"):
    """Texts that a prompt file of this content gives."""
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = rows_of(open_source(f"prompts:{file}"))
    assert all(row[ERROR_FIELD.name] is None for row in rows)
    return [row["caption"] for row in rows]


def jpeg(path, size=(40, 20), orientation=None, format="JPEG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", size, (200, 30, 30)).save(path, format=format, exif=exif)
    return path


# -- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["scenes:0", "scenes:-3", "scenes:many", "scenes:1.5"])
def test_scenes_wants_a_number(spec):
    with pytest.raises(ValueError, match="expected a number of scenes"):
        open_source(spec)


@pytest.mark.parametrize("kind", ["folder", "coco", "prompts"])
def test_nothing_there(kind, tmp_path):
    with pytest.raises(ValueError, match="nothing is there"):
        open_source(f"{kind}:{tmp_path}/none.txt").items()


def test_scenes():
    source = open_source("scenes:3")
    rows = rows_of(source)
    assert [row["image_id"] for row in rows] == ["scene-00000000", "scene-00000001", "scene-00000002"]
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as image:
            assert image.size == (row["width"], row["height"])
        assert "caption" not in row and json.loads(row["truth"])["caption"]
        assert row[ERROR_FIELD.name] is None
    assert rows_of(open_source("scenes:5"))[:3] == rows


# -- prompt files: real sets ------------------------------------------------------------------------------------------


def test_parti_prompts(data):
    path = data / "parti" / "PartiPrompts.tsv"
    captions = [row["caption"] for row in rows_of(open_source(f"prompts:{path}"))]
    assert len(captions) == 1632
    assert sum('"' in caption for caption in captions) == 22 and sum(caption[0] == '"' for caption in captions) == 1
    assert sum(caption != caption.strip() for caption in captions) == 10
    assert sum(not caption.isascii() for caption in captions) == 17
    raw = path.read_bytes().decode().split("\n")[1:]
    assert captions == [line.split("\t")[0] for line in raw if line]


def test_geneval(data):
    path = data / "geneval" / "evaluation_metadata.jsonl"
    source = open_source(f"prompts:{path}")
    captions = [row["caption"] for row in rows_of(source)]
    assert len(captions) == 553 and captions[0] == "a photo of a bench"
    assert captions == (data / "geneval" / "generation_prompts.txt").read_text().splitlines()


def test_t2i_compbench(data):
    found = sorted((data / "t2i-compbench" / "dataset").glob("*_val.txt"))
    assert len(found) == 8
    for path in found:
        captions = [row["caption"] for row in rows_of(open_source(f"prompts:{path}"))]
        assert len(captions) == 300, path.name
        assert all(caption and "\r" not in caption and "\n" not in caption for caption in captions)


def test_drawbench(data):
    one, dense = (
        [row["caption"] for row in rows_of(open_source(f"prompts:{data / 'drawbench' / name}"))]
        for name in ("drawbench.txt", "drawbench_upsampled.txt")
    )
    assert len(one) == len(dense) == 200
    assert sum(map(len, dense)) > 4 * sum(map(len, one))


def test_coco(data):
    source = open_source(f"coco:{data / 'coco-mini-cc'}")
    items = source.items()
    assert len(items) == 175 == len({item["image_id"] for item in items})
    rows = source.batch(items[::5]).to_pylist()
    assert len(rows) == 35 and all(row[ERROR_FIELD.name] is None for row in rows)
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as image:
            upright = image.size if image.getexif().get(0x0112, 1) < 5 else image.size[::-1]
        assert (row["width"], row["height"]) == upright
    notes = json.loads((data / "coco-mini-cc" / "captions.json").read_text())["annotations"]
    wanted = {f"coco-{note['image_id']}-{note['id']}": note["caption"] for note in notes}
    assert {item["earlier_id"]: item["text"] for item in items} == wanted


# -- prompt files: text as it stands ----------------------------------------------------------------------------------


def test_txt(tmp_path):
    made = prompts(tmp_path, ' a "quoted" prompt \n\n   \n\tb\u2028c\x0bd\u0085e\n\u732b, \U0001f415\nlast')
    assert made == [' a "quoted" prompt ', "\tb\u2028c\x0bd\u0085e", "\u732b, \U0001f415", "last"]


def test_crlf_and_bom(tmp_path):
    bom = b"\xef\xbb\xbf"
    assert prompts(tmp_path, bom + b"one \r\n\r\ntwo\r\n") == ["one ", "two"]
    assert prompts(tmp_path, bom + b"prompt\tnote\r\na\tx\r\nb\ty\r\n", "p.tsv") == ["a", "b"]
    assert prompts(tmp_path, bom + b"prompt,note\r\na,x\r\nb,y\r\n", "p.csv") == ["a", "b"]
    assert prompts(tmp_path, bom + b'{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n', "p.jsonl") == ["a", "b"]


def test_tsv_knows_no_quotes(tmp_path):
    content = 'Category\tPROMPT \tnote\nx\t"a", he said\ty\nx\t"open\ty\n\nx\t edge \n'
    assert prompts(tmp_path, content, "p.tsv") == ['"a", he said', '"open', " edge "]


def test_csv_knows_quotes(tmp_path):
    content = 'note,prompt\nx,"a ""red"" car,\nparked"\ny,"two\r\nlines"\n\nz, edge \nw,plain\n'
    assert prompts(tmp_path, content, "p.csv") == ['a "red" car,\nparked', "two\r\nlines", " edge ", "plain"]


def test_csv_with_a_long_field(tmp_path):
    """The csv module itself ends at 131,072 characters."""
    text = "word " * 40_000
    assert prompts(tmp_path, f'prompt\n"{text}"\n{text}\n', "p.csv") == [text, text]
    assert prompts(tmp_path, f'note,prompt\n"{text * 4}","red, {text}"\n{text},blue\n', "p.csv") == [
        f"red, {text}",
        "blue",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "red\rblue\r\rgreen\r"),
        ("p.tsv", "prompt\tn\rred\t1\rblue\t2\rgreen\t3"),
        ("p.csv", 'n,prompt\r1,red\r2,"blue"\r3,green\r'),
        ("p.jsonl", '{"prompt": "red"}\r{"prompt": "blue"}\r{"prompt": "green"}\r'),
    ],
)
def test_lines_that_end_with_carriage_returns_alone(tmp_path, name, content):
    assert prompts(tmp_path, content, name) == ["red", "blue", "green"]


def test_a_carriage_return_in_a_line_is_a_character(tmp_path):
    assert prompts(tmp_path, "red\rblue\ngreen\r\n") == ["red\rblue", "green"]


def test_jsonl(tmp_path):
    content = '{"prompt": "a\\nb", "tag": 1}\n\n{"prompt": "\\u732b\\u2028 "}\n'
    assert prompts(tmp_path, content, "p.jsonl") == ["a\nb", "\u732b\u2028 "]


@pytest.mark.parametrize("name", ["p.TXT", "p.Tsv"])
def test_suffix_in_any_case(tmp_path, name):
    assert prompts(tmp_path, "prompt\nb", name)[-1] == "b"


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("p.txt", b"", "expected prompts, found none"),
        ("p.txt", b"\n \n\r\n", "expected prompts, found none"),
        ("p.tsv", b"", "expected a header with a column `prompt`"),
        ("p.csv", b"", "expected a header with a column `prompt`"),
        ("p.jsonl", b"", "expected prompts, found none"),
        ("p.tsv", b"prompt\tnote\n", "expected prompts, found none"),
        ("p.tsv", b"text\tnote\na\tb\n", r"column `prompt`, received \['text', 'note'\]"),
        ("p.csv", b"text,note\na,b\n", r"column `prompt`, received \['text', 'note'\]"),
        ("p.tsv", b"note\tprompt\nx\ta\nx\n", "row 3: expected 2 fields, received 1"),
        ("p.csv", b"note,prompt\nx\n", "row 2: expected 2 fields, received 1"),
        ("p.csv", b'prompt\n"open\n', "expected fields quoted as RFC 4180 says"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', "line 3: expected a JSON object"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', "line 2: expected an object with text under prompt"),
        ("p.jsonl", b'{"text": "a"}\n', "line 1: expected an object with text under prompt"),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: expected an object with text"),
        ("p.txt", b"ok\n\xff\xfe\n", "expected UTF-8, received byte 0xff at 3"),
        ("p.csv", b"prompt\n\xe9t\xe9\n", "expected UTF-8, received byte 0xe9 at 7"),
        ("p.parquet", b"x", "expected a file ending in .txt, .tsv, .csv, .jsonl"),
    ],
)
def test_prompt_file_that_is_wrong(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        open_source(f"prompts:{tmp_path / name}").items()
    assert name in str(caught.value)


def test_ids_are_stable_when_the_file_grows(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\ntwo")
    before = [item["image_id"] for item in open_source(f"prompts:{path}").items()]
    assert len(set(before)) == 3, "a prompt that is there twice is two rows"
    path.write_text("one\ntwo\ntwo\nthree\n")
    after = [item["image_id"] for item in open_source(f"prompts:{path}").items()]
    assert after[:3] == before and len(set(after)) == 4
    path.write_text("new\ntwo\none\ntwo\n")
    moved = [item["image_id"] for item in open_source(f"prompts:{path}").items()]
    assert moved[1:] == [before[1], before[0], before[2]], "where a line stands does not matter"


# -- images -----------------------------------------------------------------------------------------------------------


def test_folder(tmp_path):
    root = tmp_path / "photos"
    jpeg(root / "b.jpg", (40, 20))
    jpeg(root / "sub" / "a.PNG", (10, 30), format="PNG")
    jpeg(root / "c.jpeg", (8, 8))
    (root / "b.txt").write_text("\ufeff a bench \n", encoding="utf-8")
    (root / "metadata.jsonl").write_text('{"file_name": "sub/a.PNG", "text": "from metadata"}\n')
    (root / "notes.md").write_text("no image")
    source = open_source(f"folder:{root}")
    rows = {row["source"]: row for row in rows_of(source)}
    assert list(rows) == ["photos/b.jpg", "photos/c.jpeg", "photos/sub/a.PNG"]
    texts = [row["caption_original"] for row in rows.values()]
    assert texts == [" a bench ", None, "from metadata"]
    assert [(row["width"], row["height"]) for row in rows.values()] == [(40, 20), (8, 8), (10, 30)]
    assert rows["photos/b.jpg"]["image"] == (root / "b.jpg").read_bytes()
    assert source.schema.field("image").metadata[b"lance-encoding:compression"] == b"none"


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_sizes_are_upright(tmp_path, orientation):
    from PIL import ImageOps

    jpeg(tmp_path / "f" / "a.jpg", (40, 20), orientation)
    (row,) = rows_of(open_source(f"folder:{tmp_path / 'f'}"))
    with Image.open(io.BytesIO(row["image"])) as image:
        assert ImageOps.exif_transpose(image).size == (row["width"], row["height"])
    assert (row["width"] < row["height"]) == (orientation >= 5)


def test_damaged_images_are_rows_with_a_reason(tmp_path):
    root = tmp_path / "f"
    jpeg(root / "good.jpg")
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_text("no image")
    (root / "cut.jpg").write_bytes((root / "good.jpg").read_bytes()[:30])
    jpeg(root / "note.jpg")
    (root / "note.txt").write_bytes(b"\xff\xfe")
    rows = {row["source"]: row for row in rows_of(open_source(f"folder:{root}"))}
    assert len(rows) == 5
    for name in ("empty.jpg", "text.png", "cut.jpg", "note.jpg"):
        row = rows[f"f/{name}"]
        assert row[ERROR_FIELD.name] and row["image"] is None and row["height"] is None, name
    assert rows["f/good.jpg"][ERROR_FIELD.name] is None and rows["f/good.jpg"]["height"] == 20
    assert rows["f/text.png"][ERROR_FIELD.name] == "text, not an image"


def test_image_whose_pixels_are_cut_short_is_a_row_with_a_reason(tmp_path):
    """Its header is whole: only decoding tells."""
    whole = jpeg(tmp_path / "f" / "a.jpg", (64, 64)).read_bytes()
    (tmp_path / "f" / "a.jpg").write_bytes(whole[:-60])
    (row,) = rows_of(open_source(f"folder:{tmp_path / 'f'}"))
    assert row[ERROR_FIELD.name]


def test_too_many_pixels(tmp_path, zoo):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.png").write_bytes(zoo.bad["bomb.png"][0])
    (row,) = rows_of(open_source(f"folder:{tmp_path / 'f'}"))
    assert "900000000 pixels" in row[ERROR_FIELD.name] and row["image"] is None


def test_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_listed, "MAX_IMAGE_BYTES", 100)
    jpeg(tmp_path / "f" / "a.jpg", (40, 20))
    (row,) = rows_of(open_source(f"folder:{tmp_path / 'f'}"))
    assert "more than 100 allowed" in row[ERROR_FIELD.name] and row["image"] is None


def test_folder_without_images(tmp_path):
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(ValueError, match=r"expected images \(.*\.webp\), found none"):
        open_source(f"folder:{tmp_path}").items()


def test_bad_metadata_names_its_line(tmp_path):
    jpeg(tmp_path / "a.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b.jpg"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 2: expected an object with text under file_name, text"):
        open_source(f"folder:{tmp_path}").items()


@pytest.mark.parametrize(
    "content, match",
    [
        (None, "expected captions.json and a folder images"),
        ("{", "expected COCO captions"),
        ("[]", "expected COCO captions"),
        ('{"images": []}', "expected COCO captions .* KeyError: 'annotations'"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 5, "caption": "x"}]}', "expected COCO captions"),
    ],
)
def test_coco_that_is_wrong(tmp_path, content, match):
    if content is not None:
        (tmp_path / "captions.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        open_source(f"coco:{tmp_path}").items()


def test_metadata_lines_without_a_text_are_counted(tmp_path):
    for name in "ab":
        jpeg(tmp_path / f"{name}.jpg")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": null}\n{"file_name": "b.jpg", "text": "x"}\n'
    )
    source = open_source(f"folder:{tmp_path}")
    assert [row["caption_original"] for row in rows_of(source)] == [None, "x"]
    assert source.left_out["metadata_without_text"] == 1


def test_texts_that_are_links_elsewhere_are_not_read(tmp_path):
    """Whoever may put links into a folder may not read the files of others through it."""
    (tmp_path / "secret.txt").write_text("a key")
    (tmp_path / "secret.jsonl").write_text('{"file_name": "b.jpg", "text": "another"}\n')
    folder = tmp_path / "set"
    for name in "abc":
        jpeg(folder / f"{name}.jpg")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "metadata.jsonl").symlink_to("../secret.jsonl")
    (folder / "texts").mkdir()
    (folder / "texts" / "c").write_text("of this folder")
    (folder / "c.txt").symlink_to("texts/c")
    source = open_source(f"folder:{folder}")
    assert [row["caption_original"] for row in rows_of(source)] == [None, None, "of this folder"]
    assert source.left_out == {"left_out_link to a text elsewhere": 2, "left_out_without an ending": 1}


def test_coco_ids_that_are_given_twice(tmp_path):
    """As sets that were put together have them: no caption is swallowed, and none goes to another image."""
    for name in "abc":
        jpeg(tmp_path / "images" / f"{name}.jpg")
    notes = [(1, 5, "first"), (1, 5, "first"), (1, 5, "second"), (2, 6, "whose?"), (3, 9, "of none")]
    record = {
        "images": [
            {"id": image, "file_name": f"{name}.jpg"} for image, name in ((5, "a"), (6, "b"), (6, "c"), (5, "a"))
        ],
        "annotations": [{"id": number, "image_id": image, "caption": text} for number, image, text in notes],
    }
    (tmp_path / "captions.json").write_text(json.dumps(record))
    source = open_source(f"coco:{tmp_path}")
    rows = rows_of(source)
    assert [row["caption_original"] for row in rows] == ["first", "second", None, None]
    assert len({row["image_id"] for row in rows}) == 4 and source.left_out["annotations_twice"] == 1
    assert [row[ERROR_FIELD.name] for row in rows[2:]] == [
        "image_id 6: expected one file_name under `images`, received 2: b.jpg, c.jpg",
        "image_id 9: expected one file_name under `images`, received none",
    ]
    record["annotations"] = record["annotations"][::-1]
    (tmp_path / "captions.json").write_text(json.dumps(record))
    assert {row["caption_original"] for row in rows_of(open_source(f"coco:{tmp_path}"))} == {"first", "second", None}


def test_coco_photo_that_is_missing_is_a_row_with_a_reason(tmp_path):
    record = {
        "images": [{"id": 5, "file_name": "a.jpg"}],
        "annotations": [{"id": 2, "image_id": 5, "caption": " two\nlines "}, {"id": 1, "image_id": 5, "caption": "x"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(record))
    rows = rows_of(open_source(f"coco:{tmp_path}"))
    assert [row["image_id"].split("-")[2:] for row in rows] == [["5", "1"], ["5", "2"]]
    assert all("FileNotFoundError" in row[ERROR_FIELD.name] for row in rows)
    jpeg(tmp_path / "images" / "a.jpg")
    assert [row["caption_original"] for row in rows_of(open_source(f"coco:{tmp_path}"))] == ["x", " two\nlines "]


SECRET = "TOP SECRET LINE\n"


@pytest.mark.parametrize(
    "name",
    ["../../secret.txt", "../../outside.jpg", "{root}/secret.txt", "a/../../../secret.txt", "..\\..\\secret.txt",
     "file://{root}/secret.txt", "x::file://{root}/secret.txt", "reference::{root}/secret.txt"],
)  # fmt: skip
def test_coco_reads_nothing_outside_its_folder(tmp_path, name):
    root = tmp_path / "set"
    jpeg(root / "images" / "x.jpg")
    jpeg(tmp_path / "outside.jpg")
    (tmp_path / "secret.txt").write_text(SECRET)
    record = {
        "images": [{"id": 1, "file_name": "./x.jpg"}, {"id": 2, "file_name": name.format(root=tmp_path)}],
        "annotations": [{"id": n, "image_id": n, "caption": "c"} for n in (1, 2)],
    }
    (root / "captions.json").write_text(json.dumps(record))
    good, bad = rows_of(open_source(f"coco:{root}"))
    assert good["image"] and bad["image"] is None
    assert "expected a path below images/" in bad[ERROR_FIELD.name]


@pytest.mark.parametrize(
    "content", [SECRET.encode(), b"\xff\xfe" + SECRET.encode(), b"\0\1" + SECRET.encode(), b"%PDF secret"]
)
def test_nothing_of_a_file_that_is_no_image_is_kept(tmp_path, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret").write_bytes(content)
    (tmp_path / "set/a.png").symlink_to(tmp_path / "secret")
    (row,) = rows_of(open_source(f"folder:{tmp_path}/set"))
    assert row[ERROR_FIELD.name] and "secret" not in str(row).lower()


def test_odd_characters_in_file_names(tmp_path):
    root = tmp_path / "set"
    for name in ("a::b.jpg", "c?d#e.jpg", "f g%20h.jpg", "i*[j].jpg"):
        jpeg(root / name)
        (root / name).with_suffix(".txt").write_text(name)
    rows = rows_of(open_source(f"folder:{root}"))
    assert len(rows) == 4 and all(row["image"] and row["caption_original"] in row["source"] for row in rows)


# -- what an ingest adds ----------------------------------------------------------------------------------------------


def test_only_new_items_are_added(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo")
    source = open_source(f"prompts:{path}")
    table = Table(str(tmp_path / "samples.lance"))
    table.create(source.schema)
    assert [item["text"] for item in new_items(table, source.items())] == ["one", "two"]
    writer = ColumnFileWriter(table.uri, source.schema, "ingest-1")
    writer.write(source.batch(source.items()))
    table.append([writer.finish(table.open())])
    assert new_items(table, source.items()) == []
    path.write_text("one\ntwo\nthree")
    assert [item["text"] for item in new_items(table, source.items())] == ["three"]
    assert table.open().to_table(columns=[columns.CAPTION])["caption"].to_pylist() == ["one", "two"]


def test_id_that_comes_twice_is_refused(tmp_path):
    table = Table(str(tmp_path / "samples.lance"))
    table.create(open_source("scenes:1").schema)
    with pytest.raises(ValueError, match="image_id 'b' twice"):
        new_items(table, [{"image_id": "a"}, {"image_id": "b"}, {"image_id": "b"}])

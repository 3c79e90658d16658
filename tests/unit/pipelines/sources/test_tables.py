"""Parquet, Lance and `datasets`: the usual names and others, many small pieces, columns that are missing, files cut short."""

import io
import itertools
import json
import random
import subprocess
import sys
import tracemalloc

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources.base import USUAL_NAMES, ColumnsConfig
from pipelines.sources.registry import open_source
from pipelines.sources.tables import BATCH_BYTES, READ_ROWS, Parquet, _rows_at_a_time, table_names, table_records

pytestmark = pytest.mark.unit


def images(count, first=0):
    return [f"image {number}".encode() for number in range(first, first + count)]


def table(count=5, first=0, **more):
    texts = [f"caption {number}" for number in range(first, first + count)]
    return pa.table({"url": texts, "image": images(count, first), "caption": texts, **more})


def records(spec, names=USUAL_NAMES):
    source = open_source(spec, names)
    pieces = source.pieces()
    assert json.loads(json.dumps(pieces)) == pieces
    return list(source.records(pieces))


def pairs(made):
    return [(record.image, record.caption) for record in made]


def wanted(count, first=0):
    return [(f"image {number}".encode(), f"caption {number}") for number in range(first, first + count)]


# -- which column -----------------------------------------------------------------------------------------------------

BYTES = pa.binary()
STRUCT = pa.struct([("bytes", BYTES), ("path", pa.string())])
NULLS = pa.list_(pa.null())


@pytest.mark.parametrize(
    "fields, names, expected",
    [
        ({"image": BYTES, "caption": pa.string()}, {}, ("image", "caption", None)),
        ({"jpg": BYTES, "text": pa.string()}, {}, ("jpg", "text", None)),
        ({"png": pa.large_binary()}, {}, ("png", None, None)),
        ({"image": STRUCT, "captions": pa.list_(pa.string())}, {"caption": "captions"}, ("image", "captions", None)),
        ({"a": BYTES, "b": pa.large_string()}, {"image": "a", "caption": "b"}, ("a", "b", None)),
        ({"image": BYTES, "s": pa.float32()}, {"score": "s"}, ("image", None, "s")),
        ({"image": BYTES, "caption": pa.null(), "text": pa.string()}, {}, ("image", "text", None)),
        ({"image": BYTES, "caption": NULLS, "text": pa.null(), "prompt": pa.string()}, {}, ("image", "prompt", None)),
        ({"image": BYTES, "caption": pa.null(), "text": pa.int32()}, {}, ("image", "caption", None)),
        ({"image": BYTES, "caption": pa.null(), "text": pa.null()}, {}, ("image", "caption", None)),
        (
            {"image": BYTES, "caption": pa.null(), "text": pa.string()},
            {"caption": "caption"},
            ("image", "caption", None),
        ),
        ({"image": pa.struct([("bytes", pa.null())])}, {}, ("image", None, None)),
    ],
)
def test_names(fields, names, expected):
    assert table_names(pa.schema(list(fields.items())), ColumnsConfig(**names)) == expected


@pytest.mark.parametrize(
    "fields, names, match",
    [
        (
            {"url": pa.string()},
            {},
            r"expected an image column \(image, jpg.*the table has url; name it with --columns.image",
        ),
        ({"image": BYTES}, {"caption": "c"}, r"expected column 'c' \(--columns.caption\), the table has image"),
        ({"image": BYTES}, {"score": "s"}, r"expected column 's' \(--columns.score\)"),
        ({"image": pa.string()}, {}, "column 'image': expected an image's bytes .*it is string"),
        ({"image": pa.struct([("path", pa.string())])}, {}, "column 'image': expected an image's bytes"),
        (
            {"image": pa.struct([("bytes", pa.string())])},
            {},
            "column 'image': expected an image's bytes .*bytes: string",
        ),
        ({"image": pa.struct([("bytes", pa.list_(pa.int64()))])}, {}, "column 'image': expected an image's bytes"),
        ({"image": BYTES, "caption": pa.int32()}, {}, "column 'caption': expected text"),
        ({"image": BYTES, "s": pa.string()}, {"score": "s"}, "column 's': expected numbers"),
    ],
)
def test_names_that_do_not_fit(fields, names, match):
    with pytest.raises(ValueError, match=match):
        table_names(pa.schema(list(fields.items())), ColumnsConfig(**names))


@pytest.mark.parametrize("fields", [[("image", BYTES)] * 2, [("image", BYTES), *[("caption", pa.string())] * 2]])
def test_two_columns_of_one_name(fields):
    name = fields[-1][0]
    with pytest.raises(ValueError, match=f"expected one column '{name}' .--columns.{name}., 2 are called so"):
        table_names(pa.schema(fields), USUAL_NAMES)


@pytest.mark.parametrize("kind", ["parquet", "lance"])
def test_captions_where_another_usual_column_is_of_nulls(tmp_path, kind):
    made = table(3).rename_columns(["url", "image", "text"]).append_column("caption", pa.nulls(3))
    if kind == "parquet":
        pq.write_table(made, tmp_path / "t.parquet")
    else:
        lance.write_dataset(made, tmp_path / "t.lance")
    assert pairs(records(f"{kind}:{tmp_path}/t.{kind}")) == wanted(3)


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_row_groups_are_pieces(tmp_path):
    pq.write_table(table(10), tmp_path / "a.parquet", row_group_size=4)
    pq.write_table(table(3, 10), tmp_path / "b.parquet")
    source = open_source(f"parquet:{tmp_path}")
    pieces = source.pieces()
    assert [piece["rows"] for piece in pieces] == [4, 4, 2, 3] and all(piece["stamp"] for piece in pieces)
    assert pairs(source.records(pieces)) == wanted(13)
    assert pairs(source.records(pieces[1:2])) == wanted(4, 4)
    places = [record.place for record in source.records(pieces)]
    name = tmp_path.name
    assert places[5] == f"{name}/a.parquet#5" and places[-1] == f"{name}/b.parquet#2" and len(set(places)) == 13


def test_more_rows_than_are_read_at_a_time(tmp_path):
    count = 2 * READ_ROWS + 3
    pq.write_table(table(count), tmp_path / "a.parquet")
    made = records(f"parquet:{tmp_path}/*.parquet")
    assert pairs(made) == wanted(count)
    assert [record.place.rpartition("#")[2] for record in made] == [str(number) for number in range(count)]


def test_structs_lists_and_scores(tmp_path):
    cells = [{"bytes": b"one", "path": None}, {"bytes": None, "path": "/etc/hostname"}, None]
    captions = [["a", "b"], [], None]
    made = pa.table({"image": pa.array(cells, STRUCT), "captions": captions, "score": [1, 2, None]})
    pq.write_table(made, tmp_path / "a.parquet")
    found = records(f"parquet:{tmp_path}/a.parquet", ColumnsConfig(caption="captions", score="score"))
    assert pairs(found) == [(b"one", "a"), (b"one", "b"), (None, None), (None, None)]
    assert [record.score for record in found] == [1.0, 1.0, 2.0, None]
    assert found[2].error == "only the path of a file, no bytes", "a table must not choose which files are read"
    assert found[3].error == "column 'image' is null"


def test_rows_that_were_not_downloaded(tmp_path):
    """img2dataset keeps a row without an image for each failure."""
    made = pa.table(
        {"jpg": [b"one", None, b"three"], "caption": ["a", "b", "c"], "status": ["success", "failed", "success"]}
    )
    pq.write_table(made, tmp_path / "00000.parquet")
    assert pairs(records(f"img2dataset:{tmp_path}")) == [(b"one", "a"), (b"three", "c")]
    assert [record.error for record in records(f"parquet:{tmp_path}")] == [None, "column 'jpg' is null", None]


def test_a_file_that_lacks_the_column_is_an_error_of_its_own(tmp_path):
    pq.write_table(table(2), tmp_path / "a.parquet")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "b.parquet")
    pq.write_table(table(2, 2), tmp_path / "c.parquet")
    one, two, bad, three, four = records(f"parquet:{tmp_path}")
    assert pairs([one, two, three, four]) == wanted(4)
    assert bad.error.startswith("expected an image column") and bad.place.endswith("b.parquet:0")


def test_columns_that_no_file_has_stop_the_job(tmp_path):
    for name in "ab":
        pq.write_table(table(2), tmp_path / f"{name}.parquet")
    with pytest.raises(
        ValueError, match=r"source parquet:.*expected column 'text' .*the table has url, image, caption"
    ):
        open_source(f"parquet:{tmp_path}", ColumnsConfig(caption="text")).pieces()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 100])
def test_what_is_no_parquet(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    pq.write_table(table(2), tmp_path / "b.parquet")
    bad, *good = records(f"parquet:{tmp_path}")
    assert "no Parquet file, or one cut short" in bad.error and pairs(good) == wanted(2)


def test_a_file_cut_short_has_no_footer(tmp_path):
    pq.write_table(table(2000), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    (bad,) = records(f"parquet:{tmp_path}")
    assert "cut short" in bad.error


def test_a_damaged_page_ends_its_row_group_only(tmp_path):
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table(3000), tmp_path / "a.parquet", row_group_size=1000, data_page_size=1000, **options)
    source = open_source(f"parquet:{tmp_path}")
    pieces = source.pieces()
    column = pq.read_metadata(tmp_path / "a.parquet").row_group(1).column(1)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    made = list(source.records(pieces))
    ends = [record for record in made if record.error]
    assert len(ends) == 1 and ends[0].place.endswith("a.parquet:1#end") and "damaged from row 1" in ends[0].error
    good = pairs(record for record in made if not record.error)
    assert good[:1000] == wanted(1000) and good[-1000:] == wanted(1000, 2000) and 2000 <= len(good) < 3000


def test_storage_that_fails_is_no_row_s_error(tmp_path):
    """What cannot be read now is not noted as damaged for ever: the job stops."""
    pq.write_table(table(2), tmp_path / "a.parquet")
    source = Parquet(str(tmp_path))
    pieces = source.pieces()
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        list(source.records(pieces))


# -- Lance ------------------------------------------------------------------------------------------------------------


def test_fragments_are_pieces(tmp_path):
    uri = str(tmp_path / "t.lance")
    lance.write_dataset(table(10), uri, max_rows_per_file=4)
    source = open_source(f"lance:{uri}")
    pieces = source.pieces()
    assert [piece["rows"] for piece in pieces] == [4, 4, 2]
    assert pairs(source.records(pieces)) == wanted(10)
    lance.write_dataset(table(3, 10), uri, mode="append")
    assert pairs(source.records(pieces)) == wanted(10), "the version is pinned"
    grown = source.pieces()
    assert [piece["stamp"] for piece in grown[:3]] == [piece["stamp"] for piece in pieces]
    lance.dataset(uri).delete("caption = 'caption 5'")
    changed = [new["stamp"] != old["stamp"] for new, old in zip(source.pieces(), grown)]
    assert changed == [False, True, False, False]
    assert len(records(f"lance:{uri}")) == 12


@pytest.mark.parametrize("damage", ["cut short", "not there", "other bytes", "no bytes"])
def test_damaged_fragments_of_lance_are_a_row_each(tmp_path, damage):
    uri = str(tmp_path / "t.lance")
    lance.write_dataset(table(12), uri, max_rows_per_file=4)
    path = tmp_path / "t.lance" / "data" / lance.dataset(uri).get_fragments()[1].metadata.files[0].path
    whole = path.read_bytes()
    source = open_source(f"lance:{uri}")
    pieces = source.pieces()
    if damage == "not there":
        path.unlink()
    else:
        damaged = {"cut short": whole[: len(whole) // 2], "other bytes": b"\xff" * len(whole), "no bytes": b""}
        path.write_bytes(damaged[damage])
    made = list(source.records(pieces))
    assert [record.caption for record in made if not record.error] == [
        f"caption {n}" for n in (*range(4), *range(8, 12))
    ]
    (bad,) = [record for record in made if record.error]
    assert bad.place.endswith("/1#end") and "the fragment is damaged from row 0 on" in bad.error


@pytest.mark.parametrize("content", [b"", b"\xff" * 500])
def test_a_damaged_lance_table_is_named(tmp_path, content):
    lance.write_dataset(table(2), tmp_path / "t.lance")
    (path,) = (tmp_path / "t.lance" / "_versions").glob("*.manifest")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"source lance:{tmp_path}/t.lance: expected a Lance table"):
        open_source(f"lance:{tmp_path}/t.lance").pieces()


def test_lance_names(tmp_path):
    uri = str(tmp_path / "t.lance")
    lance.write_dataset(table(2).rename_columns(["u", "picture", "words"]), uri)
    with pytest.raises(ValueError, match="expected an image column"):
        open_source(f"lance:{uri}").pieces()
    assert pairs(records(f"lance:{uri}", ColumnsConfig(image="picture", caption="words"))) == wanted(2)


TEXTS = ["red", "blue", None]
LAYOUTS = {
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "large_dictionary": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([b"red", b"blue", None]),
    "binary_view": pa.array([b"red", b"blue", None], pa.binary_view()),
    "large_list": pa.array([["red"], ["blue"], None], pa.large_list(pa.large_string())),
    "fixed_size_list": pa.array([["red"], ["blue"], None], pa.list_(pa.string(), 1)),
    "list_of_dictionary": pa.array([["red"], ["blue"], []], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "list_of_binary": pa.array([[b"red"], [b"blue"], None]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_however_arrow_lays_them_out(tmp_path, layout):
    pq.write_table(pa.table({"image": [b"1", b"2", b"3"], "caption": LAYOUTS[layout]}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    made = list(source.records(source.pieces()))
    assert [(record.image, record.caption, record.error) for record in made] == [
        (b"1", "red", None), (b"2", "blue", None), (b"3", None, None),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [pa.binary_view(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_images_however_arrow_lays_them_out(tmp_path, kind):
    images = (
        pa.array([b"1", b"2"]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array([b"1", b"2"], kind)
    )
    pq.write_table(pa.table({"image": images, "caption": pa.nulls(2), "score": pa.nulls(2)}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet", ColumnsConfig(score="score"))
    made = list(source.records(source.pieces()))
    assert [(record.image, record.caption, record.score) for record in made] == [(b"1", None, None), (b"2", None, None)]


def test_bytes_that_are_no_text(tmp_path):
    captions = pa.array([[b"fine"], [b"fine", b"caf\xe9"]])
    pq.write_table(pa.table({"image": [b"1", b"2"], "caption": captions}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    good, bad = source.records(source.pieces())
    assert good.caption == "fine" and bad.error == "column 'caption': expected UTF-8, received byte 0xe9"


# -- large values -----------------------------------------------------------------------------------------------------

MB = 1 << 20
PEAK = """
import sys
from pathlib import Path
from pipelines.sources.registry import open_source

def peak():  # what getrusage tells begins with what the parent had
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

source = open_source(sys.argv[1])
pieces = source.pieces()
before, rows, errors = peak(), 0, 0
for record in source.records(pieces):
    record.drop_long_texts()
    rows, errors = rows + 1, errors + bool(record.error)
print((peak() - before) >> 10, rows, errors)
"""


def peak_megabytes(spec):
    """(what reading a source takes of memory, in a process of its own; rows; errors)."""
    done = subprocess.run([sys.executable, "-c", PEAK, spec], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def repeated(value, rows, kind):
    """The value in every row, without so much memory."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value], kind))


def write_repeated(path, made):
    """As any program may write it: readers are not told that it is a dictionary."""
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(made, path, **options)
    return path


def test_one_large_image_in_every_row(tmp_path):
    """Decoded at once, 64 rows of 16 MB are 1 GB, of a file of less than a kilobyte."""
    path = write_repeated(tmp_path / "a.parquet", pa.table({"image": repeated(bytes(16 * MB), 64, pa.binary())}))
    assert path.stat().st_size < 1000
    megabytes, rows, errors = peak_megabytes(f"parquet:{path}")
    assert (rows, errors) == (64, 0) and megabytes < 500


def test_one_large_image_of_a_struct_in_every_row(tmp_path):
    cells = pa.StructArray.from_arrays(
        [repeated(bytes(16 * MB), 64, pa.binary()), repeated("x" * (16 * MB), 64, pa.string())] * 2,
        ["bytes", "path", "a", "b"],
    )
    path = write_repeated(tmp_path / "a.parquet", pa.table({"image": cells}))
    megabytes, rows, errors = peak_megabytes(f"parquet:{path}")
    assert (rows, errors) == (64, 0) and megabytes < 600, "what else is in the struct is not read"


def test_one_large_caption_in_every_row(tmp_path):
    made = pa.table({"image": images(64), "caption": repeated("x" * (16 * MB), 64, pa.string())})
    megabytes, rows, errors = peak_megabytes(f"parquet:{write_repeated(tmp_path / 'a.parquet', made)}")
    assert (rows, errors) == (64, 64) and megabytes < 500


def test_lists_of_large_captions(tmp_path):
    texts = repeated("x" * (4 * MB), 64 * 8, pa.string())
    lists = pa.ListArray.from_arrays(pa.array(range(0, 64 * 8 + 1, 8), pa.int32()), texts)
    path = write_repeated(tmp_path / "a.parquet", pa.table({"image": images(64), "caption": lists}))
    megabytes, rows, errors = peak_megabytes(f"parquet:{path}")
    assert (rows, errors) == (64, 64) and megabytes < 500


@pytest.mark.parametrize("layout", ["dictionary", "string_view", "list_of_dictionary", "list_of_view"])
def test_large_captions_that_are_one_in_memory(tmp_path, layout):
    """They become texts of their own one at a time."""
    texts = repeated("x" * (2 * MB), 200, pa.string())
    if "view" in layout:
        buffers = pa.array(["x" * (2 * MB)], pa.string_view()).buffers()
        texts = pa.Array.from_buffers(
            pa.string_view(), 200, [None, pa.py_buffer(buffers[1].to_pybytes()[:16] * 200), *buffers[2:]]
        )
    if "list" in layout:
        texts = pa.ListArray.from_arrays(pa.array(range(201), pa.int32()), texts)
    batch = pa.record_batch({"image": pa.array(images(200)), "caption": texts})
    made = []
    tracemalloc.start()
    for record in table_records(batch, ("image", "caption", None), "a", 0):
        assert len(record.caption) == 2 * MB
        record.drop_long_texts()
        made.append(record)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made) == 200 and all("more than 262,144 allowed" in record.error for record in made) and peak < 20 * MB


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()), STRUCT]
)
def test_a_cell_larger_than_images_may_be_is_an_error(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("pipelines.sources.tables.MAX_IMAGE_BYTES", 100)
    cells = [b"a", bytes(101), None, bytes(100)]
    if kind == STRUCT:
        cells = [{"bytes": cell, "path": "p" * 200} for cell in cells]
    column = pa.array(cells, pa.binary()).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(cells, kind)
    pq.write_table(pa.table({"image": column, "caption": list("abcd")}), tmp_path / "a.parquet")
    small, large, none, whole = records(f"parquet:{tmp_path}")
    assert large.error == "column 'image': 101 bytes, more than 100 allowed" and large.image is None
    assert (small.image, whole.image, none.image) == (b"a", bytes(100), None) and none.error and not whole.error


def test_texts_of_one_cell_are_bounded_before_they_are_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.sources.tables.SURELY_SMALL", 10)
    monkeypatch.setattr("pipelines.sources.tables.MAX_JSON_BYTES", 100)
    captions = [["a", "b"], ["x" * 60, "y" * 60], None, [], ["z" * 90]]
    pq.write_table(pa.table({"image": images(5), "caption": captions}), tmp_path / "a.parquet")
    one, two, large, none, empty, whole = records(f"parquet:{tmp_path}")
    assert [record.caption for record in (one, two, none, empty, whole)] == ["a", "b", None, None, "z" * 90]
    assert large.error == "column 'caption': 128 bytes, more than 100 allowed" and large.image == b"image 1"
    captions = pa.array([b"fine", b"caf\xe9", b"x" * 101])
    pq.write_table(pa.table({"image": images(3), "caption": captions}), tmp_path / "a.parquet")
    fine, bad, large = records(f"parquet:{tmp_path}")
    assert fine.caption == "fine" and "received byte 0xe9" in bad.error and "more than 100 allowed" in large.error


def batch_rows(path, *columns):
    file = pq.ParquetFile(path)
    with open(path, "rb") as raw:
        return _rows_at_a_time(raw, file.metadata.row_group(0), columns)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_rows_at_a_time(tmp_path, version, compression):
    """Usual files are read as many rows at a time as ever."""
    draw = random.Random(0)
    usual = pa.table({"image": [draw.randbytes(5000) for _ in range(2000)], "caption": [f"{n}" for n in range(2000)]})
    path, options = tmp_path / "a.parquet", {"data_page_version": version, "compression": compression}
    pq.write_table(usual, path, **options)
    assert pq.read_metadata(path).row_group(0).column(0).has_dictionary_page
    assert batch_rows(path, "image", "caption") == READ_ROWS
    pq.write_table(pa.table({"image": [bytes(20 * MB)] * 3}), path, use_dictionary=False, **options)
    assert batch_rows(path, "image") == BATCH_BYTES // (20 * MB)
    write_repeated(path, pa.table({"image": repeated(draw.randbytes(16 * MB), 64, pa.binary())}))
    assert batch_rows(path, "image") == BATCH_BYTES // (16 * MB) - 1
    write_repeated(path, pa.table({"image": repeated(bytes(16 * MB), 64, pa.binary())}))
    assert batch_rows(path, "image") == BATCH_BYTES // (64 * MB) - 1
    assert batch_rows(path, "other") == READ_ROWS


def test_footers_that_lie():
    class Group:
        path_in_schema, dictionary_page_offset = "image", None
        num_rows, num_columns = 0, 1

        def __init__(self, size, values, place):
            self.total_uncompressed_size, self.num_values, self.data_page_offset = size, values, place

        def column(self, number):
            return self

    for size, values, place in itertools.product((-(1 << 62), 0, 1 << 62), (-5, 0, 1 << 62), (-5, 0, 1 << 40)):
        assert 1 <= _rows_at_a_time(io.BytesIO(b"\x15"), Group(size, values, place), ["image"]) <= READ_ROWS

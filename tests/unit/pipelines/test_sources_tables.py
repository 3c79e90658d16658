"""Parquet, Lance and `datasets`: the usual names and others, many small pieces, columns that are missing, files cut short."""

import json

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import USUAL_NAMES, ColumnsConfig, open_source
from pipelines.sources_tables import READ_ROWS, Parquet, table_names

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


@pytest.mark.parametrize(
    "fields, names, expected",
    [
        ({"image": BYTES, "caption": pa.string()}, {}, ("image", "caption", None)),
        ({"jpg": BYTES, "text": pa.string()}, {}, ("jpg", "text", None)),
        ({"png": pa.large_binary()}, {}, ("png", None, None)),
        ({"image": STRUCT, "captions": pa.list_(pa.string())}, {"caption": "captions"}, ("image", "captions", None)),
        ({"a": BYTES, "b": pa.large_string()}, {"image": "a", "caption": "b"}, ("a", "b", None)),
        ({"image": BYTES, "s": pa.float32()}, {"score": "s"}, ("image", None, "s")),
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
        ({"image": BYTES, "caption": pa.int32()}, {}, "column 'caption': expected text"),
        ({"image": BYTES, "s": pa.string()}, {"score": "s"}, "column 's': expected numbers"),
    ],
)
def test_names_that_do_not_fit(fields, names, match):
    with pytest.raises(ValueError, match=match):
        table_names(pa.schema(list(fields.items())), ColumnsConfig(**names))


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


def test_lance_names(tmp_path):
    uri = str(tmp_path / "t.lance")
    lance.write_dataset(table(2).rename_columns(["u", "picture", "words"]), uri)
    with pytest.raises(ValueError, match="expected an image column"):
        open_source(f"lance:{uri}").pieces()
    assert pairs(records(f"lance:{uri}", ColumnsConfig(image="picture", caption="words"))) == wanted(2)


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("pipelines.sources_tables.PIECE_ROWS", 4)

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

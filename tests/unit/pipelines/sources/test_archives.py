"""Tars as WebDataset writers make them and as accidents leave them; folders as img2dataset leaves them."""

import bz2
import gzip
import json
import lzma
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.sources import archives as sources_grouped
from pipelines.sources.archives import DamagedShard, grouped, tar_files
from pipelines.sources.base import ColumnsConfig
from pipelines.sources.registry import open_source
from tests.support.ingest_rows import IMAGES, put_files
from tests.support.tars import records, samples, write_tar

pytestmark = pytest.mark.unit


def test_samples(tmp_path):
    write_tar(tmp_path / "s" / "0.tar", samples())
    made = records(f"webdataset:{tmp_path}/s")
    assert [record.image for record in made] == IMAGES
    assert [record.caption for record in made] == [f"caption {number}" for number in range(5)]
    assert [record.place for record in made] == [f"s/0.tar#{number:04d}.jpg" for number in range(5)]
    assert all(record.error is None for record in made)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path, format):
    deep = "a" * 60 + "/" + "b" * 120 if format != tarfile.USTAR_FORMAT else "a" * 60 + "/" + "b" * 90
    path = write_tar(tmp_path / "0.tar", [(f"{deep}.jpg", IMAGES[0]), (f"{deep}.txt", "ü猫".encode())], format=format)
    (record,) = records(f"webdataset:{path}")
    assert record.caption == "ü猫" and f"#{deep}.jpg" in record.place


COMPRESSIONS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
    "none": lambda data: data,
}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressed_whatever_the_name_says(tmp_path, kind, suffix):
    plain = write_tar(tmp_path / "plain", [("0.jpg", bytes(range(256)) * 2000), *samples()]).read_bytes()
    path = tmp_path / f"0{suffix}"
    path.write_bytes(COMPRESSIONS[kind](plain))
    assert [record.image for record in records(f"webdataset:{tmp_path}")][1:] == IMAGES
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    made = records(f"webdataset:{path}")
    assert made[-1].error and "damaged" in made[-1].error
    if kind != "none":
        path.write_bytes(whole[:40] + bytes(byte ^ 0x55 for byte in whole[40:]))
        made = records(f"webdataset:{path}")
        assert made[-1].error and "damaged" in made[-1].error


def test_an_archive_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"PK\x03\x04" + bytes(100))
    (record,) = records(f"webdataset:{tmp_path}/0.tar")
    assert record.error == "expected a tar, compressed or not: this is zip, which is not read"


@pytest.mark.parametrize("between", [0, 512, 20_480])
@pytest.mark.parametrize("compress", [gzip.compress, COMPRESSIONS["none"]])
def test_joined_tars_are_read_all(tmp_path, between, compress):
    first, second = (
        write_tar(tmp_path / f"{n}", [(f"{n}.png", IMAGES[n]), (f"{n}.txt", b"x")]).read_bytes() for n in range(2)
    )
    (tmp_path / "j.tar").write_bytes(compress(first) + compress(bytes(between) + second))
    made = records(f"webdataset:{tmp_path}/j.tar")
    assert [(record.image, record.error) for record in made] == [(IMAGES[0], None), (IMAGES[1], None)]


@pytest.mark.parametrize("behind", [b"x" * 10, b"x" * 5000, b"PK\x03\x04" * 300])
def test_what_stands_behind_the_end_is_told(tmp_path, behind):
    path = write_tar(tmp_path / "0.tar", samples(2))
    path.write_bytes(path.read_bytes() + behind)
    *good, end = records(f"webdataset:{path}")
    assert [record.image for record in good] == IMAGES[:2], "the last sample too"
    assert "what stands behind that is no tar" in end.error


def test_every_image_with_dots_in_its_name_is_an_error(tmp_path):
    dotted = [(f"cat.{n:02}.{kind}", b"x") for n in range(20) for kind in ("png", "txt")]
    members = [("a.png", IMAGES[0]), *dotted, ("b.png", IMAGES[1]), *dotted]
    made = records(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    errors = [record for record in made if record.error]
    assert len(made) == 42 and len(errors) == 40 == len({record.identify() for record in errors})
    assert "names are cut at the first dot, and the rest of this one is '00.png'" in errors[0].error


def test_groups_without_an_image_that_come_again_are_told_again(tmp_path):
    members = [("1.txt", b"x"), ("2.jpg", IMAGES[0]), ("1.cls", b"x"), ("3.jpg", IMAGES[1])]
    made = records(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    assert len({record.identify() for record in made}) == 4


def test_further_images_of_a_sample_are_counted(tmp_path):
    members = [("1.jpg", IMAGES[0]), ("1.png", b"x"), ("1.2.png", b"x"), ("2.jpg", IMAGES[1])]
    source = open_source(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    assert len(list(source.records(source.pieces()))) == 2 and source.left_out == {"more_images": 2}


def test_what_is_not_used_is_counted_by_kind(tmp_path):
    members = [
        ("1.jpg", IMAGES[0]),
        ("1.txt", b"x"),
        ("1.cls", b"5"),
        ("1.json", b"{}"),
        ("._1.jpg", b""),
        ("1.seg.npy", b""),
    ]
    members += [("2.jpg", IMAGES[1]), ("2.cls", b"6"), (".cache/x.jpg", b""), ("__MACOSX/2.jpg", b""), ("2", b"")]
    source = open_source(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    assert len(list(source.records(source.pieces()))) == 2
    assert +source.left_out == {
        "left_out_.cls": 2, "left_out_.seg.npy": 1, "left_out_hidden": 3, "left_out_without an ending": 1,
    }  # fmt: skip


def test_kinds_of_what_is_not_used_are_bounded(tmp_path):
    members = [("0.jpg", IMAGES[0]), *((f"0.kind{number}", b"") for number in range(300)), (f"0.{'x' * 60}", b"")]
    source = open_source(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    list(source.records(source.pieces()))
    assert sum(source.left_out.values()) == 301 and len(source.left_out) <= 102
    assert source.left_out["left_out_of other kinds"] > 200


@pytest.mark.parametrize("texts, found", [(["a", None, "b"], ["a", "b"]), ([None], [None]), ([], [None])])
def test_nulls_among_captions_are_none_of_them(tmp_path, texts, found):
    members = [("1.jpg", IMAGES[0]), ("1.json", json.dumps({"caption": texts}).encode())]
    made = records(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    pq.write_table(
        pa.table({"image": [IMAGES[0]], "caption": pa.array([texts], pa.list_(pa.string()))}), tmp_path / "x.parquet"
    )
    for each in (made, records(f"parquet:{tmp_path}/x.parquet")):
        assert [record.caption for record in each] == found


def test_links_to_texts_elsewhere_are_not_read(tmp_path):
    shard = tmp_path / "set" / "00000"
    shard.mkdir(parents=True)
    (tmp_path / "secret").write_text("a key")
    for name, content in (("1.jpg", IMAGES[0]), ("2.jpg", IMAGES[1]), ("2.caption", b"inside")):
        (shard / name).write_bytes(content)
    (shard / "1.txt").symlink_to(tmp_path / "secret")
    (shard / "2.txt").symlink_to("2.caption")
    source = open_source(f"img2dataset:{tmp_path}/set")
    assert [record.caption for record in source.records(source.pieces())] == [None, "inside"]
    assert +source.left_out == {"left_out_link to a text elsewhere": 1}


@pytest.mark.parametrize(
    "members, found",
    [
        ([("1.txt", b" \n"), ("1.json", b'{"caption": "real"}')], "real"),
        ([("1.txt", b""), ("1.caption", b"real")], "real"),
        ([("1.txt", b"")], ""),
        ([("1.txt", b""), ("1.json", b'{"caption": []}')], ""),
        ([("1.txt", b"real"), ("1.json", b'{"caption": "other"}')], "real"),
    ],
)
def test_an_empty_text_hides_no_other(tmp_path, members, found):
    (record,) = records(f"webdataset:{write_tar(tmp_path / '0.tar', [('1.jpg', IMAGES[0]), *members])}")
    assert record.caption == found


@pytest.mark.parametrize("number", ["1" + "0" * 400, '"' + "x" * 100_000 + '"', "[[]]"])
def test_scores_that_are_no_numbers_are_short_reasons(tmp_path, number):
    members = [("1.jpg", IMAGES[0]), ("1.json", f'{{"s": {number}}}'.encode())]
    (record,) = records(f"webdataset:{write_tar(tmp_path / '0.tar', members)}", ColumnsConfig(score="json.s"))
    assert "json.s: expected a number" in record.error and len(record.error) < 200


def test_shards_that_lead_nowhere_are_rows_with_a_reason(tmp_path):
    write_tar(tmp_path / "a.tar", samples(2))
    (tmp_path / "b.tar").symlink_to("gone.tar")
    (tmp_path / "c.tar").symlink_to("c.tar")
    made = records(f"webdataset:{tmp_path}")
    assert [bool(record.error) for record in made] == [False, False, True, True]
    assert made[2].place.endswith("b.tar#end") and made[3].place.endswith("c.tar#end")


def test_what_lies_beside_shards_of_folders_is_counted(tmp_path):
    root = tmp_path / "set"
    for name in ("00000/1.jpg", "00000/deep/2.jpg", "_tmp/3.jpg", "4.jpg", "00000_stats.json", "00000.parquet"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGES[0])
    source = open_source(f"img2dataset:{root}")
    assert len(list(source.records(source.pieces()))) == 1
    assert +source.left_out == {
        "left_out_folder in a shard": 1, "left_out_folder that is no shard": 1, "left_out_.jpg": 1,
    }  # fmt: skip


def test_colons_are_part_of_a_name(tmp_path):
    """fsspec chains addresses by them."""
    folder = tmp_path / "we::ird"
    write_tar(folder / "a.tar", samples(1))
    write_tar(folder / "a.tar::b.tar", samples(2)[2:])
    assert [record.caption for record in records(f"webdataset:{folder}")] == ["caption 0", "caption 1"]
    write_tar(tmp_path / "chain" / "a.tar", samples(1))
    link = tmp_path / "chain" / "simplecache::file:" / "x.tar"
    write_tar(link, samples(1))
    assert len(records(f"webdataset:{tmp_path}/chain")) == 2, "a name of this machine begins with its folder"


def test_braces_make_shards_in_order(tmp_path):
    for number in (2, 0, 1):
        write_tar(tmp_path / f"{number:02d}.tar", [(f"{number}.png", IMAGES[number])])
    pieces = open_source(f"webdataset:{tmp_path}/{{00..02}}.tar").pieces()
    assert [piece["place"].rpartition("/")[2] for piece in pieces] == ["00.tar", "01.tar", "02.tar"]
    assert all(piece["stamp"] and piece["bytes"] > 0 and piece["rows"] is None for piece in pieces)
    assert json.loads(json.dumps(pieces)) == pieces


def test_names_in_json_and_by_option(tmp_path):
    about = json.dumps({"caption": "from json", "score": 5.5, "alt": ["a", "b"]}).encode()
    path = write_tar(tmp_path / "0.tar", [("1.json", about), ("1.img.png", IMAGES[0]), ("1.jpg", IMAGES[1])])
    names = ColumnsConfig(image="img.png", score="json.score")
    (record,) = records(f"webdataset:{path}", names)
    assert (record.image, record.caption, record.score) == (IMAGES[0], "from json", 5.5)
    made = records(f"webdataset:{path}", ColumnsConfig(image=".JPG", caption="json.alt"))
    assert [(record.image, record.caption) for record in made] == [(IMAGES[1], "a"), (IMAGES[1], "b")]
    (record,) = records(f"webdataset:{path}", ColumnsConfig(image="jpg", score="json.alt"))
    assert "json.alt: expected a number, received ['a', 'b']" in record.error


def with_json(path, *abouts):
    """A tar of one sample for each JSON value (or text)."""
    parts = [about if isinstance(about, str) else json.dumps(about) for about in abouts]
    members = [((f"{n}.png", IMAGES[n]), (f"{n}.json", part.encode())) for n, part in enumerate(parts)]
    return write_tar(path / "0.tar", [member for pair in members for member in pair])


def test_a_list_of_captions_makes_a_row_each(tmp_path):
    path = with_json(tmp_path, {"caption": ["one", "two"]}, {"caption": []}, {"caption": "plain"}, {"caption": None})
    made = records(f"webdataset:{path}")
    assert [(record.image, record.caption) for record in made] == [
        (IMAGES[0], "one"), (IMAGES[0], "two"), (IMAGES[1], None), (IMAGES[2], "plain"), (IMAGES[3], None),
    ]  # fmt: skip
    assert len({record.identify() for record in made}) == 5


@pytest.mark.parametrize("value", [5, True, {"en": "x"}, ["x", 3]])
def test_a_caption_that_is_no_text_is_a_row_s_error(tmp_path, value):
    bad, good = records(f"webdataset:{with_json(tmp_path, {'caption': value}, {'caption': 'x'})}")
    assert bad.error == f"json.caption: expected text, or a list of texts, received {json.dumps(value)}"
    assert good.caption == "x"


def test_keys_of_objects_in_objects(tmp_path):
    about = {"meta": {"caption": "deep", "score": 2}, "a.b": "a dot in the key"}
    path = with_json(tmp_path, about)
    (record,) = records(f"webdataset:{path}", ColumnsConfig(caption="json.meta.caption", score="json.meta.score"))
    assert (record.caption, record.score) == ("deep", 2.0)
    (record,) = records(f"webdataset:{path}", ColumnsConfig(caption="json.a.b"))
    assert record.caption == "a dot in the key"


def test_an_extension_with_a_dot_may_hold_the_caption(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("1.jpg", IMAGES[0]), ("1.long.txt", b"a long text"), ("1.txt", b"short")])
    (record,) = records(f"webdataset:{path}", ColumnsConfig(caption="long.txt"))
    assert record.caption == "a long text"


@pytest.mark.parametrize(
    "names, match",
    [
        (
            {"caption": "json.captoin"},
            r"expected json.captoin \(--columns.caption\).*they have png, json, json.caption",
        ),
        ({"caption": "txt"}, r"expected txt \(--columns.caption\)"),
        ({"caption": "json.caption.en"}, r"none of the first 2 has it"),
        ({"score": "json.none"}, r"expected json.none \(--columns.score\)"),
    ],
)
def test_a_caption_or_score_that_no_sample_has_stops_the_job(tmp_path, names, match):
    path = with_json(tmp_path, {"caption": "a"}, {"caption": "b"})
    with pytest.raises(ValueError, match=match):
        open_source(f"webdataset:{path}", ColumnsConfig(**names)).pieces()
    put_files(tmp_path / "files" / "00000")
    with pytest.raises(ValueError, match=r"--columns\."):
        open_source(f"img2dataset:{tmp_path}/files", ColumnsConfig(image="webp")).pieces()


def test_a_name_that_later_samples_have_is_right(tmp_path):
    path = with_json(tmp_path, {"x": 1}, "no json", {"caption": None, "score": 5})
    made = records(f"webdataset:{path}", ColumnsConfig(caption="json.caption", score="json.score"))
    assert [record.score for record in made if not record.error] == [None, 5.0]
    members = [(f"{n:03}.png", b"x") for n in range(100)]
    write_tar(tmp_path / "1.tar", [*members, ("100.png", b"x"), ("100.json", b'{"late": "yes"}')])
    made = records(f"webdataset:{tmp_path}/1.tar", ColumnsConfig(caption="json.late"))
    assert made[-1].caption == "yes" and len(made) == 101


@pytest.mark.parametrize(
    "part, reason",
    [
        (("1.txt", b"caf\xe9"), ".txt: expected UTF-8, received byte 0xe9"),
        (("1.json", b"{"), ".json: expected JSON"),
        (("1.json", b"[" * 100_000), ".json: expected JSON"),
    ],
)
def test_texts_that_cannot_be_read_are_a_row_s_error(tmp_path, part, reason):
    path = write_tar(tmp_path / "0.tar", [("1.jpg", IMAGES[0]), part, ("2.jpg", IMAGES[1])])
    bad, good = records(f"webdataset:{path}")
    assert reason in bad.error and good.error is None and good.image == IMAGES[1]


def test_names_that_climb_are_only_names(tmp_path):
    members = [("../../evil.jpg", IMAGES[0]), ("/etc/evil.jpg", IMAGES[1]), ("../../evil.txt", b"x")]
    made = records(f"webdataset:{write_tar(tmp_path / 'in' / '0.tar', members)}")
    assert [record.image for record in made[:2]] == IMAGES[:2]
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "0.tar"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_not_followed(tmp_path, kind):
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "0.tar", [("0.jpg", IMAGES[0]), link, ("1.txt", b"x"), ("2.jpg", IMAGES[2])])
    made = records(f"webdataset:{path}")
    assert [record.image for record in made] == [IMAGES[0], None, IMAGES[2]]
    assert "not followed" in made[1].error or "no regular file" in made[1].error


def test_the_same_key_twice_makes_two_samples(tmp_path):
    members = [
        ("1.jpg", IMAGES[0]),
        ("1.txt", b"a"),
        ("1.jpg", IMAGES[1]),
        ("1.txt", b"b"),
        ("2.jpg", IMAGES[2]),
        *samples(1),
    ]
    made = records(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")
    assert [(record.image, record.caption) for record in made] == [
        (IMAGES[0], "a"), (IMAGES[1], "b"), (IMAGES[2], None), (IMAGES[0], "caption 0"),
    ]  # fmt: skip


def test_what_is_no_sample_is_passed_over(tmp_path):
    folder = tarfile.TarInfo("d")
    folder.type = tarfile.DIRTYPE
    members = [folder, ("d/._1.jpg", b"x"), ("__MACOSX/1.jpg", b"x"), ("d/1.jpg", IMAGES[0]), ("d/.DS_Store", b"x")]
    assert [record.image for record in records(f"webdataset:{write_tar(tmp_path / '0.tar', members)}")] == IMAGES[:1]


def test_sample_without_an_image(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("1.jpg", IMAGES[0]), ("2.txt", b"x"), ("2.cls", b"3"), ("3.jpg", IMAGES[1])])
    made = records(f"webdataset:{path}")
    assert [record.error is None for record in made] == [True, False, True]
    assert "the sample has txt, cls" in made[1].error


def test_image_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_grouped, "MAX_IMAGE_BYTES", 100)
    path = write_tar(tmp_path / "0.tar", [("1.jpg", bytes(101)), ("2.jpg", IMAGES[0])])
    large, small = records(f"webdataset:{path}")
    assert "101 bytes, more than 100 allowed" in large.error and small.image == IMAGES[0]


@pytest.mark.parametrize("cut", [600, 1100, 1536, 2560, 2561, 3000, 4096, 6000, 10_000])
def test_a_cut_shard_gives_what_is_whole_and_a_reason(tmp_path, cut):
    """Each of the members takes 1,024 bytes. The last sample before the cut may lack its caption: it is not taken."""
    path = write_tar(tmp_path / "0.tar", samples())
    path.write_bytes(path.read_bytes()[:cut])
    *good, end = records(f"webdataset:{path}")
    assert end.error and end.place.endswith("0.tar#end") and "damaged" in end.error
    followed = max(0, (cut - 512 - len(IMAGES[0])) // 2048)  # samples after which another one's image is whole
    assert [(r.image, r.caption) for r in good] == [(IMAGES[n], f"caption {n}") for n in range(followed)]


def test_damage_in_a_header_is_not_taken_for_the_end(tmp_path):
    """tarfile by itself stops there without a word."""
    path = write_tar(tmp_path / "0.tar", samples())
    content = bytearray(path.read_bytes())
    content[4096 + 150] ^= 0xFF  # checksum of the header of 0002.jpg
    path.write_bytes(content)
    *good, end = records(f"webdataset:{path}")
    assert "no header where one is due" in end.error
    assert [record.image for record in good] == IMAGES[:1]


@pytest.mark.parametrize("content", [b"", b"no tar", bytes(100), b"x" * 5000])
def test_what_is_no_tar(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    write_tar(tmp_path / "1.tar", samples(2))
    made = records(f"webdataset:{tmp_path}")
    assert len(made) == 3 and made[0].error and [record.image for record in made[1:]] == IMAGES[:2]


def test_names_that_no_sample_has_stop_the_job(tmp_path):
    write_tar(tmp_path / "0.tar", samples())
    with pytest.raises(
        ValueError, match=r"expected an image \(.png\).*its first ones have jpg, txt; name .*--columns.image"
    ):
        open_source(f"webdataset:{tmp_path}", ColumnsConfig(image="png")).pieces()


def test_last_sample_is_given_only_if_the_files_end_well():
    def broken():
        yield "a.jpg", b"1"
        yield "b.jpg", b"2"
        raise DamagedShard("x")

    made = []
    with pytest.raises(DamagedShard):
        made.extend(grouped(broken()))
    assert [sample.key for sample in made] == ["a"]


def test_headers_are_not_kept(tmp_path):
    """tarfile keeps every header of a tar that it reads."""
    path = write_tar(tmp_path / "0.tar", [(f"{number}.cls", b"") for number in range(3000)])
    reader, seen = tar_files(str(path), lambda extension: 1 << 20), set()
    for _ in reader:
        seen.add(len(reader.gi_frame.f_locals["tar"].members))
    assert max(seen) <= 1

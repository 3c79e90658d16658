"""Tars whose headers are made to fill the memory, or to keep a reader for ever."""

import gzip
import io
import lzma
import random
import subprocess
import sys
import tarfile
import time

import pytest

from pipelines.sources import archives as sources_grouped
from pipelines.sources import compression, tars
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.unit

MB = 1 << 20
TYPES = {"long name": b"L", "long link": b"K", "pax": b"x", "global pax": b"g", "solaris pax": b"X"}


def header(name, size=0, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def file(name, content):
    return header(name, len(content)) + content + bytes(-len(content) % 512)


def record(name, value):
    size = len(name) + len(value) + 3
    while len(str(size)) + len(name) + len(value) + 3 != size:
        size = len(str(size)) + len(name) + len(value) + 3
    return f"{size} {name}={value}\n".encode()


def pax(*records, kind=b"x"):
    data = b"".join(records)
    return header("pax", len(data), kind) + data + bytes(-len(data) % 512)


END = bytes(1024)
BEFORE = file("1.jpg", b"one") + file("1.txt", b"a caption") + file("2.jpg", b"two")


def read(path):
    source = open_source(f"webdataset:{path}")
    return list(source.records(source.pieces()))


def made(tmp_path, *parts, level=1):
    path = tmp_path / "0.tar.gz"
    with gzip.open(path, "wb", level) as packed:
        for part in parts:
            packed.write(part)
    return path


def assert_damaged(found, reason):
    first, end = found
    assert (first.image, first.caption) == (b"one", "a caption")
    assert end.place.endswith("0.tar.gz#end") and end.error.startswith("the shard is damaged") and reason in end.error


@pytest.mark.parametrize("kind", TYPES)
def test_a_header_of_any_size_is_not_read(tmp_path, kind):
    path = made(tmp_path, BEFORE, header("x", 2 * MB, TYPES[kind]), bytes(2 * MB), file("3.jpg", b"three"), END)
    assert_damaged(read(path), "headers of a file of more than 1,048,576 bytes")


PEAK = """
import sys
from pathlib import Path
from pipelines.sources.archives import grouped
from pipelines.sources.tars import DamagedShard, tar_files

def peak():  # what getrusage tells begins with what the parent had
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

before = peak()
try:
    for sample in grouped(tar_files(sys.argv[1], lambda extension: (256 << 20) * (extension in ("jpg", "txt")))):
        sample = None
except DamagedShard:
    pass
print((peak() - before) >> 10)
"""


def peak_megabytes(path):
    """What reading a tar takes of memory, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def pieces_of(head, count):
    yield BEFORE
    yield head
    for _ in range(count):
        yield bytes(MB)


@pytest.mark.parametrize(
    "head",
    [header("x", 400 * MB, b"L"), header("x", 400 * MB, b"g"), header("2.bin", 400 * MB), header("3.jpg", 400 * MB)],
    ids=["long name", "global pax", "unwanted", "image"],
)
def test_memory_of_what_is_not_taken(tmp_path, head):
    """400 MB that a gzip of 400 kB has: headers, a file that nobody wants, an image larger than allowed."""
    path = made(tmp_path, *pieces_of(head, 400), END)
    assert path.stat().st_size < 4 * MB
    assert peak_megabytes(path) < 100


def test_a_file_that_says_more_than_there_is_takes_no_memory(tmp_path):
    path = made(tmp_path, BEFORE, header("3.jpg", 200 * MB), b"short")
    assert "3.jpg ends after 5 of 209,715,200 bytes" in read(path)[-1].error
    assert peak_megabytes(path) < 100


def test_headers_without_end(tmp_path):
    """Each of them is small."""
    path = made(tmp_path, BEFORE, *(pax() for _ in range(2000)), file("3.jpg", b"three"), END)
    assert_damaged(read(path), "more than 16 headers of a file")
    path = made(tmp_path, BEFORE, *(pax(record("comment", "x" * 600_000)) for _ in range(2)), file("3.jpg", b"3"), END)
    assert_damaged(read(path), "headers of a file of more than")


def test_global_headers_add_up(tmp_path):
    one = [
        pax(record(f"comment{number}", "x" * 100_000), kind=b"g") + file(f"{number}.png", b"n")
        for number in range(3, 20)
    ]
    found = read(made(tmp_path, BEFORE, *one, END))
    assert [record.image for record in found[:3]] == [b"one", b"two", b"n"] and len(found) < 14
    assert "headers that hold for all files of more than 1,048,576 bytes" in found[-1].error


def old_sparse(*entries, size, extended=False):
    block = bytearray(header("3.jpg", 4, tarfile.GNUTYPE_SPARSE))
    for place, (first, count) in enumerate(entries):
        block[386 + 24 * place : 410 + 24 * place] = b"%011o\0%011o\0" % (first, count)
    block[482] = extended
    block[483:495] = b"%011o\0" % size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_sparse_maps_without_end(tmp_path):
    more = (b"%011o\0%011o\0" % (1, 1)) * 21 + b"\1" + bytes(7)
    path = made(tmp_path, BEFORE, old_sparse(size=8, extended=True), *[more * 200 for _ in range(200)])
    assert_damaged(read(path), "headers of a file of more than")
    endless = pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0")) + header("3.jpg", 512)
    path = made(tmp_path, BEFORE, endless, b"9999999\n" + b"1\n" * (2 * MB))
    assert_damaged(read(path), "headers of a file of more than")


def test_sparse_files_are_read_whole(tmp_path):
    path = made(tmp_path, old_sparse((2, 3), (6, 1), size=9) + b"abcd" + bytes(508), file("3.txt", b"text"), END)
    (only,) = read(path)
    assert (only.image, only.caption) == (b"\0\0abc\0d\0\0", "text")
    maps = record("GNU.sparse.major", "0"), record("GNU.sparse.minor", "1"), record("GNU.sparse.realsize", "9")
    names = record("GNU.sparse.name", "3.jpg"), record("GNU.sparse.map", "2,3,6,1,9,0")
    (only,) = read(made(tmp_path, pax(*maps, *names), file("GNUSparseFile/3.jpg", b"abcd"), END))
    assert only.image == b"\0\0abc\0d\0\0"


@pytest.mark.parametrize("entries", [[(5, 9)], [(4, 2), (2, 2)], [(0, 3), (2, 2)]])
def test_sparse_maps_that_cannot_be(tmp_path, entries):
    path = made(tmp_path, BEFORE, old_sparse(*entries, size=9) + b"abcdefgh" + bytes(504), END)
    assert_damaged(read(path), "parts that lie behind its end or in each other")


def test_many_parts_of_a_sparse_file_take_no_time(tmp_path):
    """In the square of their number it would be an hour."""
    count, size = 60_000, 128 * MB
    places = ",".join(f"{2 * number},1" for number in range(count))
    head = pax(
        record("GNU.sparse.realsize", str(size)), record("GNU.sparse.name", "3.jpg"), record("GNU.sparse.map", places)
    )
    begun = time.monotonic()
    (only,) = read(made(tmp_path, head, file("x", b"a" * count), END))
    assert len(only.image) == size and only.image[:5] == b"a\0a\0a" and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    "head",
    [
        pax(b"9" * (MB - 2048)),
        pax(record("comment", "9" * (MB - 4096))),
        pax(b"".join(b"1 a" for _ in range(300_000))),
        pax(b"12 size=-5120\n"[:-1], record("size", "-5120")),
        pax(record("size", "-5120")),
        pax(record("size", "9" * 90)),
        pax(record("GNU.sparse.map", "1,x")),
        pax(record("GNU.sparse.map", "9" * 99)),
        pax(record("GNU.sparse.realsize", "9" * 99)),
        pax(record("GNU.sparse.major", "1"), record("GNU.sparse.minor", "0")) + header("3.jpg", 512),
    ],
    ids=["digits", "digits in a text", "short records", "not its length", "below zero", "huge", "no number", "half a map",
         "huge and sparse", "no map"],
)  # fmt: skip
def test_headers_that_are_wrong_end_soon(tmp_path, head):
    begun = time.monotonic()
    found = read(made(tmp_path, BEFORE, head, file("3.jpg", b"three"), file("4.jpg", b"four"), END))
    assert found[0].image == b"one" and time.monotonic() - begun < 20
    assert found[-1].error or found[-1].image == b"four"


@pytest.mark.parametrize("size", [b"\xff" * 7 + b"\xfe\0" + bytes(3), b"\x80" + b"\x7f" * 11])
def test_sizes_in_bytes_that_lead_nowhere(tmp_path, size):
    """Below zero: the same file would be found again and again. Beyond all files: no storage can be asked for that."""
    block = bytearray(header("3.bin"))
    block[124:136] = size
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    assert_damaged(read(made(tmp_path, BEFORE, bytes(block), END)), "a header that says")


def test_a_header_that_is_usual_is_read(tmp_path):
    """Names of any length that file systems have, other attributes, and a length that was counted in characters."""
    name = "é" * 120 + "/" + "n" * 200 + ".jpg"
    whole = pax(record("SCHILY.xattr.user.note", "a=b\nc"), record("path", "x.jpg"))
    path = made(tmp_path, whole, file("1.jpg", b"one"), pax(b"12 path=\xc3\xa9.jpg\n"), file("2.jpg", b"two"), END)
    assert [record.image for record in read(path)] == [b"one", b"two"]
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"one"))
    assert read(path)[0].image == b"one" and read(path)[0].place.endswith(name)


# -- samples of many files --------------------------------------------------------------------------------------------


NAMES = [
    "a.jpg",
    "x" * 96 + ".jpg",
    f"{'d' * 100}/{'e' * 90}.jpg",
    "bär/猫.jpg",
    "l" * 300 + ".jpg",
    "./b.c.jpg",
    "0.jpg",
]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_are_read_as_tarfile_reads_them(tmp_path, format):
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name) < 250]
    with tarfile.open(tmp_path / "0.tar", "w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid = number, 1.5 if format == tarfile.PAX_FORMAT else 1, 1000
            tar.addfile(info, io.BytesIO(bytes([number]) * number))
    with tarfile.open(tmp_path / "0.tar") as tar:
        expected = [
            (info.name, tar.extractfile(info).read()) for info in tar if info.isreg() and info.name != "folder/"
        ]
    assert [name for name, _ in expected] == names
    assert list(tars.tar_files(str(tmp_path / "0.tar"), lambda extension: MB)) == expected


@pytest.mark.parametrize("place", [0, 130, 150, 156, 345, 500])
def test_a_changed_byte_of_a_header_is_seen(tmp_path, place):
    good = file("0.jpg", b"0") + file("1.jpg", b"1")
    broken = bytearray(good)
    broken[1024 + place] ^= 1
    (tmp_path / "0.tar").write_bytes(bytes(broken) + bytes(1024))
    with pytest.raises(tars.DamagedShard, match=r"no header where one is due|a header that is damaged"):
        list(tars.tar_files(str(tmp_path / "0.tar"), lambda extension: MB))


def test_a_sample_keeps_no_more_bytes_than_an_image_and_its_texts(monkeypatch):
    monkeypatch.setattr(sources_grouped, "MAX_SAMPLE_BYTES", 100)
    files = [("1.jpg", bytes(60)), ("1.png", bytes(60)), ("1.txt", b"text"), ("2.jpg", bytes(100)), ("2.txt", b"")]
    one, two = sources_grouped.grouped(iter(files))
    assert one.parts["jpg"] == bytes(60) and one.parts["png"] == "120 bytes, more than 100 allowed"
    assert two.parts == {"jpg": bytes(100), "txt": b""}


def test_files_of_one_name_without_end_are_several_samples(monkeypatch):
    monkeypatch.setattr(sources_grouped, "MAX_PARTS", 3)
    made = list(sources_grouped.grouped((f"a.{number}", b"") for number in range(8)))
    assert [len(sample.parts) for sample in made] == [3, 3, 2]


# -- xz ---------------------------------------------------------------------------------------------------------------


def xz(data, dictionary=1 << 20):
    return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": dictionary}])


def test_xz_that_asks_for_more_memory_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "XZ_MEMORY", 8 * MB)
    (tmp_path / "0.tar").write_bytes(xz(BEFORE + END) + xz(file("3.jpg", b"three") + END, 16 * MB))
    one, two, end = read(tmp_path / "0.tar")
    assert (one.image, two.image) == (b"one", b"two") and "Memory usage limit exceeded" in end.error
    (tmp_path / "0.tar").write_bytes(xz(BEFORE + END, 16 * MB))
    (end,) = read(tmp_path / "0.tar")
    assert "Memory usage limit exceeded" in end.error


def test_xz_as_strong_as_xz_makes_it_by_itself(tmp_path):
    (tmp_path / "0.tar").write_bytes(lzma.compress(BEFORE + END, preset=9 | lzma.PRESET_EXTREME))
    assert [record.image for record in read(tmp_path / "0.tar")] == [b"one", b"two"]


def outcome(file, *sizes):
    try:
        return [file.read(size) for size in sizes]
    except EOFError:
        return "cut short"


@pytest.mark.parametrize("behind", [b"", bytes(8), b"else", b"something that is no stream of xz", xz(b"more")[:20]])
def test_xz_gives_what_pythons_own_reader_gives(behind):
    parts = [random.Random(0).randbytes(MB + 50_005), b"", bytes(2 * MB), b"end"]
    packed = b"".join(map(xz, parts)) + behind
    with lzma.LZMAFile(io.BytesIO(packed)) as theirs:
        ours = compression.decompressed(io.BytesIO(packed))
        for size in (1, 100, 0, MB // 2, 512, MB):
            assert ours.read(size) == theirs.read(size) and ours.tell() == theirs.tell()
        ours.seek(2 * MB)
        theirs.seek(2 * MB)
        assert outcome(ours, 100 * MB, 5) == outcome(theirs, 100 * MB, 5)
    assert outcome(compression.decompressed(io.BytesIO(packed[: MB // 2])), 100 * MB) == "cut short"

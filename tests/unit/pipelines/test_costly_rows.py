"""Rows that would cost much more than they are worth: texts without end, and files that are none."""

import gzip
import io
import json
import os
import socket
import tarfile
import threading
import tracemalloc

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem

from lidit.runtime.files import NoRegularFile, open_regular
from pipelines.generation.prompt_sets import read_prompts
from pipelines.ingestion import worker as ingest_worker
from pipelines.sources import archives as sources_grouped
from pipelines.sources import locations
from pipelines.sources.base import MAX_JSON_BYTES, MAX_TEXT_BYTES, ColumnsConfig, Record
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.unit
LONGEST = "a red bench " * (MAX_TEXT_BYTES // 12)
LONG = "x" * (MAX_TEXT_BYTES + 1)
REASON = f"{MAX_TEXT_BYTES + 1:,} bytes, more than {MAX_TEXT_BYTES:,} allowed"


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pair(number, image, text=None, about=None):
    members = [(f"{number}.jpg", image)]
    members += [(f"{number}.txt", text.encode())] if text is not None else []
    return members + ([(f"{number}.json", json.dumps(about).encode())] if about is not None else [])


def errors(made):
    """Caption or reason of every row, in order of the sources' places."""
    return [
        row["ingest_error"] or row["caption_original"] for row in sorted(made.rows(), key=lambda row: row["source"])
    ]


# -- texts ------------------------------------------------------------------------------------------------------------


def test_long_texts_of_a_tar_are_rows_with_a_reason(job, photo, tmp_path):
    about = [{"caption": LONGEST}, {"caption": LONG}, {"caption": "fine", "more": "x" * MAX_JSON_BYTES}]
    members = [*pair(0, photo(0), LONGEST), *pair(1, photo(1), LONG)]
    members += [member for n in range(3) for member in pair(2 + n, photo(2 + n), about=about[n])]
    made = job(f"webdataset:{write_tar(tmp_path / 'x.tar', members)}")
    made.run()
    first, long_text, second, long_value, long_file = errors(made)
    assert first == second == LONGEST
    assert long_text == f".txt: {REASON}" and long_value == f"caption: {REASON}"
    assert long_file.startswith(".json: 4,19") and long_file.endswith(f"more than {MAX_JSON_BYTES:,} allowed")
    assert not [row for row in made.rows() if row["ingest_error"] and row["image"] is not None]


def test_a_text_that_is_too_long_is_not_read_from_a_tar(tmp_path, monkeypatch):
    members = pair(0, b"image", "x" * (64 << 20))
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(write_tar(tmp_path / "x.tar", members).read_bytes(), 1))
    source = open_source(f"webdataset:{path}")
    pieces = source.pieces()
    tracemalloc.start()
    (record,) = source.records(pieces)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert record.error == f".txt: {64 << 20:,} bytes, more than {MAX_TEXT_BYTES:,} allowed" and peak < 8 << 20


def test_long_texts_of_tables(job, photo, tmp_path):
    table = pa.table({"image": [photo(0), photo(1), photo(2)], "caption": [["fine", LONG], [LONGEST], [LONG + "é"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    lance.write_dataset(table, str(tmp_path / "a.lance"))
    for spec in ("parquet:{}/a.parquet", "lance:{}/a.lance"):
        made = job(spec.format(tmp_path), store=str(tmp_path / spec.partition(":")[0]))
        made.run()
        assert sorted(errors(made)) == sorted(
            ["fine", LONGEST, f"caption: {REASON}", f"caption: {MAX_TEXT_BYTES + 3:,} bytes, more than 262,144 allowed"]
        )
        again = job(spec.format(tmp_path), store=str(tmp_path / spec.partition(":")[0]), reread=True)
        assert again.run()[0]["counts"] == {"read": 4, "already_there": 4}


def test_long_texts_of_folders_sets_and_prompts(job, photo, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "0.txt").write_text(LONG)
    (folder / "1.txt").write_text(LONGEST)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "2.jpg", "text": LONG}))
    made = job(f"folder:{folder}")
    made.run()
    assert errors(made) == [f"ValueError: 0.txt: {REASON}", LONGEST, f"caption: {REASON}"]
    (tmp_path / "p.txt").write_text(f"{LONG}\nfine\n")
    made = job(f"prompts:{tmp_path}/p.txt", store=str(tmp_path / "prompts"))
    made.run()
    assert [row["caption"] or row["ingest_error"] for row in made.rows()] == [f"caption: {REASON}", "fine"]


def test_captions_of_a_coco_set(job, photo, tmp_path):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images/a.jpg").write_bytes(photo(0))
    notes = [{"id": n, "image_id": 1, "caption": text} for n, text in enumerate([LONG, "fine", 5, ["a"], None])]
    record = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": notes}
    (tmp_path / "coco/captions.json").write_text(json.dumps(record))
    made = job(f"coco:{tmp_path}/coco")
    made.run()
    found = [row["ingest_error"] or row["caption_original"] for row in made.rows()]
    expected = ["caption: expected text, received int", "caption: expected text, received list"]
    assert found == [f"caption: {REASON}", "fine", *expected, None]


def test_the_limit_is_of_bytes_and_the_id_of_the_whole_text():
    wide = "狗" * (MAX_TEXT_BYTES // 3)
    for text, good in ((wide, True), (wide + "狗", False), ("\ud83d" * 120_000, False), ("x" * MAX_TEXT_BYTES, True)):
        record = Record("a", b"image", text)
        wanted = Record("a", b"image", text).identify()
        record.drop_long_texts()
        assert (record.error is None) == good == (record.caption == text) and record.identify() == wanted
    record = Record("a", values={"caption": LONG, "truth": LONG, "number": 5}, image_id="a", error="before")
    record.drop_long_texts()
    assert record.values == {"number": 5} and record.error == "before"


def test_texts_count_in_a_window(job, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest_worker, "WINDOW_BYTES", 300_000)
    texts = [f"{number} {LONGEST[:50_000]}" for number in range(20)]
    pq.write_table(pa.table({"image": [b"x"] * 20, "caption": texts}), tmp_path / "a.parquet")
    made = job(f"parquet:{tmp_path}/a.parquet")
    windows = list(ingest_worker._Ingest(made.worker, made.work.units[0])._windows())
    assert [len(window.records) for window in windows] == [6, 6, 6, 2]


def test_names_without_end_are_cut_and_count_in_a_window(job, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest_worker, "WINDOW_BYTES", 200_000)
    names = [f"{number}{'x' * 60_000}" for number in range(6)]
    members = [(f"{name}.jpg", photo(number)) for number, name in enumerate(names)]
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    made = job(f"webdataset:{tmp_path}/x.tar")
    windows = list(ingest_worker._Ingest(made.worker, made.work.units[0])._windows())
    assert max(len(window.records) for window in windows) <= 4
    made.run()
    assert [len(row["source"]) for row in made.rows()] == [4096] * 6


# -- files that are none ----------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(tmp_path):
    """Makes a named pipe. One that is opened all the same gets a writer after some seconds: a test fails, and does not hang."""
    made, over = [], threading.Event()

    def let_go():
        while not over.wait(3):
            for path in made:
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                except OSError:
                    continue
                raised.append(path)

    def make(path):
        os.mkfifo(path)
        made.append(path)
        return path

    raised = []
    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    yield make
    over.set()
    thread.join()
    assert not raised, f"opened for reading: {raised}"


def test_pipes_devices_and_sockets_of_a_folder_are_left_out(job, pipe, photo, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(photo(0))
    (folder / "link.jpg").symlink_to(folder / "good.jpg")
    for name in ("pipe.jpg", "good.txt", "link.caption", "metadata.jsonl"):
        pipe(folder / name)
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "nowhere.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "proc.jpg").symlink_to("/proc/self/status")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "s.png"))
        made = job(f"folder:{folder}")
        made.run()
    rows = {row["source"].removeprefix("set/"): row for row in made.rows()}
    assert sorted(rows) == ["good.jpg", "link.jpg", "nowhere.jpg", "proc.jpg"]
    assert rows["good.jpg"]["image"] == rows["link.jpg"]["image"] == photo(0)
    assert rows["nowhere.jpg"]["ingest_error"] == "FileNotFoundError: nowhere.jpg"
    assert "more than the 0 bytes" in rows["proc.jpg"]["ingest_error"]
    assert made.work.counts == {"already_there": 0, "left_out_no regular file": 6}


def test_pipes_named_by_a_set_are_rows_with_a_reason(job, pipe, photo, tmp_path):
    (tmp_path / "coco/images").mkdir(parents=True)
    (tmp_path / "coco/images/a.jpg").write_bytes(photo(0))
    pipe(tmp_path / "coco/images/b.jpg")
    (tmp_path / "coco/images/c.jpg").symlink_to("/dev/zero")
    images = [{"id": n, "file_name": f"{name}.jpg"} for n, name in enumerate("abc")]
    notes = [{"id": n, "image_id": n, "caption": "text"} for n in range(3)]
    (tmp_path / "coco/captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    made = job(f"coco:{tmp_path}/coco")
    made.run()
    assert [row["ingest_error"] for row in made.rows()] == [
        None,
        "b.jpg: expected a regular file, this is a named pipe, which is not read",
        "c.jpg: expected a regular file, this is a device, which is not read",
    ]


@pytest.mark.parametrize(
    ("kind", "name"), [("prompts", "p.txt"), ("prompts", "p.csv"), ("webdataset", "x.tar"), ("parquet", "x.parquet")]
)
def test_a_source_that_is_a_pipe_is_refused_by_name(pipe, tmp_path, kind, name):
    pipe(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a regular file, this is a named pipe"):
        source = open_source(f"{kind}:{tmp_path}/{name}")
        (source.items if kind == "prompts" else source.pieces)()


def test_shards_that_are_pipes_are_left_out(pipe, tmp_path):
    write_tar(tmp_path / "a.tar", pair(0, b"image"))
    pipe(tmp_path / "b.tar")
    source = open_source(f"webdataset:{tmp_path}")
    assert [piece["place"].rpartition("/")[2] for piece in source.pieces()] == ["a.tar"]
    assert source.left_out == {"left_out_no regular file": 1}
    assert len(open_source(f"webdataset:{tmp_path}/*.tar").pieces()) == 1


def test_pipes_in_a_folder_of_img2dataset(pipe, photo, tmp_path):
    (tmp_path / "files/00000").mkdir(parents=True)
    (tmp_path / "files/00000/0.jpg").write_bytes(photo(0))
    pipe(tmp_path / "files/00000/0.txt")
    pipe(tmp_path / "files/00000/1.jpg")
    source = open_source(f"img2dataset:{tmp_path}/files")
    first, second = source.records(source.pieces())
    assert first.error == ".txt: 0.txt: expected a regular file, this is a named pipe, which is not read"
    assert second.error == "1.jpg: expected a regular file, this is a named pipe, which is not read"


def test_prompt_folders_with_a_pipe_are_refused(pipe, tmp_path):
    (tmp_path / "p").mkdir()
    pipe(tmp_path / "p/a.txt")
    with pytest.raises(NoRegularFile, match=r"a\.txt"):
        read_prompts(str(tmp_path / "p"))


def test_files_of_object_stores_are_read_up_to_the_limit(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    (tmp_path / "b").write_bytes(bytes(101))
    (tmp_path / "c").write_bytes(b"")
    asked = []

    class Store(DirFileSystem):
        """Counts what is asked; has no ranges of empty objects, as S3."""

        def cat_file(self, path, start=None, end=None, **options):
            asked.append(end)
            if end is not None and path.endswith("c"):
                raise OSError(22, "InvalidRange")
            return super().cat_file(path, start=start, end=end, **options)

    monkeypatch.setattr(locations.fsspec.core, "url_to_fs", lambda uri: (Store(str(tmp_path)), ""))
    assert locations.read_below("s3://x", "a", 100) == locations.read_below("s3://x", "a", 100, 100) == bytes(100)
    assert locations.read_below("s3://x", "c", 100) == b"" and asked == [101, None, 101]
    for size in (None, 101):
        with pytest.raises(ValueError, match="101 bytes, more than 100 allowed"):
            locations.read_below("s3://x", "b", 100, size)
    with pytest.raises(FileNotFoundError):
        locations.read_below("s3://x", "d", 100)


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(bytes(50))

    def grown(path):
        file = open_regular(path)
        size = os.fstat(file.fileno())
        monkeypatch.setattr(locations.os, "fstat", lambda number: size)
        with open(path, "ab") as more:
            more.write(bytes(1000))
        return file

    monkeypatch.setattr(locations, "open_regular", grown)
    with pytest.raises(ValueError, match="more than the 50 bytes that its folder tells"):
        locations.read_below(str(tmp_path), "a.jpg", 2000)


def test_the_limits_of_a_named_image_and_of_named_texts():
    names = sources_grouped.SampleNames(ColumnsConfig(image="img", caption="json.meta.caption", score="cls"))
    sizes = [names.wanted(name) for name in ("img", "json", "json.meta.caption", "cls", "txt", "jpg")]
    assert sizes == [256 << 20, 4 << 20, 256 << 10, 256 << 10, 0, 0]
    assert names.needed_to_check("json") == 4 << 20 and names.needed_to_check("img") == 0

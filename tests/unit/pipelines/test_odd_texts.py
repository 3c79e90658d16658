"""Texts and names that UTF-8 cannot write are rows, and the job goes on; an error that nobody foresaw is one sentence."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ingestion import worker as ingest_worker
from pipelines.ingestion.worker import IngestWorker
from pipelines.sources import base as sources

pytestmark = pytest.mark.unit
HALF = "half an emoji \ud83d"


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_half_a_character_in_json_is_a_row_with_a_reason(job, photo, tmp_path):
    about = [{"caption": "fine"}, {"caption": HALF}, {"caption": ["also fine", HALF]}]
    write_tar(
        tmp_path / "x.tar",
        [pair for n in range(3) for pair in ((f"{n}.jpg", photo(n)), (f"{n}.json", json.dumps(about[n]).encode()))],
    )
    made = job(f"webdataset:{tmp_path}/x.tar")
    (result,) = made.run()
    rows = {row["source"]: row for row in made.rows() if row["ingest_error"]}
    reason = r"caption: expected text, received half of a character, \ud83d, at 14"
    assert result["errors"] == 2 and {row["ingest_error"] for row in rows.values()} == {reason}
    assert {row["caption_original"] for row in made.rows()} == {"fine", "also fine", None}
    assert job(f"webdataset:{tmp_path}/x.tar", reread=True).run()[0]["counts"] == {"read": 4, "already_there": 4}


def test_names_that_are_not_utf8_are_good_rows(job, photo, tmp_path):
    write_tar(tmp_path / "x.tar", [("caf\udce9.jpg", photo(0)), ("caf\udce9.txt", b"coffee")])
    made = job(f"webdataset:{tmp_path}/x.tar")
    made.run()
    (row,) = made.rows()
    assert (row["caption_original"], row["ingest_error"]) == ("coffee", None) and row["source"].endswith(
        r"caf\udce9.jpg"
    )


def test_files_whose_names_are_not_utf8(job, photo, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in ((b"caf\xe9.jpg", photo(0)), (b"caf\xe9.txt", b"coffee"), (b"bad\xe9.png", b"x")):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            file.write(content)
    made = job(f"folder:{folder}")
    made.run()
    bad, good = made.rows()
    assert (good["caption_original"], good["source"]) == ("coffee", r"set/caf\udce9.jpg")
    assert bad["ingest_error"] and job(f"folder:{folder}").work.units == []


def test_half_a_character_in_listed_texts(job, photo, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": HALF}) + "\n" + json.dumps({"prompt": "fine"}))
    made = job(f"prompts:{tmp_path}/p.jsonl")
    made.run()
    assert [row["caption"] for row in made.rows()] == [None, "fine"] and "half of a char" in made.rows()[0][
        "ingest_error"
    ]
    assert job(f"prompts:{tmp_path}/p.jsonl").work.units == []
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.jpg").write_bytes(photo(0))
    (tmp_path / "set/metadata.jsonl").write_text(json.dumps({"file_name": "1.jpg", "text": HALF}))
    made = job(f"folder:{tmp_path}/set", store=str(tmp_path / "other"))
    made.run()
    assert "half of a character" in made.rows()[0]["ingest_error"]


def test_a_column_that_is_not_utf8(job, photo, tmp_path):
    """Arrow does not look when it writes or reads."""
    texts = pa.array([b"fine", b"caf\xe9", b"also"]).view(pa.string())
    pq.write_table(pa.table({"image": [photo(n) for n in range(3)], "caption": texts}), tmp_path / "a.parquet")
    made = job(f"parquet:{tmp_path}/a.parquet")
    made.run()
    assert [row["caption_original"] for row in made.rows()] == ["fine", None, "also"]
    assert made.rows()[1]["ingest_error"] == "column 'caption': expected UTF-8, received byte 0xe9"


@pytest.mark.parametrize(
    ("owner", "name", "where"),
    [
        (ingest_worker, "make_row", r"looking at set/1\.jpg"),
        (sources.Listed, "records", r"reading what follows the begin of set/1\.jpg"),
        (ingest_worker.ColumnFileWriter, "write", r"writing the rows of set/1\.jpg and what follows"),
    ],
)
def test_an_unforeseen_error_is_one_sentence(job, photo, tmp_path, monkeypatch, owner, name, where):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.jpg").write_bytes(photo(0))
    made = job(f"folder:{tmp_path}/set")
    (tmp_path / "store/runs/ingest-1").mkdir(parents=True)

    def broken(*_, **__):
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(owner, name, broken if name != "records" else lambda *_: map(broken, [1]))
    assert isinstance(made.worker, IngestWorker)
    with pytest.raises(RuntimeError, match=where + r": KeyError: 'nobody.*runs/ingest-1/unit-0.txt") as caught:
        made.worker(made.work.units[0])
    assert "\n" not in str(caught.value)
    assert "in broken" in (tmp_path / "store/runs/ingest-1/unit-0.txt").read_text()

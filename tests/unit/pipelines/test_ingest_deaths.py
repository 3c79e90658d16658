"""Rows and shards that kill the process which looks at them or reads them, and what the next process makes of it."""

import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines import ingest
from pipelines.ingestion import worker as ingest_worker
from pipelines.ingestion.summary import IngestSummary
from pipelines.ingestion.work import Work
from tests.support.ingest_rows import write

pytestmark = pytest.mark.unit
ERROR = columns.error("ingest")


def test_a_worker_that_dies_and_its_successor(job, photo, tmp_path, monkeypatch):
    """It dies while it looks at rows 4 to 7; the next one takes these one by one, and in the end leaves row 5 out."""
    write(tmp_path / "a.parquet", [(photo(seed), f"caption {seed}") for seed in range(12)])
    monkeypatch.setattr(ingest_worker, "WINDOW_ROWS", 4)
    made = job(f"parquet:{tmp_path}/a.parquet", rows_per_fragment=100)
    (unit,) = made.work.units
    look = ingest_worker.UnitTask._look

    class Death(BaseException):
        """As far as the tracker can see, the process is gone."""

    def fatal(task, record):
        if record.caption == "caption 5":
            raise Death
        return look(task, record)

    monkeypatch.setattr(ingest_worker.UnitTask, "_look", fatal)
    for number in range(3):  # in its window, then twice alone
        with pytest.raises(Death):
            made.worker(unit)
        made.worker.process = f"successor {number}"
    (result,) = made.run()
    rows = made.rows()
    assert (result["errors"], result["counts"]["read"], len(rows)) == (1, 12, 12)
    assert [row["caption_original"] for row in rows] == [f"caption {n}" if n != 5 else None for n in range(12)]
    assert rows[5][ERROR] == ingest_worker.DIED


class Death(BaseException):
    """As far as the tracker can see, the process is gone."""


def dies_behind(monkeypatch, source, place, records):
    """Reading the piece at such a place kills, behind so many records."""
    read = source.read

    def fatal(piece):
        for number, record in enumerate(read(piece)):
            if number == records and place in piece["place"]:
                raise Death
            yield record

    monkeypatch.setattr(source, "read", fatal)


def successors(made, unit, deaths):
    """Workers that die on the unit, one after the other; the next one does not."""
    for number in range(deaths):
        with pytest.raises(Death):
            made.worker(unit)
        made.worker.process = f"successor {number}"


@pytest.mark.parametrize("window", [2, 3, 100])
@pytest.mark.parametrize("records", [0, 2, 3])
def test_a_piece_that_kills_its_reader(job, photo, tmp_path, monkeypatch, window, records):
    """What comes before that place in the piece is taken, and all other pieces of the unit; nothing twice."""
    for number, name in enumerate("abc"):
        write(tmp_path / f"{name}.parquet", [(photo(5 * number + row), f"{name}{row}") for row in range(4)])
    monkeypatch.setattr(ingest_worker, "WINDOW_ROWS", window)
    made = job(f"parquet:{tmp_path}", rows_per_fragment=100)
    (unit,) = made.work.units
    dies_behind(monkeypatch, made.worker.source, "b.parquet", records)
    successors(made, unit, 3)  # ahead of the rows in hand, then twice alone
    (result,) = made.run()
    rows = made.rows()
    taken = (
        [f"a{row}" for row in range(4)]
        + [f"b{row}" for row in range(records)]
        + [None]
        + [f"c{row}" for row in range(4)]
    )
    assert [row["caption_original"] for row in rows] == taken
    assert [row[ERROR] for row in rows if row[ERROR]] == [ingest_worker.DIED_READING]
    place = f"{tmp_path.name}/b.parquet:0"
    assert rows[4 + records]["source"] == f"{place}#unread"
    assert (result["errors"], result["counts"], result["unread"]) == (1, {"read": 9 + records}, [place])
    monkeypatch.undo()
    monkeypatch.setattr(ingest_worker.ray, "get", lambda value: value)
    again = job(f"parquet:{tmp_path}", rows_per_fragment=100)
    (result,) = again.run()
    assert (len(again.rows()), result["unread"]) == (13, []), "where there is memory for it, the rest comes"
    assert result["counts"] == {"read": 12, "already_there": 8 + records}


def test_a_piece_that_kills_in_every_run_is_one_row(job, photo, tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [(photo(row), f"a{row}") for row in range(4)])
    for _ in range(2):
        made = job(f"parquet:{tmp_path}", rows_per_fragment=100)
        dies_behind(monkeypatch, made.worker.source, "a.parquet", 3)
        successors(made, made.work.units[0], 3)
        (result,) = made.run()
        assert len(result["unread"]) == 1 and len(made.rows()) == 4
    assert (result["errors"], result["counts"]) == (0, {"read": 4, "already_there": 4})


def test_an_item_that_kills_its_reader(job, photo, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(photo(number))
    made = job(f"folder:{tmp_path}/images", rows_per_fragment=100)
    (unit,) = made.work.units
    record = made.worker.source.record

    def fatal(item):
        if item["path"] == "2.jpg":
            raise Death
        return record(item)

    monkeypatch.setattr(made.worker.source, "record", fatal)
    successors(made, unit, 3)
    made.run()
    rows = made.rows()
    assert [row["image_id"] for row in rows] == [item["image_id"] for item in unit["parts"]]
    assert [row[ERROR] for row in rows] == [None, None, ingest_worker.DIED_READING, None]


def test_a_row_that_kills_behind_a_piece_that_does(job, photo, tmp_path, monkeypatch):
    """The rows behind what is set aside have other numbers than before."""
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.parquet", [(photo(5 * number + row), f"{name}{row}") for row in range(4)])
    made = job(f"parquet:{tmp_path}", rows_per_fragment=100)
    (unit,) = made.work.units
    look = ingest_worker.UnitTask._look

    def fatal(task, record):
        if record.caption == "b2":
            raise Death
        return look(task, record)

    monkeypatch.setattr(ingest_worker.UnitTask, "_look", fatal)
    successors(made, unit, 3)
    dies_behind(monkeypatch, made.worker.source, "a.parquet", 1)
    successors(made, unit, 5)  # twice in the piece; in the window, then twice at the row, under its new number
    made.run()
    rows = made.rows()
    assert [row["caption_original"] for row in rows] == ["a0", None, "b0", "b1", None, "b3"]
    assert [rows[1][ERROR], rows[4][ERROR]] == [ingest_worker.DIED_READING, ingest_worker.DIED]


def test_more_memory_than_there_is(job, photo, tmp_path, monkeypatch):
    """A file may ask for any size."""
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.parquet", [(photo(5 * number + row), f"{name}{row}") for row in range(4)])
    made = job(f"parquet:{tmp_path}", rows_per_fragment=100)
    read = made.worker.source.read

    def greedy(piece):
        for number, record in enumerate(read(piece)):
            if number == 2 and "a.parquet" in piece["place"]:
                pa.allocate_buffer(1 << 62)
            yield record

    monkeypatch.setattr(made.worker.source, "read", greedy)
    (result,) = made.run()
    assert [row["caption_original"] for row in made.rows()] == ["a0", "a1", None, "b0", "b1", "b2", "b3"]
    assert "needs more memory than there is: malloc of size" in made.rows()[2][ERROR]
    assert result["unread"] == [f"{tmp_path.name}/a.parquet:0"]


def test_what_was_not_read_is_named_and_not_noted_as_done(job, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest.ray, "get", lambda value: value)
    for name in "ab":
        write(tmp_path / f"{name}.parquet", [(photo(0), name)])
    made = job(f"parquet:{tmp_path}", rows_per_fragment=100)
    summary = IngestSummary("ingest", "s")
    run = type("Run", (), {"id": "ingest-1", "check": staticmethod(lambda: None)})
    driver = ingest.IngestPass(made.config, made.table, run, made.work, summary)
    driver.index = made.index
    (unit,) = made.work.units
    result = made.worker(unit) | {"unread": [unit["parts"][0]["place"]]}
    assert driver.take(result)
    driver.flush()
    driver._note([unit["name"]])
    assert [piece["place"] for piece in Work.of(made.config, made.source, made.table).units[0]["parts"]] == result[
        "unread"
    ]
    assert summary.counts["unread"] == 1 and f"such as {tmp_path.name}/a.parquet:0: the next run" in summary.to_text()

"""The ingest job without Ray: config, what is due, and the worker with the real tracker and keeper called directly."""

import dataclasses
import io
import tarfile
import time

import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines import ingest
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table
from pipelines.engine.unit_pass import ErrorRateExceeded
from pipelines.ingest import IngestConfig
from pipelines.ingestion import worker as ingest_worker
from pipelines.ingestion.done_pieces import DonePieces
from pipelines.ingestion.filters import FiltersConfig
from pipelines.ingestion.summary import IngestSummary
from pipelines.ingestion.work import Work, options_of, packed
from pipelines.sources.base import ColumnsConfig, Record, error_row
from pipelines.sources.registry import open_source
from tests.support.ingest_rows import total, write

pytestmark = pytest.mark.unit
ERROR = columns.error("ingest")


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rows_per_fragment": 0}, "rows_per_fragment: expected a whole number >= 1"),
        ({"max_error_rate": 1.5}, "max_error_rate: expected a number >= 0 and <= 1"),
        ({"filters": FiltersConfig(min_score=5.0)}, "filters.min_score: expected with --columns.score"),
    ],
)
def test_config_is_checked(options, match):
    with pytest.raises(ValueError, match=match):
        IngestConfig(source="scenes:1", **options)


@pytest.mark.parametrize("written", ["{0}", "{0}/", "file://{0}", "{1}", "{0}/../samples.lance", "{2}"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_the_store_s_own_table_is_no_source(tmp_path, monkeypatch, written, dry_run):
    monkeypatch.chdir(tmp_path)
    Table(f"{tmp_path}/store/samples.lance").create(open_source("scenes:1").schema)
    (tmp_path / "link").symlink_to("store")
    place = written.format(f"{tmp_path}/store/samples.lance", "store/samples.lance", "link/samples.lance")
    config = IngestConfig(source=f"lance:{place}", store=f"{tmp_path}/store", dry_run=dry_run)
    with pytest.raises(ValueError, match="expected another table than the store's own"):
        ingest.main(config)
    assert not (tmp_path / "store" / "runs").exists()


def test_flags():
    from lidit.cli import parse_config

    flags = "--source parquet:x --columns.image jpg --columns.score s --filters.min_score 5 --filters.captions [url,tag_list]"
    config = parse_config("ingest", ingest, [*flags.split(), "--filters.near_duplicates", "4", "--check", "header"])
    assert config.columns == ColumnsConfig("jpg", None, "s") and config.check == "header"
    assert (config.filters.min_score, list(config.filters.captions)) == (5.0, ["url", "tag_list"])
    assert config.filters.near_duplicates == 4 and not config.filters.duplicates
    assert config.update is False and not config.compares_all, (
        "a field may be called as a method of the parser's values is"
    )
    config = parse_config("ingest", ingest, ["--source", "folder:x", "--update"])
    assert config.update is True and config.compares_all


# -- what is due ------------------------------------------------------------------------------------------------------


def names_of(units):
    return [[part["n"] for part in unit["parts"]] for unit in units]


def test_items_are_packed_by_rows():
    assert names_of(packed([{"n": n} for n in range(7)], 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert packed([], 3) == []


def test_pieces_are_packed_by_rows_or_bytes():
    pieces = [{"n": n, "stamp": "x", "rows": rows, "bytes": 0} for n, rows in enumerate([100, 2, 3, 50, 1, 1])]
    units = packed(pieces, 10)
    assert names_of(units) == [[0], [1, 2], [3], [4, 5]]
    assert [unit["name"] for unit in units] == ["0", "1", "2", "3"]
    shards = [{"n": n, "stamp": None, "rows": None, "bytes": size} for n, size in enumerate([10_000, 20_000, 10**9, 5])]
    assert names_of(packed(shards, 10)) == [[0, 1], [2], [3]]


def test_done_pieces_are_not_due(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", [(b"x", name)])
    config = IngestConfig(f"parquet:{tmp_path}", str(tmp_path / "store"))
    source, table = open_source(config.source), Table(str(tmp_path / "store" / columns.SAMPLES_TABLE))
    table.create(source.schema)
    work = Work.of(config, source, table)
    assert (work.rows, len(work.units), work.counts["shards_done_before"]) == (2, 1, 0)
    work.done.note("ingest-1", source.pieces()[:1])
    again = Work.of(config, source, table)
    assert (again.rows, again.counts["shards_done_before"]) == (1, 1)
    assert again.units[0]["parts"][0]["place"].endswith("b.parquet:0")
    for other in (
        dataclasses.replace(config, reread=True),
        dataclasses.replace(config, filters=FiltersConfig(min_side=5)),
        dataclasses.replace(config, columns=ColumnsConfig(caption="caption")),
        dataclasses.replace(config, check="header"),
    ):
        assert Work.of(other, source, table).rows == 2, "other options may choose other rows"
    narrow = dataclasses.replace(config, source=f"parquet:{tmp_path}/{{a,b}}.parquet", rows_per_fragment=7)
    assert Work.of(narrow, open_source(narrow.source), table).rows == 1, "the same files by another spec"
    write(tmp_path / "a.parquet", [(b"x", "a"), (b"y", "new")])
    assert Work.of(config, source, table).rows == 3, "it has changed"


def test_pieces_of_unknown_content_are_always_due(tmp_path):
    done = DonePieces(str(tmp_path / "t.lance"), {})
    piece = {"place": "p", "uri": "u", "stamp": None, "rows": 1}
    done.note("ingest-1", [piece])
    assert piece not in done and not (tmp_path / "t.lance").exists()


def test_options_are_json(tmp_path):
    import json

    config = IngestConfig("parquet:x", filters=FiltersConfig(captions=("url",)))
    assert json.loads(json.dumps(options_of(config))) == options_of(config)


# -- the worker -------------------------------------------------------------------------------------------------------


def test_rows_and_files(job, photo, tmp_path):
    images = [photo(seed) for seed in range(10)]
    write(tmp_path / "a.parquet", [(image, f"caption {n}") for n, image in enumerate(images)])
    made = job(f"parquet:{tmp_path}/a.parquet")
    (result,) = made.run()
    assert [file["rows"] for file in result["files"]] == [4, 4, 2]
    assert (result["errors"], result["counts"]) == (0, {"read": 10})
    rows = made.rows()
    assert [row["image"] for row in rows] == images and [row["caption_original"] for row in rows] == [
        f"caption {n}" for n in range(10)
    ]
    assert all((row["height"], row["width"], row[ERROR], row["image_phash"]) == (64, 96, None, None) for row in rows)
    assert made.tracker.totals.remote() == {"rows": 10, "errors": 0}


def test_rows_without_a_caption_are_counted(job, photo, tmp_path):
    texts = ["a caption", None, "", " ", "another"]
    write(tmp_path / "a.parquet", [(photo(n), text) for n, text in enumerate(texts)])
    counts = total(job(f"parquet:{tmp_path}/a.parquet").run())
    assert counts == {"read": 5, "no_caption": 3}
    told = IngestSummary("ingest", "s", counts=counts).to_text()
    assert "3 rows came without a caption" in told


def test_windows_may_be_of_any_size(job, photo, tmp_path, monkeypatch):
    images = [photo(seed) for seed in range(10)]
    write(tmp_path / "a.parquet", [(image, "x") for image in images])
    for rows, size in ((3, 1 << 30), (1000, 5000), (1, 1)):
        monkeypatch.setattr(ingest_worker, "WINDOW_ROWS", rows)
        monkeypatch.setattr(ingest_worker, "WINDOW_BYTES", size)
        made = job(f"parquet:{tmp_path}/a.parquet", reread=True, store=str(tmp_path / f"{rows}"))
        made.run()
        assert [row["image"] for row in made.rows()] == images


def test_identities_are_new_once_within_and_across_files(job, photo, tmp_path):
    same = [(photo(0), "a"), (photo(1), "a"), (photo(0), "a"), (photo(0), "b")]
    write(tmp_path / "a.parquet", same)
    write(tmp_path / "b.parquet", [*same, (photo(2), "a")])
    made = job(f"parquet:{tmp_path}")
    assert total(made.run()) == {"read": 9, "repeated": 5}
    assert len({row["image_id"] for row in made.rows()}) == len(made.rows()) == 4
    again = job(f"parquet:{tmp_path}", reread=True)
    assert total(again.run()) == {"read": 9, "already_there": 9}
    assert len(again.rows()) == 4


def test_zoo(job, zoo, tmp_path):
    images = {**zoo.good, **{name: data for name, (data, _) in zoo.bad.items()}}
    write(tmp_path / "a.parquet", [(data, name) for name, data in images.items()])
    made = job(f"parquet:{tmp_path}/a.parquet", rows_per_fragment=100)
    (result,) = made.run()
    rows = made.rows()
    assert result["errors"] == len(zoo.bad) and len(rows) == len(images)
    good, bad = rows[: len(zoo.good)], rows[len(zoo.good) :]
    assert [row["image"] for row in good] == list(zoo.good.values()) and all(row[ERROR] is None for row in good)
    assert all(row[ERROR] and row["image"] is None and row["caption_original"] is None for row in bad)
    assert len(result["examples"]) == ingest_worker.EXAMPLES and "a.parquet#" in result["examples"][0]["error"]
    assert total(job(f"parquet:{tmp_path}/a.parquet").run()) == {"read": len(images), "already_there": len(images)}


@pytest.mark.parametrize(
    "filters, counts, left",
    [
        ({}, {}, "0123456789"),
        ({"min_side": 60}, {"filtered_min_side": 1}, "123456789"),
        ({"max_aspect": 2.0}, {"filtered_max_aspect": 1}, "023456789"),
        ({"min_score": 5.0}, {"filtered_min_score": 5, "filtered_no_score": 1}, "5678"),
        ({"captions": ("url",)}, {"caption_null_url": 1}, "0123456789"),
        ({"captions": ("url",), "bad_caption": "drop"}, {"filtered_caption_url": 1}, "012456789"),
        ({"captions": ("url", "file_name"), "min_caption": 4}, {"caption_null_url": 1, "caption_null_file_name": 1,
          "caption_null_min_caption": 1}, "0123456789"),
        ({"duplicates": True}, {"filtered_duplicates": 1}, "012345678"),
        ({"near_duplicates": 4}, {"filtered_near_duplicates": 2}, "01234567"),
        ({"duplicates": True, "near_duplicates": 4}, {"filtered_duplicates": 1, "filtered_near_duplicates": 1}, "01234567"),
    ],
)  # fmt: skip
def test_filters_count_what_they_take(job, photo, tmp_path, filters, counts, left):
    rows = [(photo(seed), f"caption {seed}", float(seed)) for seed in range(8)]
    rows[0] = (photo(0, size=(50, 60)), "caption 0", 0.0)
    rows[1] = (photo(1, size=(200, 64)), "caption 1", 1.0)
    rows[3] = (rows[3][0], "https://example.com", 3.0)
    rows[4] = (rows[4][0], "IMG_0042.jpg", 4.0)
    rows[5] = (rows[5][0], "cat", 5.0)
    rows.append((photo(6, quality=60), "caption 8", 8.0))  # the same picture as row 6, other bytes
    rows.append((rows[7][0], "caption 9", None))  # the same bytes as row 7
    write(tmp_path / "a.parquet", rows)
    names = ColumnsConfig(score="score")
    made = job(f"parquet:{tmp_path}/a.parquet", filters=FiltersConfig(**filters), columns=names)
    assert total(made.run()) == {"read": 10, **counts}
    kept = {row["source"].rpartition("#")[2]: row for row in made.rows()}
    assert "".join(kept) == left
    nulled = [place for place, row in kept.items() if row["caption_original"] is None]
    assert len(nulled) == sum(count for name, count in counts.items() if name.startswith("caption_null"))


def test_duplicates_of_earlier_runs_are_found(job, photo, tmp_path):
    write(tmp_path / "a.parquet", [(photo(0), "a"), (photo(1), "b")])
    job(f"parquet:{tmp_path}/a.parquet", filters=FiltersConfig(near_duplicates=4)).run()
    write(tmp_path / "b.parquet", [(photo(0), "other"), (photo(1, quality=60), "c"), (photo(2), "d")])
    both = FiltersConfig(duplicates=True, near_duplicates=4)
    made = job(f"parquet:{tmp_path}/b.parquet", filters=both)
    assert total(made.run()) == {"read": 3, "filtered_duplicates": 1, "filtered_near_duplicates": 1}


@pytest.mark.parametrize("errors", [40, 21])
def test_more_than_half_is_asked_of_the_true_number_at_the_end(job, photo, tmp_path, errors):
    """A tar does not tell how many rows it has: before the end 40 of 40 may be the first of many."""
    write(tmp_path / "a.parquet", [(photo(0), "x")])
    made = job(f"parquet:{tmp_path}/a.parquet")
    made.work.rows = None
    driver = ingest.IngestPass(made.config, made.table, None, made.work, IngestSummary("ingest", "s"))
    first = made.tracker.first_error.remote
    driver.check_errors({"rows": 40, "errors": errors}, first)
    with pytest.raises(ErrorRateExceeded, match=f"{errors} of 40 rows are damaged"):
        driver.check_errors({"rows": 40, "errors": errors}, first, at_end=True)
    driver.check_errors({"rows": 40, "errors": 20}, first, at_end=True)


def test_the_same_damage_in_many_places_is_as_many_errors(job, photo, tmp_path):
    """A site that answers every request with one page: all rows are damaged, though only one has bytes of its own."""
    page = b"<!doctype html><html>gone</html>"
    for shard in ("one/a.parquet", "two/one/a.parquet"):  # alike in folder, file and row
        (tmp_path / shard).parent.mkdir(parents=True)
        write(tmp_path / shard, [(page, "a"), (page, "a"), (page, "b"), (photo(0), "good"), (photo(0), "good")])
    made = job(f"parquet:{tmp_path}/**/a.parquet")
    results = made.run()
    assert sum(result["errors"] for result in results) == 6
    assert total(results) == {"read": 10, "repeated": 3}
    assert len({row["image_id"] for row in made.rows()}) == len(made.rows()) == 7
    assert made.tracker.first_error.remote() == "one/a.parquet#0: a web page, not an image"
    again = job(f"parquet:{tmp_path}/**/a.parquet", reread=True)
    assert (len(again.rows()), sum(result["errors"] for result in again.run()), len(again.rows())) == (7, 0, 7)


def test_damage_that_is_known_by_its_content_stays(job, photo, tmp_path):
    """Tables from before name damaged rows by their bytes."""
    page = b"<!doctype html><html>gone</html>"
    write(tmp_path / "a.parquet", [(page, "a"), (photo(0), "good")])
    made = job(f"parquet:{tmp_path}/a.parquet")
    record = Record("a.parquet#0", page, "a")
    old = pa.RecordBatch.from_pylist([error_row(record, "a web page")], made.source.schema)
    writer = ColumnFileWriter(made.table.uri, made.source.schema, "ingest-1")
    writer.write(old)
    made.table.append([writer.finish(made.table.open())])
    made = job(f"parquet:{tmp_path}/a.parquet")
    assert total(made.run()) == {"read": 2, "already_there": 1}
    assert [row[ERROR] for row in made.rows()] == ["a web page", None]


def test_one_result_of_a_unit_counts(job, photo, tmp_path, monkeypatch):
    """Ray may repeat a unit whose result it has handed over, and give a result twice."""
    monkeypatch.setattr(ingest.ray, "get", lambda value: value)
    write(tmp_path / "a.parquet", [(photo(seed), "x") for seed in range(3)])
    made = job(f"parquet:{tmp_path}/a.parquet")
    driver = ingest.IngestPass(made.config, made.table, None, made.work, IngestSummary("ingest", "s"))
    driver.index = made.index
    (unit,) = made.work.units
    first, second = made.worker(unit), made.worker(unit)
    assert [[file["rows"] for file in result["files"]] for result in (first, second)] == [[3], [3]]
    assert driver.take(first) and not driver.take(first)
    assert not driver.take(second)
    assert driver.pending == [first] and not driver.unsettled
    third = made.worker(unit)
    assert third["files"] == [] and not driver.take(third)


def test_unit_that_fails_leaves_no_unfinished_file(job, photo, tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [(photo(seed), "x") for seed in range(6)])
    monkeypatch.setattr(ingest_worker, "WINDOW_ROWS", 1)
    made = job(f"parquet:{tmp_path}/a.parquet")

    def broken(self, parts):
        yield from list(type(made.source).records(made.source, parts))[:5]
        raise OSError("the network is down")

    monkeypatch.setattr(made.worker.source, "records", broken.__get__(made.worker.source))
    with pytest.raises(OSError, match="network"):
        made.run()
    assert not [path for path in (tmp_path / "store").rglob("_unfinished/**/*.lance")]


def test_prompts_go_the_same_way(job, tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(f"prompt {n}" for n in range(6)))
    made = job(f"prompts:{tmp_path}/p.txt")
    assert [len(result["files"]) for result in made.run()] == [1, 1]
    assert [row["caption"] for row in made.rows()] == [f"prompt {n}" for n in range(6)]
    assert job(f"prompts:{tmp_path}/p.txt").work.units == []


def test_tar_of_many_small_shards_shares_units(job, photo, tmp_path):
    for number in range(4):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = len(photo(number))
            tar.addfile(info, io.BytesIO(photo(number)))
    made = job(f"webdataset:{tmp_path}")
    assert len(made.work.units) == 1 and made.work.rows is None
    made.run()
    assert len(made.rows()) == 4


def test_a_dear_commit_does_not_put_off_the_next(job, photo, tmp_path):
    """What waits is lost by a kill: units are committed by number and age, and only a commit's own time is between two."""
    write(tmp_path / "a.parquet", [(photo(0), "x")])
    made = job(f"parquet:{tmp_path}/a.parquet")
    driver = ingest.IngestPass(made.config, made.table, None, made.work, IngestSummary("ingest", "s"))
    driver.pending = [{"files": [None] * 32}]
    driver.last_commit_took, driver.last_commit = 5.0, time.monotonic() - 6
    assert driver.is_due()
    driver.pending = [{"files": [None] * 31}]
    assert not driver.is_due()
    driver.oldest = time.monotonic() - 31
    assert driver.is_due()

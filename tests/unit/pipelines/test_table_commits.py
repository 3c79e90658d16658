"""Commits on a real Lance table, of several at once, of the dead and of the late: each value once, only garbage is deleted."""

import contextlib
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from lance.commit import CommitConflictError

import pipelines.engine.table
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table, data_file_uri
from tests.support.table_rows import (
    EMBEDS,
    ERROR,
    KEY,
    LENGTH,
    files,
    in_threads,
    rows_of,
    verdicts,
    write_columns,
    write_rows,
)

pytestmark = pytest.mark.unit


# -- many at once -----------------------------------------------------------------------------------------------------


def test_appends_and_attaches_at_once_lose_nothing(table):
    table.append([write_rows(table, 100 * fragment) for fragment in range(4)])
    table.declare([EMBEDS, LENGTH, ERROR], KEY)

    def work(number):
        mine = Table(table.uri)
        if number < 2:
            for step in range(3):
                mine.append([write_rows(mine, 400 + 100 * (3 * number + step))])
        else:  # two stages, each its column, each its own committer
            column = EMBEDS if number == 2 else LENGTH
            for fragment in range(4):
                assert verdicts(mine.attach([write_columns(mine, fragment, fields=[column])])) == (1, 0, 0)

    in_threads(work, 4)
    rows = rows_of(table)
    assert sorted(row["id"] for row in rows) == sorted(f"{100 * f + n:03d}" for f in range(10) for n in range(4))
    assert set(table.missing(["embeds", "length"])) == set(range(4, 10))
    for row in rows:
        number = int(row["id"])
        filled = (bytes([101, number % 100]), number % 100) if number < 400 else (None, None)
        assert (row["embeds"], row["length"]) == filled
    table.open().validate()


def test_replacing_everything(filled):
    """What a compaction left as nulls is written again, error column and all."""
    first = write_columns(filled, 0, fields=[EMBEDS, LENGTH, ERROR], mark=b"1")
    filled.attach([first])
    replaces = dict.fromkeys(["embeds", "length", "embed_error"], first.path)
    second = write_columns(filled, 0, fields=[EMBEDS, LENGTH, ERROR], mark=b"2", replaces=replaces)
    third = write_columns(filled, 0, fields=[EMBEDS, LENGTH, ERROR], mark=b"3", replaces=replaces)
    assert verdicts(filled.attach([second, third])) == (1, 0, 1)
    assert [row["embeds"][:1] for row in rows_of(filled)[:4]] == [b"2"] * 4
    assert filled.missing(["embeds", "length", "embed_error"]).keys() == {1, 2}
    filled.open().validate()


def test_same_fragments_from_several_committers(filled):
    done = []

    def work(number):
        mine = Table(filled.uri)
        files_ = [write_columns(mine, fragment, mark=b"%d" % number) for fragment in range(3)]
        for file in files_:
            outcome = mine.attach([file])
            assert len(outcome.done) + len(outcome.duplicate) == 1
            done.extend(outcome.done)

    in_threads(work, 3)
    assert sorted(file.fragment_id for file in done) == [0, 1, 2], "each fragment was done by one of them"
    by_fragment = [row["embeds"][:1] for row in rows_of(filled)]
    assert all(len(set(by_fragment[first : first + 4])) == 1 for first in (0, 4, 8))


def test_declares_at_once(table):
    in_threads(lambda number: Table(table.uri).declare([EMBEDS, pa.field(f"own_{number}", pa.int32())], KEY), 4)
    assert sorted(table.open().schema.names) == sorted(["id", "text", "embeds", *(f"own_{n}" for n in range(4))])


# -- garbage ----------------------------------------------------------------------------------------------------------


DEAD, DEAD_INGEST, ALIVE = (f"{name}-20260101T000000-{n:06x}" for n, name in enumerate(("embed", "ingest", "embed")))


def test_orphans(filled):
    committed = write_columns(filled, 0, run=DEAD)
    filled.attach([committed])
    dead, dead_rows = write_columns(filled, 1, run=DEAD), write_rows(filled, 50, run=DEAD_INGEST)
    alive = write_columns(filled, 2, run=ALIVE)
    writers = [ColumnFileWriter(filled.uri, pa.schema([LENGTH]), run) for run in (DEAD, ALIVE)]
    before, asked = rows_of(filled), []

    def over():
        asked.append(None)
        return {DEAD, DEAD_INGEST}

    removed = filled.remove_orphans(over)
    whole = {path for path in removed if path.startswith("data/")}
    assert whole == {f"data/{dead.path}", f"data/{dead_rows.path}"}
    assert all(path.startswith(f"_unfinished/{DEAD}/") for path in set(removed) - whole)
    begun = {path.name for path in (Path(filled.uri) / "_unfinished").iterdir()}
    assert begun == {ALIVE, "ingest-1"}, "the second one is nobody's that this store knows"
    writers[1].write(pa.record_batch([pa.array([1], pa.int32())], pa.schema([LENGTH])))
    assert writers[1].finish(filled.open()).rows == 1, "the living run's file can be finished"
    assert len(asked) == 1, "other runs are looked at once"
    assert f"data/{alive.path}" in files(filled) and f"data/{committed.path}" in files(filled)
    assert rows_of(filled) == before
    assert filled.remove_orphans(over) == []
    assert verdicts(filled.attach([alive])) == (1, 0, 0)


def everything(filled):
    """All runs that have files in the table, as if all were over."""
    return {Path(path).name.rpartition("-")[0] for path in files(filled)}


def test_orphans_spare_files_of_old_versions(filled):
    file = write_columns(filled, 0, run=DEAD)
    filled.attach([file])
    version = filled.open().version
    filled.drop(["embeds", "length"])
    assert filled.remove_orphans(lambda: everything(filled)) == []
    assert [row["embeds"] for row in rows_of(filled, version)[:2]] == [b"e\0", b"e\1"]


def test_orphans_spare_replaced_and_deleted(filled):
    first = write_columns(filled, 0, fields=[ERROR], error="first", run=DEAD)
    filled.attach([first])
    replaces = {"embed_error": first.path}
    filled.attach([write_columns(filled, 0, fields=[LENGTH, ERROR], replaces=replaces, run=DEAD)])
    filled.open().delete("id < '004'")
    assert filled.remove_orphans(lambda: everything(filled)) == []


def test_orphans_spare_files_that_lance_itself_wrote(filled):
    lance.write_dataset(pa.table({"id": ["x"], "text": ["y"]}), filled.uri, mode="append")
    assert filled.remove_orphans(lambda: everything(filled)) == []
    assert filled.open().count_rows() == 13


def test_orphans_spare_files_that_no_run_has_named(filled):
    """A writer with UUID names, a copy kept by hand, a file of a run that this store does not know."""
    data = Path(filled.uri) / "data"
    unknown = write_columns(filled, 0, run=ALIVE).path
    strangers = ["6fdbd3ab-ef9b-4b1c-9b0e-0f4dbb0a3a1f.lance", "my-backup.lance.bak", f"{DEAD}-0.lance.bak", unknown]
    for name in strangers[:-1]:
        (data / name).write_bytes(b"kept")
    assert filled.remove_orphans(lambda: everything(filled) - {ALIVE} | {DEAD}) == []
    assert all((data / name).exists() for name in strangers)


def test_a_commit_in_flight_conflicts_with_the_barrier(filled):
    """What was prepared on an earlier version never lands unasked: neither rows nor columns, whoever cleaned up meanwhile."""
    rows, column = write_rows(filled, 50), write_columns(filled, 0)
    asked = []

    def guard():
        asked.append(filled.open().version)
        if len(asked) == 1:
            filled.barrier()  # at this moment another run fences this one

    filled.append([rows], guard)
    assert len(asked) == 2, "asked again on the version behind the barrier"
    del asked[:]
    assert verdicts(filled.attach([column], guard)) == (1, 0, 0) and len(asked) == 2
    before, version = rows_of(filled), filled.open().version

    def fenced():
        filled.barrier()
        if filled.open().version > version + 1:
            raise InterruptedError("fenced")

    with pytest.raises(InterruptedError):
        filled.append([write_rows(filled, 60)], fenced)
    assert rows_of(filled) == before


def test_the_barrier_keeps_what_lands_beside_it(filled):
    """Rows and columns that are committed while it is on its way."""
    honest, landed = lance.LanceDataset.commit, []

    def late(uri, operation, **options):
        if isinstance(operation, lance.LanceOperation.Project) and not landed:
            landed.append(True)
            filled.append([write_rows(filled, 50)])
            filled.attach([write_columns(filled, 0)])
        return honest(uri, operation, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance.LanceDataset, "commit", staticmethod(late))
        schema = filled.open().schema
        filled.barrier()
    assert landed and filled.open().schema.equals(schema, check_metadata=True)
    assert filled.open().count_rows() == 16 and rows_of(filled)[0]["embeds"] == b"e\0"


def test_columns_are_dropped_by_who_may(filled):
    filled.attach([write_columns(filled, 0)])

    def fenced():
        raise InterruptedError("fenced")

    with pytest.raises(InterruptedError):
        filled.drop(["embeds"], fenced)
    assert rows_of(filled)[0]["embeds"] == b"e\0"


def test_files_that_are_gone_are_not_committed(filled):
    """Whoever removed them: a manifest that names them would make the table unreadable."""
    rows, kept, gone = write_rows(filled, 50), write_columns(filled, 0), write_columns(filled, 1)
    for file in (rows, gone):
        Path(data_file_uri(filled.uri, file.path)).unlink()
    with pytest.raises(RuntimeError, match=r"1 are not there any more, such as ingest-1-\w+.lance: did somebody"):
        filled.append([rows])
    assert verdicts(filled.attach([kept, gone])) == (1, 0, 1)
    assert filled.open().count_rows() == len(rows_of(filled)) == 12


@pytest.mark.parametrize("kind", ["append", "attach"])
@pytest.mark.parametrize("arrives_with", ["Project", "Append", "Merge"])
def test_a_commit_that_arrives_late_counts_once(filled, monkeypatch, kind, arrives_with):
    """Its answer is an error; it lands while the same commit is about to be made again, at whichever request."""
    commit, waiting = lance.LanceDataset.commit, []

    def slow(uri, operation, read_version):
        name = type(operation).__name__
        if name in ("Append", "Merge") and not waiting:
            waiting.append((operation, read_version))
            raise TimeoutError("no answer in time")
        if name == arrives_with and len(waiting) == 1:
            waiting.append(None)
            with contextlib.suppress(CommitConflictError):
                commit(uri, waiting[0][0], read_version=waiting[0][1])
        return commit(uri, operation, read_version=read_version)

    monkeypatch.setattr(pipelines.engine.table, "AWAY_PAUSE", 0)
    files = [write_rows(filled, 12)] if kind == "append" else [write_columns(filled, number) for number in range(3)]
    monkeypatch.setattr(lance.LanceDataset, "commit", slow)
    if kind == "append":
        filled.append(files)
        assert filled.open().to_table(["id"])["id"].to_pylist() == [f"{number:03d}" for number in range(16)]
    else:
        filled.attach(files)
        assert not filled.missing(["embeds"]) and filled.open().count_rows() == 12
    assert waiting

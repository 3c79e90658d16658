"""`Table` on a real Lance table: columns grow per fragment, each value is attached once, and only garbage is deleted."""

import contextlib
import json
import threading
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from lance.commit import CommitConflictError

import pipelines.table
from lidit.checksum import ColumnDigest
from pipelines.field_prints import field_differences
from pipelines.table import (
    TOMBSTONE,
    UNCOMPRESSED,
    ColumnFile,
    ColumnFileWriter,
    Table,
    column_holder,
    data_file_uri,
    field_ids,
    file_digests,
    is_ours,
)

pytestmark = pytest.mark.unit

KEY = "lidit:fingerprint"
ROWS = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])
EMBEDS = pa.field(
    "embeds", pa.large_binary(), metadata={KEY: json.dumps({"weights": "w1", "layer": 2}), **UNCOMPRESSED}
)
LENGTH = pa.field("length", pa.int32(), metadata={KEY: json.dumps({"weights": "w1", "layer": 2})})
ERROR = pa.field("embed_error", pa.string())


@pytest.fixture
def table(tmp_path):
    """An empty table."""
    made = Table(str(tmp_path / "store" / "samples.lance"))
    made.create(ROWS)
    return made


@pytest.fixture
def filled(table):
    """Three fragments of 4 rows, and the stage's columns declared."""
    table.append([write_rows(table, first) for first in (0, 4, 8)])
    table.declare([EMBEDS, LENGTH, ERROR], KEY)
    return table


def write_rows(table, first, count=4, run="ingest-1"):
    writer = ColumnFileWriter(table.uri, ROWS, run)
    ids = [f"{number:03d}" for number in range(first, first + count)]
    writer.write(pa.record_batch([ids, [f"text {value}" for value in ids]], schema=ROWS))
    return writer.finish(table.open())


def write_columns(
    table, fragment, fields=(EMBEDS, LENGTH), rows=4, run="embed-1", mark=b"e", replaces=None, error=None
):
    """A column file of a fragment, of the declared fields."""
    schema = table.open().schema
    wanted = pa.schema([schema.field(f.name) for f in fields])
    values = {
        "embeds": [mark + bytes([row]) for row in range(rows)],
        "length": list(range(rows)),
        "embed_error": [error] * rows,
    }
    writer = ColumnFileWriter(table.uri, wanted, run)
    writer.write(pa.record_batch([pa.array(values[f.name], f.type) for f in wanted], schema=wanted))
    return writer.finish(table.open(), fragment, replaces)


def verdicts(attached):
    return len(attached.done), len(attached.duplicate), len(attached.stale)


def rows_of(table, version=None):
    return table.open(version).to_table().to_pylist()


def files(table):
    """Paths of all data files that lie in the table's folder."""
    return {path for path in table.open().all_files().read_all()["path"].to_pylist() if path.startswith("data/")}


# -- rows -------------------------------------------------------------------------------------------------------------


def test_no_table(tmp_path):
    table = Table(str(tmp_path / "none.lance"))
    assert not table.exists()
    with pytest.raises(ValueError, match=r"no table at .*none.lance: ingest rows first"):
        table.open()


def test_create_is_repeatable_and_adds_columns(table):
    assert table.exists() and table.open().count_rows() == 0
    before = table.open().version
    table.create(ROWS)
    assert table.open().version == before
    table.create(pa.schema([*ROWS, pa.field("more", pa.int32())]))
    assert table.open().schema.names == ["id", "text", "more"]


def test_created_twice_at_once(tmp_path):
    table = Table(str(tmp_path / "samples.lance"))
    in_threads(lambda number: Table(table.uri).create(ROWS), 4)
    assert table.open().schema.names == ["id", "text"] and table.open().count_rows() == 0


def test_append(table):
    table.append([write_rows(table, 0), write_rows(table, 4, count=2)])
    assert [row["id"] for row in rows_of(table)] == [f"{number:03d}" for number in range(6)]
    assert [fragment.count_rows() for fragment in table.open().get_fragments()] == [4, 2]
    table.open().validate()


def test_append_of_nothing(table):
    version = table.open().version
    table.append([])
    table.append([write_rows(table, 0, count=0)])
    assert table.open().version == version and table.open().count_rows() == 0


def test_append_of_the_same_file_adds_it_once(table):
    one, other = write_rows(table, 0), write_rows(table, 4)
    table.append([one])
    table.append([one])
    table.append([one, other])
    assert [row["id"] for row in rows_of(table)] == [f"{number:03d}" for number in range(8)]


def test_append_after_columns_were_added(filled):
    filled.append([write_rows(filled, 12)])
    assert [row["embeds"] for row in rows_of(filled)] == [None] * 16
    assert filled.missing(["embeds"]) == {fragment: ["embeds"] for fragment in range(4)}


def test_upsert(tmp_path):
    table = Table(str(tmp_path / "encoders.lance"))
    key = pa.field("encoder", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
    table.create(pa.schema([key, pa.field("value", pa.int32())]))
    table.upsert("encoder", {"encoder": "one", "value": 1})
    table.upsert("encoder", {"encoder": "two", "value": 2})
    table.upsert("encoder", {"encoder": "one", "value": 3})
    table.upsert("encoder", {"encoder": "one", "value": 3})
    assert sorted((row["encoder"], row["value"]) for row in rows_of(table)) == [("one", 3), ("two", 2)]


def test_upserts_at_once(tmp_path):
    table = Table(str(tmp_path / "encoders.lance"))
    key = pa.field("encoder", pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})
    table.create(pa.schema([key, pa.field("value", pa.int32())]))
    in_threads(lambda number: Table(table.uri).upsert("encoder", {"encoder": "one", "value": 7}), 4)
    assert rows_of(table) == [{"encoder": "one", "value": 7}]


# -- columns ----------------------------------------------------------------------------------------------------------


def test_declare_adds_null_columns_with_their_metadata(filled):
    schema = filled.open().schema
    assert schema.field("embeds").metadata[KEY.encode()] == EMBEDS.metadata[KEY.encode()]
    assert schema.field("embeds").type == pa.large_binary() and schema.field("embeds").nullable
    assert {row["embeds"] for row in rows_of(filled)} == {None}
    assert filled.missing(["embeds", "length"]) == {fragment: ["embeds", "length"] for fragment in range(3)}
    assert filled.missing(["id", "text"]) == {}


def test_declare_again_changes_nothing(filled):
    version = filled.open().version
    filled.declare([EMBEDS, LENGTH, ERROR], KEY)
    assert filled.open().version == version


def test_declare_names_what_differs(filled):
    other = pa.field(
        "embeds", pa.large_binary(), metadata={KEY: json.dumps({"weights": "w2", "layer": 2, "norm": True})}
    )
    version = filled.open().version
    with pytest.raises(ValueError) as caught:
        filled.declare([other, pa.field("more", pa.int32())], KEY)
    message = str(caught.value)
    assert "'embeds'" in message and 'weights: the table has "w1", this run makes "w2"' in message
    assert "norm: the table has null, this run makes true" in message and "layer" not in message
    assert "--overwrite" in message
    assert filled.open().version == version, "nothing was added before it was refused"


def test_declare_names_another_type(filled):
    with pytest.raises(ValueError, match=r"type: the table has int32, this run makes int64"):
        filled.declare([pa.field("length", pa.int64(), metadata=LENGTH.metadata)], KEY)


def test_differences():
    def field(**values):
        return pa.field("a", pa.int32(), metadata={KEY: json.dumps(values)})

    assert field_differences(field(a=1), field(a=1), KEY) == []
    assert field_differences(pa.field("a", pa.int32()), pa.field("a", pa.int32()), KEY) == []
    (long,) = field_differences(field(a="x" * 500), field(a=1), KEY)
    assert len(long) < 150 and "characters" in long


def test_drop(filled):
    filled.attach([write_columns(filled, 0)])
    filled.drop(["embeds", "nothing"])
    assert filled.open().schema.names == ["id", "text", "length", "embed_error"]
    assert [row["length"] for row in rows_of(filled)][:5] == [0, 1, 2, 3, None]
    version = filled.open().version
    filled.drop(["embeds"])
    assert filled.open().version == version
    filled.declare([EMBEDS], KEY)
    assert filled.missing(["embeds", "length"]) == {0: ["embeds"], 1: ["embeds", "length"], 2: ["embeds", "length"]}


# -- attach -----------------------------------------------------------------------------------------------------------


def test_partial_attach_leaves_the_rest_null(filled):
    assert verdicts(filled.attach([write_columns(filled, 1)])) == (1, 0, 0)
    embeds = [row["embeds"] for row in rows_of(filled)]
    assert embeds == [None] * 4 + [b"e\0", b"e\1", b"e\2", b"e\3"] + [None] * 4
    assert filled.missing(["embeds", "length"]) == {0: ["embeds", "length"], 2: ["embeds", "length"]}
    assert verdicts(filled.attach([write_columns(filled, 0), write_columns(filled, 2)])) == (2, 0, 0)
    assert filled.missing(["embeds", "length"]) == {}
    assert filled.missing(["embed_error"]) == {fragment: ["embed_error"] for fragment in range(3)}
    filled.open().validate()
    assert filled.open().schema.field("embeds").metadata[KEY.encode()] == EMBEDS.metadata[KEY.encode()]


def test_attach_of_all_nulls_is_no_longer_missing(filled):
    schema = pa.schema([filled.open().schema.field("embeds")])
    writer = ColumnFileWriter(filled.uri, schema, "embed-1")
    writer.write(pa.record_batch([pa.nulls(4, pa.large_binary())], schema=schema))
    filled.attach([writer.finish(filled.open(), 0)])
    assert 0 not in filled.missing(["embeds"])


def test_attach_twice_is_harmless(filled):
    file = write_columns(filled, 0)
    assert verdicts(filled.attach([file])) == (1, 0, 0)
    version, before = filled.open().version, rows_of(filled)
    assert verdicts(filled.attach([file])) == (1, 0, 0)
    assert verdicts(filled.attach([file, write_columns(filled, 1)])) == (2, 0, 0)
    assert rows_of(filled)[:4] == before[:4] and filled.open().version == version + 1


def test_attach_of_nothing(filled):
    version = filled.open().version
    assert verdicts(filled.attach([])) == (0, 0, 0)
    assert filled.open().version == version


def test_second_committer_is_a_duplicate(filled):
    first, second = write_columns(filled, 0, mark=b"1"), write_columns(filled, 0, mark=b"2")
    assert verdicts(filled.attach([first])) == (1, 0, 0)
    outcome = Table(filled.uri).attach([second, write_columns(filled, 1)])
    assert verdicts(outcome) == (1, 1, 0) and outcome.duplicate == [second]
    assert [row["embeds"][:1] for row in rows_of(filled)[:4]] == [b"1"] * 4


def test_two_files_of_a_fragment_in_one_commit(filled):
    outcome = filled.attach([write_columns(filled, 0, mark=b"1"), write_columns(filled, 0, mark=b"2")])
    assert verdicts(outcome) == (1, 1, 0)
    assert [row["embeds"][:1] for row in rows_of(filled)[:4]] == [b"1"] * 4


def test_half_of_its_columns_taken_is_stale(filled):
    filled.attach([write_columns(filled, 0, fields=[EMBEDS])])
    assert verdicts(filled.attach([write_columns(filled, 0)])) == (0, 0, 1)
    assert [row["length"] for row in rows_of(filled)[:4]] == [None] * 4
    assert verdicts(filled.attach([write_columns(filled, 0, fields=[LENGTH])])) == (1, 0, 0)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_wrong_number_of_rows_is_stale(filled, rows):
    version = filled.open().version
    assert verdicts(filled.attach([write_columns(filled, 0, rows=rows)])) == (0, 0, 1)
    assert filled.open().version == version


def test_column_that_was_dropped_meanwhile_is_stale(filled):
    file = write_columns(filled, 0)
    filled.drop(["length"])
    assert verdicts(filled.attach([file])) == (0, 0, 1)


def test_column_that_was_dropped_and_declared_again(filled):
    """The new column is another one, maybe of another fingerprint: the old one's values must not fill it."""
    file = write_columns(filled, 0, mark=b"old")
    filled.drop(["embeds", "length"])
    filled.declare([EMBEDS, LENGTH], KEY)
    assert verdicts(filled.attach([file])) == (0, 0, 1)
    assert [row["embeds"] for row in rows_of(filled)] == [None] * 12


def test_fragment_that_is_gone_is_stale(filled):
    gone, kept = write_columns(filled, 1), write_columns(filled, 2)
    filled.open().delete("id >= '004' and id < '008'")
    assert verdicts(filled.attach([gone, kept])) == (1, 0, 1)
    assert [row["embeds"] for row in rows_of(filled)] == [None] * 4 + [b"e\0", b"e\1", b"e\2", b"e\3"]


def test_rows_deleted_meanwhile_keep_their_neighbours_values(filled):
    file = write_columns(filled, 1)
    filled.open().delete("id = '005'")
    assert verdicts(filled.attach([file])) == (1, 0, 0)
    values = {row["id"]: row["embeds"] for row in rows_of(filled)}
    assert "005" not in values
    assert [values[key] for key in ("004", "006", "007")] == [b"e\0", b"e\2", b"e\3"]


def test_compaction_in_between_is_stale(filled):
    waiting = [write_columns(filled, fragment) for fragment in range(3)]
    filled.open().optimize.compact_files()
    assert len(filled.open().get_fragments()) == 1
    before = rows_of(filled)
    assert verdicts(filled.attach(waiting)) == (0, 0, 3)
    assert rows_of(filled) == before


def test_compaction_keeps_attached_columns(filled):
    filled.attach([write_columns(filled, fragment) for fragment in range(3)])
    before = rows_of(filled)
    filled.open().optimize.compact_files()
    assert rows_of(filled) == before and filled.missing(["embeds", "length"]) == {}


def test_other_columns_attached_meanwhile_are_kept(filled):
    """Two stages on one table: each rebases on the other."""
    mine, theirs = write_columns(filled, 0, fields=[EMBEDS]), write_columns(filled, 0, fields=[LENGTH])
    one, other = Table(filled.uri), Table(filled.uri)
    assert verdicts(one.attach([mine])) == verdicts(other.attach([theirs])) == (1, 0, 0)
    assert [(row["embeds"], row["length"]) for row in rows_of(filled)[:2]] == [(b"e\0", 0), (b"e\1", 1)]


def holder(table, fragment, name):
    dataset = table.open()
    return column_holder(dataset.get_fragment(fragment).metadata, field_ids(dataset)[name])


def test_replacing_a_column(filled):
    first = write_columns(filled, 0, fields=[EMBEDS, ERROR], error="old")
    filled.attach([first])
    assert holder(filled, 0, "embed_error") == first.path and holder(filled, 0, "length") is None
    second = write_columns(filled, 0, fields=[LENGTH, ERROR], error="new", replaces={"embed_error": first.path})
    assert verdicts(filled.attach([second])) == (1, 0, 0)
    assert holder(filled, 0, "embed_error") == second.path
    (old,) = [file for file in filled.open().get_fragment(0).metadata.files if file.path == first.path]
    assert TOMBSTONE in old.fields
    rows = rows_of(filled)
    assert [(row["embeds"], row["length"], row["embed_error"]) for row in rows[:2]] == [
        (b"e\0", 0, "new"),
        (b"e\1", 1, "new"),
    ]
    assert rows[4]["embed_error"] is None
    filled.open().validate()
    assert verdicts(filled.attach([second])) == (1, 0, 0), "again is harmless here too"


def test_replacing_is_stale_when_the_holder_changed(filled):
    first = write_columns(filled, 0, fields=[EMBEDS, ERROR], error="first")
    early = write_columns(filled, 0, fields=[LENGTH, ERROR], error="early")
    filled.attach([first])
    assert verdicts(filled.attach([early])) == (0, 0, 1), "nobody held it when this was made"
    wrong = write_columns(filled, 0, fields=[LENGTH, ERROR], error="wrong", replaces={"embed_error": "another.lance"})
    assert verdicts(filled.attach([wrong])) == (0, 0, 1)
    assert [row["embed_error"] for row in rows_of(filled)[:4]] == ["first"] * 4


def test_new_columns_taken_is_a_duplicate_even_when_replacing(filled):
    first = write_columns(filled, 0, fields=[EMBEDS, ERROR], error="first")
    filled.attach([first])
    again = write_columns(filled, 0, fields=[EMBEDS, ERROR], error="again", replaces={"embed_error": first.path})
    assert verdicts(filled.attach([again])) == (0, 1, 0)
    assert [row["embed_error"] for row in rows_of(filled)[:4]] == ["first"] * 4


# -- many at once -----------------------------------------------------------------------------------------------------


def in_threads(work, count):
    """Runs work(0 .. count - 1), all at once; raises what any of them raised."""
    start, errors = threading.Barrier(count), []

    def run(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


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


# -- digests ----------------------------------------------------------------------------------------------------------


def test_digests_of_a_file(filled):
    file = write_columns(filled, 0)
    assert file.columns == ["embeds", "length"] and file.rows == 4
    digests = file_digests(filled.uri, file.path)
    assert set(digests) == {"embeds", "length"}
    filled.attach([file])
    for name, noted in digests.items():
        digest = ColumnDigest()
        for batch in filled.open().get_fragment(0).to_batches(columns=[name], batch_size=3):
            digest.update(batch.column(0))
        assert digest.hexdigest() == noted


def test_digests_do_not_depend_on_the_batches(filled):
    batch = pa.record_batch([[b"a", None, b"", b"bc"]], schema=pa.schema([EMBEDS]))
    found = []
    for cut in (4, 2, 1):
        writer = ColumnFileWriter(filled.uri, pa.schema([EMBEDS]), "embed-1")
        for first in range(0, 4, cut):
            writer.write(batch.slice(first, cut))
        found.append(file_digests(filled.uri, writer.finish(filled.open(), 0).path))
    assert found[0] == found[1] == found[2]


def test_no_digests_from_another_tool(table):
    lance.write_dataset(pa.table({"id": ["x"], "text": ["y"]}), table.uri, mode="append")
    (file,) = table.open().get_fragments()[0].metadata.files
    assert file_digests(table.uri, file.path) == {}


def test_column_file_travels_as_json(filled):
    file = write_columns(filled, 1, fields=[LENGTH, ERROR])
    again = ColumnFile(**json.loads(json.dumps(file.to_json())))
    assert again == file and verdicts(filled.attach([again])) == (1, 0, 0)
    assert file.path.startswith("embed-1-") and file.size > 0


def test_names_of_our_files(filled):
    lance.write_dataset(pa.table({"id": ["x"], "text": ["y"]}), filled.uri, mode="append")
    ours = [[is_ours(file.path) for file in f.metadata.files] for f in filled.open().get_fragments()]
    assert ours == [[True], [True], [True], [False]]


def test_data_file_uri():
    assert data_file_uri("s3://b/t.lance/", "a.lance") == data_file_uri("s3://b/t.lance", "a.lance")


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

    monkeypatch.setattr(pipelines.table, "AWAY_PAUSE", 0)
    files = [write_rows(filled, 12)] if kind == "append" else [write_columns(filled, number) for number in range(3)]
    monkeypatch.setattr(lance.LanceDataset, "commit", slow)
    if kind == "append":
        filled.append(files)
        assert filled.open().to_table(["id"])["id"].to_pylist() == [f"{number:03d}" for number in range(16)]
    else:
        filled.attach(files)
        assert not filled.missing(["embeds"]) and filled.open().count_rows() == 12
    assert waiting

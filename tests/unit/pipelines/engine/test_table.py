"""`Table` on a real Lance table: columns grow per fragment, each value is attached once, and only garbage is deleted."""

import json

import lance
import pyarrow as pa
import pytest

from lidit.store.checksum import ColumnDigest, is_ours
from pipelines.engine.column_file import ColumnFile, ColumnFileWriter, file_digests
from pipelines.engine.field_prints import field_differences
from pipelines.engine.table import TOMBSTONE, Table, column_holder, data_file_uri, field_ids
from tests.support.table_rows import (
    EMBEDS,
    ERROR,
    KEY,
    LENGTH,
    ROWS,
    in_threads,
    rows_of,
    verdicts,
    write_columns,
    write_rows,
)

pytestmark = pytest.mark.unit


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
    assert "--overwrite" in message and "the new column another name" in message, "it may be any stage's"
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

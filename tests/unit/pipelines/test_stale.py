"""Columns whose input has changed since: found from the version and the files' notes, made again, and never silently kept."""

import datetime

import lance
import pyarrow as pa
import pytest
from lance.file import LanceFileReader

from lidit.store import columns, stale
from lidit.store.stale import MADE_FROM, made_from, stale_columns
from pipelines.engine import worker
from pipelines.engine.column_file import ColumnFile, ColumnFileWriter
from pipelines.engine.pool import ActorsConfig, Tracker
from pipelines.engine.stage import StageConfig, _overwrite, _units
from pipelines.engine.table import column_holder, field_ids
from pipelines.engine.worker import READS, Columns, FragmentWorker
from pipelines.report.facts import stale_facts
from tests.unit.pipelines.conftest import Near

pytestmark = pytest.mark.unit

TEXTS = [["one", "two"], ["three", None], ["four", "five"]]


def field(name, reads="caption", **more):
    metadata = {READS: reads, columns.META_STAGE: "shout", columns.META_FINGERPRINT: "{}", **more}
    return pa.field(name, pa.string(), metadata=metadata)


LOUD, LENGTH = field("loud"), field("note", reads="other", **{columns.META_ALSO_READS: "caption"})
ERROR = pa.field(columns.error("shout"), pa.string())


class Shout:
    """`caption` -> `loud`."""

    name, window_rows = "shout", 1

    def __init__(self, config):
        pass

    @classmethod
    def writes(cls, config):
        return [LOUD]

    def __call__(self, window, wanted):
        return Columns(
            {name: pa.array([text and text.upper() for text in window["caption"].to_pylist()]) for name in wanted}
        )


@pytest.fixture
def table(fill, monkeypatch):
    """Three fragments of captions, and the stage's column made in all of them."""
    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    made = fill(TEXTS)
    made.declare([LOUD, ERROR], columns.META_FINGERPRINT)
    assert run(made) == {0: ["loud"], 1: ["loud"], 2: ["loud"]}
    return made


def worker_of(table):
    config = StageConfig(store=table.uri.rpartition("/")[0], actors=ActorsConfig(num_gpus=0.0))
    return FragmentWorker(Shout, config, table.uri, "shout-1", Near(Tracker()))


def run(table):
    """What the stage does now: fragment -> columns."""
    units = _units(table, [LOUD])[0]
    actor = worker_of(table)
    files = [ColumnFile(**actor(unit)["file"]) for unit in units]
    assert len(table.attach(files).done) == len(files)
    return {unit["fragment"]: unit["wanted"] for unit in units}


def put(table, fragment, values, name="caption", note=True):
    """Replaces a column of ingest in a fragment, as an update does; or fills it."""
    dataset = table.open()
    held = column_holder(dataset.get_fragment(fragment).metadata, field_ids(dataset)[name])
    writer = ColumnFileWriter(table.uri, pa.schema([dataset.schema.field(name)]), "ingest-2")
    writer.write(pa.record_batch([pa.array(values, pa.string())], [name]))
    file = writer.finish(dataset, fragment, {} if held is None else {name: held})
    assert len(table.attach([file]).done) == 1


def stale_in(table, fields=(LOUD,)):
    return stale_columns(LanceFileReader, table.open(), table.uri, fields)


def values(table, name="loud"):
    return table.open().to_table()[name].to_pylist()


def test_only_the_fragment_whose_input_has_changed_is_made_again(table):
    assert stale_in(table) == {} and run(table) == {}
    kept = {
        f.fragment_id: column_holder(f.metadata, field_ids(table.open())["loud"]) for f in table.open().get_fragments()
    }
    put(table, 1, ["three", "new"])
    assert stale_in(table) == {1: ["loud"]}
    assert values(table) == ["ONE", "TWO", "THREE", None, "FOUR", "FIVE"], "until then it stays as it is"
    assert run(table) == {1: ["loud"]}
    assert values(table) == ["ONE", "TWO", "THREE", "NEW", "FOUR", "FIVE"]
    assert stale_in(table) == {} and run(table) == {}
    now = {
        f.fragment_id: column_holder(f.metadata, field_ids(table.open())["loud"]) for f in table.open().get_fragments()
    }
    assert {fragment for fragment in kept if kept[fragment] != now[fragment]} == {1}


def test_another_file_of_the_same_values_changes_nothing(table):
    put(table, 0, TEXTS[0])
    assert stale_in(table) == {} and run(table) == {}
    put(table, 0, ["one", "other"])
    put(table, 0, TEXTS[0])
    assert stale_in(table) == {}, "what was taken back is as it was"


def test_a_table_without_changes_costs_no_reads(table, monkeypatch):
    monkeypatch.setattr(stale, "_note", lambda *_: pytest.fail("a file was read"))
    monkeypatch.setattr(stale, "_digests", lambda *_: pytest.fail("a file was read"))
    assert stale_in(table) == {}
    table.open().delete("caption = 'one'")
    assert stale_in(table) == {}


def test_files_without_notes_count_as_they_are(table):
    """They are older than the notes: nobody knows what they were made from."""
    dataset = table.open()
    held = column_holder(dataset.get_fragment(0).metadata, field_ids(dataset)["loud"])
    writer = ColumnFileWriter(table.uri, pa.schema([LOUD]), "shout-0")
    writer.write(pa.record_batch([["ONE", "TWO"]], ["loud"]))
    table.attach([writer.finish(dataset, 0, {"loud": held})])
    put(table, 0, ["changed", "changed"])
    put(table, 1, ["changed", "changed"])
    assert stale_in(table) == {1: ["loud"]}


@pytest.mark.parametrize("note", ["no JSON", "[]", '{"caption": 1}', '{"caption": {}}'])
def test_damaged_notes_are_no_notes(table, note):
    dataset = table.open()
    held = column_holder(dataset.get_fragment(0).metadata, field_ids(dataset)["loud"])
    writer = ColumnFileWriter(table.uri, pa.schema([LOUD]), "shout-0", {MADE_FROM: note})
    writer.write(pa.record_batch([["ONE", "TWO"]], ["loud"]))
    table.attach([writer.finish(dataset, 0, {"loud": held})])
    put(table, 0, ["changed", "changed"])
    assert stale_in(table) == {}


def test_compaction_by_another_tool_makes_nothing_stale(table):
    before = values(table)
    table.open().optimize.compact_files(target_rows_per_fragment=100)
    assert len(table.open().get_fragments()) == 1
    assert stale_in(table) == {} and run(table) == {} and values(table) == before
    (fragment,) = table.open().get_fragments()
    put(table, fragment.fragment_id, ["x"] * 6)
    assert stale_in(table) == {}, "nobody knows what the compacted column was made from"


def test_made_from_a_compacted_column_and_changed_later(table):
    table.open().optimize.compact_files(target_rows_per_fragment=100)
    table.drop(["loud"])
    table.declare([LOUD], columns.META_FINGERPRINT)
    (fragment,) = run(table)
    assert stale_in(table) == {}
    put(table, fragment, ["x"] * 6)
    assert stale_in(table) == {fragment: ["loud"]} and run(table) and set(values(table)) == {"X"}


def test_a_column_that_another_tool_writes_anew(table):
    """Lance adds it as a file of its own, whose digest nobody has noted."""
    dataset = table.open()
    dataset.drop_columns(["caption"])
    dataset.add_columns({"caption": "'again'"})
    assert stale_in(table) == {0: ["loud"], 1: ["loud"], 2: ["loud"]}
    assert len(run(table)) == 3 and set(values(table)) == {"AGAIN"} and stale_in(table) == {}


def test_input_that_changes_while_the_stage_works(table):
    """The finished file is not attached: its fragment is done again, from the new values."""
    put(table, 2, ["four", "six"])
    (unit,) = _units(table, [LOUD])[0]
    late = ColumnFile(**worker_of(table)(unit)["file"])
    put(table, 2, ["four", "seven"])
    outcome = table.attach([late])
    assert (len(outcome.done), len(outcome.stale)) == (0, 1) and stale_in(table) == {2: ["loud"]}
    assert run(table) == {2: ["loud"]} and values(table)[-2:] == ["FOUR", "SEVEN"]


def test_input_that_changes_before_the_first_file_is_attached(fill, monkeypatch):
    monkeypatch.setattr(worker.ray, "get", lambda value: value)
    table = fill(TEXTS)
    table.declare([LOUD, ERROR], columns.META_FINGERPRINT)
    first = _units(table, [LOUD])[0][0]
    late = ColumnFile(**worker_of(table)(first)["file"])
    put(table, 0, ["new", "new"])
    assert len(table.attach([late]).stale) == 1
    assert len(run(table)) == 3 and values(table)[:2] == ["NEW", "NEW"]


def test_columns_looked_at_too_count(table):
    """And a fragment that lacks one column and has another that is stale is one unit."""
    table.declare([pa.field("other", pa.string()), LENGTH], columns.META_FINGERPRINT)
    for fragment in (0, 1):
        put(table, fragment, ["x", "y"], "other")
    dataset = table.open()
    ids, metadata = field_ids(dataset), dataset.get_fragment(0).metadata
    held = {name: column_holder(metadata, ids[name]) for name in ("other", "caption")}
    writer = ColumnFileWriter(table.uri, pa.schema([LENGTH]), "shout-1", made_from(LanceFileReader, table.uri, held))
    writer.write(pa.record_batch([["a", "b"]], ["note"]))
    table.attach([writer.finish(dataset, 0, None, held)])
    for fragment in (0, 1):
        put(table, fragment, ["new", "new"])
    assert stale_in(table, [LOUD, LENGTH]) == {0: ["loud", "note"], 1: ["loud"]}
    units, waiting = _units(table, [LOUD, LENGTH])
    wanted = {unit["fragment"]: (unit["wanted"], unit["again"], unit["stale"]) for unit in units}
    assert wanted == {0: (["loud", "note"], True, True), 1: (["loud", "note"], True, True)} and waiting == 1


def test_what_is_stale_is_told_by_stage(table):
    put(table, 1, ["three", "new"])
    put(table, 2, ["four", "new"])
    table.open().delete("caption = 'four'")
    (facts,) = stale_facts(table.open(), stale_in(table))
    assert (facts.stage, facts.columns, facts.fragments, facts.rows) == ("shout", ["loud"], 2, 3)
    assert "loud: in 2 fragments (3 rows) made from values that have changed since" in facts.words
    assert "lidit shout" in facts.words


def test_overwrite_of_what_is_stale_makes_all_anew(table):
    put(table, 1, ["three", "new"])
    _overwrite(table, [LOUD, ERROR])
    assert "loud" not in table.open().schema.names


def test_a_deleted_fragment_is_not_stale(table):
    put(table, 1, ["three", "new"])
    table.open().delete("caption = 'three' OR caption = 'new'")
    assert stale_in(table) == {} and lance.dataset(table.uri).count_rows() == 4


def test_texts_that_lance_itself_updates(table):
    """It moves the row into a file of its own, the made column with it."""
    table.open().update({"caption": "'new'"}, where="caption = 'two'")
    assert values(table).count("TWO") == 1
    (moved,) = stale_in(table)
    assert stale_in(table) == {moved: ["loud"]} and moved not in (0, 1, 2)
    assert run(table) == {moved: ["loud"]}
    assert sorted(filter(None, values(table))) == ["FIVE", "FOUR", "NEW", "ONE", "THREE"]
    assert stale_in(table) == {} and run(table) == {}


def test_updates_of_other_columns_make_nothing_stale(table):
    table.open().add_columns({"rating": "5"})
    table.open().update({"rating": "6"}, where="caption = 'two'")
    assert stale_in(table) == {} and run(table) == {}


def test_an_update_whose_earlier_version_is_gone_is_unknown(table, monkeypatch):
    table.open().update({"caption": "'new'"}, where="caption = 'two'")
    monkeypatch.setattr(stale, "MOST_COMPARED", 1)
    assert stale_in(table) == {}
    monkeypatch.undo()
    assert len(stale_in(table)) == 1
    table.open().cleanup_old_versions(older_than=datetime.timedelta(0), delete_unverified=True)
    assert stale_in(table) == {}


def test_rows_merged_in_by_another_tool(table):
    ids = table.open().to_table().to_pylist()
    rows = [
        {"image_id": row["image_id"], "caption": "new" if row["caption"] == "four" else row["caption"]} for row in ids
    ]
    table.open().merge_insert("image_id").when_matched_update_all().execute(pa.Table.from_pylist(rows))
    assert set(stale_in(table)) <= {fragment.fragment_id for fragment in table.open().get_fragments()}
    assert run(table)
    assert sorted(filter(None, values(table))) == ["FIVE", "NEW", "ONE", "THREE", "TWO"]

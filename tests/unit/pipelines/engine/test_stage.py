"""What a stage's driver decides without Ray: what is to be done, when to commit, when to stop."""

import json
import time
from pathlib import Path

import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines.engine import stage
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.runs import Fenced, Run
from pipelines.engine.stage import (
    StageConfig,
    StagePass,
    _check_owner,
    _check_reads,
    _overwrite,
    _reads,
    _units,
)
from pipelines.engine.summary import Summary
from pipelines.engine.unit_pass import CommitConfig, ErrorRateExceeded
from pipelines.engine.worker import MAY_BE_NULL, READS

pytestmark = pytest.mark.unit


def made_field(name, reads="caption", kind=None, **fingerprint):
    metadata = {
        READS: reads,
        columns.META_STAGE: "embed",
        columns.META_FINGERPRINT: json.dumps(fingerprint or {"weights": "w1"}),
    }
    return pa.field(name, kind or pa.int32(), metadata=metadata)


A, B = made_field("a"), made_field("b")
ERROR = pa.field(columns.error("embed"), pa.string())


@pytest.fixture
def table(fill):
    """Three fragments of 2 rows, columns a, b and the error column declared."""
    made = fill([["one", "two"], ["three", None], ["four", "five"]])
    made.declare([A, B, ERROR], columns.META_FINGERPRINT)
    return made


def column_file(table, fragment, names=("a", "b", "embed_error"), rows=2, values=None):
    fields = pa.schema([table.open().schema.field(name) for name in names])
    filled = {"a": values or list(range(rows)), "b": list(range(rows)), "c": ["c"] * rows}
    writer = ColumnFileWriter(table.uri, fields, "embed-1")
    arrays = [pa.array(filled.get(f.name, [None] * rows), f.type) for f in fields]
    writer.write(pa.record_batch(arrays, schema=fields))
    return writer.finish(table.open(), fragment)


def todo(table, fields=(A, B)):
    """({fragment: columns it lacks}, number of waiting fragments)."""
    units, waiting = _units(table, list(fields))
    return {unit["fragment"]: unit["wanted"] for unit in units}, waiting


# -- what is to be done -----------------------------------------------------------------------------------------------


def test_units_are_what_is_missing(table):
    assert todo(table) == ({0: ["a", "b"], 1: ["a", "b"], 2: ["a", "b"]}, 0)
    assert [unit["rows"] for unit in _units(table, [A, B])[0]] == [2, 2, 2]
    table.attach([column_file(table, 1), column_file(table, 2, ["a"])])
    assert todo(table) == ({0: ["a", "b"], 2: ["b"]}, 0)
    table.attach([column_file(table, 0), column_file(table, 2, ["b"])])
    assert todo(table) == ({}, 0)


def test_fragments_without_the_column_to_read_wait(table):
    """`c` is made from a column that another stage fills fragment by fragment."""
    source = made_field("recaption", kind=pa.string())
    c = made_field("c", reads="recaption")
    table.declare([source, c], columns.META_FINGERPRINT)
    assert todo(table, [c]) == ({}, 3)
    table.attach([column_file(table, 1, ["recaption"])])
    assert todo(table, [c]) == ({1: ["c"]}, 2)
    assert todo(table, [A, c]) == ({0: ["a"], 1: ["a", "c"], 2: ["a"]}, 0), "what can be done now is done"


def test_new_rows_are_new_units(table, fill):
    table.attach([column_file(table, fragment) for fragment in range(3)])
    schema = pa.schema([table.open().schema.field(name) for name in ("image_id", "caption")])
    writer = ColumnFileWriter(table.uri, schema, "ingest-2")
    writer.write(pa.record_batch([["new"], ["six"]], schema=schema))
    table.append([writer.finish(table.open())])
    assert todo(table) == ({3: ["a", "b"]}, 0)


def test_deleted_fragment_is_no_unit(table):
    table.open().delete("caption = 'four' or caption = 'five'")
    assert set(todo(table)[0]) == {0, 1}
    table.open().delete("caption = 'one'")
    assert [(unit["fragment"], unit["rows"]) for unit in _units(table, [A, B])[0]] == [(0, 1), (1, 2)]


def test_compacted_fragments_are_done_again_where_they_have_gaps(table):
    """A compaction writes a declared column's nulls out: a fragment then has a file for it, and no values."""
    table.attach([column_file(table, 0)])
    table.open().optimize.compact_files()
    (unit,) = _units(table, [A, B])[0]
    assert unit["wanted"] == ["a", "b"] and unit["again"] and unit["rows"] == 6


def test_compacted_fragments_that_are_complete_are_left_alone(table):
    table.attach([column_file(table, 0), column_file(table, 1, values=[1, None]), column_file(table, 2)])
    before = table.open().to_table().to_pylist()
    table.open().optimize.compact_files()
    assert todo(table) == ({}, 0), "a null text has null columns, and that is complete"
    assert table.open().to_table().to_pylist() == before


def test_null_of_a_column_that_may_be_null_is_no_gap(table):
    """`a` may be null where `b` tells why: only a null `b` makes the fragment unfinished."""
    a = A.with_metadata({**A.metadata, MAY_BE_NULL: "b"})
    table.attach([column_file(table, fragment, values=[None, None]) for fragment in range(3)])
    table.open().optimize.compact_files()
    assert _units(table, [A, B])[0] and _units(table, [a, B]) == ([], 0)


def test_columns_of_others_are_never_touched(table):
    table.declare([made_field("c").with_metadata({columns.META_STAGE: "latents"})], columns.META_FINGERPRINT)
    with pytest.raises(ValueError, match=r"column 'caption' of .* was ingested, not made by embed: it stays as it is"):
        _check_owner(NamedStage, [A, made_field("caption")], table.open(), table)
    with pytest.raises(ValueError, match=r"column 'c' of .* was made by latents, not made by embed"):
        _check_owner(NamedStage, [made_field("c")], table.open(), table)
    _check_owner(NamedStage, [A, B, made_field("new")], table.open(), table)


def test_column_to_read_that_is_not_there(table):
    fields = [made_field("x", reads="caption_vlm"), A]
    assert _reads(fields) == ["caption", "caption_vlm"]
    with pytest.raises(ValueError, match=r"embed reads column 'caption_vlm', which .* does not have; it has image_id"):
        _check_reads(NamedStage, fields, table.open(), table)
    _check_reads(NamedStage, [A, B], table.open(), table)


class NamedStage:
    name = "embed"


# -- overwrite --------------------------------------------------------------------------------------------------------


def test_overwrite_drops_what_was_made_differently(table):
    table.attach([column_file(table, 0)])
    other = made_field("a", weights="w2")
    _overwrite(table, [other, B, ERROR])
    assert "a" not in table.open().schema.names
    assert {"b", "embed_error"} <= set(table.open().schema.names), "the other column's values and reasons are kept"
    assert [row["b"] for row in table.open().to_table().to_pylist()] == [0, 1, None, None, None, None]


def test_overwrite_goes_on_with_what_is_half_done(table):
    table.attach([column_file(table, 0)])
    version = table.open().version
    _overwrite(table, [A, B, ERROR])
    assert table.open().version == version


def test_overwrite_makes_complete_columns_anew(table):
    table.attach([column_file(table, fragment) for fragment in range(3)])
    _overwrite(table, [A, B, ERROR])
    assert not {"a", "b", "embed_error"} & set(table.open().schema.names)


def test_overwrite_takes_along_what_was_made_from_it(table, capsys):
    table.declare([made_field("from_a", reads="a"), made_field("from_b", reads="b")], columns.META_FINGERPRINT)
    table.attach([column_file(table, fragment) for fragment in range(3)])
    _overwrite(table, [made_field("a", weights="w2"), ERROR])
    names = set(table.open().schema.names)
    assert not {"a", "from_a"} & names and {"b", "from_b", "embed_error"} <= names
    assert "dropped with a, being made from it: from_a" in capsys.readouterr().err


def test_overwrite_of_nothing(fill):
    table = fill([["one"]])
    _overwrite(table, [A, B, ERROR])
    assert table.open().count_rows() == 1


# -- the pass ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_pass(table, tmp_path):
    def make(rows=10, **changes):
        config = StageConfig(store=str(tmp_path / "store"), **changes)
        run = Run(config.store, "embed")
        rate, summary = config.max_error_rate, Summary("embed", config.store)
        return StagePass("embed", table, run, summary, rows=rows, when=config.commit, max_error_rate=rate)

    return make


def result(file, errors=0, **counts):
    examples = [{"row": 0, "error": f"reason {number}"} for number in range(errors)]
    return {
        "file": file.to_json(),
        "fragment": file.fragment_id,
        "errors": errors,
        "examples": examples,
        "counts": {"rows": file.rows, "errors": errors, **counts},
        "kinds": {"ok": [f"caption {number}" for number in range(4)]},
    }


@pytest.mark.parametrize(
    "errors, rows, total, rate, stops",
    [
        (0, 0, 10, 0.0, False),
        (1, 10, 10, 0.0, True),
        (1, 100, 100, 0.01, False),
        (2, 100, 100, 0.01, True),
        (10, 10, 5000, 0.01, False),  # at the start a few errors are no rate yet: 1,000 rows are the base
        (11, 10, 5000, 0.01, True),
        (40, 4000, 5000, 0.01, False),
        (41, 4000, 5000, 0.01, True),
        (10, 10, 10, 1.0, False),
        (3, 5, 10, 0.2, True),  # of a small table all rows are the base
        (2, 5, 10, 0.2, False),
    ],
)
def test_error_rate(make_pass, errors, rows, total, rate, stops):
    made = make_pass(total, max_error_rate=rate)
    if not stops:
        made.check_errors({"errors": errors, "rows": rows}, lambda: "reason 0")
        return
    with pytest.raises(
        ErrorRateExceeded, match=rf"{errors} of {rows:,} rows failed, more than max_error_rate {rate:g}"
    ):
        made.check_errors({"errors": errors, "rows": rows}, lambda: "reason 0")


def test_error_rate_shows_an_example(make_pass):
    made = make_pass(2, max_error_rate=0.0)
    with pytest.raises(ErrorRateExceeded, match="such as: reason 0"):
        made.check_errors({"errors": 1, "rows": 2}, lambda: "reason 0")


def test_commit_counts_what_it_added(make_pass, table):
    made = make_pass()
    made.flush()
    assert made.summary.commits == 0
    table.attach([column_file(table, 1)])
    files = [column_file(table, 0), column_file(table, 1), column_file(table, 2)]
    made.pending = [result(file, errors=1, tokens=7) for file in files]
    made.flush()
    summary = made.summary
    assert (summary.fragments, summary.rows, summary.errors, summary.commits) == (2, 4, 2, 1)
    assert summary.counts == {"tokens": 14} and made.pending == []
    assert summary.bytes_written == files[0].size + files[2].size
    assert [example["fragment"] for example in summary.error_examples] == [0, 2]
    assert todo(table) == ({}, 0)


def test_commit_shows_a_few_examples_only(make_pass, table):
    made = make_pass()
    made.pending = [result(column_file(table, fragment), errors=4) for fragment in range(3)]
    made.flush()
    assert len(made.summary.error_examples) == stage.EXAMPLES and made.summary.errors == 12
    assert made.summary.examples == {"ok": ["caption 0", "caption 1", "caption 2", "caption 3", "caption 0"]}


def test_run_that_was_taken_for_dead_commits_nothing(make_pass, table):
    made = make_pass()
    made.pending = [result(column_file(table, 0))]
    with Run(made.run.store, "latents") as other:
        Path(made.run.store, "runs", made.run.id).mkdir(parents=True)
        Path(made.run.store, "runs", made.run.id, "fence").touch()
        assert other.end_dead(table) == {made.run.id}
    with pytest.raises(Fenced, match="was silent for so long"):
        made.flush()
    assert 0 in todo(table)[0]


def test_when_a_commit_is_due(make_pass, table):
    file = column_file(table, 0)
    made = make_pass(commit=CommitConfig(fragments=2, seconds=1000.0))
    assert not made.is_due()
    made.pending = [result(file)]
    assert not made.is_due()
    made.pending *= 2
    assert made.is_due()
    made.last_commit_took = 1000.0  # then committing would take over a hundredth of the time
    assert not made.is_due()
    made.pending, made.last_commit_took = [result(file)], 0.0
    made.oldest = time.monotonic() - 1001
    assert made.is_due()


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: CommitConfig(fragments=0), "commit.fragments: expected a whole number >= 1"),
        (lambda: CommitConfig(seconds=-1), "commit.seconds: expected a number >= 0"),
        (lambda: StageConfig(max_error_rate=-0.1), "max_error_rate: expected a number >= 0 and <= 1"),
        (lambda: StageConfig(max_error_rate=1.1), "max_error_rate: expected a number >= 0 and <= 1"),
    ],
)
def test_config_is_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_config_of_its_limits():
    assert StageConfig(max_error_rate=0.0).actors == ActorsConfig()
    assert StageConfig(max_error_rate=1.0).commit == CommitConfig()
    assert CommitConfig(fragments=1, seconds=0).fragments == 1

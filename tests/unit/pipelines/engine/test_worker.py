"""Parts of a worker's task that need no tracker: gaps of deleted rows, merging of pieces, reasons of earlier runs."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.worker import ALSO_READS, EXAMPLES, READS, Columns, Unavailable, _Task, add_examples, columns_read

pytestmark = pytest.mark.unit

SCHEMA = pa.schema([pa.field("a", pa.large_binary()), pa.field("b", pa.int32())])


@pytest.fixture
def task():
    """A task without a worker: only what the parts below use."""
    made = _Task.__new__(_Task)
    made.wanted, made.schema = ["a", "b"], SCHEMA
    made.errors, made.earlier_errors = {}, {}
    return made


def batch(*numbers):
    values = [None if number is None else b"%d" % number for number in numbers]
    return pa.record_batch([pa.array(values, pa.large_binary()), pa.array(numbers, pa.int32())], schema=SCHEMA)


def test_gaps_become_nulls(task):
    made = [
        task._with_gaps(np.array(positions), batch(*positions)).to_pydict()["b"]
        for positions in ([0, 1, 2], [4, 7], [8], [12, 13])
    ]
    assert made == [[0, 1, 2], [None, 4, None, None, 7], [8], [None, None, None, 12, 13]]


def test_gap_at_the_start(task):
    made = task._with_gaps(np.array([3]), batch(3))
    assert made.to_pydict() == {"a": [None, None, None, b"3"], "b": [None, None, None, 3]}


def test_no_gap_copies_nothing(task):
    given = batch(0, 1)
    assert task._with_gaps(np.array([0, 1]), given) is given


def piece(value, error=None, **counts):
    arrays = {"a": pa.array([value], pa.large_binary()), "b": pa.array([None if value is None else 1], pa.int32())}
    return Columns(arrays, {} if error is None else {0: error}, {"rows": 1, **counts})


def test_pieces_are_merged_row_by_row(task):
    parts = [piece(b"x", tokens=3), piece(None, "bad"), piece(b""), piece(None, "worse", tokens=1)]
    merged = task._merge(parts)
    assert merged.arrays["a"].to_pylist() == [b"x", None, b"", None]
    assert merged.arrays["b"].to_pylist() == [1, None, 1, None]
    assert merged.errors == {1: "bad", 3: "worse"}
    assert merged.counts == {"rows": 4, "tokens": 4}


def test_one_piece_is_itself(task):
    whole = Columns({"a": pa.array([b"1", b"2"]), "b": pa.array([1, 2])}, {1: "bad"}, {"rows": 2})
    assert task._merge([whole]) is whole


def test_examples_of_pieces_are_kept_by_kind(task):
    parts = [piece(b"x"), piece(b"y")]
    parts[0].examples, parts[1].examples = {"ok": ["one"]}, {"ok": ["two"], "empty": [""]}
    assert task._merge(parts).examples == {"ok": ["one", "two"], "empty": [""]}
    held = {}
    for number in range(9):
        add_examples(held, {"ok": [str(number)]})
    assert held["ok"] == [str(number) for number in range(EXAMPLES)]


def test_columns_looked_at_too_are_read_where_they_are_there():
    fields = [
        pa.field("a", pa.string(), metadata={READS: "image", ALSO_READS: "caption_original"}),
        pa.field("b", pa.string(), metadata={READS: "image"}),
    ]
    assert columns_read(fields, ["image_id", "image"]) == ["image"]
    assert columns_read(fields, ["image", "caption_original", "truth"]) == ["caption_original", "image"]


def test_what_is_unavailable_is_no_fault_of_a_row(task):
    """It passes through, where any other exception becomes the error of a row."""

    def piece_(first, stop, window):
        raise Unavailable("the server is down")

    task._piece, task.attempt = piece_, SimpleNamespace(careful=[], quarantined=[])
    with pytest.raises(Unavailable, match="is down"):
        task._compute(np.arange(3), batch(0, 1, 2))
    task.attempt.careful = [(0, 3)]
    with pytest.raises(Unavailable, match="is down"):
        task._compute(np.arange(3), batch(0, 1, 2))
    assert task.errors == {}


def test_reasons_of_earlier_runs_are_kept(task):
    task.earlier_errors, task.errors = {0: "old", 1: "old"}, {1: "new", 2: "new"}
    assert [task._error_text(row) for row in range(4)] == ["old", "old; new", "new", None]
    task.earlier_errors = {0: ""}
    assert task._error_text(0) is None


def test_earlier_reasons_by_position(task, fill):
    """Reasons of the columns that are made again are left out; positions are physical, deleted rows counted."""
    table = fill([["one", "two", "three", "four"]])
    error = pa.field(columns.error("embed"), pa.string())
    made = [pa.field(name, pa.string(), metadata={columns.META_STAGE: "embed"}) for name in ("a", "b", "x")]
    table.declare([error, *made], columns.META_FINGERPRINT)
    writer = ColumnFileWriter(table.uri, pa.schema([error]), "embed-1")
    reasons = ["x: gone", None, "a: again; x: kept; b: again", "a: again"]
    writer.write(pa.record_batch([reasons], schema=pa.schema([error])))
    table.attach([writer.finish(table.open(), 0)])
    table.open().delete("caption = 'one'")
    task.dataset, task.stage, task.error_column = table.open(), SimpleNamespace(name="embed"), error.name
    task.fragment = task.dataset.get_fragment(0)
    assert task._earlier_errors() == {2: "x: kept", 3: ""}
    task.wanted = ["a", "b", "x"]
    assert task._earlier_errors() == {}, "all that the reasons were about is made again"

"""The keeper of what is known: one row for one identity, whatever dies and is repeated; filters against table and run."""

import pytest

from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table
from pipelines.ingestion.dedup import FINAL, IN_RUN, IN_TABLE, PROVISIONAL, REJECTED, UNKNOWN, DedupIndex
from pipelines.sources.base import ID_FIELD, IMAGE_FIELDS

pytestmark = pytest.mark.unit


@pytest.fixture
def index(tmp_path):
    """`index(rows, **filters)`: beside a table of such rows: (image_id, digest, hash)."""
    import pyarrow as pa

    def make(rows=(), **filters):
        schema = pa.schema([ID_FIELD, *IMAGE_FIELDS])
        table = Table(str(tmp_path / "samples.lance"))
        table.create(schema)
        if rows:
            names = (columns.IMAGE_ID, columns.IMAGE_DIGEST, columns.IMAGE_PHASH)
            writer = ColumnFileWriter(table.uri, schema, "ingest-1")
            writer.write(pa.RecordBatch.from_pylist([dict(zip(names, row)) for row in rows], schema))
            table.append([writer.finish(table.open())])
        return DedupIndex(table.uri, **filters)

    return make


def claim(index, unit, attempt, ids, digests=None, hashes=None):
    none = [None] * len(ids)
    return index.claim(unit, attempt, ids, digests or none, hashes or none)


def test_an_identity_is_new_once(index):
    index = index([("old", None, None)])
    attempt = index.begin("u")
    assert index.seen(["old", "a"]) == [IN_TABLE, UNKNOWN]
    assert claim(index, "u", attempt, ["a", "b", "a", "old"]) == ["new", "new", "repeated", IN_TABLE]
    assert index.seen(["a"]) == [UNKNOWN], "not settled yet: its unit may die"
    assert index.settle("u", attempt) == FINAL
    assert index.seen(["old", "a", "b", "c"]) == [IN_TABLE, IN_RUN, IN_RUN, UNKNOWN]
    assert claim(index, "v", index.begin("v"), ["b", "c"]) == ["repeated", "new"]


def test_a_unit_that_is_begun_again_gets_its_rows_again(index):
    index = index()
    first = index.begin("u")
    claim(index, "u", first, ["a", "b"])
    second = index.begin("u")
    assert claim(index, "u", second, ["a", "b", "a"]) == ["new", "new", "repeated"]
    assert index.settle("u", second) == FINAL
    assert index.settle("u", second) == REJECTED, "Ray may give a result twice"
    assert index.settle("u", first) == REJECTED


def test_the_first_result_counts_whichever_attempt_made_it(index):
    """Ray hands over the result of a worker that dies right then, repeats the unit, and keeps the second result to itself."""
    index = index(duplicates=True, near_duplicates=2)
    first = index.begin("u")
    claim(index, "u", first, ["a", "b"], ["d1", "d2"], [0, 1 << 40 | 0xFFFF])
    second = index.begin("u")
    assert claim(index, "u", second, ["a"], ["d1"], [0]) == ["new"]
    assert index.settle("u", first) == FINAL
    assert claim(index, "u", second, ["b"], ["d2"], [0xFFFF]) == ["repeated"], "it need not go on"
    assert index.settle("u", second) == REJECTED
    assert index.seen(["a", "b"]) == [IN_RUN, IN_RUN]
    other = index.begin("v")
    assert claim(index, "v", other, ["x", "y"], ["d2", "d9"], [None, 1]) == ["duplicates", "near_duplicates"]


def test_rows_of_a_dead_attempt_are_kept_for_the_next_one(index):
    """Another unit must not have them: whichever attempt's files are committed, the row is in them."""
    index = index(duplicates=True, near_duplicates=2)
    dead = index.begin("u")
    claim(index, "u", dead, ["a", "b"], ["d1", "d2"], [0, 0xFFFF])
    other = index.begin("v")
    verdicts = claim(index, "v", other, ["b", "c", "d"], ["d3", "d2", "d4"], [None, None, 0xFFFE])
    assert verdicts == ["repeated", "duplicates", "near_duplicates"]
    again = index.begin("u")
    assert claim(index, "u", again, ["a", "b"], ["d1", "d2"], [0, 0xFFFF]) == ["new", "new"]
    assert [index.settle("v", other), index.settle("u", again), index.settle("u", dead)] == [
        PROVISIONAL,
        FINAL,
        REJECTED,
    ]


def test_a_unit_that_is_settled_gets_nothing_more(index):
    index = index()
    first = index.begin("u")
    claim(index, "u", first, ["a"])
    index.settle("u", first)
    late = index.begin("u")
    assert claim(index, "u", late, ["a"]) == ["repeated"] and index.seen(["a"]) == [IN_RUN]


def test_a_result_that_depends_on_a_unit_in_hand_is_provisional(index):
    index = index()
    one, two = index.begin("u"), index.begin("v")
    claim(index, "u", one, ["a"])
    assert claim(index, "v", two, ["a", "b"]) == ["repeated", "new"]
    assert index.settle("v", two) == PROVISIONAL
    assert index.settle("u", one) == FINAL
    three = index.begin("w")
    claim(index, "w", three, ["a"])
    assert index.settle("w", three) == FINAL, "what it leans on is settled"


def test_duplicates_by_digest(index):
    index = index([("old", "d0", None), ("unknown", None, None)], duplicates=True)
    attempt = index.begin("u")
    verdicts = claim(index, "u", attempt, list("abcdef"), ["d0", "d1", "d1", None, None, "d2"])
    assert verdicts == ["duplicates", "new", "duplicates", "new", "new", "new"]
    other = index.begin("v")
    assert claim(index, "v", other, ["x", "y"], ["d2", "d3"]) == ["duplicates", "new"]
    assert index.settle("v", other) == PROVISIONAL
    index.settle("u", attempt)
    assert claim(index, "w", index.begin("w"), ["z"], ["d1"]) == ["duplicates"]


def test_digests_play_no_part_unless_asked(index):
    index = index([("old", "d0", None)])
    assert claim(index, "u", index.begin("u"), ["a", "b"], ["d0", "d0"]) == ["new", "new"]


def test_near_duplicates_by_hash(index):
    index = index([("old", None, 0)], near_duplicates=2)
    one = index.begin("u")
    verdicts = claim(index, "u", one, list("abcde"), None, [0b11, 0b111, 0b101, 0b11111111, None])
    assert verdicts == ["near_duplicates", "new", "near_duplicates", "new", "new"]
    two = index.begin("v")
    assert claim(index, "v", two, ["x", "y"], None, [0b1111111, 0xFFFF0000]) == ["near_duplicates", "new"]
    assert claim(index, "v", two, ["z"], None, [0xFFFF0001]) == ["near_duplicates"], "in an earlier window of its own"
    assert index.settle("v", two) == PROVISIONAL
    again = index.begin("u")
    assert claim(index, "u", again, ["a"], None, [0b111]) == ["new"]
    index.settle("u", again)
    assert claim(index, "w", index.begin("w"), ["q"], None, [0b110]) == ["near_duplicates"]


def test_rows_that_are_repeated_claim_nothing_else(index):
    index = index(duplicates=True)
    attempt = index.begin("u")
    assert claim(index, "u", attempt, ["a", "a", "b"], ["d0", "d1", "d1"]) == ["new", "repeated", "new"]

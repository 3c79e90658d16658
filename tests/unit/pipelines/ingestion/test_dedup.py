"""The keeper of what is known: one row for one identity, whatever dies and is repeated; filters against table and run."""

import pytest

from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table
from pipelines.ingestion.dedup import ALONE, IN_RUN, IN_TABLE, LEANING, REFUSED, UNKNOWN, Known
from pipelines.sources.base import ID_FIELD, IMAGE_FIELDS

pytestmark = pytest.mark.unit


@pytest.fixture
def known(tmp_path):
    """`known(rows, **filters)`: beside a table of such rows: (image_id, digest, hash)."""
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
        return Known(table.uri, **filters)

    return make


def claim(known, unit, attempt, ids, digests=None, hashes=None):
    none = [None] * len(ids)
    return known.claim(unit, attempt, ids, digests or none, hashes or none)


def test_an_identity_is_new_once(known):
    known = known([("old", None, None)])
    attempt = known.begin("u")
    assert known.seen(["old", "a"]) == [IN_TABLE, UNKNOWN]
    assert claim(known, "u", attempt, ["a", "b", "a", "old"]) == ["new", "new", "repeated", IN_TABLE]
    assert known.seen(["a"]) == [UNKNOWN], "not settled yet: its unit may die"
    assert known.settle("u", attempt) == ALONE
    assert known.seen(["old", "a", "b", "c"]) == [IN_TABLE, IN_RUN, IN_RUN, UNKNOWN]
    assert claim(known, "v", known.begin("v"), ["b", "c"]) == ["repeated", "new"]


def test_a_unit_that_is_begun_again_gets_its_rows_again(known):
    known = known()
    first = known.begin("u")
    claim(known, "u", first, ["a", "b"])
    second = known.begin("u")
    assert claim(known, "u", second, ["a", "b", "a"]) == ["new", "new", "repeated"]
    assert known.settle("u", second) == ALONE
    assert known.settle("u", second) == REFUSED, "Ray may give a result twice"
    assert known.settle("u", first) == REFUSED


def test_the_first_result_counts_whichever_attempt_made_it(known):
    """Ray hands over the result of a worker that dies right then, repeats the unit, and keeps the second result to itself."""
    known = known(duplicates=True, near_duplicates=2)
    first = known.begin("u")
    claim(known, "u", first, ["a", "b"], ["d1", "d2"], [0, 1 << 40 | 0xFFFF])
    second = known.begin("u")
    assert claim(known, "u", second, ["a"], ["d1"], [0]) == ["new"]
    assert known.settle("u", first) == ALONE
    assert claim(known, "u", second, ["b"], ["d2"], [0xFFFF]) == ["repeated"], "it need not go on"
    assert known.settle("u", second) == REFUSED
    assert known.seen(["a", "b"]) == [IN_RUN, IN_RUN]
    other = known.begin("v")
    assert claim(known, "v", other, ["x", "y"], ["d2", "d9"], [None, 1]) == ["duplicates", "near_duplicates"]


def test_rows_of_a_dead_attempt_are_kept_for_the_next_one(known):
    """Another unit must not have them: whichever attempt's files are committed, the row is in them."""
    known = known(duplicates=True, near_duplicates=2)
    dead = known.begin("u")
    claim(known, "u", dead, ["a", "b"], ["d1", "d2"], [0, 0xFFFF])
    other = known.begin("v")
    verdicts = claim(known, "v", other, ["b", "c", "d"], ["d3", "d2", "d4"], [None, None, 0xFFFE])
    assert verdicts == ["repeated", "duplicates", "near_duplicates"]
    again = known.begin("u")
    assert claim(known, "u", again, ["a", "b"], ["d1", "d2"], [0, 0xFFFF]) == ["new", "new"]
    assert [known.settle("v", other), known.settle("u", again), known.settle("u", dead)] == [LEANING, ALONE, REFUSED]


def test_a_unit_that_is_settled_gets_nothing_more(known):
    known = known()
    first = known.begin("u")
    claim(known, "u", first, ["a"])
    known.settle("u", first)
    late = known.begin("u")
    assert claim(known, "u", late, ["a"]) == ["repeated"] and known.seen(["a"]) == [IN_RUN]


def test_leaning_on_a_unit_in_hand_is_told(known):
    known = known()
    one, two = known.begin("u"), known.begin("v")
    claim(known, "u", one, ["a"])
    assert claim(known, "v", two, ["a", "b"]) == ["repeated", "new"]
    assert known.settle("v", two) == LEANING
    assert known.settle("u", one) == ALONE
    three = known.begin("w")
    claim(known, "w", three, ["a"])
    assert known.settle("w", three) == ALONE, "what it leans on is settled"


def test_duplicates_by_digest(known):
    known = known([("old", "d0", None), ("unknown", None, None)], duplicates=True)
    attempt = known.begin("u")
    verdicts = claim(known, "u", attempt, list("abcdef"), ["d0", "d1", "d1", None, None, "d2"])
    assert verdicts == ["duplicates", "new", "duplicates", "new", "new", "new"]
    other = known.begin("v")
    assert claim(known, "v", other, ["x", "y"], ["d2", "d3"]) == ["duplicates", "new"]
    assert known.settle("v", other) == LEANING
    known.settle("u", attempt)
    assert claim(known, "w", known.begin("w"), ["z"], ["d1"]) == ["duplicates"]


def test_digests_play_no_part_unless_asked(known):
    known = known([("old", "d0", None)])
    assert claim(known, "u", known.begin("u"), ["a", "b"], ["d0", "d0"]) == ["new", "new"]


def test_near_duplicates_by_hash(known):
    known = known([("old", None, 0)], near_duplicates=2)
    one = known.begin("u")
    verdicts = claim(known, "u", one, list("abcde"), None, [0b11, 0b111, 0b101, 0b11111111, None])
    assert verdicts == ["near_duplicates", "new", "near_duplicates", "new", "new"]
    two = known.begin("v")
    assert claim(known, "v", two, ["x", "y"], None, [0b1111111, 0xFFFF0000]) == ["near_duplicates", "new"]
    assert claim(known, "v", two, ["z"], None, [0xFFFF0001]) == ["near_duplicates"], "in an earlier window of its own"
    assert known.settle("v", two) == LEANING
    again = known.begin("u")
    assert claim(known, "u", again, ["a"], None, [0b111]) == ["new"]
    known.settle("u", again)
    assert claim(known, "w", known.begin("w"), ["q"], None, [0b110]) == ["near_duplicates"]


def test_rows_that_are_repeated_claim_nothing_else(known):
    known = known(duplicates=True)
    attempt = known.begin("u")
    assert claim(known, "u", attempt, ["a", "a", "b"], ["d0", "d1", "d1"]) == ["new", "repeated", "new"]

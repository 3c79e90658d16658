"""What a verification looks at: fragments that have changed since a version, and random rows of them."""

import lance
import numpy as np
import pyarrow as pa
import pytest

from pipelines.verification.scope import draw_rows, fragments_since, fresh_in, scan

pytestmark = pytest.mark.unit


@pytest.fixture
def dataset(tmp_path):
    """Four fragments of 10, 20, 30 and 40 rows; `row` counts through all of them."""
    start = 0
    for rows in (10, 20, 30, 40):
        made = pa.table({"row": np.arange(start, start + rows)})
        lance.write_dataset(made, str(tmp_path / "t"), mode="append" if start else "create")
        start += rows
    return lance.dataset(str(tmp_path / "t"))


def ids(fragments):
    return [fragment.fragment_id for fragment in fragments]


def test_all_without_a_version(dataset):
    assert ids(fragments_since(dataset, "")) == [0, 1, 2, 3]


def test_new_fragments(dataset):
    assert ids(fragments_since(dataset, "2")) == [2, 3] and ids(fragments_since(dataset, "4")) == []
    dataset.tags.create("seen", 3)
    assert ids(fragments_since(dataset, "seen")) == [3]


def test_fragments_with_new_columns_or_deleted_rows(dataset):
    dataset.tags.create("seen", dataset.version)
    dataset.delete("row = 35")
    assert ids(fragments_since(dataset, "seen")) == [2]
    dataset.add_columns({"twice": "row * 2"})
    assert ids(fragments_since(dataset, "seen")) == [0, 1, 2, 3]


def test_what_is_not_there(dataset):
    dataset.tags.create("seen", 3)
    for since in ("unseen", "99"):
        with pytest.raises(ValueError, match=rf"since: expected .* a tag \(there are: seen\), received '{since}'"):
            fragments_since(dataset, since)


def test_scan_reads_these_fragments_alone(dataset):
    batches = list(scan(dataset, [dataset.get_fragments()[1], dataset.get_fragments()[3]], ["row"], 15))
    assert [batch.num_rows for batch in batches] == [15, 5, 15, 15, 10]
    assert np.concatenate([batch["row"] for batch in batches]).tolist() == [*range(10, 30), *range(60, 100)]
    assert list(scan(dataset, [], ["row"], 15)) == []


def test_random_rows_are_of_these_fragments(dataset):
    fragments = [dataset.get_fragments()[1], dataset.get_fragments()[3]]
    drawn = draw_rows(dataset, fragments, 25, seed=0)
    values = dataset.take(drawn.tolist())["row"].to_pylist()
    assert len(set(values)) == 25 and values == sorted(values)
    assert set(values) <= {*range(10, 30), *range(60, 100)} and min(values) < 30 and max(values) >= 60
    assert draw_rows(dataset, fragments, 25, seed=0).tolist() == drawn.tolist()
    assert draw_rows(dataset, fragments, 25, seed=1).tolist() != drawn.tolist()


def test_no_more_rows_than_there_are(dataset):
    assert draw_rows(dataset, dataset.get_fragments(), 1000, seed=0).tolist() == list(range(100))
    assert draw_rows(dataset, [], 10, seed=0).tolist() == []


def test_deleted_rows_are_not_drawn(dataset):
    dataset.delete("row < 25 AND row != 2")
    fragments = dataset.get_fragments()
    drawn = draw_rows(dataset, fragments[:2], 1000, seed=0)
    assert dataset.take(drawn.tolist())["row"].to_pylist() == [2, 25, 26, 27, 28, 29]


def test_stale_fragments_are_left_out_by_column(dataset):
    stale = {1: ["row"], 3: ["other"]}
    assert ids(fresh_in(dataset.get_fragments(), "row", stale)) == [0, 2, 3]
    assert ids(fresh_in(dataset.get_fragments(), "third", stale)) == [0, 1, 2, 3]

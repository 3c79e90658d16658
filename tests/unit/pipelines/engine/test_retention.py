"""Old versions go; young ones, the newest, and those that somebody has tagged stay, with all their rows."""

import lance
import pyarrow as pa
import pytest

from pipelines.engine.retention import RetentionConfig, clean_up, removable, tagged_versions
from pipelines.engine.table import Table

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path):
    """A store whose samples have versions 1 to 6, each with a row of its own only."""
    for version in range(1, 7):
        lance.write_dataset(
            pa.table({"row": [version]}), str(tmp_path / "samples.lance"), mode="overwrite" if version > 1 else "create"
        )
    return str(tmp_path)


def table(store):
    return Table(f"{store}/samples.lance")


def versions(store):
    return [entry["version"] for entry in table(store).open().versions()]


def rows(store, version):
    return table(store).open(version).to_table()["row"].to_pylist()


def test_all_but_the_newest_go_at_once(store):
    done = clean_up(store, RetentionConfig(days=0))
    assert versions(store) == [6] and rows(store, 6) == [6]
    assert done["removed"] == 5 and done["bytes_freed"] > 0 and done["tagged"] == {}


def test_tagged_ones_stay_whole(store):
    dataset = table(store).open()
    dataset.tags.create("train-run", 2)
    dataset.tags.create("mine", 4)
    done = clean_up(store, RetentionConfig(days=0))
    assert versions(store) == [2, 4, 6] and [rows(store, version) for version in (2, 4, 6)] == [[2], [4], [6]]
    assert done["removed"] == 3 and done["tagged"] == {"mine": 4, "train-run": 2} == tagged_versions(table(store))
    dataset.tags.delete("train-run")
    assert clean_up(store, RetentionConfig(days=0))["removed"] == 1 and versions(store) == [4, 6]


def test_a_tag_that_comes_at_the_last_moment_counts(store):
    """Lance looks at the tags once more when it removes."""
    chosen = removable(table(store), RetentionConfig(days=0))
    assert chosen == [1, 2, 3, 4, 5]
    table(store).open().tags.create("late", 3)
    table(store).open().cleanup_old_versions(versions=chosen, error_if_tagged_old_versions=False)
    assert versions(store) == [3, 6] and rows(store, 3) == [3]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (RetentionConfig(days=None), [1, 2, 3, 4, 5, 6]),
        (RetentionConfig(days=1), [1, 2, 3, 4, 5, 6]),
        (RetentionConfig(days=0, versions=4), [3, 4, 5, 6]),
        (RetentionConfig(days=0, versions=100), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_young_ones_and_the_newest_stay(store, config, kept):
    clean_up(store, config)
    assert versions(store) == kept


def test_an_empty_store(tmp_path):
    assert clean_up(str(tmp_path), RetentionConfig()) == {"removed": 0, "bytes_freed": 0, "tagged": {}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"days": -1}, "retention.days: expected a number >= 0 or null, received -1"),
        ({"versions": 0}, "retention.versions: expected a whole number >= 1, received 0"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        RetentionConfig(**values)

"""Prompt sets and the rows that are made of them."""

import json

import pytest

from lidit.store import columns
from pipelines.engine.runs import Run
from pipelines.engine.table import Table
from pipelines.generation.prompt_sets import add_rows, pictures, read_prompts

pytestmark = pytest.mark.unit


def prompts_of(tmp_path, *lines, name="prompts.txt"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return read_prompts(str(path))


def rows_of(tmp_path):
    return Table(str(tmp_path / "store" / columns.SAMPLES_TABLE)).open().to_table().to_pylist()


def test_records_keep_all_that_the_file_says(tmp_path):
    lines = ['{"prompt": "a", "tag": "x"}', "", '{"prompt": "ü b", "include": [1]}']
    prompts = prompts_of(tmp_path, *lines, name="m.jsonl")
    assert [one.text for one in prompts] == ["a", "ü b"]
    assert prompts[1].record == {"prompt": "ü b", "include": [1]}


def test_folders_are_read_in_the_order_of_their_names(tmp_path):
    for name, text in (("b.txt", "second\n"), ("a.txt", "first")):
        (tmp_path / name).write_text(text)
    assert [(one.text, one.stem) for one in read_prompts(str(tmp_path))] == [("first", "a"), ("second", "b")]
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"c\.txt is empty"):
        read_prompts(str(tmp_path))


def test_a_folder_without_prompts(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        read_prompts(str(tmp_path))


def test_rows_are_added_once_in_fragments(tmp_path):
    wanted = pictures("p", prompts_of(tmp_path, "a", "b", "b"), 2, seed=5)
    store = str(tmp_path / "store")
    assert add_rows(store, wanted, rows_per_fragment=4) == 6
    assert add_rows(store, wanted, rows_per_fragment=4) == 0
    rows = rows_of(tmp_path)
    assert [(row["prompt"], row["prompt_index"], row["sample_index"], row["seed"]) for row in rows] == [
        ("a", 0, 0, 5), ("a", 0, 1, 6), ("b", 1, 0, 5), ("b", 1, 1, 6), ("b", 2, 0, 5), ("b", 2, 1, 6),
    ]  # fmt: skip
    assert json.loads(rows[0]["prompt_record"]) == {"prompt": "a"}
    assert len(Table(f"{store}/{columns.SAMPLES_TABLE}").open().get_fragments()) == 2


def test_more_images_and_more_prompts_add_what_is_new(tmp_path):
    store = str(tmp_path / "store")
    add_rows(store, pictures("p", prompts_of(tmp_path, "a"), 1, seed=0), 8)
    assert add_rows(store, pictures("p", prompts_of(tmp_path, "a", "c"), 2, seed=0), 8) == 3
    assert len({row["image_id"] for row in rows_of(tmp_path)}) == 4


def test_two_writers_at_once_are_told(tmp_path):
    store = str(tmp_path / "store")
    with Run(store, "prompts"), pytest.raises(ValueError, match="another run adds prompts"):
        add_rows(store, pictures("p", prompts_of(tmp_path, "a"), 1, seed=0), 8)

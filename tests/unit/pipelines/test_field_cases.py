"""Inputs as people really have them, made by the test data's own script: what ingest makes of each."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from pipelines.engine.unit_pass import ErrorRateExceeded
from pipelines.ingest import IngestPass
from pipelines.ingestion.summary import IngestSummary
from pipelines.sources.base import ColumnsConfig
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.unit
ERROR = "ingest_error"


@pytest.fixture(scope="module")
def cases(data, tmp_path_factory) -> Path:
    """All of them, made once; read only."""
    script = data / "field" / "make_cases.py"
    if not script.is_file():
        pytest.skip(f"needs {script}")
    spec = importlib.util.spec_from_file_location("make_cases", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("cases")
    for case in module.CASES:
        case(folder)
    return folder


def texts_of(made):
    """(caption or prompt, whether there is an image, whether there is a reason) of each row."""
    rows = made.rows()
    name = "caption_original" if "caption_original" in rows[0] else "caption"
    return [(row[name], row.get("image") is not None, row[ERROR] is not None) for row in rows]


def errors_of(made):
    return [row[ERROR] for row in made.rows() if row[ERROR]]


@pytest.mark.parametrize(
    "spec, texts",
    [
        ("webdataset:joined_tars/x.tar", ["red", "of the second tar"]),
        ("webdataset:gzip_named_tar/x.tar", ["red"]),
        ("webdataset:json_captions/x.tar", ["one", "two", None, "plain"]),
        ("webdataset:latin1_name/x.tar", ["x", "coffee"]),
        ("folder:metadata_below/set", ["from the subfolder"]),
        ("folder:metadata_spelling/set", ["with a dot and a slash", "ending in capitals"]),
        ("folder:junk_files/set", [None]),
        ("folder:other_endings/set", [None, None, None]),
        ("folder:linked_folder/set", [None]),
        ("folder:large_png_text/set", [None, None]),
        ("parquet:parquet_types/dictionary", ["red", "blue"]),
        ("parquet:parquet_types/string_view", ["red", "blue"]),
        ("parquet:parquet_types/large_list", ["a", "b", "c"]),
    ],
)
def test_all_of_it_are_good_rows(job, cases, spec, texts):
    kind, _, path = spec.partition(":")
    made = job(f"{kind}:{cases}/{path}")
    made.run()
    assert texts_of(made) == [(text, True, False) for text in texts]


def test_what_was_passed_by_is_counted(job, cases):
    counts = {
        name: job(f"folder:{cases}/{name}/set").work.counts
        for name in ("metadata_spelling", "other_endings", "linked_folder", "junk_files")
    }
    assert counts["metadata_spelling"]["texts_without_image"] == 1
    assert counts["other_endings"]["left_out_.heic"] == 1
    assert counts["linked_folder"]["left_out_link to a folder"] == 1
    assert counts["junk_files"]["left_out_hidden"] == 2


@pytest.mark.parametrize("name, texts", [("p.txt", ["red", "blue", "green"]), ("long.csv", ["word " * 40_000])])
def test_prompt_files(job, cases, name, texts):
    made = job(f"prompts:{cases}/old_line_ends/{name}")
    made.run()
    assert texts_of(made) == [(text, False, False) for text in texts]


def test_a_nested_key_is_found_and_an_unknown_one_stops_the_job(job, cases):
    made = job(f"webdataset:{cases}/json_captions/x.tar", columns=ColumnsConfig(caption="json.meta.caption"))
    made.run()
    assert [text for text, _, _ in texts_of(made)] == [None, "deep", None]
    with pytest.raises(ValueError, match=r"json\.captoin"):
        open_source(f"webdataset:{cases}/json_captions/x.tar", ColumnsConfig(caption="json.captoin")).pieces()


def test_half_an_emoji_is_a_row_with_a_reason(job, cases):
    made = job(f"webdataset:{cases}/half_emoji/x.tar")
    made.run()
    assert texts_of(made) == [("fine", True, False), (None, False, True), ("also fine", True, False)]


@pytest.mark.parametrize("name, errors, rows", [("all_damaged", 40, 40), ("dotted_names", 20, 21)])
def test_more_than_half_damaged_stop_the_job(job, cases, name, errors, rows):
    made = job(f"webdataset:{cases}/{name}/x.tar")
    (result,) = made.run()
    assert (result["errors"], len(made.rows())) == (errors, rows)
    driver = IngestPass(made.config, made.table, None, made.work, IngestSummary("ingest", "s"))
    with pytest.raises(ErrorRateExceeded, match=f"{errors} of {rows} rows are damaged"):
        driver.check_errors(made.tracker.totals.remote(), made.tracker.first_error.remote, at_end=True)


def test_no_file_outside_of_a_set_is_read(job, cases):
    made = job(f"coco:{cases}/coco_outside/set")
    made.run()
    assert texts_of(made) == [("c0", True, False), (None, False, True), (None, False, True)]
    assert all("leads outside" in error and "SECRET" not in error for error in errors_of(made))


def test_pixels_that_latents_cannot_use_are_refused(job, cases):
    made = job(f"folder:{cases}/float_tiff/set")
    made.run()
    assert sorted(reason for *_, reason in texts_of(made)) == [False, True]
    assert "floating-point values" in errors_of(made)[0]


def test_two_folders_of_one_name_are_two(job, cases):
    for year in (2023, 2024):
        made = job(f"folder:{cases}/same_folder_name/{year}/images")
        made.run()
    assert [text for text, _, _ in texts_of(made)] == ["first red", "second blue"]


def test_a_line_in_front_is_one_new_prompt(job, cases, tmp_path):
    for part in ("before", "after"):
        shutil.copy(cases / "prompts_line_in_front" / part / "p.txt", tmp_path / "p.txt")
        made = job(f"prompts:{tmp_path}/p.txt")
        made.run()
    assert [text for text, _, _ in texts_of(made)] == ["a", "b", "c", "new"]


def test_an_edited_caption_is_told(job, cases, tmp_path):
    shutil.copytree(cases / "edited_caption" / "before", tmp_path / "at")
    job(f"folder:{tmp_path}/at/set").run()
    shutil.copytree(cases / "edited_caption" / "after", tmp_path / "at", dirs_exist_ok=True)
    made = job(f"folder:{tmp_path}/at/set")
    assert made.work.counts["differ"] == 1 and "set/1.png" in made.work.examples["differ"][0]

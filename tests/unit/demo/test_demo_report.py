"""The demo's page: whatever captions, prompts, tasks, scores and runs are called, it shows their names as text."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from demo import report
from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.runs import Run
from pipelines.engine.table import Table
from pipelines.sources.base import ERROR_FIELD, ID_FIELD, IMAGE_FIELDS, Record, make_row

pytestmark = pytest.mark.unit

EVIL = '<script>alert(1)</script> & "quotes" \'n <img src=x onerror=alert(2)>'


def write(store: Path, fields: list[pa.Field], rows: list[dict[str, object]]) -> str:
    table, schema = Table(str(store / columns.SAMPLES_TABLE)), pa.schema(fields)
    table.create(schema)
    writer = ColumnFileWriter(table.uri, schema, "ingest-1")
    writer.write(pa.RecordBatch.from_pylist(rows, schema))
    table.append([writer.finish(table.open())])
    return str(store)


@pytest.fixture
def store(tmp_path: Path, photo: Callable[..., bytes]) -> str:
    """Three images with hostile captions, and the summary of a run."""
    rows = [make_row(Record(f"a/{number}", photo(number), f"{EVIL} {number}"), True) for number in range(3)]
    store = write(tmp_path / "store", [ID_FIELD, *IMAGE_FIELDS, ERROR_FIELD], rows)
    with Run(store, "ingest") as run:
        summary = {"job": "ingest", "rows": 3, "errors": 1, "seconds": 2.5, "rows_per_second": 1.2}
        run.write("summary.json", json.dumps(summary))
    return store


@pytest.fixture
def generated(tmp_path: Path, photo: Callable[..., bytes]) -> str:
    """Pictures of two tasks, right, wrong and not judged, with their scores."""
    kinds = {
        columns.PROMPT: pa.string(), columns.PROMPT_RECORD: pa.string(), columns.SAMPLE_INDEX: pa.int32(),
        columns.IMAGE: pa.large_binary(), "scenes_correct": pa.bool_(), "scenes_seen": pa.string(),
    }  # fmt: skip
    seen = json.dumps({"objects": [{"colour": "red", "shape": EVIL}]})
    rows = [
        dict(zip(kinds, (f"{EVIL} {n}", json.dumps({"tag": ("z_task", EVIL)[n % 2]}), 0, photo(n, size=(64, 64)), right, seen)))
        for n, right in enumerate((True, False, None))
    ]  # fmt: skip
    folder = write(tmp_path / "generated", [pa.field(*kind) for kind in kinds.items()], rows)
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "images": 12}
    Path(folder, "scores.json").write_text(json.dumps({"scenes": {"overall": figure, EVIL: figure}}))
    with Run(folder, "generate") as run:
        run.write(
            "config.yaml", json.dumps({"weights": EVIL, "sampler": {"num_inference_steps": 2, "guidance_scale": 1}})
        )
    return folder


class Reader(html.parser.HTMLParser):
    """Notes tags, attributes and text, as a browser would see them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_hostile_text_as_text(store: str, generated: str, tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    run.mkdir()
    steps = [{"kind": "train", "step": step, "loss": 1 / step, "images_seen": step} for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    read = Reader(report.render(store, str(run), [generated], [EVIL, "lidit a && b"]))
    assert "script" not in read.tags and "b>run" in read.text
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    sources = [value or "" for name, value in read.attributes if name == "src"]
    assert len(sources) == 6 and all(source.startswith("data:image/") for source in sources)
    assert [value for name, value in read.attributes if name == "alt" and value].count(f"{EVIL} 0") == 1
    for words in (
        f"{EVIL} 2",
        f"seen: red {EVIL}",
        f"weights {EVIL}, 2 steps",
        f"{EVIL}\nlidit a && b",
        "scene-GenEval",
    ):
        assert words in read.text, words
    assert (read.text.count("✓"), read.text.count("✗")) == (2, 2), "one picture each, and what the marks mean"
    came = read.text.partition("What came out")[2]
    assert came.index("z task") < came.index(f"{EVIL} 1"), "tasks in the order of the table"
    assert read.text.count("0.50 [0.40, 0.60], 12 images") == 2 and "training loss: 0.125" in read.text


def test_what_is_not_there_is_left_out(store: str, tmp_path: Path) -> None:
    page = report.render(store, str(tmp_path / "none"), [str(tmp_path / "none")], [])
    assert "What was done" in page and "What went in" in page
    assert not [words for words in ("Training", "What came out", "How that scores", "The commands") if words in page]


def test_nothing_turns_the_reading_order(store: str) -> None:
    page = report.render(store, "none", [], ["lidit \u202eelif"])
    assert "lidit \\u202eelif" in page and "\u202e" not in page

"""The summary: right figures, one line of JSON, and text that says what matters."""

import json

import pytest

from pipelines.engine.summary import Summary
from pipelines.ingestion.summary import IngestSummary
from pipelines.latents import LatentsSummary
from pipelines.recaption import RecaptionSummary

pytestmark = pytest.mark.unit


def test_rates():
    summary = Summary(
        "embed", "s", rows=100, bytes_written=5000, work_seconds=4.0, counts={"tokens": 800, "slots": 1000}
    )
    assert summary.rates == {
        "rows_per_second": 25.0,
        "tokens_per_second": 200.0,
        "padding_waste": pytest.approx(0.2),
        "bytes_per_row": 50.0,
    }


def test_no_rates_of_nothing():
    assert Summary("embed", "s").rates == {}
    assert "tokens_per_second" not in Summary("ingest", "s", rows=3, work_seconds=1.0).rates


def test_json_is_one_line_with_rates():
    summary = Summary("embed", "s", run="r", rows=10, work_seconds=2.0, error_examples=[{"error": "two\nlines"}])
    text = summary.to_json()
    assert "\n" not in text
    record = json.loads(text)
    assert record["job"] == "embed" and record["rows_per_second"] == 5.0 and record["ok"] is False
    assert record["error_examples"] == [{"error": "two\nlines"}]


def test_text_of_a_good_run():
    summary = Summary(
        "embed", "store/", ok=True, fragments=2, rows=1500, bytes_written=3_000_000, seconds=3.0, work_seconds=1.5,
        counts={"tokens": 15000, "slots": 20000}, next="lidit verify --store store",
    )  # fmt: skip
    text = summary.to_text()
    for part in ("embed: done, 1,500 rows in 2 fragments", "1,000 rows/s, 10,000 tokens/s, padding waste 25.0%"):
        assert part in text
    for part in ("3.0 MB, 2,000 bytes a row", "store/samples.lance", "lidit verify --store store"):
        assert part in text
    for part in ("errors", "truncated", "waiting", "cleaned", "NOT DONE"):
        assert part not in text


def test_text_names_what_went_wrong():
    summary = Summary(
        "embed", "s", rows=10, errors=2, error_examples=[{"error": "NaN in row"}], fragments_waiting=3,
        orphans_removed=4, counts={"truncated": 5},
    )  # fmt: skip
    text = summary.to_text()
    for part in ("NOT DONE", "`embed_error`", "NaN in row", "3 fragments lack", "4 unfinished", "5 prompts"):
        assert part in text
    assert "  unchanged  6 rows were there" in IngestSummary("ingest", "s", counts={"already_there": 6}).to_text()


def test_text_of_counts_without_slots():
    """Tokens without padding figures must not break the text."""
    text = Summary("embed", "s", rows=10, work_seconds=1.0, counts={"tokens": 5}).to_text()
    assert "10 rows/s" in text


def test_dry_run():
    assert Summary("embed", "s", dry_run=True, ok=True).to_text().endswith("dry run: nothing was changed")


def test_statuses_with_examples_the_commonest_first():
    summary = RecaptionSummary("recaption", "s", ok=True, rows=10)
    summary.counts = {"status_refusal": 2, "status_ok": 7, "blank_checked": 3, "blank_same": 1}
    summary.examples = {"ok": ["A red circle."], "refusal": ["Sorry, " + "x" * 500]}
    lines = summary.to_text().splitlines()
    assert lines[2:4] == [
        '  ok         7 rows, such as "A red circle."',
        f'  refusal    2 rows, such as "Sorry, {"x" * 153}"',
    ]
    assert "3 images were also shown blank: 1 captions stayed the same" in lines[4]
    assert json.loads(summary.to_json())["examples"]["ok"] == ["A red circle."]


def test_images_are_counted_and_their_time_is_split():
    counts = {"images": 200, "decode_seconds": 1.0, "device_seconds": 3.0, "wait_seconds": 0.4, "call_seconds": 4.0}
    summary = LatentsSummary("latents", "s", rows=1000, work_seconds=4.0, counts=counts)
    assert summary.rates["images_per_second"] == 50.0
    text = summary.to_text()
    assert "250 rows/s, 50.0 images/s (equal ones counted once)" in text
    assert "5.0 ms to decode and resize (in threads beside), 15.0 ms on the device; 10% of the time" in text
    assert (
        "images/s"
        not in LatentsSummary("latents", "s", rows=3, work_seconds=1.0, counts=counts | {"images": 0}).to_text()
    )

"""What a tracker counts is exported, under the job's name; without a job nothing is."""

import pytest

from pipelines.engine.job_metrics import COUNTED, JobMetrics
from pipelines.engine.pool import Tracker

pytestmark = pytest.mark.unit


def test_counts_that_are_exported(recorded):
    JobMetrics("embed").add({"rows": 3, "tokens": 40.0, "slots": 44, "errors": 0, "truncated": 2})
    labels = {"stage": "embed"}
    assert recorded == [("lidit_rows", 3, labels), ("lidit_tokens", 40.0, labels), ("lidit_slots", 44, labels)]


def test_every_metric_says_what_it_is():
    assert all(text.endswith(".") for text in COUNTED.values())


def test_a_tracker_exports_what_it_hears(recorded):
    tracker = Tracker("latents")
    tracker.begin("7")
    tracker.enter("7", 0, 5)
    tracker.leave("7", {"rows": 5, "images": 4, "errors": 1})
    tracker.end("7")
    assert [(name, value) for name, value, _ in recorded] == [
        ("lidit_rows", 5),
        ("lidit_errors", 1),
        ("lidit_images", 4),
    ]
    assert tracker.totals() == {"rows": 5, "images": 4, "errors": 1}


def test_a_tracker_without_a_job_exports_nothing(recorded):
    tracker = Tracker()
    tracker.begin("7")
    tracker.enter("7", 0, 5)
    tracker.leave("7", {"rows": 5})
    assert recorded == []

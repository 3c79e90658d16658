"""What is in the table: buckets, texts, lengths, and why rows are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lidit.store import columns
from lidit.store.features import Features
from trainer.data.survey import _wider, mean_length, survey

pytestmark = pytest.mark.unit

BOTH = {columns.CAPTION: 0.5, columns.CAPTION_ORIGINAL: 0.5}


def test_every_row_is_in_its_bucket_or_left_out_for_a_reason(store: Any) -> None:
    found = survey(Features(store.uri, ["one", "two"], BOTH))
    rows = found.rows
    assert rows.buckets == ("48x80", "64x64")  # by name, not by what came first
    assert found.total == len(rows.codes) == 90
    reasons = {"without latents": 0, "without embeddings": 0}
    for row, bucket in enumerate(store.buckets):
        has = [store.embeds[text, "one"][row] is not None for text in (columns.CAPTION, columns.CAPTION_ORIGINAL)]
        assert rows.texts is not None and rows.texts[row] == has[0] + 2 * has[1]
        if bucket is None:
            reasons["without latents"] += 1
        elif not any(has):
            reasons["without embeddings"] += 1
        expected = 255 if bucket is None or not any(has) else rows.buckets.index(bucket)
        assert rows.codes[row] == expected
    assert rows.missing == reasons and min(reasons.values()) > 0
    assert rows.counts.sum() + sum(reasons.values()) == 90


def test_with_one_text_its_rows_are_all_there_is(store: Any) -> None:
    found = survey(Features(store.uri, ["one"], {columns.CAPTION_ORIGINAL: 1.0}))
    assert found.rows.texts is None
    absent = sum(value is None for value in store.embeds[columns.CAPTION_ORIGINAL, "one"])
    no_latents = sum(bucket is None for bucket in store.buckets)
    both = sum(
        value is None and bucket is None
        for value, bucket in zip(store.embeds[columns.CAPTION_ORIGINAL, "one"], store.buckets)
    )
    assert found.rows.missing == {"without latents": no_latents, "without embeddings": absent - both}


def test_lengths_and_bytes_are_those_of_the_rows(store: Any) -> None:
    found = survey(Features(store.uri, ["one", "two"], {columns.CAPTION: 0.75, columns.CAPTION_ORIGINAL: 0.25}))
    expected = {}
    for (text, name), values in store.embeds.items():
        lengths = [len(value) for value in values if value is not None]
        histogram = found.lengths[text][name]
        assert histogram.tolist() == np.bincount(lengths).tolist()
        assert mean_length(histogram) == pytest.approx(np.mean(lengths))
        expected[text] = expected.get(text, 0) + np.mean(lengths) * 2 * {"one": 8, "two": 16}[name]
    counts = found.rows.counts
    latents = np.average([4 * 4 * 6 * 10, 4 * 4 * 8 * 8], weights=counts)
    prompts = 0.75 * expected[columns.CAPTION] + 0.25 * expected[columns.CAPTION_ORIGINAL]
    assert found.sample_bytes == pytest.approx(latents + prompts)


def test_held_out_rows_are_not_trained_on(store: Any) -> None:
    features = Features(store.uri, ["one", "two"], BOTH)
    everything, part = survey(features).rows, survey(features, holdout=0.3).rows
    assert 10 < len(part.held_out) < 45
    assert (part.codes[part.held_out] == 255).all()
    assert np.array_equal(part.held_out_buckets, everything.codes[part.held_out])
    assert part.counts.sum() + len(part.held_out) == everything.counts.sum()
    others = np.setdiff1d(np.arange(90), part.held_out)
    assert np.array_equal(part.codes[others], everything.codes[others])


def test_an_empty_table_and_a_column_that_no_row_has(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    empty = survey(Features(writer.store.uri, ["one"], {columns.CAPTION: 1.0}))
    assert empty.total == 0 and empty.rows.counts.sum() == 0 and empty.sample_bytes == 0
    writer.fragment([None] * 5)
    found = survey(Features(writer.store.uri, ["one"], {columns.CAPTION: 1.0}))
    assert found.rows.missing == {"without latents": 5} and found.rows.buckets == ()


def test_more_buckets_than_a_byte_holds(make_writer: Callable[..., Any]) -> None:
    writer = make_writer(widths={"one": 8}, longest=1)
    names = [f"{8 * (1 + number // 20)}x{8 * (1 + number % 20)}" for number in range(300)]
    writer.fragment([*names[:100], None, *names[100:], *names[:50]])
    rows = survey(Features(writer.store.uri, ["one"], {columns.CAPTION: 1.0})).rows
    assert rows.codes.dtype == np.uint16 and rows.buckets == tuple(sorted(names))
    assert rows.counts.sum() == 350 and rows.missing == {"without latents": 1}
    for row, bucket in enumerate(writer.store.buckets):
        assert bucket is None or rows.buckets[rows.codes[row]] == bucket


def test_codes_grow_wider_and_keep_what_is_left_out() -> None:
    assert _wider(np.array([0, 254, 255], np.uint8)).tolist() == [0, 254, 65535]

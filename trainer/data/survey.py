"""Surveys the feature table: each row's bucket and texts, and the lengths of its prompts.

Reads the small columns of every row once, a window at a time; never a latent, never an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lidit.store import columns
from lidit.store.features import Features
from trainer.data.plan import Rows, is_held_out, left_out

SCAN_ROWS = 65536  # rows of a window


@dataclass
class Survey:
    """Result of a survey of the whole table."""

    rows: Rows
    total: int  # rows of the table
    lengths: dict[str, dict[str, np.ndarray]]  # text -> encoder -> int64, how many prompts have 0, 1, 2 .. tokens
    sample_bytes: float  # of a trainable row as it is read, by the text mix


def survey(features: Features, holdout: float = 0.0) -> Survey:
    """Surveys a table. `holdout`: fraction of rows that are kept for validation."""
    total = features.total
    columns_of = {
        text: {name: columns.length(text, name) for name in formats} for text, formats in features.embeds.items()
    }
    lengths = {text: {name: np.zeros(1, np.int64) for name in formats} for text, formats in features.embeds.items()}
    names: dict[str, int] = {}
    codes, texts = np.empty(total, np.uint8), np.zeros(total, np.uint8)
    small = features.table.scanner(
        columns=[features.bucket, *(column for by_name in columns_of.values() for column in by_name.values())],
        batch_size=SCAN_ROWS,
        batch_readahead=2,
        fragment_readahead=2,
        scan_in_order=True,
    )
    at = 0
    for batch in small.to_batches():
        here = slice(at, at + batch.num_rows)
        numbers = _codes(batch.column(features.bucket), names)
        if len(names) > left_out(codes) and codes.dtype == np.uint8:
            codes = _wider(codes)
        codes[here] = np.minimum(numbers, left_out(codes))
        for bit, text in enumerate(features.texts):
            has = np.ones(batch.num_rows, bool)
            for name, column in columns_of[text].items():
                tokens = batch.column(column)
                has &= tokens.is_valid().to_numpy(zero_copy_only=False)
                lengths[text][name] = _added(lengths[text][name], np.bincount(tokens.drop_null().to_numpy()))
            texts[here] |= has.astype(np.uint8) << bit
        at += batch.num_rows
    rows = _rows(codes, texts, names, holdout, len(features.texts))
    return Survey(rows, total, lengths, _sample_bytes(features, rows, lengths))


def mean_length(histogram: np.ndarray) -> float:
    """Returns the mean of a histogram of prompt lengths; 0 if it is empty."""
    return float(np.dot(np.arange(len(histogram)), histogram) / max(1, histogram.sum()))


def _codes(column: pa.Array, names: dict[str, int]) -> np.ndarray:
    """Maps bucket names to their numbers, 65535 for null; new names are added to `names`."""
    encoded = pc.dictionary_encode(column)
    numbers = [names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()]
    indices = pc.fill_null(encoded.indices, len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([*numbers, 65535], np.uint16)[indices]


def _wider(codes: np.ndarray) -> np.ndarray:
    """Widens codes from 8 to 16 bits, for tables with more buckets than fit."""
    wider = codes.astype(np.uint16)
    wider[codes == left_out(codes)] = left_out(wider)
    return wider


def _added(histogram: np.ndarray, more: np.ndarray) -> np.ndarray:
    """Adds two histograms of different lengths."""
    total = np.zeros(max(len(histogram), len(more)), np.int64)
    total[: len(histogram)] += histogram
    total[: len(more)] += more
    return total


def _rows(codes: np.ndarray, texts: np.ndarray, names: dict[str, int], holdout: float, text_count: int) -> Rows:
    """Codes in order of appearance -> `Rows`: buckets sorted by name; rows that lack something or are held out left out.

    `codes` are changed in place.
    """
    buckets, out = sorted(names), left_out(codes)
    renamed = np.full(out + 1, out, codes.dtype)
    for number, name in enumerate(buckets):
        renamed[names[name]] = number
    held_out, no_bucket, no_text = [], 0, 0
    for start in range(0, len(codes), SCAN_ROWS):
        part, has_text = renamed[codes[start : start + SCAN_ROWS]], texts[start : start + SCAN_ROWS] > 0
        whole = (part != out) & has_text
        no_bucket += int((part == out).sum())
        no_text += int(((part != out) & ~has_text).sum())
        kept_out = whole & is_held_out(np.arange(start, start + len(part)), holdout)
        held_out.append((start + np.flatnonzero(kept_out), part[kept_out]))
        codes[start : start + SCAN_ROWS] = np.where(whole & ~kept_out, part, out)
    reasons = (("without latents", no_bucket), ("without embeddings", no_text))
    return Rows(
        codes,
        buckets,
        texts if text_count > 1 else None,
        np.concatenate([rows for rows, _ in held_out]) if held_out else None,
        np.concatenate([part for _, part in held_out]) if held_out else None,
        {reason: count for reason, count in reasons if count},
    )


def _sample_bytes(features: Features, rows: Rows, lengths: Mapping[str, Mapping[str, np.ndarray]]) -> float:
    sizes = np.array([features.latents.size(bucket) for bucket in rows.buckets] or [0])
    latents = float(np.average(sizes, weights=rows.counts)) if rows.counts.sum() else 0.0
    prompts = (
        sum(mean_length(lengths[text][name]) * form.bytes_per_token for name, form in features.embeds[text].items())
        for text in features.texts
    )
    return latents + float(np.dot(features.shares, list(prompts)))

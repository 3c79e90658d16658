"""Scope of a verification: all of it, or the fragments that have changed since a version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import lance
import numpy as np
import pyarrow as pa


def fragments_since(dataset: lance.LanceDataset, since: str) -> list[lance.LanceFragment]:
    """Fragments whose files, or deleted rows, are not those of the version; all of them for an empty `since`.

    Args:
        since: a tag of the table, or the number of a version.

    Raises:
        ValueError: there is no such tag or version; names the tags.
    """
    fragments = dataset.get_fragments()
    if not since:
        return fragments
    try:
        earlier = dataset.checkout_version(int(since) if since.isdecimal() else since)
    except (OSError, ValueError) as error:
        tags = ", ".join(dataset.tags.list()) or "none"
        raise ValueError(
            f"since: expected a version that is still kept, or a tag (there are: {tags}), received {since!r}"
        ) from error
    seen = {fragment.fragment_id: _content_of(fragment) for fragment in earlier.get_fragments()}
    return [fragment for fragment in fragments if seen.get(fragment.fragment_id) != _content_of(fragment)]


def scan(
    dataset: lance.LanceDataset, fragments: Sequence[lance.LanceFragment], columns: list[str], rows: int
) -> Iterator[pa.RecordBatch]:
    """Reads columns of these fragments, a few rows at a time."""
    for fragment in fragments:
        yield from dataset.scanner(columns=columns, batch_size=rows, fragments=[fragment]).to_batches()


def fresh_in(
    fragments: Sequence[lance.LanceFragment], name: str, stale: Mapping[int, Sequence[str]]
) -> list[lance.LanceFragment]:
    """Selects the fragments in which the column is not stale (fragment id -> its stale columns)."""
    return [fragment for fragment in fragments if name not in stale.get(fragment.fragment_id, ())]


def draw_rows(
    dataset: lance.LanceDataset, fragments: Sequence[lance.LanceFragment], count: int, seed: int
) -> np.ndarray:
    """Positions in the table of `count` random rows of these fragments (or of all of theirs), sorted."""
    wanted = {fragment.fragment_id for fragment in fragments}
    held = dataset.get_fragments()
    rows = np.array([fragment.count_rows() for fragment in held], np.int64)
    inside = np.array([row if fragment.fragment_id in wanted else 0 for fragment, row in zip(held, rows)], np.int64)
    total = int(inside.sum())
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    place = np.searchsorted(np.cumsum(inside), drawn, side="right")  # each row's fragment
    before = np.cumsum(rows) - rows, np.cumsum(inside) - inside
    return before[0][place] + drawn - before[1][place]


def _content_of(fragment: lance.LanceFragment) -> tuple[tuple[str, ...], str]:
    """Identifies a fragment's state: its data files, and which of its rows are deleted."""
    metadata = fragment.metadata
    return tuple(f"{file.path}{list(file.fields)}" for file in metadata.files), str(metadata.deletion_file)

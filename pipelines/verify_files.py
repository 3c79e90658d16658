"""What verify finds by reading data files as they lie there: content that is not what was written, files in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import lance
from lance.file import LanceFileReader

from lidit.checksum import HeldFile, content_problems, held_files, held_image_ids, place_problems, read_notes


def wrong_content(
    table_uri: str, dataset: lance.LanceDataset, fragments: Sequence[lance.LanceFragment]
) -> Iterator[str]:
    """Reads every data file against the digests that its writer left in it."""
    for file in (file for fragment in fragments for file in held_files(dataset, table_uri, fragment)):
        try:
            notes = read_notes(LanceFileReader, file.uri)
            for problem in content_problems(LanceFileReader, file, notes):
                yield f"{file.where}: {problem}"
            if not notes.digests:
                yield f"{file.where}: no digests; it was written or compacted by another tool"
        except (OSError, ValueError, RuntimeError) as error:
            yield f"{file.where}: cannot be read: {error}"


def wrong_places(
    table_uri: str,
    dataset: lance.LanceDataset,
    fragments: Sequence[lance.LanceFragment],
    looked_at: Callable[[int, int], None],
) -> Iterator[str]:
    """Holds every data file against the place that it was made for.

    Args:
        looked_at: told at the end how many files there are, and how many of them do not say what place they were made for.
    """
    total = silent = 0
    for fragment in fragments:
        known: list[str | None] = []  # the digest of the fragment's ids, once it was asked for

        def image_ids(file: HeldFile, known: list[str | None] = known) -> str | None:
            known[:] = known or [held_image_ids(LanceFileReader, file)]
            return known[0]

        for file in held_files(dataset, table_uri, fragment):
            total += 1
            try:
                notes = read_notes(LanceFileReader, file.uri)
                silent += notes.made_for is None
                for problem in place_problems(file, notes, image_ids):
                    yield f"{file.where}: {problem}"
            except (OSError, ValueError, RuntimeError):
                continue  # `wrong_content` says so
    looked_at(total, silent)

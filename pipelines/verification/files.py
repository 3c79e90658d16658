"""Checks data files as they lie there: content that is not what was written, files in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import lance
from lance.file import LanceFileReader

from lidit.store import columns
from lidit.store.checksum import HeldFile, content_problems, held_files, held_image_ids, place_problems, read_notes


def wrong_content(
    table_uri: str,
    dataset: lance.LanceDataset,
    fragments: Sequence[lance.LanceFragment],
    without: Callable[[HeldFile], None],
) -> Iterator[str]:
    """Reads every data file against the digests that its writer left in it.

    Args:
        without: told of every file that has no digests, since another tool wrote or compacted it: it cannot be checked, which
            does not make it wrong.
    """
    for file in (file for fragment in fragments for file in held_files(dataset, table_uri, fragment)):
        try:
            notes = read_notes(LanceFileReader, file.uri)
            for problem in content_problems(LanceFileReader, file, notes):
                yield f"{file.where}: {problem}"
            if not notes.digests:
                without(file)
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


class Unchecked:
    """Files without digests: how many, and which columns of stages are in them."""

    def __init__(self, dataset: lance.LanceDataset):
        key = columns.META_STAGE.encode()
        self._stages = {f.name: f.metadata[key].decode() for f in dataset.schema if key in (f.metadata or {})}
        self._files: dict[tuple[str, ...], int] = {}

    def add(self, file: HeldFile) -> None:
        """Counts a file without digests."""
        held = tuple(name for name in file.columns if name in self._stages)
        self._files[held] = self._files.get(held, 0) + 1

    @property
    def count(self) -> int:
        """Number of files without digests."""
        return sum(self._files.values())

    def sentences(self) -> list[str]:
        """Words what cannot be checked of the stages' columns, and what to do.

        Files that hold none of them need no digest.
        """
        return [
            f"{count:,} files hold {', '.join(names)} and no digests: another tool wrote or compacted them, and whether they "
            f"are as they were made cannot be told. To be sure, make them again: "
            f"{', '.join(f'lidit {stage} --overwrite' for stage in dict.fromkeys(self._stages[name] for name in names))}"
            for names, count in self._files.items()
            if names
        ]

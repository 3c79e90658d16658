"""Reads the data files of a run once more while it trains: a disk's flipped bits must not be trained on unseen.

Loading rows looks at no digest, since digests are of whole columns. So a thread reads each file that the run's tables refer
to once, column by column, against the notes that its writer left in it (`lidit.store.checksum`). The ranks share the files. It
reads slowly, at the lowest priority, and holds little memory; a run that ends sooner has checked a part, each start another.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import threading
import time
from collections.abc import Sequence

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lance.file import LanceFileReader

from lidit.runtime.outage import outlast
from lidit.store.checksum import HeldFile, content_problems, held_files, held_image_ids, place_problems, read_notes
from lidit.store.features import Features

BYTES_PER_SECOND = 16 << 20  # of a rank: less than a hundredth of what its loader may read


class DamagedData(RuntimeError):
    """Some data file is not what was written; raised on all ranks together, the run is saved."""


class DataCheck:
    """Checks a rank's part of the files in a thread. Use as a context.

    Object stores check their own content, so only tables on local or mounted disks are read.

    Args:
        features: the tables of all phases.
        rank, world_size: which part of the files is ours.
        bytes_per_second: read at most.
    """

    def __init__(
        self, features: Sequence[Features], rank: int = 0, world_size: int = 1, bytes_per_second: int = BYTES_PER_SECOND
    ):
        self.found = ""  # what is wrong, once something is
        self.files = self.checked = 0
        self._features, self._rank, self._world_size = features, rank, world_size
        self._bytes_per_second = bytes_per_second
        self._due = 0.0  # when the next bytes may be read
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data-check", daemon=True)

    def __enter__(self) -> DataCheck:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def words(self) -> str:
        """Returns the progress in words."""
        state = self.found or "nothing wrong found"
        return f"data check: {self.checked:,} of this rank's {self.files:,} files read against their digests, {state}"

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        _be_nice()
        files = self._ours()
        self.files = len(files)
        for file, names in files:
            if self._over.is_set():
                return
            problem = self._problem(file, names)
            if self._over.is_set():
                return
            self.checked += 1
            if problem:
                self.found = f"{file.table_uri}, {file.where}: {problem}"
                print(f"data check: {self.found}", file=sys.stderr, flush=True)
                return

    def _ours(self) -> list[tuple[HeldFile, frozenset[str]]]:
        """Returns this rank's files with the columns that the run reads of each, shuffled anew at every start."""
        columns_read: dict[HeldFile, frozenset[str]] = {}
        for features in self._features:
            uri, names = features.table.uri, frozenset(features.columns)
            if not isinstance(url_to_fs(uri)[0], LocalFileSystem):
                continue
            for fragment in features.table.get_fragments():
                for file in held_files(features.table, uri, fragment):
                    if read := names & set(file.columns):
                        columns_read[file] = columns_read.get(file, frozenset()) | read
        ours = list(columns_read.items())[self._rank :: self._world_size]
        random.Random(os.urandom(8)).shuffle(ours)
        return ours

    def _problem(self, file: HeldFile, names: frozenset[str]) -> str:
        """Returns what is wrong with a file; empty if nothing is, or if the run ended meanwhile."""

        def read() -> str:
            image_ids = functools.partial(held_image_ids, LanceFileReader)
            notes = read_notes(LanceFileReader, file.uri)
            return "; ".join(
                [
                    *place_problems(file, notes, image_ids),
                    *content_problems(LanceFileReader, file, notes, names, self._wait),
                ]
            )

        try:
            return outlast(read, f"checking {file.path}")
        except _Over:
            return ""
        except Exception as error:  # whatever damage makes of the reader's work
            return f"cannot be read: {(str(error) or repr(error)).splitlines()[0]}"

    def _wait(self, size: int) -> None:
        """Sleeps to keep the reading rate. Raises _Over when the run has ended."""
        now = time.monotonic()
        self._due = max(now, self._due) + size / self._bytes_per_second
        if self._over.wait(self._due - now):
            raise _Over


class _Over(Exception):
    """The run has ended."""


def _be_nice() -> None:
    """Gives this thread the lowest priority, on systems with priorities for threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)

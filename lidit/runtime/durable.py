"""Makes what was written to a local disk outlast a power cut: files, names in folders, and what Lance writes in a commit.

A rename or a commit that reaches the disk before the content that it names leaves empty files behind. So content is
flushed first, then the name, then whatever refers to it. Object stores do all of that themselves.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

# Lance writes these itself while it commits; data files that it writes too are asked for by name.
COMMITTED = ("_versions", "_transactions", "_deletions", "_refs/tags")
NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # by mounted buckets, some network file systems


def flush(path: str | Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk.

    A file system that offers no such thing for it is as safe as it is; errors of the disk are raised.

    Raises:
        OSError: the content did not reach the disk.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(handle)


def make_folders(folder: str | Path) -> None:
    """Makes a folder and those above it, where they are not there, so that they are still there after a power cut."""
    folder = os.path.abspath(folder)
    there = _lowest_present(folder)
    os.makedirs(folder, exist_ok=True)
    if there != folder:
        for parent in _up_to(os.path.dirname(folder), there):
            flush(parent)


def publish(source: str | Path, target: str | Path) -> None:
    """Moves a file to its place, in one step, content first: a power cut leaves it there whole or not at all."""
    flush(source)
    os.replace(source, target)
    flush(os.path.dirname(os.path.abspath(target)))


@contextlib.contextmanager
def flushed_commit(table_uri: str, also: Sequence[str] = ()) -> Iterator[None]:
    """Flushes what a Lance table's own writing has left in its folders during the block, however the block ends.

    Lance flushes nothing itself. After the block a power cut takes neither the new version nor its tag away. Nothing is
    done where the table is not on a local disk.

    Args:
        table_uri: folder or URI of the table, which need not be there yet.
        also: further folders of the table where Lance writes in the block: `data`, where it writes rows itself.

    Raises:
        RuntimeError: the disk refused.
    """
    fs, root = fsspec.core.url_to_fs(table_uri)
    if not isinstance(fs, LocalFileSystem):
        yield
        return
    there = _lowest_present(root)
    before = {folder: _entries(folder) for folder in (f"{root}/{name}" for name in (*COMMITTED, *also))}
    try:
        yield
    finally:
        try:
            _flush_changes(before)
            for folder in _up_to(root, there):
                flush(folder)
        except OSError as error:
            raise RuntimeError(
                f"{table_uri}: a commit did not reach the disk ({error}). Look at the disk, then run the same command again"
            ) from error


def _flush_changes(before: dict[str, set[tuple[str, int]]]) -> None:
    """Flushes files that are new or changed since their folders were listed, and those folders."""
    for folder, known in before.items():
        changed = _entries(folder) - known
        for path, _ in sorted(changed):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it meanwhile
                flush(path)
        if changed:
            flush(folder)


def _entries(folder: str) -> set[tuple[str, int]]:
    """(path, time of the last change) of each file in a folder; none where there is no such folder."""
    found = set()
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    found.add((entry.path, entry.stat().st_mtime_ns))
    return found


def _lowest_present(folder: str) -> str:
    """The folder, or the nearest one above it that is there."""
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder


def _up_to(folder: str, top: str) -> Iterator[str]:
    """A folder and those above it, as far as they are there: the names of new ones lie in the one above."""
    while True:
        if os.path.isdir(folder):
            yield folder
        if folder in (top, os.path.dirname(folder)):
            return
        folder = os.path.dirname(folder)

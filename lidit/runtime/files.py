"""Small files on any storage: created by one of several, replaced in one step, and known to be there or not.

A lease, a heartbeat, a fence: each is a file of a few bytes, and each must be whole whenever it is read.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import stat
import time
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

WITH_BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "tos", "cos", "obs"}  # of fsspec
OTHER_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
CREATE_TRIES = 3  # of a file that is refused and yet not there


def is_there(fs: Any, path: str) -> bool:
    """Tells whether a file or folder is there now, as storage itself says.

    fsspec's own `exists` is False after any error; here only "not found" is no.

    Raises:
        OSError: storage does not answer, or refuses to.
    """
    fs.invalidate_cache()
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def make_folder(fs: Any, path: str) -> None:
    """Makes a folder with those above it; never a bucket: one that is not there was misspelt, or is for its owner to make.

    An object store has no folders to make.

    Raises:
        ValueError: there is no bucket of that name.
    """
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if not protocols & WITH_BUCKETS:
        fs.makedirs(path, exist_ok=True)
        return
    bucket = path.lstrip("/").partition("/")[0]
    with contextlib.suppress(PermissionError):  # who may not look may still write
        if not is_there(fs, path) and not is_there(fs, bucket):
            raise ValueError(
                f"{fs.unstrip_protocol(path)}: expected a bucket {bucket!r}, there is no bucket of that name; is it spelt "
                f"right, and in this account or endpoint? Make it first: jobs make none"
            )


class NoRegularFile(ValueError):
    """A pipe, a socket or a device: who reads it may wait for ever, or read without end."""


def check_regular(path: str | Path) -> None:
    """Checks that a file of this machine, links followed, is one of bytes on a disk. Opens nothing.

    Raises:
        NoRegularFile: it is a pipe, a socket or a device; says which.
        FileNotFoundError: nothing is there.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind in OTHER_KINDS:
        raise NoRegularFile(
            f"{Path(path).name}: expected a regular file, this is {OTHER_KINDS[kind]}, which is not read"
        )


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file of this machine to read its bytes; pipes, sockets and devices are not opened.

    Raises:
        NoRegularFile: it is one.
        OSError: it cannot be opened.
    """
    check_regular(path)
    return open(path, "rb")


def create_exclusively(fs: Any, path: str, content: bytes) -> None:
    """Writes a file that must not be there; of several at once, one succeeds, and nobody sees half a file.

    Raises:
        FileExistsError: it is there already.
    """
    if isinstance(fs, LocalFileSystem):
        with _beside(path, content) as beside:
            Path(path).hardlink_to(beside)
        return
    for attempt in range(CREATE_TRIES):
        try:
            fs.pipe_file(path, content, mode="create")
            return
        except OSError as error:  # PreconditionFailed (412), or ConditionalRequestConflict (409) of two at one moment
            if is_there(fs, path):
                raise FileExistsError(path) from error
            if attempt == CREATE_TRIES - 1:
                raise
            time.sleep(random.uniform(0, 0.2))


def replace_file(fs: Any, path: str, content: bytes) -> None:
    """Writes a file anew in one step: who reads never meets half of it. An object store does so by itself."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    with _beside(path, content) as beside:
        beside.replace(path)


def remove_file(fs: Any, path: str) -> None:
    """Deletes a file; one that is gone already is no error."""
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def seconds_since_written(fs: Any, path: str) -> float:
    """Returns the age of a file by the clock of its storage, whatever the clocks of its writer and reader say.

    A file is written beside it and the two times are compared: to the second on S3.

    Raises:
        FileNotFoundError: it is not there.
        NotImplementedError: this storage keeps no times.
    """
    probe = f"{path}.{secrets.token_hex(4)}"
    fs.pipe_file(probe, b"")
    try:
        fs.invalidate_cache()
        return (fs.modified(probe) - fs.modified(path)).total_seconds()
    finally:
        with contextlib.suppress(Exception):  # it harms nobody, and the answer counts
            remove_file(fs, probe)


@contextlib.contextmanager
def _beside(path: str, content: bytes) -> Any:
    """A whole file of that content in the same folder, gone in the end: a full disk must not fill up with pieces."""
    beside = Path(f"{path}.{secrets.token_hex(4)}")
    try:
        beside.write_bytes(content)
        yield beside
    finally:
        beside.unlink(missing_ok=True)

"""Where a run keeps its files: a folder, or any URI that fsspec knows (`s3://bucket/runs`).

A local folder is written in place. To anything else files are written on the machine's own disk first and uploaded whole;
an object store shows a file only once it is complete.

Everything here may be done twice, and is: while storage is away (lidit/runtime/outage.py) it waits for it. Not there is only
what storage itself says is not there; any other error is raised, since deleting and writing anew hang on the answer.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lidit.runtime.durable import flush, make_folders, publish
from lidit.runtime.files import create_exclusively
from lidit.runtime.outage import outlast

LOOKS = 3  # tries to list a folder that exists and cannot be listed: another process changes it


class Storage:
    """The files under one URI; paths are relative to it, with forward slashes."""

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")
        self.fs, root = fsspec.core.url_to_fs(self.uri)
        self.root = root.rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the URI: of a run's folder the name of the run."""
        return self.uri.rpartition("/")[2]

    @property
    def local(self) -> bool:
        """Whether it is a folder that this machine reads and writes directly."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file is, as the file system names it; of a local storage: a path for `open`."""
        return f"{self.root}/{name}" if name else self.root

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders directly below one, sorted; none where it is not there."""
        return sorted(entry for entry, kind, _ in self._list(name) if kind == "directory")

    def files(self, name: str = "") -> list[str]:
        """Names of the files directly below a folder, sorted; none where it is not there."""
        return sorted(entry for entry, kind, _ in self._list(name) if kind != "directory")

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of all files below a folder, by their path from there."""
        sizes = {}
        for entry, kind, size in self._list(name):
            if kind == "directory":
                below = self.sizes(f"{name}/{entry}" if name else entry)
                sizes.update({f"{entry}/{path}": bytes_ for path, bytes_ in below.items()})
            else:
                sizes[entry] = size
        return sizes

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there now. Raises what storage raises where it cannot tell."""
        return outlast(lambda: self._is_there(self.path(name)), f"looking for {name}")

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return outlast(lambda: self.fs.cat_file(self.path(name)), f"reading {name}")

    def read_if_there(self, name: str) -> bytes | None:
        """A whole file, or None where there is none. Raises what storage raises where it cannot tell."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file that appears whole or not at all, and is on the disk when this returns."""
        outlast(lambda: self._write(name, content), f"writing {name}")

    def create(self, name: str, content: bytes) -> None:
        """Writes a file that must not be there: of several processes that create it at once, one succeeds.

        Raises:
            FileExistsError: it is there already, with another content.
        """
        try:
            outlast(lambda: self._create(name, content), f"creating {name}")
        except FileExistsError:
            if self.read_if_there(name) != content:  # else our first try succeeded, and its answer was lost
                raise

    def upload(self, source: Path, name: str) -> None:
        """Copies a file of this machine there."""
        outlast(lambda: self.fs.put_file(str(source), self.path(name)), f"uploading {name}")

    def download(self, name: str, target: Path) -> None:
        """Copies a file from there to this machine; names that came out of storage: see `inside`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        outlast(lambda: self.fs.get_file(self.path(name), str(target)), f"downloading {name}")

    def remove(self, name: str) -> None:
        """Deletes a file; one that is gone already is no error."""
        with contextlib.suppress(FileNotFoundError):
            outlast(lambda: self.fs.rm_file(self.path(name)), f"removing {name}")

    def remove_folder(self, name: str) -> None:
        """Deletes a folder with all that is in it; one that is gone already is no error."""
        self.fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            outlast(lambda: self.fs.rm(self.path(name), recursive=True), f"removing {name}")

    def remove_if_empty(self, name: str) -> None:
        """Deletes a folder that has nothing in it, and leaves any other; an object store has no empty folders."""
        if self.local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(name))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _is_there(self, path: str) -> bool:
        self.fs.invalidate_cache()
        try:
            self.fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def _list(self, name: str) -> list[tuple[str, str, int]]:
        """Returns (name, kind, bytes) of the entries directly below a folder."""
        path = self.path(name)

        def look() -> list[dict[str, Any]]:
            for _ in range(LOOKS):
                self.fs.invalidate_cache()
                try:
                    return self.fs.ls(path, detail=True)
                except FileNotFoundError:
                    if not self._is_there(path):
                        return []
            raise OSError(f"{path} is there and cannot be listed: does something else change it all the time?")

        start = path.lstrip("/") + "/"
        entries = ((entry["name"].strip("/"), entry) for entry in outlast(look, f"listing {name or self.uri}"))
        return [
            (full[len(start) :], str(entry["type"]), int(entry["size"] or 0))
            for full, entry in entries
            if full.startswith(start)  # some stores list a folder below itself
        ]

    def _write(self, name: str, content: bytes) -> None:
        if not self.local:
            self.fs.pipe_file(self.path(name), content)
            return
        path = Path(self.path(name))
        with _temporary_file(path, content) as temporary:
            publish(temporary, path)

    def _create(self, name: str, content: bytes) -> None:
        if not self.local:
            create_exclusively(self.fs, self.path(name), content)
            return
        path = Path(self.path(name))
        with _temporary_file(path, content) as temporary:
            flush(temporary)
            os.link(temporary, path)
            flush(path.parent)


def inside(folder: Path, name: str) -> Path:
    """Joins a name that came from storage to a local folder; never gives a path outside of it.

    Raises:
        ValueError: the name is empty, absolute, or has empty parts, `.`, `..`, a backslash or NUL.
    """
    path, root = folder / name, os.path.normpath(folder)
    if not is_relative(name) or os.path.commonpath([root, os.path.normpath(path)]) != root:
        raise ValueError(f"{name!r}: expected a relative name without .., which stays below {folder}")
    return path


def is_relative(name: str) -> bool:
    """Whether a name stays below the folder that it is joined to, on any system."""
    return not any(letter in name for letter in "\\\0:") and not {"", ".", ".."} & set(name.split("/"))


@contextlib.contextmanager
def _temporary_file(path: Path, content: bytes) -> Iterator[Path]:
    """Yields a temporary file with that content, in the same folder as `path`; it is deleted in the end."""
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)

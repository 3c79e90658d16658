"""Where a run keeps its files: a folder, or any URI that fsspec knows (`s3://bucket/runs`).

A local folder is written in place. To anything else files are written on the machine's own disk first and uploaded whole;
an object store shows a file only once it is complete.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lidit.durable import make_folders, publish


class Storage:
    """The files under one URI; paths are relative to it, with forward slashes."""

    def __init__(self, uri: str):
        self.uri = uri.rstrip("/")
        self.fs, root = fsspec.core.url_to_fs(self.uri)
        self.root = root.rstrip("/")

    @property
    def local(self) -> bool:
        """Whether it is a folder that this machine reads and writes directly."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Where a file is, as the file system names it; of a local storage: a path for `open`."""
        return f"{self.root}/{name}" if name else self.root

    def folders(self, name: str = "") -> list[str]:
        """Names of the folders directly below one, sorted; none where it is not there."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(name), detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory")

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of all files below a folder, by their path from there."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.path(name), detail=True)
        start = len(self.path(name)) + 1
        return {path[start:]: int(entry["size"]) for path, entry in found.items()}

    def exists(self, name: str) -> bool:
        """Whether a file is there now."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file that appears whole or not at all, and is on the disk when this returns."""
        if not self.local:
            self.fs.pipe_file(self.path(name), content)
            return
        path = Path(self.path(name))
        make_folders(path.parent)
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            beside.write_bytes(content)
            publish(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def upload(self, source: Path, name: str) -> None:
        """Copies a file of this machine there."""
        self.fs.put_file(str(source), self.path(name))

    def download(self, name: str, target: Path) -> None:
        """Copies a file from there to this machine."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self.path(name), str(target))

    def remove(self, name: str) -> None:
        """Deletes a file; one that is gone already is no error."""
        try:
            self.fs.rm_file(self.path(name))
        except FileNotFoundError:
            return

    def remove_folder(self, name: str) -> None:
        """Deletes a folder with all that is in it; one that is gone already is no error."""
        self.fs.invalidate_cache()
        try:
            self.fs.rm(self.path(name), recursive=True)
        except FileNotFoundError:
            return


def absolute(uri: str) -> str:
    """A path -> the absolute one (workers have another working directory); a URI with a protocol stays."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))

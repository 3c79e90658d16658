"""URIs of a source: braces and wildcards expanded, folders listed, files read. Anything that fsspec opens.

Credentials come from the environment (or the storage library's own files), never from a URI or a config: configs refuse them,
and what a storage lists with signed links is shown without the signatures.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from lidit.runtime.files import NoRegularFile, check_regular, open_regular
from lidit.runtime.outage import is_away, outlast
from lidit.runtime.uris import shown

LONGEST_KIND, MOST_KINDS = 40, 100  # of the words for files that are not taken
STAT_THREADS = 16
READ_BLOCK = 8 << 20  # bytes of one request to an object store, when a file is read from front to back
BRACES = re.compile(r"\{([^{}]*)\}")
CHAIN = re.compile(r"[a-z][a-z0-9+.-]*(://[^:]*)?::[a-z][a-z0-9+.-]*://")  # `simplecache::s3://bucket/a.tar`
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class File:
    """A file of a source."""

    uri: str
    size: int  # bytes
    stamp: str | None  # changes when the content does; None where the storage tells nothing

    @property
    def place(self) -> str:
        """Folder and name: enough for a person, the same from any machine; no path of anybody's, no secret of a URL."""
        uri = self.uri.partition("?")[0] if self.uri.startswith("http") else shown(self.uri)
        return "/".join(uri.rstrip("/").split("/")[-2:])


def real_place(uri: str) -> str:
    """A path of this machine made absolute, `~` and links resolved: ids are made of it. A URI stays.

    `lidit.runtime.places.absolute` leaves links: a store may be mounted elsewhere on another machine.

    Raises:
        ValueError: links on the way lead in a circle.
    """
    if "://" in uri:
        return uri
    try:
        return str(Path(uri).expanduser().resolve())
    except RuntimeError as error:  # up to Python 3.12; later ones leave such a path as it is
        raise ValueError(f"{uri}: expected a file or folder: {error}") from error


def filesystem_at(uri: str) -> tuple[Any, str]:
    """A URI -> its fsspec file system, and the path there. `::` is part of a name, unless it begins a chain of fsspec's."""
    if "::" not in uri or CHAIN.match(uri):
        return fsspec.core.url_to_fs(uri)
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    kind = fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)


def expand_braces(text: str) -> list[str]:
    """`a-{0000..0012}.tar` -> 13 names, zeros kept; `{x,y}` -> two; several braces multiply."""
    found = BRACES.search(text)
    if found is None:
        return [text]
    inside = found[1]
    if (numbers := RANGE.fullmatch(inside)) is not None:
        first, last = int(numbers[1]), int(numbers[2])
        if last < first:
            raise ValueError(f"{text}: expected a range that rises, received {{{inside}}}")
        width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = inside.split(",")
    head, tail = text[: found.start()], text[found.end() :]
    return [head + choice + rest for choice in choices for rest in expand_braces(tail)]


def is_hidden(path: str) -> bool:
    """Tells whether a file, or a folder on its way, is what programs leave for themselves: `._a.png`, `.ipynb_checkpoints`.

    The one rule for folders, buckets and tars. `path`: below the folder or in the tar; `./` and `../` hide nothing.
    """
    return any(part == "__MACOSX" or (part[:1] == "." and part not in (".", "..")) for part in path.split("/"))


def what_is_left_out(uri: str, path: str) -> str:
    """A word for a file that is not taken: `hidden`, `link to a folder`, or its ending."""
    if is_hidden(path):
        return "hidden"
    fs, root = filesystem_at(uri)
    if isinstance(fs, LocalFileSystem):
        if os.path.isdir(f"{root}/{path}"):
            return "link to a folder"
        if not is_regular(f"{root}/{path}"):
            return "no regular file"
    return posixpath.splitext(path)[1].lower() or "without an ending"


def count_left_out(left_out: Counter[str], what: str) -> None:
    """Counts a file that is not taken under a word for its kind; kinds may be as many as files, so most have a common one."""
    name = f"left_out_{what}"
    if name not in left_out and (len(what) > LONGEST_KIND or len(left_out) >= MOST_KINDS):
        name = "left_out_of other kinds"
    left_out[name] += 1


def links_elsewhere(uri: str) -> Callable[[str], bool]:
    """A folder -> whether a path below it is a link to a file elsewhere: somebody else's text, perhaps."""
    fs, root = filesystem_at(uri)
    if not isinstance(fs, LocalFileSystem):
        return lambda path: False
    inside = os.path.realpath(root)

    def leads_away(path: str) -> bool:
        whole = f"{root}/{path}"
        return os.path.islink(whole) and os.path.commonpath([inside, os.path.realpath(whole)]) != inside

    return leads_away


def is_regular(path: str) -> bool:
    """Tells whether a path of this machine is no pipe, socket or device; True where it leads nowhere: reading it says so."""
    try:
        check_regular(path)
    except NoRegularFile:
        return False
    except OSError:
        pass
    return True


def find_files(spec: str, suffixes: Sequence[str], kind: str, left_out: Counter[str] | None = None) -> list[File]:
    """The files that a spec means, each once: a file, a folder (all below it with such suffixes), braces, `*`.

    `left_out` is added what lies in folders and is not taken: `left_out_` and what `what_is_left_out` says.

    Raises:
        ValueError: nothing there, or one of the files named is not; says which.
    """
    found: list[File] = []
    passed: Counter[str] = Counter() if left_out is None else left_out
    uris = list(dict.fromkeys(expand_braces(spec)))
    with ThreadPoolExecutor(STAT_THREADS) as threads:  # object stores answer in tens of milliseconds each
        for uri, files in zip(uris, threads.map(lambda uri: _files_at(uri, suffixes, passed), uris)):
            if not files:
                more = f" (1 of {len(uris):,})" if len(uris) > 1 else ""
                what = f"source {kind}:{spec}: expected {' or '.join(suffixes)} at {uri}{more}, found nothing"
                raise ValueError(shown(what))
            found += files
    return list({file.uri: file for file in found}.values())


def list_folder(uri: str) -> list[dict[str, Any]]:
    """Lists what lies directly in a folder, by name: dictionaries with `name`, `size`, `type` (`file` or `directory`)."""
    fs, path = filesystem_at(uri)
    entries = [entry for entry in fs.ls(path, detail=True) if entry["name"].rstrip("/") != path.rstrip("/")]
    return sorted(entries, key=lambda entry: entry["name"])


def walk_files(uri: str, left_out: Counter[str] | None = None) -> dict[str, int]:
    """Path below the folder -> bytes, of all files below it, sorted; links to folders are not followed.

    `left_out` is added the pipes, sockets and devices, which are no files here.
    """
    fs, root = filesystem_at(uri)
    root = root.rstrip("/")
    found = {}
    for entry in _below(fs, root):
        if _may_be_read(fs, entry):
            found[entry["name"].removeprefix(f"{root}/")] = entry["size"]
        elif left_out is not None:
            count_left_out(left_out, "no regular file")
    return dict(sorted(found.items()))


def _below(fs: Any, root: str) -> list[dict[str, Any]]:
    """All files below a folder. What cannot be listed raises: fsspec's own walk would leave it out, unsaid.

    An object store that lists a whole prefix is asked once, not once for each folder.
    """
    base, name = (AsyncFileSystem, "_find") if isinstance(fs, AsyncFileSystem) else (AbstractFileSystem, "find")
    if getattr(type(fs), name) is not getattr(base, name):
        found = list(fs.find(root, detail=True).values())
    else:
        found, folders = [], [root]
        while folders:
            folder = folders.pop()
            entries = fs.ls(folder, detail=True)
            found += entries
            inside = (entry["name"].rstrip("/") for entry in entries if entry["type"] == "directory")
            folders += [name for name in inside if name != folder]  # some stores list a folder in itself
    return [entry for entry in found if entry["type"] != "directory"]


def is_folder(uri: str) -> bool:
    """Tells whether there is a folder (or a prefix with objects below it)."""
    fs, path = filesystem_at(uri)
    return fs.isdir(path)


def is_local(uri: str) -> bool:
    """Tells whether the URI is a path of this machine."""
    return isinstance(filesystem_at(uri)[0], LocalFileSystem)


def open_stream(uri: str) -> Any:
    """A file to be read from front to back once, as a context."""
    fs, path = filesystem_at(uri)
    if isinstance(fs, LocalFileSystem):
        return open_regular(path)
    return fs.open(path, "rb", block_size=READ_BLOCK, cache_type="readahead")


def open_parts(uri: str) -> Any:
    """A file of which parts are read here and there, as a context; who reads does its own buffering."""
    fs, path = filesystem_at(uri)
    return open_regular(path) if isinstance(fs, LocalFileSystem) else fs.open(path, "rb", cache_type="none")


def read_bytes(uri: str) -> bytes:
    """A whole file. Raises NoRegularFile where it is a pipe, a socket or a device."""
    fs, path = filesystem_at(uri)
    return outlast(lambda: _whole(fs, path, None, None), "reading a file of the source")


def read_below(root: str, path: str, most: int, size: int | None = None) -> bytes:
    """A whole file below a folder. Nothing in `path` is a protocol, nor one of fsspec's chained ones (`::`).

    Args:
        root, path: the folder's URI, and the path below it.
        most: bytes that it may have.
        size: bytes that it has, where a listing told it: an object store is then not asked again.

    Raises:
        ValueError: it is larger, or has grown since it was opened, or is a pipe, a socket or a device.
    """
    fs, folder = filesystem_at(root)
    return outlast(lambda: _whole(fs, f"{folder.rstrip('/')}/{path}", most, size), "reading a file of the source")


def too_large(size: int, most: int) -> str:
    """The reason for a file or text of so many bytes."""
    return f"{size:,} bytes, more than {most:,} allowed"


def leads_outside(path: str) -> bool:
    """Tells whether a path that a file of the source names might lead out of its folder, or to another storage."""
    plain = path.replace("\\", "/")
    return plain.startswith("/") or ".." in plain.split("/") or ":/" in plain or "::" in plain


def stamp_of(info: dict[str, Any]) -> str | None:
    """A short digest of what the storage says of a file's content: its ETag, or its time, and its size."""
    told = next(
        (info[key] for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if info.get(key)), None
    )
    return None if told is None else hashlib.sha256(f"{told} {info.get('size')}".encode()).hexdigest()[:16]


def _may_be_read(fs: Any, entry: dict[str, Any]) -> bool:
    """Whether an entry of a listing is no pipe, socket or device; of `other` type, as links of this machine are too."""
    if entry["type"] != "other":
        return True
    return isinstance(fs, LocalFileSystem) and is_regular(entry["name"])


def _whole(fs: Any, path: str, most: int | None, size: int | None) -> bytes:
    if isinstance(fs, LocalFileSystem):
        return _whole_local(path, most)
    if most is None:
        return fs.cat_file(path)
    if size is None:
        data = _beginning(fs, path, most + 1)
    elif size > most:
        raise ValueError(too_large(size, most))
    else:
        data = fs.cat_file(path)
    if len(data) > most:
        raise ValueError(too_large(len(data), most))
    return data


def _whole_local(path: str, most: int | None) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise ValueError(too_large(size, most))
        data = file.read(size + 1)  # never without an end: files of /proc have a size of 0 and any content
    if len(data) > size:
        raise ValueError(f"more than the {size:,} bytes that its folder tells: it is being written, or on no disk")
    return data


def _beginning(fs: Any, path: str, size: int) -> bytes:
    """The first bytes of a file of an object store, in one request."""
    try:
        return fs.cat_file(path, end=size)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or is_away(error) or fs.info(path)["size"]:
            raise
        return b""  # of an object without bytes no range can be asked for


def _files_at(uri: str, suffixes: Sequence[str], left_out: Counter[str]) -> list[File]:
    fs, path = filesystem_at(uri)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        if not any(sign in path for sign in "*?["):
            return []
        matching = fs.glob(path, detail=True).items()
        infos = [
            entry for name, entry in matching if not is_hidden(posixpath.basename(name)) and _may_be_read(fs, entry)
        ]
    else:
        infos = [info]
        if not _may_be_read(fs, info):
            check_regular(path)
        if info["type"] == "directory":
            infos = []
            for entry in _below(fs, path):
                inside = entry["name"].removeprefix(f"{path.rstrip('/')}/")
                if inside.lower().endswith(tuple(suffixes)) and not is_hidden(inside) and _may_be_read(fs, entry):
                    infos.append(entry)
                else:
                    count_left_out(left_out, what_is_left_out(uri, inside))
    found = []
    for entry in sorted((entry for entry in infos if entry["type"] != "directory"), key=lambda entry: entry["name"]):
        file = fs.unstrip_protocol(entry["name"]).removeprefix("file://")
        if file != uri and CHAIN.match(file):  # whoever may give files names may not choose what else is opened
            count_left_out(left_out, "name that reads as another address")
        else:
            found.append(File(file, int(entry["size"] or 0), stamp_of(entry)))
    return found

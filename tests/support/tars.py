"""Tars of samples, and the records that a source reads from them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from pipelines.sources.base import USUAL_NAMES, ColumnsConfig, Record
from pipelines.sources.registry import open_source
from tests.support.ingest_rows import IMAGES


def write_tar(
    path: Path,
    members: Iterable[tuple[str, bytes] | tarfile.TarInfo],
    mode: str = "w",
    format: int = tarfile.PAX_FORMAT,
) -> Path:
    """Write a tar of members: (name, bytes), or a TarInfo for what is no file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=format) as tar:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def samples(count: int = 5) -> list[tuple[str, bytes]]:
    """Return the members of `count` samples: an image and a caption each."""
    return [
        member
        for number in range(count)
        for member in ((f"{number:04d}.jpg", IMAGES[number]), (f"{number:04d}.txt", f"caption {number}\n".encode()))
    ]


def records(spec: str, names: ColumnsConfig = USUAL_NAMES) -> list[Record]:
    """Read all records of the source named by `spec`."""
    source = open_source(spec, names)
    return list(source.records(source.pieces()))

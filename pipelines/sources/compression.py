"""Compressed files, told by their content, apart from the sources that read them: gzip, bzip2, xz and Zstandard."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from abc import ABC, abstractmethod
from typing import Any

import pyarrow as pa

BEGINNINGS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "rar", b"\x04\x22\x4d\x18": "lz4"}
LONGEST = max(map(len, [*BEGINNINGS, *ARCHIVES]))
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
BZIP2_DAMAGE = "Invalid data stream"  # an OSError of the module bz2, told from the storage's by its words
READ_ON = 1 << 20  # bytes
XZ_MEMORY = 256 << 20  # of what xz needs; `xz -9` needs 65 MB, a file may ask for 4 GB
XZ_LIMIT = "Memory usage limit exceeded"


class UnknownArchive(ValueError):
    """A file of many files, or a compressed one, of a kind that is not read."""


def decompressed(raw: Any) -> Any:
    """A file to be read from front to back, open at its start -> what is in it, compressed or not.

    Raises:
        UnknownArchive: names its kind.
    """
    start = raw.read(LONGEST)
    raw.seek(0)
    if found := _starts(start, ARCHIVES):
        raise UnknownArchive(f"this is {found}, which is not read")
    kind = _starts(start, BEGINNINGS)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return _Xz(raw)
    return _Zstandard(raw) if kind == "zstd" else raw


def is_damage(error: Exception) -> bool:
    """Tells whether an error of reading what `decompressed` gave is about the content, not the storage."""
    return isinstance(error, DAMAGE) or (isinstance(error, OSError) and str(error) == BZIP2_DAMAGE)


class _Forward(ABC):
    """A file that knows its position and skips forward, as tarfile needs it."""

    def __init__(self) -> None:
        self._position = 0

    @abstractmethod
    def _some(self, size: int) -> bytes:
        """The next bytes, at most so many; none only at the end."""

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only at the end."""
        parts = []
        while size > 0 and (part := self._some(size)):
            parts.append(part)
            size -= len(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def tell(self) -> int:
        """Bytes read so far."""
        return self._position

    def seek(self, position: int) -> int:
        """Skips to a position that has not been passed."""
        assert position >= self._position
        while self._position < position and self.read(min(READ_ON, position - self._position)):
            pass
        return self._position


class _Zstandard(_Forward):
    def __init__(self, raw: Any):
        super().__init__()
        self._stream = pa.CompressedInputStream(raw, "zstd")

    def _some(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            if error.errno is None and ("ZSTD" in str(error) or "compressed stream" in str(error)):
                raise EOFError(str(error)) from error
            raise


class _Xz(_Forward):
    """What `lzma.LZMAFile` gives, several streams one after the other, but within `XZ_MEMORY`."""

    def __init__(self, raw: Any):
        super().__init__()
        self._raw, self._decoder = raw, lzma.LZMADecompressor(memlimit=XZ_MEMORY)
        self._ended = False

    def _some(self, size: int) -> bytes:
        while True:
            if self._decoder.eof:
                packed = self._decoder.unused_data or self._raw.read(READ_ON)
                if not packed or self._ended:
                    return b""
                following = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
                try:
                    data = following.decompress(packed, size)
                except lzma.LZMAError as error:
                    if str(error) == XZ_LIMIT:
                        raise
                    self._ended = True  # what follows is no stream of xz: passed by
                    return b""
                self._decoder = following
            else:
                packed = self._raw.read(READ_ON) if self._decoder.needs_input else b""
                if self._decoder.needs_input and not packed:
                    raise EOFError("the compressed file ends before its end mark")
                data = self._decoder.decompress(packed, size)
            if data:
                return data


def _starts(start: bytes, kinds: dict[bytes, str]) -> str | None:
    return next((kind for beginning, kind in kinds.items() if start.startswith(beginning)), None)

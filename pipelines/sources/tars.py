"""The files of a tar, one after the other, with bounds that tarfile lacks: apart from what the sources make of them.

A tar is read from front to back and nothing of it is ever unpacked to a disk: names with `../` are only names, links are not
followed.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipelines.sources.compression import UnknownArchive, decompressed, is_damage
from pipelines.sources.locations import count_left_out, is_hidden, open_stream, too_large

MAX_HEADER_BYTES = 1 << 20
"""Of all that stands before the content of one file of a tar, and of what holds for all files."""
MAX_HEADERS = 16  # of one file: two long names and a PAX header are usual
MAX_SIZE = 1 << 40  # of a file that is passed over: storage cannot be asked for any place
DIGITS = re.compile(rb"[0-9]{100}")  # in a row, in a PAX header: tarfile's patterns take the square of their number
RECORD = re.compile(rb"([0-9]{1,7}) [^=\n]+=")  # as one begins: its length, its name
CHECKSUM, SIZE = slice(148, 156), slice(124, 136)  # of a header, in octal digits, as a rule


class DamagedShard(Exception):
    """A shard that ends in the middle, or is none; what came before is good, but for the last sample.

    `behind_end`: it is whole, last sample and all, and something else stands behind it.
    """

    def __init__(self, reason: str, behind_end: bool = False):
        super().__init__(reason)
        self.behind_end = behind_end


def tar_files(uri: str, wanted: Any, left_out: Counter[str] | None = None) -> Iterator[tuple[str, bytes | str]]:
    """(name, bytes) of a tar's files in order, read in one pass; instead of bytes a reason where they are not taken.

    Args:
        uri: of the tar.
        wanted: extension -> how many bytes a file may have; b"" for one that is not needed, of which that is 0.
        left_out: is added the hidden ones, which are passed over.

    Raises:
        DamagedShard: no tar, or one that is cut short.
    """
    tar = None
    try:
        with open_stream(uri) as raw:
            # Zeros end a tar; behind them may be the next one of several that were joined.
            options: dict[str, Any] = {"tarinfo": _StrictTarInfo, "ignore_zeros": True}
            with _StrictTarFile.open(fileobj=decompressed(raw), mode="r:", **options) as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined] # it would keep every header
                    if member.isdir():
                        continue
                    if is_hidden(member.name):
                        if left_out is not None:
                            count_left_out(left_out, "hidden")
                        continue
                    yield member.name, _content(tar, member, wanted)
    except UnknownArchive as error:
        raise DamagedShard(f"expected a tar, compressed or not: {error}") from error
    except Exception as error:
        if not (isinstance(error, tarfile.TarError) or is_damage(error)):
            raise
        what = f"({type(error).__name__}: {error})"
        if tar is not None and tar.ended:
            raise DamagedShard(
                f"the shard is read to its end, and what stands behind that is no tar {what}", True
            ) from error
        raise DamagedShard(
            f"the shard is damaged {what}: the samples before that place are taken, but for the last one; what comes after "
            f"is lost"
        ) from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, wanted: Any) -> bytes | str:
    if member.issym() or member.islnk():
        return f"a link (to {member.linkname!r}): not followed"
    if not member.isreg():
        return "no regular file"
    extension = posixpath.basename(member.name).partition(".")[2].lower()
    most = wanted(extension)
    if not most:
        return b""
    if member.size > most:
        return too_large(member.size, most)
    if member.issparse():
        return _sparse_content(tar, member)
    # As `extractfile` does, without its two layers of buffers.
    tar.fileobj.seek(member.offset_data)  # type: ignore[union-attr]
    content = tar.fileobj.read(member.size)  # type: ignore[union-attr]
    if len(content) < member.size:
        raise tarfile.ReadError(f"{member.name} ends after {len(content):,} of {member.size:,} bytes")
    return content


def _sparse_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A file of which the tar has the parts that are not zero; tarfile itself takes the square of their number."""
    content = bytearray(member.size)
    tar.fileobj.seek(member.offset_data)  # type: ignore[union-attr]
    stop = 0
    for first, size in member.sparse:  # type: ignore[union-attr, misc]
        if size == 0:  # it fills up a header, or marks the end
            continue
        if first < stop or size < 0 or first + size > member.size:
            raise tarfile.ReadError(f"{member.name} has parts that lie behind its end or in each other")
        stop = first + size
        part = tar.fileobj.read(size)  # type: ignore[union-attr]
        if len(part) < size:
            raise tarfile.ReadError(f"{member.name} ends in the middle")
        content[first:stop] = part
    return bytes(content)


class _StrictTarFile(tarfile.TarFile):
    """A tar that knows whether its end mark has been passed, and no header since."""

    ended = False
    global_bytes = 0  # of headers that hold for all files; tarfile keeps them


class _Headers:
    """A tar's file while what stands before the content of one file is read, which must not be much."""

    def __init__(self, file: Any):
        self.file, self.left, self.count = file, MAX_HEADER_BYTES, 0
        self.again: bytes | None = None  # what the next `read` gives once more

    def read(self, size: int) -> bytes:
        """The next bytes."""
        if self.again is not None:
            data, self.again = self.again, None
            return data
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"headers of a file of more than {MAX_HEADER_BYTES:,} bytes")
        return self.file.read(size)

    def tell(self) -> int:
        """Position of the next bytes."""
        return self.file.tell()


class _StrictTarInfo(tarfile.TarInfo):
    """Headers of a tar that must end as tars end; tarfile itself takes a damaged header for the end, and says nothing.

    They are also bounded: tarfile reads headers of any size and number, and follows sizes that lead backwards.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        """A file's header is read in a fifth of tarfile's time; all others, and all that is odd, are left to tarfile.

        Owner, times and modes are passed over: nobody asks for them.
        """
        checksum, size = buf[CHECKSUM], buf[SIZE]
        digits = checksum[:6] + size[:11]  # then both end in the one way in which they are usually written
        plain = buf[156:157] == tarfile.REGTYPE and len(buf) == tarfile.BLOCKSIZE and len(digits) == 17
        if not (plain and digits.isdigit() and checksum[6:] == b"\0 " and size[11:] == b"\0"):
            return super().frombuf(buf, encoding, errors)
        if sum(buf) - sum(checksum) + 8 * 0x20 != int(checksum[:6], 8):  # its own place counts as spaces
            return super().frombuf(buf, encoding, errors)
        info = cls(_text(buf[:100], encoding, errors))
        info.size = int(size[:11], 8)
        if prefix := _text(buf[345:500], encoding, errors):
            info.name = f"{prefix}/{info.name}"
        return info

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            info = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if tar.ended:
                raise  # the end of the file
            raise tarfile.ReadError("it ends without the mark that ends a tar") from error
        except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without the mark that ends a tar") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"no header where one is due: {error}") from error
        except (ValueError, LookupError) as error:  # of numbers and texts in headers
            raise tarfile.ReadError(f"a header that is damaged: {error}") from error
        if not 0 <= info.size <= MAX_SIZE or tar.offset < info.offset_data:
            raise tarfile.ReadError(f"a header that says {info.size} bytes")
        tar.ended = False
        return info

    def _proc_member(self, tar: Any) -> Any:
        if self.type not in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            return super()._proc_member(tar)  # type: ignore[misc]
        if isinstance(tar.fileobj, _Headers):  # one of several before a file
            return self._proc_header(tar)
        tar.fileobj = _Headers(tar.fileobj)
        try:
            return self._proc_header(tar)
        finally:
            tar.fileobj = tar.fileobj.file

    def _proc_header(self, tar: Any) -> Any:
        tar.fileobj.count += 1
        if tar.fileobj.count > MAX_HEADERS:
            raise tarfile.ReadError(f"more than {MAX_HEADERS} headers of a file")
        return super()._proc_member(tar)  # type: ignore[misc]

    def _proc_pax(self, tar: Any) -> Any:
        data = tar.fileobj.read(self._block(self.size))  # type: ignore[attr-defined]
        if self.type == tarfile.XGLTYPE:
            tar.global_bytes += self.size
            if tar.global_bytes > MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"headers that hold for all files of more than {MAX_HEADER_BYTES:,} bytes")
        tar.fileobj.again = _whole_records(data)
        return super()._proc_pax(tar)  # type: ignore[misc]


def _text(field: bytes, encoding: str, errors: str) -> str:
    return field.partition(b"\0")[0].decode(encoding, errors)


def _whole_records(data: bytes) -> bytes:
    """A PAX header up to where it is no more what it should be, before patterns that may take for ever look at it."""
    place = 0
    while place < len(data) and data[place]:
        found = RECORD.match(data, place)
        stop = place + int(found[1]) if found else 0
        if found is None or stop < found.end() or data[stop - 1 : stop] != b"\n":
            break
        place = stop
    if DIGITS.search(data, 0, place):
        raise tarfile.ReadError("a PAX header with a number of 100 digits")
    return data[:place].ljust(len(data), b"\0")

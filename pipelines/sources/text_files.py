"""Files of lines, of CSV and of JSON lines, read whole; what cannot be read is a ValueError with file and line."""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import re
from typing import Any

from pipelines.sources.locations import read_bytes

MAX_FIELD = 1 << 30  # characters of a field of a CSV file
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)  # this file's own fault; see `is_unreadable`
BYTE_ORDER_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # files that were joined have them at further lines too


def is_unreadable(error: BaseException | None) -> bool:
    """Tells whether an error is the file's own fault, not the storage's: not there, refused, a folder, or links in a circle."""
    return isinstance(error, UNREADABLE) or (isinstance(error, OSError) and error.errno == errno.ELOOP)


def read_text(uri: str) -> str:
    """The text of a file of lines; where no line feed is in it, carriage returns end them (old Macs, some spreadsheets).

    Raises:
        ValueError: it cannot be opened, or is not UTF-8.
    """
    try:
        text = read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{uri}: expected UTF-8, received byte {error.object[error.start]:#x} at {error.start}"
        ) from error
    except FileNotFoundError as error:
        raise ValueError(f"{uri}: expected a file, nothing is there") from error
    except OSError as error:
        if not is_unreadable(error):
            raise
        raise ValueError(
            f"{uri}: expected a file that can be read, received {type(error).__name__}: {error}"
        ) from error
    return without_marks(text if "\n" in text else text.replace("\r", "\n"))


def without_marks(text: str) -> str:
    """The text without the byte order marks that its lines begin with."""
    return BYTE_ORDER_MARKS.sub("", text)


def lines_of(text: str) -> list[str]:
    """Lines that end with a line feed, a carriage return before it or not."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def csv_lines(uri: str) -> list[list[str]]:
    """Fields of each row, the header's first. Of a single column a line without quotes is one field, commas and all."""
    csv.field_size_limit(MAX_FIELD)  # of this process: 131,072 by itself
    lines = io.StringIO(read_text(uri), newline="")
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None or len(header) != 1:
            return [] if header is None else [header, *reader]
        rows = [header]
        for line in lines:
            quoted = line.startswith('"')
            whole = itertools.chain([line], lines)  # of a quoted field as many lines as it has
            rows.append(
                next(csv.reader(whole, strict=True)) if quoted else [line.removesuffix("\n").removesuffix("\r")]
            )
        return rows
    except csv.Error as error:
        raise ValueError(f"{uri}: expected fields quoted as RFC 4180 says: {error}") from error


def ragged(uri: str, number: int, expected: int, received: int) -> str:
    """Names what is wrong with a row of a table that has fields too few or too many."""
    what = f"{uri}, row {number}: expected {expected} fields, received {received}"
    if received < expected:
        return what
    if uri.lower().endswith(".tsv"):
        return f"{what}; fields that have tabs in them can be had as .csv, quoted"
    return f"{what}; quote fields that have commas in them"


def csv_records(uri: str, required: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows by the header's names. Raises ValueError where one of those that are required is not there, or a row is ragged."""
    lines = csv_lines(uri)
    header = [name.strip().lower() for name in lines[0]] if lines else []
    if missing := [name for name in required if name not in header]:
        raise ValueError(f"{uri}: expected a header with columns {', '.join(missing)}, received {header}")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        if line in ([], [""]):
            continue
        if len(line) != len(header):
            raise ValueError(ragged(uri, number, len(header), len(line)))
        records.append(dict(zip(header, line)))
    return records


def json_lines(uri: str, required: tuple[str, ...], nullable: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The objects of a file. Raises ValueError where one lacks text under a key that is required (null where it may be)."""

    def has(record: dict[str, Any], key: str) -> bool:
        return isinstance(record.get(key), str) or (key in nullable and record.get(key, "") is None)

    records = []
    for number, line in enumerate(lines_of(read_text(uri)), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of numbers and nesting that Python does not read
            raise ValueError(f"{uri}, line {number}: expected a JSON object: {error}") from error
        if not isinstance(record, dict) or not all(has(record, key) for key in required):
            raise ValueError(f"{uri}, line {number}: expected an object with text under {', '.join(required)}")
        records.append(record)
    return records

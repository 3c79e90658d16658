"""Sources that are tables: Parquet files and Lance tables; `saved.py` has the folders of Hugging Face `datasets`.

They are cut by row group or fragment, and read a few rows at a time: memory does not depend on how large a
row group or a fragment is, nor on how often a large value is repeated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lidit.runtime.outage import is_away
from lidit.store.checksum import DamagedBytes, no_panic
from pipelines.sources.base import MAX_IMAGE_BYTES, MAX_JSON_BYTES, USUAL_NAMES, ColumnsConfig, Piece, Record, Sharded
from pipelines.sources.locations import (
    STAT_THREADS,
    File,
    find_files,
    open_parts,
    real_place,
    too_large,
)

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
READ_ROWS = 64
LANCE_ROWS = 8  # which tells nothing of its values beforehand, and is as fast with few
BATCH_BYTES = 512 << 20
"""That so many rows may take at worst, each with the largest value of a dictionary; else fewer are read."""
COMPRESSIBLE = 4  # times: a dictionary that is so much smaller in the file is none of images, and counts so many times
LEVEL_BYTES = 16  # of a value, beside its own
SURELY_SMALL = 1 << 20  # bytes of the texts of some rows
READ_BYTES = 8 << 20  # of one column, read ahead
IMAGE_CHOICES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "img")
CAPTION_CHOICES = ("caption", "text", "TEXT", "txt", "caption_original", "prompt")
PAGE = re.compile(rb"\x15([\x80-\xff]{0,4}[\x00-\x7f])" * 3, re.DOTALL)  # a page's kind, its bytes, those in the file
PAGE_BYTES = 16  # of a page's header, that have these
DICTIONARY_PAGE = 2
DAMAGE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowSerializationError)
REMOTE_STORE = re.compile(r"Generic (?!LocalFileSystem|memory)\w+ error")  # of Lance, in an error of damage's class
DAMAGE_WORDS = (
    "parquet", "thrift", "decompress", "corrupt", "page", "end of stream", "truncated", "unexpected end", "flatbuffer",
    "ipc stream", "ipc message", "message body", "encrypted metadata", "physical column", "schema had",
    "malformed", "logical type", "compression codec",
)  # fmt: skip
READER_ERRORS = (*DAMAGE, UnicodeDecodeError, OSError)  # of damage, where `is_damage` says so


class Parquet(Sharded):
    """Parquet files: one, braces, a wildcard, or all below a folder. `downloaded`: rows without an image are left out."""

    def __init__(self, argument: str, names: ColumnsConfig = USUAL_NAMES, downloaded: bool = False):
        self.argument, self.names, self.downloaded = real_place(argument), names, downloaded

    def pieces(self) -> list[Piece]:
        files = find_files(self.argument, PARQUET_SUFFIXES, "parquet", self.left_out)
        with ThreadPoolExecutor(STAT_THREADS) as threads:
            footers = list(threads.map(_footer, files))
        schemas = [footer[1] for footer in footers if not isinstance(footer, str)]
        problems = [problem for schema in schemas if (problem := self._problem(schema))]
        if schemas and len(problems) == len(schemas):
            raise ValueError(f"source parquet:{self.argument}: {problems[0]}")
        return [piece for file, footer in zip(files, footers) for piece in _row_groups(file, footer)]

    def read(self, piece: Piece) -> Iterator[Record]:
        place = piece["place"]
        if piece["damage"]:
            yield Record(place, error=piece["damage"])
            return
        row = piece["first"]
        with open_parts(piece["uri"]) as raw:
            try:
                file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True)
                if problem := self._problem(file.schema_arrow):
                    yield Record(place, error=problem)
                    return
                names = table_names(file.schema_arrow, self.names)
                columns = _leaves(file.schema_arrow, names)
                rows = _rows_at_a_time(raw, file.metadata.row_group(piece["group"]), columns)
                for batch in file.iter_batches(rows, row_groups=[piece["group"]], columns=columns):
                    yield from table_records(batch, names, piece["file"], row, skip_empty=self.downloaded)
                    row += batch.num_rows
            except READER_ERRORS as error:
                if not is_damage(error):
                    raise
                yield Record(f"{place}#end", error=f"the row group is damaged from row {row} on: {error}")

    def _problem(self, schema: pa.Schema) -> str | None:
        try:
            table_names(schema, self.names)
        except ValueError as error:
            return str(error)
        return None


class LanceTable(Sharded):
    """A Lance table, its version of now: one piece per fragment."""

    def __init__(self, argument: str, names: ColumnsConfig = USUAL_NAMES):
        self.argument, self.names = real_place(argument), names

    def pieces(self) -> list[Piece]:
        try:
            with no_panic():
                dataset = lance.dataset(self.argument)
        except (ValueError, FileNotFoundError, DamagedBytes) as error:
            raise ValueError(f"source lance:{self.argument}: expected a Lance table: {error}") from error
        table_names(dataset.schema, self.names)
        name = self.argument.rstrip("/").rpartition("/")[2]
        return [
            {
                "place": f"{name}/{fragment.fragment_id}",
                "uri": self.argument,
                "stamp": _fragment_stamp(fragment),
                "rows": fragment.count_rows(),
                "bytes": sum(file.file_size_bytes or 0 for file in fragment.metadata.files),
                "version": dataset.version,
                "fragment": fragment.fragment_id,
            }
            for fragment in dataset.get_fragments()
        ]

    def read(self, piece: Piece) -> Iterator[Record]:
        dataset = lance.dataset(self.argument, version=piece["version"])
        names = table_names(dataset.schema, self.names)
        fragment, row = dataset.get_fragment(piece["fragment"]), 0
        assert fragment is not None  # the version is pinned
        batches = fragment.to_batches(
            columns=[name for name in names if name],
            batch_size=LANCE_ROWS,
            batch_readahead=1,
            io_buffer_size=READ_BYTES,
        )
        try:
            with no_panic():
                for batch in batches:
                    yield from table_records(batch, names, piece["place"], row)
                    row += batch.num_rows
        except (*DAMAGE, DamagedBytes) as error:
            if is_away(error) or REMOTE_STORE.search(str(error)):
                raise
            yield Record(f"{piece['place']}#end", error=f"the fragment is damaged from row {row} on: {error}")


def table_names(schema: pa.Schema, names: ColumnsConfig) -> tuple[str, str | None, str | None]:
    """The columns that hold image, caption and score: those named, or the first usual name that is there.

    A caption column of nulls alone is passed over for another usual one that has texts.

    Raises:
        ValueError: a column that is named is not there, or there twice, or of the wrong type, or none is of images.
    """
    try:
        called = schema.names
    except UnicodeDecodeError as error:
        raise ValueError(f"the name of a column: {_reason(error)}") from error
    image = names.image or next((name for name in IMAGE_CHOICES if name in called), None)
    caption = names.caption or _usual_caption(called, schema)
    has = f"the table has {', '.join(called)}"
    if image is None:
        raise ValueError(f"expected an image column ({', '.join(IMAGE_CHOICES)}), {has}; name it with --columns.image")
    for what, name in (("image", image), ("caption", caption), ("score", names.score)):
        if name is not None and name not in called:
            raise ValueError(f"expected column {name!r} (--columns.{what}), {has}")
        if name is not None and (count := called.count(name)) > 1:
            raise ValueError(f"expected one column {name!r} (--columns.{what}), {count} are called so: {has}")
    kind = _plain(schema.field(image).type)
    if not (_is_binary(kind) or _has_bytes(kind)):
        raise ValueError(
            f"column {image!r}: expected an image's bytes (binary, or a struct with binary `bytes`), it is {kind}"
        )
    if caption is not None and not _is_text(_value(kind := _plain(schema.field(caption).type))):
        raise ValueError(f"column {caption!r}: expected text, or lists of texts, it is {kind}")
    if names.score is not None:
        kind = _plain(schema.field(names.score).type)
        is_number = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null)
        if not any(holds(kind) for holds in is_number):
            raise ValueError(f"column {names.score!r}: expected numbers, it is {kind}")
    return image, caption, names.score


def is_damage(error: Exception) -> bool:
    """Tells whether a reader's error is about the file's content, and not about the storage; Arrow has OSErrors for both."""
    if is_away(error) or not isinstance(error, OSError):
        return not is_away(error)
    is_arrow_s = type(error) is OSError and error.errno is None
    return is_arrow_s and any(word in str(error).lower() for word in DAMAGE_WORDS)


def _usual_caption(called: list[str], schema: pa.Schema) -> str | None:
    """The first usual caption column; where it is of nulls alone, the first that has texts, if there is one."""
    there = {name: _value(_plain(schema.field(called.index(name)).type)) for name in CAPTION_CHOICES if name in called}
    first = next(iter(there), None)
    if first is None or not pa.types.is_null(there[first]):
        return first
    return next((name for name, kind in there.items() if _is_text(kind) and not pa.types.is_null(kind)), first)


def table_records(
    batch: pa.RecordBatch, names: tuple[str, str | None, str | None], place: str, first: int, skip_empty: bool = False
) -> Iterator[Record]:
    """Rows as records; a list of captions makes one record each.

    Args:
        batch: rows with the columns `names`: image, caption, score.
        place: where they come from.
        first: number of the first row there.
        skip_empty: leave rows without an image out, instead of making errors of them.
    """
    image, caption, score = names
    nothing = pa.nulls(batch.num_rows)
    cells, paths = _image_cells(batch.column(image))
    may_be_large = cells.nbytes > MAX_IMAGE_BYTES
    captions = _texts(batch.column(caption) if caption else nothing)
    scores = (batch.column(score) if score else nothing).to_pylist()
    for row, (cell, text, number) in enumerate(zip(cells, captions, scores)):
        if may_be_large and (size := _size(cell)) > MAX_IMAGE_BYTES:
            yield Record(f"{place}#{first + row}", error=f"column {image!r}: {too_large(size, MAX_IMAGE_BYTES)}")
            continue
        data = cell.as_py()
        if data is None and skip_empty:
            continue
        if isinstance(text, ValueError):
            yield Record(f"{place}#{first + row}", data, error=f"column {caption!r}: {_reason(text)}")
            continue
        error = None
        if data is None:  # a table must not choose which files are read
            has_path = paths is not None and paths[row].as_py()
            error = "only the path of a file, no bytes" if has_path else f"column {image!r} is null"
        texts = [one for one in text if one is not None] if isinstance(text, list) else [text]
        for one in texts or [None]:
            yield Record(f"{place}#{first + row}", data, one, None if number is None else float(number), error)


def _image_cells(column: pa.Array) -> tuple[pa.Array, pa.Array | None]:
    """The bytes of images, and the paths that stand beside them where they are {bytes, path}, as `datasets` has it."""
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type) and pa.types.is_struct(column.type.value_type):
        column = column.dictionary_decode()
    if not pa.types.is_struct(column.type):
        return column, None
    has_path = column.type.get_field_index("path") >= 0
    return pc.struct_field(column, "bytes"), pc.struct_field(column, "path") if has_path else None


def _texts(values: pa.Array) -> Iterable[Any]:
    """The values, bytes as text; an error in the place of one that is not UTF-8 (Arrow itself does not look) or too large."""
    if values.nbytes * (len(values) if _may_repeat(values.type) else 1) > SURELY_SMALL:
        return map(_bounded, values)
    try:
        found = values.to_pylist()
    except UnicodeDecodeError:
        found = [_or_error(value.as_py) for value in values]
    return [
        text if text is None or isinstance(text, str) else _or_error(functools.partial(_decoded, text))
        for text in found
    ]


def _bounded(value: pa.Scalar) -> Any:
    """One of the values, looked at before it is made a text."""
    if (size := _size(value)) > MAX_JSON_BYTES:
        return ValueError(too_large(size, MAX_JSON_BYTES))
    return _or_error(lambda: _decoded(value.as_py()))


def _size(value: pa.Scalar) -> int:
    """Bytes of a value, or of all in a list; a value of a dictionary, or of a view, counts as often as it is there."""
    if isinstance(value, pa.ExtensionScalar | pa.DictionaryScalar):
        value = value.value
    if value is None or not value.is_valid:
        return 0
    if not _is_list(value.type):
        return value.as_buffer().size
    if not _may_repeat(value.type):
        return value.values.nbytes
    size = 0
    for one in value.values:
        size += LEVEL_BYTES + _size(one)
        if size > MAX_JSON_BYTES:
            break
    return size


def _may_repeat(kind: pa.DataType) -> bool:
    """Whether many values may be one in memory."""
    if isinstance(kind, pa.BaseExtensionType):
        return _may_repeat(kind.storage_type)
    views = ("is_dictionary", "is_string_view", "is_binary_view", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, name)(kind) for name in views) or (_is_list(kind) and _may_repeat(kind.value_type))


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"expected UTF-8, received byte {error.object[error.start]:#x}"
    return str(error)


def _or_error(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except UnicodeDecodeError as error:
        return error


def _decoded(text: Any) -> Any:
    if isinstance(text, list):
        return [_decoded(one) for one in text]
    return text.decode() if isinstance(text, bytes) else text


def _leaves(schema: pa.Schema, names: Iterable[str | None]) -> list[str]:
    """The columns to read; of a struct, what `datasets` has in one."""
    leaves = []
    for name in names:
        if name and pa.types.is_struct(kind := schema.field(name).type):
            leaves += [f"{name}.{part}" for part in ("bytes", "path") if kind.get_field_index(part) >= 0]
        elif name:
            leaves.append(name)
    return leaves


def _rows_at_a_time(raw: Any, group: pq.RowGroupMetaData, columns: Iterable[str]) -> int:
    """How many rows of a row group to decode at once, so that a large value is not multiplied beyond `BATCH_BYTES`."""
    rows, each = max(group.num_rows, 1), 1.0
    for number in range(group.num_columns):
        column = group.column(number)
        if not any(column.path_in_schema == name or column.path_in_schema.startswith(f"{name}.") for name in columns):
            continue
        values = max(column.num_values / rows, 1)  # more than one in lists
        size = max(column.total_uncompressed_size, 0)
        largest = size / rows
        if READ_ROWS * values * size > BATCH_BYTES:
            largest = max(largest, _dictionary_bytes(raw, column))
        each += values * (largest + LEVEL_BYTES)
    return int(min(READ_ROWS, max(1, BATCH_BYTES // each)))


def _dictionary_bytes(raw: Any, column: pq.ColumnChunkMetaData) -> int:
    """What the largest value of a column's dictionary may have, by the header of its first page; 0 where it has none."""
    places = [place for place in (column.dictionary_page_offset, column.data_page_offset) if place and place > 0]
    raw.seek(min(places, default=0))
    found = PAGE.match(raw.read(PAGE_BYTES))
    if found is None:
        return column.total_uncompressed_size
    kind, size, compressed = map(_zigzag, found.groups())
    if kind != DICTIONARY_PAGE:
        return 0
    return size * (COMPRESSIBLE if compressed * COMPRESSIBLE < size else 1)


def _zigzag(number: bytes) -> int:
    """A whole number as Thrift writes it, seven bits a byte, the lowest first, and the lowest of all is the sign."""
    value = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(number))
    return value >> 1


def _footer(file: File) -> tuple[pq.FileMetaData, pa.Schema] | str:
    """A file's metadata and columns, or why it has none."""
    with open_parts(file.uri) as raw:
        try:
            footer = pq.read_metadata(raw)
            return footer, footer.schema.to_arrow_schema()
        except UnicodeDecodeError as error:
            return f"the name of a column: {_reason(error)}"
        except READER_ERRORS as error:
            if not is_damage(error):
                raise
            return f"no Parquet file, or one cut short: {error}"


def _row_groups(file: File, footer: tuple[pq.FileMetaData, pa.Schema] | str) -> Iterator[Piece]:
    """The pieces of a file. Of what the footer says of columns nothing is asked here: damage of it may end the process."""
    common = {"uri": file.uri, "file": file.place, "stamp": file.stamp}
    if isinstance(footer, str):
        yield {**common, "place": file.place, "rows": 1, "bytes": 0, "damage": footer}
        return
    groups = [footer[0].row_group(group) for group in range(footer[0].num_row_groups)]
    sizes = [max(about.total_byte_size, 0) for about in groups]  # before compression
    first, whole = 0, max(sum(sizes), 1)
    for group, (about, size) in enumerate(zip(groups, sizes)):
        parts = {"place": f"{file.place}:{group}", "rows": about.num_rows, "bytes": file.size * size // whole}
        yield {**common, **parts, "group": group, "first": first, "damage": None}
        first += about.num_rows


def _fragment_stamp(fragment: lance.LanceFragment) -> str:
    """Changes when files or deletions of the fragment do."""
    about = fragment.metadata
    deleted = about.deletion_file
    return f"{'-'.join(file.path for file in about.files)}-{deleted.id if deleted else ''}"


def _plain(kind: pa.DataType) -> pa.DataType:
    """What the values are, however they are laid out: in a dictionary (pandas' and Polars' categories) or an extension."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return _plain(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _value(kind: pa.DataType) -> pa.DataType:
    """What the values of a list are, or the values themselves."""
    return _plain(kind.value_type) if _is_list(kind) else kind


def _has_bytes(kind: pa.DataType) -> bool:
    """Whether it is a struct whose `bytes` are bytes, or nulls alone."""
    if not pa.types.is_struct(kind) or (place := kind.get_field_index("bytes")) < 0:
        return False
    inside = _plain(kind.field(place).type)
    return _is_binary(inside) or pa.types.is_null(inside)


def _is_list(kind: pa.DataType) -> bool:
    lists = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, name)(kind) for name in lists)


def _is_binary(kind: pa.DataType) -> bool:
    return any(
        getattr(pa.types, name)(kind)
        for name in ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    )


def _is_text(kind: pa.DataType) -> bool:
    """Text, bytes of text, or a column of nulls alone (tools give it no better type)."""
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null, _is_binary)
    return any(is_such(kind) for is_such in texts)

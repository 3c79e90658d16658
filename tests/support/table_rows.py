"""Rows and columns of a small Lance table, for tests of `pipelines.engine.table`."""

import json
import threading

import pyarrow as pa

from pipelines.engine.column_file import UNCOMPRESSED, ColumnFileWriter

KEY = "lidit:fingerprint"
ROWS = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])
EMBEDS = pa.field(
    "embeds", pa.large_binary(), metadata={KEY: json.dumps({"weights": "w1", "layer": 2}), **UNCOMPRESSED}
)
LENGTH = pa.field("length", pa.int32(), metadata={KEY: json.dumps({"weights": "w1", "layer": 2})})
ERROR = pa.field("embed_error", pa.string())


def write_rows(table, first, count=4, run="ingest-1"):
    writer = ColumnFileWriter(table.uri, ROWS, run)
    ids = [f"{number:03d}" for number in range(first, first + count)]
    writer.write(pa.record_batch([ids, [f"text {value}" for value in ids]], schema=ROWS))
    return writer.finish(table.open())


def write_columns(
    table, fragment, fields=(EMBEDS, LENGTH), rows=4, run="embed-1", mark=b"e", replaces=None, error=None
):
    """A column file of a fragment, of the declared fields."""
    schema = table.open().schema
    wanted = pa.schema([schema.field(f.name) for f in fields])
    values = {
        "embeds": [mark + bytes([row]) for row in range(rows)],
        "length": list(range(rows)),
        "embed_error": [error] * rows,
    }
    writer = ColumnFileWriter(table.uri, wanted, run)
    writer.write(pa.record_batch([pa.array(values[f.name], f.type) for f in wanted], schema=wanted))
    return writer.finish(table.open(), fragment, replaces)


def verdicts(attached):
    return len(attached.done), len(attached.duplicate), len(attached.stale)


def rows_of(table, version=None):
    return table.open(version).to_table().to_pylist()


def files(table):
    """Paths of all data files that lie in the table's folder."""
    return {path for path in table.open().all_files().read_all()["path"].to_pylist() if path.startswith("data/")}


def in_threads(work, count):
    """Runs work(0 .. count - 1), all at once; raises what any of them raised."""
    start, errors = threading.Barrier(count), []

    def run(number):
        start.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

"""Parquet files to ingest, and what all units of an ingest counted: for tests that drive one without Ray."""

import pyarrow as pa
import pyarrow.parquet as pq


def write(path, rows):
    """A Parquet file of (image, caption) or (image, caption, score)."""
    names = ("image", "caption", "score")
    values = {name: [row[number] for row in rows] for number, name in enumerate(names[: len(rows[0])])}
    pq.write_table(pa.table(values), path)
    return path


def total(results):
    counts: dict[str, int] = {}
    for result in results:
        for name, count in result["counts"].items():
            counts[name] = counts.get(name, 0) + count
    return counts

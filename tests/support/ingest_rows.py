"""Files to ingest, and what all units of an ingest counted: for tests that drive one without Ray."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

IMAGES = [f"image {number}".encode() for number in range(5)]  # read, not looked at


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


def put_files(folder, count=3):
    """Samples as img2dataset leaves them in a folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:05d}.jpg").write_bytes(IMAGES[number])
        (folder / f"{number:05d}.txt").write_text(f"caption {number}")
        (folder / f"{number:05d}.json").write_text(json.dumps({"status": "success", "key": f"{number:05d}"}))

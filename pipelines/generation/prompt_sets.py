"""Prompts to make images of: read from a file, a folder or the command line, one row per image, each with its seed.

The rows stand in a table like any other, `<store>/samples.lance`: `prompt`, its place in the set, which of its images it is,
the seed, and what else the file says of the prompt. A row's `image_id` is made of set, place, text and seed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.runtime.files import check_regular
from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.runs import Run
from pipelines.engine.table import samples_of
from pipelines.ingestion.work import new_items
from pipelines.sources.files import Prompts

SCHEMA = pa.schema(
    [
        pa.field(columns.IMAGE_ID, pa.string(), nullable=False),
        pa.field(columns.PROMPT, pa.string()),
        pa.field(columns.PROMPT_INDEX, pa.int32()),
        pa.field(columns.SAMPLE_INDEX, pa.int32()),
        pa.field(columns.SEED, pa.int64()),
        pa.field(columns.PROMPT_RECORD, pa.string()),
    ]
)


@dataclass(frozen=True)
class Prompt:
    """A prompt of a set."""

    index: int
    """Its place in the set, from 0."""
    text: str
    record: dict[str, Any]
    """All that the file says of it; `prompt` among it."""
    stem: str
    """Name of its own file without the ending, where every prompt has one; else its index."""


@dataclass(frozen=True)
class Picture:
    """One image to be made: a row of the table."""

    image_id: str
    prompt: Prompt
    number: int
    """Which of the prompt's images, from 0."""
    seed: int

    def row(self) -> dict[str, Any]:
        """As the table holds it."""
        return {
            columns.IMAGE_ID: self.image_id,
            columns.PROMPT: self.prompt.text,
            columns.PROMPT_INDEX: self.prompt.index,
            columns.SAMPLE_INDEX: self.number,
            columns.SEED: self.seed,
            columns.PROMPT_RECORD: json.dumps(self.prompt.record, ensure_ascii=False),
        }


def read_prompts(path: str) -> list[Prompt]:
    """A file as of `lidit ingest --source prompts:FILE` (.txt, .tsv, .csv, .jsonl), or a folder of .txt files, a prompt each.

    Raises:
        ValueError: nothing is there, or it holds no prompts.
    """
    folder = Path(path)
    if folder.is_dir():
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise ValueError(f"prompts: expected .txt files in {path}, a prompt each, found none")
        for file in files:
            check_regular(file)
        texts = [file.read_text(encoding="utf-8-sig").strip() for file in files]
        if empty := [file.name for file, text in zip(files, texts) if not text]:
            raise ValueError(f"prompts: {path}/{empty[0]} is empty")
        return [Prompt(n, text, {"prompt": text}, file.stem) for n, (file, text) in enumerate(zip(files, texts))]
    source = Prompts(path)
    texts = [item["text"] for item in source.items()]
    records: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    if source.suffix == ".jsonl":
        lines = (json.loads(line) for line in folder.read_text(encoding="utf-8-sig").split("\n") if line.strip())
        records = [record for record in lines if record["prompt"].strip()]
    return [Prompt(n, text, record, str(n)) for n, (text, record) in enumerate(zip(texts, records))]


def pictures(name: str, prompts: Sequence[Prompt], images_per_prompt: int, seed: int) -> list[Picture]:
    """The images to make, prompt by prompt: image k of every prompt has seed `seed` + k."""
    return [
        Picture(f"{name}:{prompt.index:05d}:{_digest(prompt.text)}:{seed + number}", prompt, number, seed + number)
        for prompt in prompts
        for number in range(images_per_prompt)
    ]


def add_rows(store: str, wanted: Sequence[Picture], rows_per_fragment: int) -> int:
    """Puts the rows that are not there yet into the store's table, all in one commit; returns how many.

    Raises:
        ValueError: another run adds rows to the store at this moment.
    """
    table = samples_of(store)
    with Run(store, "prompts") as run:
        if others := run.rivals(table, ["prompts"]):  # before it is looked which rows are there
            raise ValueError(
                f"another run adds prompts to {store} ({others[0]}): run this one again when that is done, in a moment"
            )
        table.create(SCHEMA)
        missing = {item["image_id"] for item in new_items(table, [{"image_id": one.image_id} for one in wanted])}
        rows = [one.row() for one in wanted if one.image_id in missing]
        files = []
        for batch in _batches(rows, rows_per_fragment):
            writer = ColumnFileWriter(table.uri, SCHEMA, run.id)
            try:
                writer.write(batch)
                files.append(writer.finish(table.open()))
            except BaseException:
                writer.discard()
                raise
        table.append(files, run.check)
    return len(rows)


def _batches(rows: list[dict[str, Any]], size: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        yield pa.RecordBatch.from_pylist(rows[start : start + size], SCHEMA)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]

"""A tiny LLM and a table of prompts, for tests that drive a stage without Ray; an ingest without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lidit.store import columns
from pipelines.engine.column_file import ColumnFile, ColumnFileWriter
from pipelines.engine.pool import Tracker
from pipelines.engine.table import Table
from pipelines.ingest import IngestConfig
from pipelines.ingestion import worker as ingest_worker
from pipelines.ingestion.dedup import DedupIndex
from pipelines.ingestion.work import Work
from pipelines.ingestion.worker import IngestWorker
from pipelines.sources.registry import open_source
from tests.support.table_rows import EMBEDS, ERROR, KEY, LENGTH, ROWS, write_rows


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that threads only wait for each other."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def fill(tmp_path: Path) -> Any:
    """`fill([[prompt, ...], ...])`: a store in `tmp_path` with one fragment per list; returns its samples table."""

    def make(fragments: list[list[str | None]]) -> Table:
        path = tmp_path / "prompts.txt"
        path.write_text("x")
        source = open_source(f"prompts:{path}")
        table = Table(str(tmp_path / "store" / "samples.lance"))
        table.create(source.schema)
        for number, prompts in enumerate(fragments):
            writer = ColumnFileWriter(table.uri, source.schema, "ingest-1")
            items = [{"image_id": f"{number}-{row}", "text": prompt} for row, prompt in enumerate(prompts)]
            writer.write(source.batch(items))
            table.append([writer.finish(table.open())])
        return table

    return make


class Near:
    """An actor that is no process: `actor.method.remote(...)` calls the method, and `ray.get` gives what it gave."""

    def __init__(self, inside: Any):
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inside, name)
        return type("Call", (), {"remote": staticmethod(method)})


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`job(config)`: a worker beside an empty table (or the one there is), `job.run()` what all units make."""
    monkeypatch.setattr(ingest_worker.ray, "get", lambda value: value)
    return lambda spec, **options: Job(tmp_path, spec, options)


class Job:
    def __init__(self, folder: Path, spec: str, options: dict[str, Any]):
        self.config = IngestConfig(spec, **{"store": str(folder / "store"), "rows_per_fragment": 4, **options})
        self.source = open_source(spec, self.config.columns)
        self.table = Table(f"{self.config.store}/{columns.SAMPLES_TABLE}")
        self.table.create(self.source.schema)
        self.work = Work.of(self.config, self.source, self.table)
        filters = self.config.filters
        self.tracker = Near(Tracker())
        self.index = Near(DedupIndex(self.table.uri, filters.duplicates, filters.near_duplicates))
        self.worker = IngestWorker(self.config, self.table.uri, "ingest-1", self.tracker, self.index)

    def run(self) -> list[dict[str, Any]]:
        """Every unit's result; its rows are appended."""
        results = [self.worker(unit) for unit in self.work.units]
        for result in results:
            self.index.settle.remote(result["name"], result["attempt"])
            self.table.append([ColumnFile(**file) for file in result["files"]])
        return results

    def rows(self) -> list[dict[str, Any]]:
        return self.table.open().to_table().to_pylist()


@pytest.fixture
def table(tmp_path):
    """An empty table."""
    made = Table(str(tmp_path / "store" / "samples.lance"))
    made.create(ROWS)
    return made


@pytest.fixture
def filled(table):
    """Three fragments of 4 rows, and the stage's columns declared."""
    table.append([write_rows(table, first) for first in (0, 4, 8)])
    table.declare([EMBEDS, LENGTH, ERROR], KEY)
    return table

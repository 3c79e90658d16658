"""Ingests a source: new rows of `scenes:N`, `folder:PATH`, `coco:PATH` or `prompts:FILE` -> `samples.lance`.

A row whose `image_id` is in the table already is left as it is, so the same command may be run again: after a kill it
adds what is missing, and after the source has grown it adds what is new.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import yaml

from lidit import columns
from pipelines.pool import ActorsConfig, run_units, start_ray, start_tracker
from pipelines.progress import JobProgress
from pipelines.runs import Run
from pipelines.sources import ERROR_FIELD, Item, open_source
from pipelines.summary import Summary
from pipelines.table import ColumnFile, ColumnFileWriter, Table

WRITE_ROWS = 64  # rows of one write: bounds an actor's memory, images may be large
COMMIT_FRAGMENTS = 32


@dataclass(frozen=True)
class IngestConfig:
    """The ingest job."""

    source: str
    """Where rows come from: `scenes:N`, `folder:PATH`, `coco:PATH`, `prompts:FILE` (.txt, .tsv, .csv, .jsonl)."""
    store: str = "./store"
    """Folder or URI of the feature store; made if it is not there."""
    rows_per_fragment: int = 1024
    """Rows of a fragment, the unit of work of every later stage."""
    actors: ActorsConfig = ActorsConfig(num_gpus=0.0)
    """The pool of workers that read files and render scenes."""

    def __post_init__(self) -> None:
        if self.rows_per_fragment < 1:
            raise ValueError(f"rows_per_fragment: expected at least 1, received {self.rows_per_fragment}")


class IngestWorker:
    """Items of a source -> a data file that waits to be appended."""

    def __init__(self, spec: str, table_uri: str, run_id: str, tracker: Any):
        self.source, self.table_uri, self.run_id, self.tracker = open_source(spec), table_uri, run_id, tracker

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        items: Sequence[Item] = unit["items"]
        name = unit["name"]
        ray.get(self.tracker.begin.remote(name))
        writer = ColumnFileWriter(self.table_uri, self.source.schema, self.run_id)
        errors = 0
        for first in range(0, len(items), WRITE_ROWS):
            piece = items[first : first + WRITE_ROWS]
            ray.get(self.tracker.enter.remote(name, first, first + len(piece)))
            batch = self.source.batch(piece)
            writer.write(batch)
            failed = len(batch) - batch.column(ERROR_FIELD.name).null_count
            errors += failed
            ray.get(self.tracker.leave.remote(name, {"rows": len(piece), "errors": failed}))
        file = writer.finish(Table(self.table_uri).open())
        ray.get(self.tracker.end.remote(name))
        return {"name": name, "file": file.to_json(), "errors": errors}


def main(config: IngestConfig) -> Summary:
    """Appends the source's new rows, all of a fragment or none of it."""
    start = time.monotonic()
    source = open_source(config.source)
    table = Table(f"{config.store.rstrip('/')}/{columns.SAMPLES_TABLE}")
    with Run(config.store, "ingest") as run:
        others = [other for other in run.alive() if other.startswith("ingest-")]
        if others:
            raise ValueError(
                f"another ingest works on {config.store} ({others[0]}): two at once could add a row twice. Run this one "
                f"when that is over"
            )
        run.write("config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        items = source.items()
        table.create(source.schema)
        new = _new_items(table, items)
        summary = Summary("ingest", config.store, run.id)
        _append(config, table, run, new, summary)
        summary.orphans_removed = len(table.remove_orphans(run.is_dead))
        summary.ok, summary.seconds = True, time.monotonic() - start
        summary.counts = {"already_there": len(items) - len(new)}
        summary.next = f"lidit embed --store {config.store}"
        run.write("summary.json", summary.to_json())
    return summary


def _append(config: IngestConfig, table: Table, run: Run, new: list[Item], summary: Summary) -> None:
    """Sends items through the actors, a fragment's worth each, and appends the files that come back."""
    if not new:
        return
    start_ray()
    tracker = start_tracker()
    size = config.rows_per_fragment
    units = [{"name": str(first), "items": new[first : first + size]} for first in range(0, len(new), size)]
    worker_kwargs = {"spec": config.source, "table_uri": table.uri, "run_id": run.id, "tracker": tracker}
    progress = JobProgress("ingest", len(new))
    pending: list[ColumnFile] = []

    def commit() -> None:
        start = time.monotonic()
        run.check_alive()
        table.append(pending)
        summary.fragments += len(pending)
        summary.rows += sum(file.rows for file in pending)
        summary.bytes_written += sum(file.size for file in pending)
        summary.commits, summary.commit_seconds = summary.commits + 1, summary.commit_seconds + time.monotonic() - start
        pending.clear()

    begun = time.monotonic()
    done: set[str] = set()
    try:
        for result in run_units(IngestWorker, worker_kwargs, units, config.actors):
            progress.show(tracker)
            if result is not None and result["name"] not in done:  # Ray may give a repeated call's result twice
                done.add(result["name"])
                pending.append(ColumnFile(**result["file"]))
                summary.errors += result["errors"]
            if len(pending) >= COMMIT_FRAGMENTS:
                commit()
        progress.show(tracker, final=True)
    finally:
        progress.close()
        ray.kill(tracker)
        if pending:
            commit()
        summary.work_seconds = time.monotonic() - begun


def _new_items(table: Table, items: list[Item]) -> list[Item]:
    """The items whose rows are not in the table; ValueError where the source gives one id twice."""
    ids = pa.array([item["image_id"] for item in items], pa.string())
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = ids.value_counts()
        twice = next(entry["values"].as_py() for entry in counts if entry["counts"].as_py() > 1)
        raise ValueError(f"the source gives image_id {twice!r} twice: ids must be unique")
    present = table.open().to_table(columns=[columns.IMAGE_ID]).column(columns.IMAGE_ID)
    is_there = pc.is_in(ids, value_set=present.combine_chunks())
    return [item for item, there in zip(items, is_there.to_pylist()) if not there]


if __name__ == "__main__":
    from lidit.cli import main as command_line

    sys.exit(command_line(["ingest", *sys.argv[1:]]))

"""Ingests a source: its new rows -> `samples.lance`, images as the bytes they came in.

    lidit ingest --store ./store --source 'webdataset:s3://bucket/laion/{00000..00412}.tar' --columns.caption json.caption
    lidit ingest --store ./store --source parquet:./downloads --filters.min_side 256 --filters.captions+ url

A row is new if its `image_id` is not in the table. Scenes, folders, COCO sets and prompt files name their rows, by where they
lie in full and what is in them; for the others `image_id` is a digest of image and caption. So the same command may be run
again: after a kill it adds what is missing, after the source has grown what is new. docs/ingest.md has the sources, the rules
and the filters.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import ray
import yaml

from lidit.cli import run
from lidit.runtime.fields import to_plain
from lidit.runtime.outage import outlast
from lidit.runtime.places import settled
from lidit.store import columns
from pipelines.engine.column_file import ColumnFile
from pipelines.engine.pool import resolve_actors, start_ray_data
from pipelines.engine.runs import Run
from pipelines.engine.table import Table, samples_of
from pipelines.engine.unit_pass import Result, UnitPass
from pipelines.ingestion.config import IngestConfig
from pipelines.ingestion.dedup import PROVISIONAL, REJECTED, start_index
from pipelines.ingestion.filters import FiltersConfig
from pipelines.ingestion.listed_sizes import note_sizes
from pipelines.ingestion.summary import IngestSummary
from pipelines.ingestion.update import update
from pipelines.ingestion.work import Work
from pipelines.ingestion.worker import EXAMPLES, IngestWorker
from pipelines.sources.base import Listed, Source
from pipelines.sources.locations import real_place
from pipelines.sources.registry import open_source
from pipelines.sources.tables import LanceTable


def main(config: IngestConfig) -> IngestSummary:
    """Appends the source's new rows, all of a unit or none of it.

    Raises:
        ValueError: the source is not what its spec says, or another ingest works on the store.
        ErrorRateExceeded: too many rows are damaged; what is committed by then is kept.
        RuntimeError, OSError: a worker failed, or the storage did; the same command goes on.
    """
    start, config = time.monotonic(), settled(config)
    source = outlast(lambda: open_source(config.source, config.columns), "looking at the source")
    _check_update(config, source)
    table = samples_of(config.store)
    _check_not_itself(config, source, table)
    if config.dry_run:
        return _plan(config, source, table)
    with Run(config.store, "ingest") as run:
        if others := run.rivals(
            table, ["ingest"]
        ):  # before it is looked which rows are there: none of theirs may come after
            raise ValueError(
                f"another ingest works on {config.store} ({others[0]}): two at once could add a row twice. Run this one "
                f"when that is over"
            )
        run.write("config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
        work = outlast(lambda: Work.of(config, source, table), "looking what is new")
        table.create(source.schema)
        summary = IngestSummary("ingest", config.store, run.id, counts=dict(work.counts), examples=work.examples)
        if work.units:
            IngestPass(config, table, run, work, summary).work_on_all()
        if config.update and work.to_update:
            update(config, table, run, work.to_update, summary)
        note_sizes(table.uri, run.id, work.sizes)
        summary.orphans_removed = len(table.remove_orphans(lambda: run.end_dead(table) | {run.id}))
        summary.ok, summary.seconds = True, time.monotonic() - start
        summary.next = f"lidit embed --store {config.store}"
        run.write("summary.json", summary.to_json())
    return summary


class IngestPass(UnitPass):
    """Appends the units' files, then notes their pieces as done."""

    failed, finished = "are damaged", "units"
    remedy = "Are the columns named rightly (--columns.image, --columns.caption)? Else raise max_error_rate"

    def __init__(self, config: IngestConfig, table: Table, run: Run, work: Work, summary: IngestSummary):
        super().__init__("ingest", table, run, summary, rows=work.rows, max_error_rate=config.max_error_rate)
        self.config, self.work = config, work
        self.parts = {unit["name"]: unit["parts"] for unit in work.units}
        self.unsettled = set(self.parts)
        self.unread: set[str] = set()  # places of pieces that could not be read whole
        self.provisional: set[str] = set()  # units that may be noted as done only when all are
        self.index: Any = None  # the `DedupIndex`

    def work_on_all(self) -> None:
        """Sends all units.

        Raises:
            ErrorRateExceeded: too many rows are damaged.
            RuntimeError: a worker failed, or units gave no result; what is committed is kept.
        """
        start_ray_data()
        filters = self.config.filters
        self.index = start_index(self.table.uri, filters.duplicates, filters.near_duplicates)
        self._say_what_cannot_be_compared()
        try:
            self.send(IngestWorker, {"config": self.config, "index": self.index}, self.work.units, self.config.actors)
        finally:
            ray.kill(self.index)
        if self.unsettled:
            raise RuntimeError(
                f"{len(self.unsettled):,} units gave no result that counts. Run the same command again: what is committed is "
                f"kept"
            )
        self._note(sorted(self.provisional))

    def accept(self, result: Result) -> bool:
        """Whether it is the first result of a unit, and the index agrees."""
        name = result["name"]
        if name not in self.unsettled:
            return False
        verdict = ray.get(self.index.settle.remote(name, result["attempt"]))
        if verdict == REJECTED:
            return False
        self.unsettled.remove(name)
        if verdict == PROVISIONAL:
            self.provisional.add(name)
        self.unread.update(result["unread"])
        return True

    def waiting(self) -> int:
        """A unit may have several fragments, or none."""
        return sum(len(result["files"]) for result in self.pending)

    def commit(self, results: list[Result]) -> bool:
        """Appends the files in one commit; a unit is noted as done after that."""
        files = [ColumnFile(**file) for result in results for file in result["files"]]
        if files:
            self.table.append(files, self.run.check)
        self._note([result["name"] for result in results if result["name"] not in self.provisional])
        summary, counts = self.summary, Counter(self.summary.counts)
        for result in results:
            counts.update(result["counts"])
            if result["unread"]:
                counts["unread"] += len(result["unread"])
                summary.examples["unread"] = [*summary.examples.get("unread", []), *result["unread"]][:EXAMPLES]
            summary.errors += result["errors"]
            summary.error_examples += result["examples"]
        summary.counts, summary.error_examples = dict(counts), summary.error_examples[:EXAMPLES]
        summary.fragments += len(files)
        summary.rows += sum(file.rows for file in files)
        summary.bytes_written += sum(file.size for file in files)
        return bool(files)

    def _note(self, units: list[str]) -> None:
        if self.work.done is not None and units:
            pieces = [piece for unit in units for piece in self.parts[unit] if piece["place"] not in self.unread]
            self.work.done.note(self.run.id, pieces)

    def _say_what_cannot_be_compared(self) -> None:
        """Counts images of the table that have no digest or hash, because they were ingested without."""
        filters, dataset = self.config.filters, self.table.open()
        compared = {columns.IMAGE_DIGEST: filters.duplicates, columns.IMAGE_PHASH: filters.near_duplicates is not None}
        for name, wanted in compared.items():
            if wanted and (count := dataset.count_rows(f"{columns.HEIGHT} IS NOT NULL AND {name} IS NULL")):
                self.summary.counts[f"without_{name}"] = count


def _check_update(config: IngestConfig, source: Source) -> None:
    """Refuses to look for edits where a row's name comes from its content."""
    if not config.update and config.compare != "all":
        return
    option = "update" if config.update else "compare all"
    if not isinstance(source, Listed):
        raise ValueError(
            f"{option}: expected folder: or coco:, whose rows keep their names; rows of {config.source} are named by their "
            f"content, so what was edited there is a new row beside the old one. Ingest it without that option, and delete the "
            f"old rows if they are not wanted"
        )
    if not source.may_differ:
        raise ValueError(
            f"{option}: expected folder: or coco:; a row of {config.source} never has another content under its name"
        )


def _check_not_itself(config: IngestConfig, source: Source, table: Table) -> None:
    """Refuses the store's own table as the source, whose rows would come in again under other names with every run."""
    if isinstance(source, LanceTable) and real_place(table.uri) == source.argument:
        raise ValueError(
            f"source {config.source}: expected another table than the store's own, into which its rows are written: each run "
            f"would add them once more. To have them in another store, name that one with --store"
        )


def _plan(config: IngestConfig, source: Source, table: Table) -> IngestSummary:
    """What a run would do, changing nothing."""
    work = Work.of(config, source, table)
    start_ray_data()
    smallest, largest, _ = resolve_actors(config.actors)
    parts = sum(len(unit["parts"]) for unit in work.units)
    rows = f"{work.rows:,} rows" if work.rows is not None else "rows unknown until they are read"
    size = f", {work.bytes / 1e6:,.1f} MB" if work.bytes else ""
    there = table.open() if table.exists() else None
    state = f"version {there.version}, {there.count_rows():,} rows" if there else "to be made"
    to_update = len(work.to_update) if config.update else 0
    what = "items" if isinstance(source, Listed) else "pieces"
    plan = [
        f"table      {table.uri}, {state}",
        f"to read    {parts:,} {what} in {len(work.units):,} units: {rows}{size}",
        f"done       {', '.join(f'{count:,} {name}' for name, count in work.counts.items())}",
        *([f"to update  {to_update:,} rows that the source has otherwise now"] if to_update else []),
        f"actors     {smallest} to {largest}, each {config.actors.num_cpus:g} CPUs",
        f"columns    {', '.join(source.schema.names)}",
        f"filters    {', '.join(f'{name} {value}' for name, value in _set(config.filters).items()) or 'none'}",
    ]
    return IngestSummary("ingest", config.store, dry_run=True, ok=True, plan=plan)


def _set(filters: FiltersConfig) -> dict[str, Any]:
    """The options that are not as they are by default."""
    usual = asdict(FiltersConfig())
    return {name: value for name, value in asdict(filters).items() if value != usual[name]}


if __name__ == "__main__":
    run("ingest")

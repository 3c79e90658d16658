"""Ingests a source: its new rows -> `samples.lance`, images as the bytes they came in.

    lidit ingest --store ./store --source 'webdataset:s3://bucket/laion/{00000..00412}.tar' --columns.caption json.caption
    lidit ingest --store ./store --source parquet:./downloads --filters.min_side 256 --filters.captions+ url

A row is new if its `image_id` is not in the table. Scenes, folders, COCO sets and prompt files name their rows; for the
others `image_id` is a digest of image and caption. So the same command may be run again: after a kill it adds what is
missing, after the source has grown what is new. docs/ingest.md has the sources, the rules and the filters.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
import yaml

from lidit import columns
from pipelines.done_pieces import DonePieces
from pipelines.filters import FiltersConfig
from pipelines.hash_index import KeySet, keys_of
from pipelines.ingest_worker import EXAMPLES, IngestWorker
from pipelines.known import LEANING, LOAD_ROWS, REFUSED, start_known
from pipelines.pool import ActorsConfig, resolve_actors, run_units, start_ray, start_tracker
from pipelines.progress import JobProgress
from pipelines.runs import Run
from pipelines.sources import ColumnsConfig, Item, Listed, Piece, Sharded, Source, open_source
from pipelines.summary import Summary
from pipelines.table import ColumnFile, Table

COMMIT_FRAGMENTS = 32  # finished fragments that wait at most
COMMIT_SECONDS = 30.0  # and how long
ERROR_BASE = 1000  # rows that the error rate is taken over at least (or all, if there are fewer)
TYPICAL_BYTES = 16_384  # of a sample, where a shard does not tell how many it has: small shards share a unit


@dataclass(frozen=True)
class IngestConfig:
    """The ingest job."""

    source: str
    """Where rows come from: scenes:N, folder:URI, coco:URI, prompts:FILE, webdataset:URI, parquet:URI, lance:URI, hf:PATH or
    img2dataset:PATH. Credentials of object stores come from the environment."""
    store: str = "./store"
    """Folder or URI of the feature store; made if it is not there."""
    rows_per_fragment: int = 1024
    """Rows of a fragment, the unit of work of every later stage; the last one of a shard may have fewer."""
    actors: ActorsConfig = ActorsConfig(num_gpus=0.0)
    """The pool of workers that read, look at images and write; `num_cpus` of each decode at the same time."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which column or file holds what; for webdataset, parquet, lance, hf and img2dataset."""
    filters: FiltersConfig = FiltersConfig()
    """Which rows are wanted; all by default."""
    check: Literal["decode", "header"] = "decode"
    """How an image is looked at. `decode`: decoded once, so that damage is found here. `header`: only its header and that its
    end is there, many times faster; damage inside is then the next stage's to find."""
    max_error_rate: float = 0.5
    """Share of rows that may be damaged (0 to 1); above it the job stops, for then the columns are probably named wrongly."""
    reread: bool = False
    """Read shards again that were taken in whole by an earlier run; rows that were deleted from the table since come back."""
    dry_run: bool = False
    """Print the plan (shards, rows, bytes, workers) and exit."""

    def __post_init__(self) -> None:
        if self.rows_per_fragment < 1:
            raise ValueError(f"rows_per_fragment: expected at least 1, received {self.rows_per_fragment}")
        if not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate: expected a share from 0 to 1, received {self.max_error_rate}")
        if self.filters.min_score is not None and self.columns.score is None:
            raise ValueError("filters.min_score: expected with --columns.score, which says what to hold it against")


class TooManyErrors(RuntimeError):
    """More rows were damaged than `max_error_rate` allows."""


def main(config: IngestConfig) -> Summary:
    """Appends the source's new rows, all of a unit or none of it.

    Raises:
        ValueError: the source is not what its spec says, or another ingest works on the store.
        TooManyErrors: what is committed by then is kept.
        RuntimeError, OSError: a worker failed, or the storage did; the same command goes on.
    """
    start = time.monotonic()
    source = open_source(config.source, config.columns)
    table = Table(f"{config.store.rstrip('/')}/{columns.SAMPLES_TABLE}")
    if config.dry_run:
        return _plan(config, source, table)
    with Run(config.store, "ingest") as run:
        others = [other for other in run.alive() if other.startswith("ingest-")]
        if others:
            raise ValueError(
                f"another ingest works on {config.store} ({others[0]}): two at once could add a row twice. Run this one "
                f"when that is over"
            )
        run.write("config.yaml", yaml.safe_dump(_plain(asdict(config)), sort_keys=False))
        work = _Work.of(config, source, table)
        table.create(source.schema)
        summary = Summary("ingest", config.store, run.id, counts=dict(work.counts))
        if work.units:
            _Pass(config, table, run, work, summary).run()
        summary.orphans_removed = len(table.remove_orphans(run.is_dead))
        summary.ok, summary.seconds = True, time.monotonic() - start
        summary.next = f"lidit embed --store {config.store}"
        run.write("summary.json", summary.to_json())
    return summary


@dataclass
class _Work:
    """What is to be done: units, each `{"name", "parts"}`."""

    units: list[dict[str, Any]]
    rows: int | None  # to be read; None: a tar does not tell
    bytes: int
    counts: Counter[str]  # what need not be read at all
    done: DonePieces | None = None

    @classmethod
    def of(cls, config: IngestConfig, source: Source, table: Table) -> _Work:
        """Items that are new, or pieces that are not noted as done, in units of about a fragment's rows."""
        if isinstance(source, Listed):
            items = source.items()
            new = _new_items(table, items)
            counts = Counter(already_there=len(items) - len(new))
            return cls(_packed(new, config.rows_per_fragment), len(new), 0, counts)
        assert isinstance(source, Sharded)
        done = DonePieces(table.uri, _options(config))
        pieces = source.pieces()
        due = [piece for piece in pieces if config.reread or piece not in done]
        counts = Counter(shards_done_before=len(pieces) - len(due))
        rows = [piece["rows"] for piece in due]
        total = None if None in rows else sum(rows)
        return cls(_packed(due, config.rows_per_fragment), total, sum(piece["bytes"] for piece in due), counts, done)


class _Pass:
    """The units' way through the actors, with the committer."""

    def __init__(self, config: IngestConfig, table: Table, run: Run, work: _Work, summary: Summary):
        self.config, self.table, self.run_, self.work, self.summary = config, table, run, work, summary
        self.parts = {unit["name"]: unit["parts"] for unit in work.units}
        self.pending: list[dict[str, Any]] = []  # results whose files wait for the commit
        self.leaning: list[str] = []  # units that may be noted as done only when all are
        self.last_commit = time.monotonic()
        self.errors: list[str] = []

    def run(self) -> None:
        """Sends the units, commits what comes back; on any end but a crash, what is finished is committed."""
        config = self.config
        start_ray()
        tracker = start_tracker()
        known = start_known(self.table.uri, config.filters.duplicates, config.filters.near_duplicates)
        self._say_what_cannot_be_compared()
        worker_kwargs = {
            "config": config,
            "table_uri": self.table.uri,
            "run_id": self.run_.id,
            "tracker": tracker,
            "known": known,
        }
        begun, ended = float("inf"), 0.0
        progress = JobProgress("ingest", self.work.rows)
        try:
            for result in run_units(IngestWorker, worker_kwargs, self.work.units, config.actors):
                progress.show(tracker)
                if result is not None:
                    verdict = ray.get(known.settle.remote(result["name"], result["attempt"]))
                    if verdict != REFUSED:  # else Ray gave the result of an attempt that was repeated elsewhere
                        begun, ended = min(begun, result["begun"]), max(ended, result["ended"])
                        self.leaning += [result["name"]] * (verdict == LEANING)
                        self.pending.append(result)
                        self.errors += [example["error"] for example in result["examples"]]
                self._check_errors(progress.totals)
                if self._due():
                    self._commit()
            progress.show(tracker, final=True)
            self._check_errors(progress.totals)
        except TooManyErrors:
            self.pending = [result for result in self.pending if not result["errors"]]
            raise
        finally:
            progress.close()
            for actor in (tracker, known):
                ray.kill(actor)
            self._commit()
            self.summary.work_seconds = max(0.0, ended - begun)
        self._note(self.leaning)

    def _due(self) -> bool:
        waiting = sum(len(result["files"]) for result in self.pending)
        return bool(self.pending) and (
            waiting >= COMMIT_FRAGMENTS or time.monotonic() - self.last_commit >= COMMIT_SECONDS
        )

    def _commit(self) -> None:
        """Appends the finished units' files, then notes their pieces as done."""
        if not self.pending:
            return
        start = time.monotonic()
        self.run_.check_alive()
        files = [ColumnFile(**file) for result in self.pending for file in result["files"]]
        if files:
            self.table.append(files)
        self._note([result["name"] for result in self.pending if result["name"] not in self.leaning])
        summary, counts = self.summary, Counter(self.summary.counts)
        for result in self.pending:
            counts.update(result["counts"])
            summary.errors += result["errors"]
            summary.error_examples += result["examples"]
        summary.counts, summary.error_examples = dict(counts), summary.error_examples[:EXAMPLES]
        summary.fragments += len(files)
        summary.rows += sum(file.rows for file in files)
        summary.bytes_written += sum(file.size for file in files)
        self.pending, self.last_commit = [], time.monotonic()
        summary.commits, summary.commit_seconds = summary.commits + 1, summary.commit_seconds + self.last_commit - start

    def _note(self, units: list[str]) -> None:
        if self.work.done is not None and units:
            self.work.done.note(self.run_.id, [piece for unit in units for piece in self.parts[unit]])

    def _say_what_cannot_be_compared(self) -> None:
        """Counts images of the table that have no digest or hash, because they were ingested without."""
        filters, dataset = self.config.filters, self.table.open()
        compared = {columns.IMAGE_DIGEST: filters.duplicates, columns.IMAGE_PHASH: filters.near_duplicates is not None}
        for name, wanted in compared.items():
            if wanted and (count := dataset.count_rows(f"{columns.HEIGHT} IS NOT NULL AND {name} IS NULL")):
                self.summary.counts[f"without_{name}"] = count

    def _check_errors(self, totals: dict[str, float]) -> None:
        errors, rows = int(totals.get("errors", 0)), int(totals.get("rows", 0))
        base = max(rows, min(self.work.rows or ERROR_BASE, ERROR_BASE))
        if errors > self.config.max_error_rate * base:
            raise TooManyErrors(
                f"{errors:,} of {rows:,} rows are damaged, more than max_error_rate {self.config.max_error_rate:g} allows"
                f"{'; such as: ' + self.errors[0] if self.errors else ''}. Finished units without errors are committed. Are "
                f"the columns named rightly (--columns.image, --columns.caption)? Else raise max_error_rate, and run the "
                f"same command again"
            )


def _new_items(table: Table, items: list[Item]) -> list[Item]:
    """The items whose rows are not in the table; ValueError where the source gives one id twice."""
    ids = [item["image_id"] for item in items]
    if len(set(ids)) < len(ids):
        twice = next(image_id for image_id, count in Counter(ids).items() if count > 1)
        raise ValueError(f"the source gives image_id {twice!r} twice: ids must be unique")
    if not table.exists():
        return items
    present = KeySet()
    for batch in table.open().to_batches(columns=[columns.IMAGE_ID], batch_size=LOAD_ROWS):
        present.add(keys_of(batch.column(0).to_pylist()))
    return [item for item, there in zip(items, present.contains(keys_of(ids))) if not there]


def _packed(parts: list[Item] | list[Piece], rows: int) -> list[dict[str, Any]]:
    """Parts that follow each other, as units of about so many rows (as far as the parts tell)."""
    units: list[dict[str, Any]] = []
    room = 0.0
    for part in parts:
        size = part.get("rows", 1)  # an item is a row
        size = part["bytes"] / TYPICAL_BYTES if size is None else size
        if not units or room < min(size, rows):
            units.append({"name": str(len(units)), "parts": []})
            room = rows
        units[-1]["parts"].append(part)
        room -= size
    return units


def _options(config: IngestConfig) -> dict[str, Any]:
    """What decides which rows a piece gives."""
    kind = config.source.partition(":")[0]
    return {"kind": kind, **_plain({name: asdict(config)[name] for name in ("columns", "filters", "check")})}


def _plain(values: Any) -> Any:
    """Tuples as lists, for YAML and JSON."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return [_plain(value) for value in values] if isinstance(values, (list, tuple)) else values


def _plan(config: IngestConfig, source: Source, table: Table) -> Summary:
    """What a run would do, changing nothing."""
    work = _Work.of(config, source, table)
    start_ray()
    smallest, largest, _ = resolve_actors(config.actors)
    parts = sum(len(unit["parts"]) for unit in work.units)
    rows = f"{work.rows:,} rows" if work.rows is not None else "rows unknown until they are read"
    size = f", {work.bytes / 1e6:,.1f} MB" if work.bytes else ""
    there = table.open() if table.exists() else None
    state = f"version {there.version}, {there.count_rows():,} rows" if there else "to be made"
    what = "items" if isinstance(source, Listed) else "pieces"
    plan = [
        f"table      {table.uri}, {state}",
        f"to read    {parts:,} {what} in {len(work.units):,} units: {rows}{size}",
        f"done       {', '.join(f'{count:,} {name}' for name, count in work.counts.items())}",
        f"actors     {smallest} to {largest}, each {config.actors.num_cpus:g} CPUs",
        f"columns    {', '.join(source.schema.names)}",
        f"filters    {', '.join(f'{k} {v}' for k, v in asdict(config.filters).items() if v) or 'none'}",
    ]
    return Summary("ingest", config.store, dry_run=True, ok=True, plan=plan)


if __name__ == "__main__":
    from lidit.cli import main as command_line

    sys.exit(command_line(["ingest", *sys.argv[1:]]))

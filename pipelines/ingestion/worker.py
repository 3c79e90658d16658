"""An ingest actor: reads, checks, filters, claims and writes one unit, overlapping; nothing visible until committed."""

from __future__ import annotations

import gc
import importlib
import itertools
import secrets
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
from PIL.Image import DecompressionBombWarning

from lidit.runtime.outage import is_away, outlast
from lidit.runtime.uris import shown
from lidit.runtime.watchdog import arm
from lidit.store import columns
from pipelines.engine.column_file import ColumnFile, ColumnFileWriter
from pipelines.engine.pool import Attempt, read_ahead
from pipelines.engine.runs import runs_folder
from pipelines.engine.table import Table
from pipelines.ingestion.config import IngestConfig
from pipelines.ingestion.dedup import IN_RUN, IN_TABLE, NEW, REPEATED, UNKNOWN
from pipelines.sources.base import ERROR_FIELD, Record, Source, error_row, make_row, writable
from pipelines.sources.image_check import Unwanted
from pipelines.sources.registry import open_source

WINDOW_ROWS = 256  # rows that are checked, claimed and written together; with WINDOW_BYTES bounds an actor's memory
WINDOW_BYTES = 32 << 20
EXAMPLES = 5  # errors of a unit that are shown in the summary
NOT_NEW = {IN_TABLE: "already_there", IN_RUN: "repeated", REPEATED: "repeated"}  # what `DedupIndex` says -> count
DIED = "the process died on this row, and again when it was tried alone"
DIED_READING = "the process died while it read what is here, and again when nothing else was done: out of memory?"


@dataclass
class _Window:
    """Records that follow each other in a unit, with their number in it."""

    first: int
    records: list[Record] = field(default_factory=list)


@dataclass
class _Looked:
    """What became of a record: a row, or the name of the filter that it did not pass."""

    row: dict[str, Any] | None = None
    filtered: str | None = None
    nulled: str | None = None  # why its caption was taken away


class IngestWorker:
    """One actor. Its unit is `{"name": str, "parts": [items or pieces]}`."""

    def __init__(self, config: IngestConfig, table_uri: str, run_id: str, tracker: Any, index: Any):
        warnings.simplefilter("ignore", DecompressionBombWarning)  # sizes are checked, against a limit of our own
        self.config, self.table_uri, self.run_id = config, table_uri, run_id
        self.tracker, self.index = tracker, index
        self.source = open_source(config.source, config.columns)
        if config.filters.near_duplicates is not None:
            importlib.import_module("imagehash")  # now, and not in the first unit's time
        arm()
        self.process = secrets.token_hex(8)
        self.workers = max(1, int(config.actors.num_cpus))
        self.threads = ThreadPoolExecutor(self.workers)
        gc.freeze()  # what was imported lives as long as the actor: the collector need not look through it at every window

    def each(self, function: Callable[[Any], Any], things: Sequence[Any]) -> list[Any]:
        """The function of each thing, in order; a slice per thread, so that threads seldom wake each other."""
        if self.workers == 1:
            return [function(thing) for thing in things]
        slices = [things[first :: self.workers] for first in range(self.workers)]
        made: list[Any] = [None] * len(things)
        for first, results in enumerate(self.threads.map(lambda slice_: [function(thing) for thing in slice_], slices)):
            made[first :: self.workers] = results
        return made

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        return outlast(lambda: self._work(unit), f"unit {unit['name']}")

    def _work(self, unit: dict[str, Any]) -> dict[str, Any]:
        begun = time.time()
        self.source.left_out.clear()
        self.source.unread.clear()
        task = _Ingest(self, unit)
        try:
            files = task.run()
        except Unforeseen as error:
            task.files.discard()
            raise RuntimeError(self._explained(error, unit["name"])) from None
        except BaseException:
            task.files.discard()
            raise
        ray.get(self.tracker.end.remote(unit["name"]))
        return {
            "name": unit["name"],
            "attempt": task.number,
            "files": [file.to_json() for file in files],
            "errors": task.errors,
            "examples": task.examples,
            "counts": dict(task.counts + self.source.left_out),
            "unread": self.source.unread[:],
            "begun": begun,
            "ended": time.time(),
        }

    def _explained(self, error: Unforeseen, unit: str) -> str:
        """One sentence; the traceback is written into the run's folder."""
        cause = error.__cause__
        fs, root = runs_folder(self.config.store)
        path = f"{root}/{self.run_id}/unit-{unit}.txt"
        text = "".join(traceback.format_exception(error))
        fs.pipe_file(path, writable(shown(text)).encode())
        return writable(
            f"{error}: {type(cause).__name__}: {cause}. This was not foreseen; the traceback is in "
            f"runs/{self.run_id}/unit-{unit}.txt of the store. What is committed is kept, and the same command goes on"
        )


class Unforeseen(Exception):
    """An error that nobody has thought of, at a row that the message names; the error is its cause."""


FORESEEN = (Unforeseen, OSError, RuntimeError, MemoryError, ray.exceptions.RayError)


class at:  # a class, and no generator: every row goes through it
    """Has an unforeseen error say where it came up. What storage, Ray and other processes do is not meant."""

    def __init__(self, where: Callable[[], str]):
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, FORESEEN) or is_away(error):
            return
        raise Unforeseen(self.where()) from error


class UnitTask:
    """A unit in hand: the parts of its worker that it needs, and looking at its records."""

    def __init__(self, worker: IngestWorker, unit: dict[str, Any]):
        self.unit, self.source, self.each = unit, worker.source, worker.each
        self.config, self.filters, self.tracker = worker.config, worker.config.filters, worker.tracker
        self.table_uri, self.run_id = worker.table_uri, worker.run_id
        self.counts: Counter[str] = Counter()
        self.attempt: Attempt = ray.get(self.tracker.begin.remote(unit["name"], worker.process))

    def looked_at(self, fresh: Sequence[tuple[int, Record]]) -> list[_Looked]:
        """Looks at records, given with their numbers. If a process died among them, each is taken alone."""
        if not fresh:
            return []
        name, first, stop = self.unit["name"], fresh[0][0], fresh[-1][0] + 1
        if not any(first < to and since < stop for since, to in self.attempt.careful):
            ray.get(self.tracker.enter.remote(name, first, stop))
            return self.each(self._look, [record for _, record in fresh])
        looked = []
        for number, record in fresh:
            if number in self.attempt.quarantined:
                # By its content, so that the next run knows it, wherever it lies, before it kills again.
                looked.append(_Looked({**error_row(record, DIED), columns.IMAGE_ID: record.identify()}))
                continue
            ray.get(self.tracker.enter.remote(name, number, number + 1))
            looked.append(self._look(record))
            ray.get(self.tracker.leave.remote(name, {}))
        return looked

    def _look(self, record: Record) -> _Looked:
        """A record as a row, if it passes the filters."""
        with at(lambda: f"looking at {record.place}"):
            return self._row(record)

    def _row(self, record: Record) -> _Looked:
        filters, nulled = self.filters, None
        if record.error is None:
            if (failed := filters.score(record.score)) is not None:
                return _Looked(filtered=failed)
            if (nulled := filters.caption(record.caption)) is not None:
                if filters.bad_caption == "drop":
                    return _Looked(filtered=f"caption_{nulled}")
                record.caption = None
        decode, with_phash = self.config.check == "decode", filters.near_duplicates is not None
        try:
            row = make_row(record, self.source.has_images, decode, with_phash, filters.size)
        except Unwanted as unwanted:
            return _Looked(filtered=str(unwanted))
        return _Looked(row, nulled=nulled)


class _Ingest(UnitTask):
    """A unit whose new rows become files."""

    def __init__(self, worker: IngestWorker, unit: dict[str, Any]):
        super().__init__(worker, unit)
        self.index = worker.index
        self.files = _Files(self.table_uri, self.source, self.run_id, self.config.rows_per_fragment)
        self.errors = 0
        self.examples: list[dict[str, Any]] = []
        self.told = False  # whether the tracker knows what is read now, as it must where a process has died
        self.number: int = ray.get(self.index.begin.remote(unit["name"]))

    def run(self) -> list[ColumnFile]:
        """Reads a window ahead and writes a window behind, while images are looked at."""
        windows = self._windows()
        written: Future[None] | None = None
        with ThreadPoolExecutor(1) as writing:
            for window in read_ahead(windows, self.attempt):
                rows = self._rows(window)
                if written is not None:
                    written.result()
                written = writing.submit(self.files.write, rows)
                if self.attempt.deaths:  # nothing may die beside what the tracker was told
                    written.result()
            if written is not None:
                written.result()
        return self.files.finish()

    def _windows(self) -> Iterator[_Window]:
        window, size, place = _Window(0), 0, f"the begin of {_named(self.unit['parts'][0])}"
        with at(lambda: f"reading what follows {place}"):
            for record in self._tracked() if self.attempt.deaths else self.source.records(self.unit["parts"]):
                place = record.place
                record.drop_long_texts()
                window.records.append(record)
                size += len(record.image or b"") + len(record.caption or "") + len(record.place)
                if len(window.records) == WINDOW_ROWS or size >= WINDOW_BYTES:
                    yield window
                    window, size = _Window(window.first + len(window.records)), 0
        if window.records:
            yield window

    def _tracked(self) -> Iterator[Record]:
        """The unit's records; the tracker knows which part is read. A part that kills is read up to where it does."""
        name = self.unit["name"]
        for number, part in enumerate(self.unit["parts"]):
            records = iter(self.source.records([part]))
            self.told = False
            for count in itertools.count():
                if count == self.attempt.set_aside.get(number):
                    yield self.source.set_aside(part, DIED_READING)
                    break
                if not self.told or number in self.attempt.suspects:
                    ray.get(self.tracker.read.remote(name, number, count))
                    self.told = True
                if (record := next(records, None)) is None:
                    break
                yield record
        ray.get(self.tracker.leave.remote(name, {}))

    def _rows(self, window: _Window) -> list[dict[str, Any]]:
        """The window's new and wanted rows, claimed for this unit."""
        counts: Counter[str] = Counter(read=len(window.records))
        ids = self.each(Record.identify, window.records)
        fresh = []
        for number, (record, state) in enumerate(zip(window.records, ray.get(self.index.seen.remote(ids)))):
            if state == UNKNOWN:
                fresh.append((window.first + number, record))
            else:
                counts[NOT_NEW[state]] += 1
        rows = self._claimed(self.looked_at(fresh), counts)
        failed = [f"{row.get(columns.SOURCE)}: {row[ERROR_FIELD.name]}" for row in rows if row.get(ERROR_FIELD.name)]
        self.examples = [*self.examples, *({"error": reason} for reason in failed)][:EXAMPLES]
        self.errors += len(failed)
        self.counts.update(counts)
        self.told = False
        progress = {"rows": len(window.records), "errors": len(failed)}
        self.tracker.leave.remote(
            self.unit["name"], progress, "".join(failed[:1])
        )  # in order with what follows: no need to wait
        return rows

    def _claimed(self, looked: list[_Looked], counts: Counter[str]) -> list[dict[str, Any]]:
        """Those of the rows that are new and no duplicates."""
        counts.update(f"filtered_{one.filtered}" for one in looked if one.filtered)
        found = [(one.row, one.nulled) for one in looked if one.row is not None]
        if not found:
            return []
        names = (columns.IMAGE_ID, columns.IMAGE_DIGEST, columns.IMAGE_PHASH)
        asked = [[row.get(name) for row, _ in found] for name in names]
        kept = []
        for (row, nulled), verdict in zip(
            found, ray.get(self.index.claim.remote(self.unit["name"], self.number, *asked))
        ):
            if verdict == NEW:
                kept.append(row)
                counts.update([f"caption_null_{nulled}"] if nulled else [])
                counts["no_caption"] += self.source.has_images and not nulled and _lacks_caption(row)
            else:
                counts[NOT_NEW.get(verdict, f"filtered_{verdict}")] += 1
        counts += Counter()  # without the zeros
        return kept


def _named(part: dict[str, Any]) -> str:
    """The place of an item or a piece, for a message."""
    return str(part.get("place") or part.get("image_id"))


def _lacks_caption(row: dict[str, Any]) -> bool:
    """Whether a good row came without any text."""
    return not row.get(ERROR_FIELD.name) and not (row.get(columns.CAPTION_ORIGINAL) or "").strip()


class _Files:
    """Rows -> data files of `rows_per_fragment` rows, the last one of fewer."""

    def __init__(self, table_uri: str, source: Source, run_id: str, rows_per_fragment: int):
        self.table_uri, self.schema, self.run_id = table_uri, source.schema, run_id
        self.rows_per_fragment = rows_per_fragment
        self._done: list[ColumnFile] = []
        self._writer: ColumnFileWriter | None = None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows."""
        while rows:
            if self._writer is None:
                self._writer = ColumnFileWriter(self.table_uri, self.schema, self.run_id)
            room = self.rows_per_fragment - self._writer.rows
            first = rows[0].get(columns.SOURCE)
            with at(lambda first=first: f"writing the rows of {first} and what follows"):  # type: ignore[misc]
                self._writer.write(pa.RecordBatch.from_pylist(rows[:room], schema=self.schema))
            rows = rows[room:]
            if self._writer.rows == self.rows_per_fragment:
                self._close()

    def finish(self) -> list[ColumnFile]:
        """Closes the last file; all of them."""
        if self._writer is not None:
            self._close()
        return self._done

    def discard(self) -> None:
        """Takes the unfinished file away; finished ones are removed as orphans by the next run that ends well."""
        if self._writer is not None:
            self._writer.discard()

    def _close(self) -> None:
        assert self._writer is not None
        self._done.append(self._writer.finish(Table(self.table_uri).open()))
        self._writer = None

"""An actor of a stage: reads, computes and writes one fragment, overlapping, and nothing visible until committed."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import lance
import numpy as np
import pyarrow as pa
import ray
import torch
from lance.file import LanceFileReader

from lidit.runtime.outage import outlast
from lidit.runtime.uris import shown
from lidit.runtime.watchdog import arm
from lidit.store import columns
from lidit.store.checksum import no_panic
from lidit.store.columns import metadata_of
from lidit.store.stale import made_from
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.field_prints import field_differences
from pipelines.engine.pool import Attempt, read_ahead
from pipelines.engine.table import READ_BUFFER_BYTES, Table, column_holder, field_ids, missing_in
from pipelines.engine.versions import check_versions, made_with

READS, ALSO_READS = columns.META_READS, columns.META_ALSO_READS
MAY_BE_NULL = "lidit:may_be_null"  # field metadata: null is an answer too; another column of the stage tells why
EXAMPLES = 5  # errors of a fragment that are shown in the summary


@dataclass
class Columns:
    """Result of a stage for a window: one array per wanted column, in the window's row order."""

    arrays: dict[str, pa.Array]
    errors: dict[int, str] = field(default_factory=dict)  # row of the window -> why its values are null
    counts: dict[str, float] = field(default_factory=dict)  # added up for progress and summary
    examples: dict[str, list[str]] = field(default_factory=dict)  # for the summary: a few texts of each kind


class Unavailable(RuntimeError):
    """Something that a stage needs cannot be used now, such as a server: the job stops, and no row is marked as failed."""


class Stage(Protocol):
    """A step of the pipeline: columns in, columns out. See `pipelines/embed.py` for one.

    A stage with more to say of a run than others has a `summary`, a subclass of `pipelines.engine.summary.Summary`. One that
    keeps something beside its columns also has the class methods `for_stamp(config)`, which gives the stage and changes
    nothing, and `stamped(config)`: see `pipelines/engine/stamp.py`.
    """

    name: str
    window_rows: int  # rows handed to it at a time: what bounds an actor's memory

    def __init__(self, config: Any) -> None:
        """Loads what it needs; once per actor."""

    @classmethod
    def writes(cls, config: Any) -> list[pa.Field]:
        """The columns it adds, nullable, each with `READS`, codec and fingerprint in its metadata. Loads no weights."""

    @classmethod
    def bytes_per_row(cls, config: Any, sample: pa.Table, fields: list[pa.Field]) -> float:
        """Estimate of what a row of these fields takes, from a few rows of the columns read."""

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        """The columns read -> the wanted columns. May be called again for the same rows."""


class FragmentWorker:
    """One actor of a stage. Its unit is `{"fragment": id, "wanted": [columns], "again": bool}`.

    `again`: the fragment has values of these columns that do not count, or no longer do, and they are replaced.
    """

    def __init__(self, stage: type[Stage], config: Any, table_uri: str, run_id: str, tracker: Any):
        torch.set_num_threads(max(1, int(config.actors.num_cpus)))
        arm()
        self.process = secrets.token_hex(8)
        self.stage, self.config = stage(config), config
        self.table, self.run_id, self.tracker = Table(table_uri), run_id, tracker
        self.error_column = columns.error(stage.name)
        schema = self.table.open().schema
        fields = stage.writes(config)
        self.made_with = made_with(fields, config)
        if config.strict_versions:
            check_versions(schema, fields, strict=True)
        for made_here in fields:
            differences = field_differences(schema.field(made_here.name), made_here, columns.META_FINGERPRINT)
            if differences:
                raise ValueError(
                    f"this node would make {made_here.name!r} differently from the driver: {'; '.join(differences)}. "
                    f"Put the same model files on every node"
                )

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        return outlast(lambda: self._work(unit), f"fragment {unit['fragment']}")

    def _work(self, unit: dict[str, Any]) -> dict[str, Any]:
        fragment_id, begun = unit["fragment"], time.time()
        dataset = self.table.open()
        fragment, wanted = dataset.get_fragment(fragment_id), unit["wanted"]
        if fragment is not None and not unit["again"]:
            wanted = missing_in(fragment, wanted, field_ids(dataset))
        if fragment is None or not wanted:
            return {"fragment": fragment_id, "file": None}  # another run was first, or the fragment is gone
        task = _Task(self, dataset, fragment, wanted)
        try:
            file = task.run()
        except BaseException:
            task.writer.discard()
            raise
        ray.get(self.tracker.end.remote(str(fragment_id)))
        return {
            "fragment": fragment_id,
            "file": file.to_json(),
            "errors": len(task.errors),
            "examples": [{"row": row, "error": task.errors[row]} for row in sorted(task.errors)[:EXAMPLES]],
            "counts": dict(task.counts),
            "kinds": task.kinds,
            "begun": begun,
            "ended": time.time(),
        }


class _Task:
    """One fragment on its way through a worker."""

    def __init__(
        self, worker: FragmentWorker, dataset: lance.LanceDataset, fragment: lance.LanceFragment, wanted: list[str]
    ):
        self.stage, self.tracker = worker.stage, worker.tracker
        self.dataset, self.fragment, self.wanted = dataset, fragment, wanted
        self.fragment_id = fragment.fragment_id
        self.error_column = worker.error_column
        ids = field_ids(dataset)
        holders = {name: column_holder(self.fragment.metadata, ids[name]) for name in [*wanted, self.error_column]}
        self.replaces = {name: path for name, path in holders.items() if path is not None}
        self.earlier_errors = self._earlier_errors() if self.error_column in self.replaces else {}
        self.schema = pa.schema([dataset.schema.field(name) for name in [*wanted, self.error_column]])
        self.reads = columns_read([self.schema.field(name) for name in wanted], dataset.schema.names)
        read_from = {name: column_holder(fragment.metadata, ids[name]) for name in self.reads}
        self.read_from = {name: path for name, path in read_from.items() if path is not None}
        notes = {**worker.made_with, **made_from(LanceFileReader, worker.table.uri, self.read_from)}
        self.writer = ColumnFileWriter(worker.table.uri, self.schema, worker.run_id, notes)
        self.errors: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.kinds: dict[str, list[str]] = {}
        self.attempt: Attempt = ray.get(self.tracker.begin.remote(str(self.fragment_id), worker.process))

    def run(self) -> Any:
        """Reads a window ahead and writes a window behind, while the stage computes."""
        windows = self._windows()
        written: Future[None] | None = None
        with ThreadPoolExecutor(1) as writing:
            for positions, window in read_ahead(windows, self.attempt):
                batch = self._with_gaps(positions, self._compute(positions, window))
                if written is not None:
                    written.result()
                written = writing.submit(self.writer.write, batch)
            if written is not None:
                written.result()
            trailing = self.fragment.physical_rows - self.writer.rows
            if trailing:
                self.writer.write(pa.record_batch([pa.nulls(trailing, f.type) for f in self.schema], self.schema))
        return self.writer.finish(self.dataset, self.fragment_id, self.replaces, self.read_from)

    def _windows(self) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """(position of each row in the fragment, the columns read) in order; deleted rows are not among them."""
        # One window ahead is read here already: Lance's own 16 would hold images by the gigabyte.
        batches = iter(
            self.fragment.to_batches(
                columns=self.reads,
                batch_size=self.stage.window_rows,
                with_row_address=True,
                batch_readahead=1,
                io_buffer_size=READ_BUFFER_BYTES,
            )
        )
        while (batch := _next(batches)) is not None:
            if batch.num_rows:
                positions = batch.column("_rowaddr").to_numpy() & 0xFFFFFFFF
                yield positions.astype(np.int64), batch.select(self.reads)

    def _compute(self, positions: np.ndarray, window: pa.RecordBatch) -> pa.RecordBatch:
        """The stage's columns for a window, error column included; row by row where it must be."""
        first, stop = int(positions[0]), int(positions[-1]) + 1
        quarantined = set(self.attempt.quarantined)
        suspect = any(first < to and since < stop for since, to in self.attempt.careful)
        parts: list[Columns] = []
        if not suspect:
            try:
                parts = [self._piece(first, stop, window)]
            except Unavailable:
                raise
            except Exception:  # some row of it: each is tried alone below, and keeps its own error
                suspect = True
        if suspect:
            for row, position in enumerate(positions.tolist()):
                if position in quarantined:
                    parts.append(self._null_row("the process died on this row, and again when it was tried alone"))
                    continue
                try:
                    parts.append(self._piece(position, position + 1, window.slice(row, 1)))
                except Unavailable:
                    raise
                except Exception as error:
                    parts.append(self._null_row(shown(f"{type(error).__name__}: {error}")))
        merged = self._merge(parts)
        for row, reason in merged.errors.items():
            self.errors[int(positions[row])] = reason
        self.counts.update(merged.counts)  # type: ignore[arg-type]
        add_examples(self.kinds, merged.examples)
        texts = [self._error_text(int(position)) for position in positions]
        arrays = [merged.arrays[name] for name in self.wanted]
        return pa.record_batch([*arrays, pa.array(texts, pa.string())], self.schema)

    def _piece(self, first: int, stop: int, window: pa.RecordBatch) -> Columns:
        """Calls the stage; the tracker knows before and after."""
        unit = str(self.fragment_id)
        ray.get(self.tracker.enter.remote(unit, first, stop))
        made = self.stage(window, self.wanted)
        counts = {"rows": window.num_rows, "errors": len(made.errors), **made.counts}
        made.counts = counts
        ray.get(self.tracker.leave.remote(unit, counts, next(iter(made.errors.values()), "")))
        return made

    def _null_row(self, reason: str) -> Columns:
        counts: dict[str, float] = {"rows": 1, "errors": 1}
        ray.get(self.tracker.leave.remote(str(self.fragment_id), counts, reason))
        nulls = {name: pa.nulls(1, self.schema.field(name).type) for name in self.wanted}
        return Columns(nulls, {0: reason}, counts)

    def _merge(self, parts: list[Columns]) -> Columns:
        if len(parts) == 1:
            return parts[0]
        merged = Columns({name: pa.concat_arrays([part.arrays[name] for part in parts]) for name in self.wanted})
        counts: Counter[str] = Counter()
        for row, part in enumerate(parts):  # more than one part: one row each
            for reason in part.errors.values():
                merged.errors[row] = reason
            counts.update(part.counts)  # type: ignore[arg-type]
            add_examples(merged.examples, part.examples)
        merged.counts = dict(counts)
        return merged

    def _with_gaps(self, positions: np.ndarray, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Nulls where rows of the fragment are deleted: a column file has one value per physical row."""
        first, stop = self._next_position, int(positions[-1]) + 1
        self._next_position = stop
        if stop - first == len(positions):
            return batch
        rows = np.full(stop - first, -1)
        rows[positions - first] = np.arange(len(positions))
        return batch.take(pa.array(rows, mask=rows < 0))

    _next_position = 0

    def _earlier_errors(self) -> dict[int, str]:
        """Position -> error of an earlier run of this stage on the fragment, for other columns; mostly empty."""
        made = [f.name for f in self.dataset.schema if metadata_of(f).get(columns.META_STAGE) == self.stage.name]
        if set(made) <= set(self.wanted):
            return {}  # all that the reasons were about is made anew
        own = tuple(f"{name}: " for name in self.wanted)
        table = self.fragment.to_table(columns=[self.error_column], with_row_address=True)
        return {
            address & 0xFFFFFFFF: "; ".join(part for part in text.split("; ") if not part.startswith(own))
            for address, text in zip(table["_rowaddr"].to_pylist(), table[self.error_column].to_pylist())
            if text is not None
        }

    def _error_text(self, position: int) -> str | None:
        return (
            "; ".join(text for text in (self.earlier_errors.get(position), self.errors.get(position)) if text) or None
        )


def _next(batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    """The next batch; Lance's panic over a damaged file is an error of this job, and ends no process."""
    with no_panic():
        return next(batches, None)


def columns_read(fields: list[pa.Field], present: list[str]) -> list[str]:
    """The columns that these are made from, those looked at too included where they are present."""
    notes = [metadata_of(field) for field in fields]
    needed, along = {note[READS] for note in notes}, {note.get(ALSO_READS, "") for note in notes}
    return sorted(needed | (along & set(present)))


def add_examples(held: dict[str, list[str]], more: dict[str, list[str]]) -> None:
    """Keeps the first `EXAMPLES` texts of each kind."""
    for kind, texts in more.items():
        held[kind] = [*held.get(kind, []), *texts][:EXAMPLES]

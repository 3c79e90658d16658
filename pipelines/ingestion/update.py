"""`lidit ingest --update`: rows whose source has another caption or image now get it, under the `image_id` that they have.

A fragment with such rows gets one new file: of its captions alone, or, where an image is another one, of all that came with the
images. The file replaces the columns that it holds in one commit, as a stage's does (`Table.attach`): it is all there or not at
all, and counts only while the fragment still has the files that it was made from. What stages have made of the old values is
stale from then on (`lidit.store.stale`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray

from lidit.runtime.uris import shown
from lidit.store import columns
from pipelines.engine.column_file import ColumnFile, ColumnFileWriter
from pipelines.engine.runs import Run
from pipelines.engine.summary import Summary
from pipelines.engine.table import READ_BUFFER_BYTES, Table, column_holder, field_ids
from pipelines.engine.unit_pass import Result, UnitPass
from pipelines.ingestion.compare import Difference
from pipelines.ingestion.config import IngestConfig
from pipelines.ingestion.worker import DIED, EXAMPLES, IngestWorker, Unforeseen, UnitTask
from pipelines.sources.base import ERROR_FIELD, Listed, Record, unwritable, writable
from pipelines.sources.image_check import check_image
from pipelines.sources.text_files import is_unreadable

CAPTION_COLUMNS = [columns.CAPTION_ORIGINAL]
IMAGE_COLUMNS = [
    columns.IMAGE, columns.HEIGHT, columns.WIDTH, columns.CAPTION_ORIGINAL, columns.IMAGE_DIGEST, columns.IMAGE_PHASH,
    ERROR_FIELD.name,
]  # fmt: skip
PART = ("item", "image_id", "position", "image", "failed")  # of a `Difference`: what a worker is told of a row
WINDOW_ROWS = 64  # of a fragment, images and all: bounds an actor's memory


def units_of(differences: Sequence[Difference]) -> list[dict[str, Any]]:
    """A unit per fragment."""
    units: dict[int, dict[str, Any]] = {}
    for one in sorted(differences, key=lambda one: (one.fragment, one.position)):
        unit = units.setdefault(
            one.fragment, {"name": f"fragment {one.fragment}", "fragment": one.fragment, "parts": []}
        )
        unit["parts"].append({key: getattr(one, key) for key in PART})
    return list(units.values())


def update(config: IngestConfig, table: Table, run: Run, differences: Sequence[Difference], summary: Summary) -> None:
    """Gives rows the caption and image that their source has now; a row whose new content is no good one keeps the old.

    Raises:
        RuntimeError: a worker failed, or somebody else changed a fragment meanwhile; what is committed is kept.
    """
    units = units_of(differences)
    update_pass = UpdatePass(table, run, summary, {unit["name"] for unit in units}, len(differences))
    update_pass.send(UpdateWorker, {"config": config}, units, config.actors)
    if update_pass.unsettled:
        raise RuntimeError(
            f"{len(update_pass.unsettled):,} fragments with rows to update were changed by another job meanwhile, or gave no "
            f"result. Run the same command again: what is committed is kept"
        )


class UpdatePass(UnitPass):
    """Attaches the new files, and counts what it attached.

    Args:
        units: names of the units.
        rows: to update.
    """

    def __init__(self, table: Table, run: Run, summary: Summary, units: set[str], rows: int):
        super().__init__("ingest --update", table, run, summary, rows=rows)
        self.unsettled = units  # without a result that counts
        self.seen: set[str] = set()

    def accept(self, result: Result) -> bool:
        """The first result of each unit counts."""
        is_first = result["name"] not in self.seen
        self.seen.add(result["name"])
        return is_first

    def commit(self, results: list[Result]) -> bool:
        """Makes what is finished part of the table, in one commit."""
        files = {result["name"]: ColumnFile(**result["file"]) for result in results if result["file"] is not None}
        attached = set()
        if files:
            attached = {file.path for file in self.table.attach(list(files.values()), self.run.check).done}
        counts = Counter(self.summary.counts)
        for result in results:
            file = files.get(result["name"])
            if result["gone"] or (file is not None and file.path not in attached):
                continue
            self.unsettled.discard(result["name"])
            counts.update(result["counts"])
            known = self.summary.examples.get("not_updated", [])
            if result["examples"]:
                self.summary.examples["not_updated"] = [*known, *result["examples"]][:EXAMPLES]
            self.summary.bytes_written += file.size if file is not None else 0
        self.summary.counts = dict(counts)
        return bool(files)


class UpdateWorker(IngestWorker):
    """One actor. Its unit is `{"name", "fragment", "parts"}`, parts with what `PART` names."""

    def __init__(self, config: IngestConfig, table_uri: str, run_id: str, tracker: Any):
        super().__init__(config, table_uri, run_id, tracker, index=None)

    def _work(self, unit: dict[str, Any]) -> dict[str, Any]:
        task = _Update(self, unit)
        result = {"name": unit["name"], "file": None, "gone": not task.is_there, "counts": {}, "examples": []}
        if task.is_there:
            try:
                file = task.rewrite()
            except Unforeseen as error:
                raise RuntimeError(self._explained(error, f"update-{unit['fragment']}")) from None
            result |= {"file": file and file.to_json(), "counts": dict(task.counts), "examples": task.said}
        ray.get(self.tracker.end.remote(unit["name"]))
        return result


class _Update(UnitTask):
    """One fragment on its way through a worker."""

    def __init__(self, worker: UpdateWorker, unit: dict[str, Any]):
        super().__init__(worker, unit)
        self.said: list[str] = []  # of a few rows: why they stay as they are
        self.dataset = Table(self.table_uri).open()
        self.fragment: lance.LanceFragment = self.dataset.get_fragment(unit["fragment"])  # type: ignore[assignment]
        self.parts = {part["position"]: (number, part) for number, part in enumerate(unit["parts"])}
        self.is_there = self.fragment is not None and self._rows_are_there()

    def rewrite(self) -> ColumnFile | None:
        """Writes the fragment's columns with the new values; None where every row keeps what it has."""
        self._leave_failed()
        if not self.parts:
            return None
        with_images = any(part["image"] for _, part in self.parts.values())
        wanted = IMAGE_COLUMNS if with_images else CAPTION_COLUMNS
        schema = pa.schema([f for f in self.dataset.schema if f.name in wanted])
        ids = field_ids(self.dataset)
        holders = {name: column_holder(self.fragment.metadata, ids[name]) for name in schema.names}
        writer = ColumnFileWriter(self.table_uri, schema, self.run_id)
        try:
            for rows in self._batches(schema):
                writer.write(rows)
            if trailing := self.fragment.physical_rows - writer.rows:
                writer.write(pa.record_batch([pa.nulls(trailing, f.type) for f in schema], schema))
            if not self.counts["updated"]:
                writer.discard()
                return None
            held = {name: path for name, path in holders.items() if path is not None}
            return writer.finish(self.dataset, self.fragment.fragment_id, held)
        except BaseException:
            writer.discard()
            raise

    def _rows_are_there(self) -> bool:
        """Whether the rows still lie where they were when they were compared."""
        ids = self.fragment.to_table(columns=[columns.IMAGE_ID], with_row_address=True)
        at = dict(
            zip((address & 0xFFFFFFFF for address in ids["_rowaddr"].to_pylist()), ids[columns.IMAGE_ID].to_pylist())
        )
        return all(at.get(position, part["image_id"]) == part["image_id"] for position, (_, part) in self.parts.items())

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The fragment's rows with the new values in them, nulls where rows are deleted."""
        following = 0
        batches = self.fragment.to_batches(
            columns=schema.names,
            batch_size=WINDOW_ROWS,
            with_row_address=True,
            batch_readahead=1,
            io_buffer_size=READ_BUFFER_BYTES,
        )
        for batch in batches:
            if not batch.num_rows:
                continue
            positions = (batch.column("_rowaddr").to_numpy() & 0xFFFFFFFF).astype(np.int64)
            rows = self._replaced(positions.tolist(), batch.select(schema.names), schema)
            places = np.full(int(positions[-1]) + 1 - following, -1)
            places[positions - following] = np.arange(len(positions))
            following = int(positions[-1]) + 1
            yield rows if len(places) == len(positions) else rows.take(pa.array(places, mask=places < 0))

    def _replaced(self, positions: list[int], batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
        changed = {}
        for row, position in enumerate(positions):
            if position not in self.parts:
                continue
            number, part = self.parts[position]
            old = batch.slice(row, 1).to_pylist()[0]
            new = self._image(number, part, old) if part["image"] else self._caption(part)
            self.tracker.leave.remote(self.unit["name"], {"rows": 1})
            if new is not None:
                changed[row] = {**old, **new}
        self.counts["updated"] += len(changed)
        return _spliced(batch, changed, schema)

    def _leave_failed(self) -> None:
        """Rows that have an error and would have one again need no file."""
        for position, (number, part) in list(self.parts.items()):
            if part["failed"] and self._image(number, part, {}) is None:
                del self.parts[position]

    def _image(self, number: int, part: dict[str, Any], old: dict[str, Any]) -> dict[str, Any] | None:
        """What a row is to hold whose image is another one; None where it keeps what it has."""
        if number in self.attempt.quarantined:
            self._keep(str(part["item"].get("place") or part["image_id"]), DIED)
            return None
        ray.get(self.tracker.enter.remote(self.unit["name"], number, number + 1))  # reading it may be what kills
        record = next(iter(self.source.records([part["item"]])))
        record.drop_long_texts()
        (looked,) = self.looked_at([(number, record)])
        row = looked.row
        if row is None:
            self._keep(record.place, f"its image or caption does not pass {looked.filtered}")
            return None
        if (reason := row.get(ERROR_FIELD.name)) is not None:
            self._keep(record.place, reason)
            return None
        if old.get(columns.IMAGE_PHASH) is not None and row.get(columns.IMAGE_PHASH) is None:
            row[columns.IMAGE_PHASH] = check_image(row[columns.IMAGE], True, with_phash=True).phash
        new = {name: row.get(name) for name in IMAGE_COLUMNS}
        if part["item"].get("text_unsure") and not part["failed"]:
            del new[columns.CAPTION_ORIGINAL]
        return new

    def _caption(self, part: dict[str, Any]) -> dict[str, Any] | None:
        """What a row is to hold whose caption alone is another one; None where it keeps what it has."""
        record = Record(str(part["item"].get("place") or part["image_id"]), image_id=part["image_id"])
        try:
            assert isinstance(self.source, Listed)
            record.caption = self.source.text(part["item"])
            record.drop_long_texts()
            reason = record.error or unwritable(record)
        except ValueError as error:
            reason = f"its caption is no good one: {error}"
        except OSError as error:
            if not is_unreadable(error):
                raise
            reason = f"{type(error).__name__}: its caption cannot be read"
        if reason is None and (bad := self.filters.caption(record.caption)) is not None:
            record.caption = None
            reason = f"its caption does not pass {bad}" if self.filters.bad_caption == "drop" else None
        if reason is not None:
            self._keep(record.place, reason)
            return None
        return {columns.CAPTION_ORIGINAL: record.caption}

    def _keep(self, place: str, reason: str) -> None:
        """Counts a row that stays as it is, and remembers why."""
        self.counts["not_updated"] += 1
        self.said = [*self.said, writable(shown(f"{place}: {reason}"))][:EXAMPLES]


def _spliced(batch: pa.RecordBatch, changed: dict[int, dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """The batch with some of its rows replaced."""
    if not changed:
        return batch
    new = pa.RecordBatch.from_pylist(list(changed.values()), schema=schema)
    places = np.arange(batch.num_rows)
    places[list(changed)] = batch.num_rows + np.arange(len(changed))
    both = pa.Table.from_batches([batch.cast(schema), new]).combine_chunks()
    return both.take(pa.array(places)).combine_chunks().to_batches()[0]

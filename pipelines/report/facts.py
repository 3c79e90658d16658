"""Facts of a store without reading its large columns: from the table's metadata, and its small columns.

Bytes per column and which fragments have which column come from Lance's own metadata. Reasons of errors and histograms are
read, from small columns only; none of it looks at images, embeddings or latents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.file import LanceFileReader

from lidit.runtime.uris import shown
from lidit.store import columns
from lidit.store.stale import stale_columns
from pipelines.engine.runs import Run, runs_folder
from pipelines.engine.table import encoders_of, field_ids, samples_of

READ_ROWS = 65_536
MOST_REASONS = 10_000  # distinct ones that are counted; the rest goes under one name
REASONS_SHOWN = 12
EXAMPLES = 3  # rows named for a reason
RUNS_SHOWN = 8
OTHER_REASONS = "(other reasons)"
NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\d[\d,.]*")


@dataclass
class ColumnFacts:
    """A column of the table: its type, its size, and the stage that made it."""

    name: str
    type: str
    stage: str | None  # the stage that made it; None: ingest
    bytes: int
    rows: int  # rows of fragments that have a file for it
    nulls: int | None  # among these; None: not counted, the column is large
    about: str = ""  # codec and shape, in words


@dataclass
class StageFacts:
    """Columns of a stage that have one fingerprint."""

    name: str
    columns: list[str]
    fingerprint: dict[str, Any]
    digest: str  # short, of the fingerprint
    fragments: int  # fragments that have all of the columns
    waiting: int  # fragments that lack one


@dataclass
class StaleFacts:
    """Columns of a stage that were made from values which have changed since."""

    stage: str
    columns: list[str]
    fragments: int
    rows: int

    @property
    def words(self) -> str:
        """Says in a sentence what is stale and what to do about it."""
        return (
            f"{', '.join(self.columns)}: in {self.fragments:,} fragments ({self.rows:,} rows) made from values that have "
            f"changed since; the command that made them (lidit {self.stage}) makes them again there"
        )


@dataclass
class Reason:
    """Rows whose error messages differ in their numbers only."""

    stage: str
    text: str  # numbers replaced by N
    count: int
    examples: list[tuple[str, str]] = field(default_factory=list)  # (image_id, the whole reason)


@dataclass
class Facts:
    """Everything that is known of a table without reading its large columns."""

    uri: str
    version: int
    rows: int
    fragments: int
    deleted: int
    bytes: int
    changed: str  # time of the version
    columns: list[ColumnFacts]
    stages: list[StageFacts]
    reasons: list[Reason]
    encoders: list[dict[str, Any]]
    runs: list[dict[str, Any]]
    stale: list[StaleFacts] = field(default_factory=list)


def gather(store: str, version: int | None = None) -> Facts:
    """Reads what is known of `<store>/samples.lance` and of what lies beside it.

    Raises:
        ValueError: there is no table, or not that version.
    """
    table = samples_of(store)
    dataset = table.open()
    if version is not None and version != dataset.version:
        try:
            dataset = table.open(version)
        except (OSError, ValueError) as error:
            raise ValueError(f"{table.uri}: there is no version {version}, the newest is {dataset.version}") from error
    known = _columns(dataset)
    about = next(entry for entry in dataset.versions() if entry["version"] == dataset.version)
    return Facts(
        uri=table.uri,
        version=dataset.version,
        rows=dataset.count_rows(),
        fragments=len(dataset.get_fragments()),
        deleted=sum(fragment.num_deletions for fragment in dataset.get_fragments()),
        bytes=sum(column.bytes for column in known),
        changed=f"{about['timestamp']:%Y-%m-%d %H:%M:%S}",
        columns=known,
        stages=_stages(dataset),
        stale=stale_facts(dataset, stale_columns(LanceFileReader, dataset, table.uri, dataset.schema)),
        reasons=_reasons(dataset),
        encoders=_encoders(store),
        runs=_runs(store),
    )


def stale_facts(dataset: lance.LanceDataset, stale: Mapping[int, Sequence[str]]) -> list[StaleFacts]:
    """Sums up what is stale (fragment id -> columns), by stage."""
    found: dict[str, StaleFacts] = {}
    stages = {f.name: columns.metadata_of(f).get(columns.META_STAGE) for f in dataset.schema}
    rows = {fragment.fragment_id: fragment.count_rows() for fragment in dataset.get_fragments()}
    for fragment_id, names in stale.items():
        for stage in dict.fromkeys(stages[name] for name in names):
            facts = found.setdefault(stage or "", StaleFacts(stage or "", [], 0, 0))
            facts.fragments += 1
            facts.rows += rows[fragment_id]
            own = [name for name in names if stages[name] == stage]
            facts.columns = [name for name in dataset.schema.names if name in {*facts.columns, *own}]
    return list(found.values())


def numbers(dataset: lance.LanceDataset, name: str, most_rows: int) -> np.ndarray:
    """Values of a column of numbers, or lengths of a column of texts in characters, nulls left out, of the first rows."""
    values = _first_values(dataset, name, most_rows)
    parts = [(pc.utf8_length(part) if pa.types.is_string(part.type) else part).to_numpy(False) for part in values]
    return np.concatenate(parts) if parts else np.empty(0)


def labels(dataset: lance.LanceDataset, name: str, most_rows: int) -> Counter[str]:
    """Counts each value of a column of short texts, in the first rows."""
    counts: Counter[str] = Counter()
    for part in _first_values(dataset, name, most_rows):
        for entry in pc.value_counts(part).to_pylist():
            counts[entry["values"]] += entry["counts"]
    return counts


def _first_values(dataset: lance.LanceDataset, name: str, most_rows: int) -> Iterator[pa.Array]:
    """Reads a column's values in the first rows, part by part, without nulls."""
    rows = 0
    for batch in dataset.to_batches(columns=[name], batch_size=READ_ROWS, batch_readahead=2):
        yield batch.column(0).drop_null()
        rows += batch.num_rows
        if rows >= most_rows:
            return


def _columns(dataset: lance.LanceDataset) -> list[ColumnFacts]:
    ids = field_ids(dataset)
    sizes = {stats.id: stats.bytes_on_disk for stats in dataset.stats.data_stats().fields}  # type: ignore[attr-defined]
    rows: Counter[str] = Counter()
    for fragment in dataset.get_fragments():
        held = {field_id for file in fragment.metadata.files for field_id in file.fields}
        count = fragment.count_rows()
        rows.update({name: count for name, field_id in ids.items() if field_id in held})
    facts = []
    for stored in dataset.schema:
        is_large = pa.types.is_large_binary(stored.type) or pa.types.is_binary(stored.type)
        nulls = None
        if not is_large:
            nulls = rows[stored.name] - (dataset.count_rows() - dataset.count_rows(f"`{stored.name}` IS NULL"))
        size = sizes.get(ids[stored.name], 0)
        stage = columns.metadata_of(stored).get(columns.META_STAGE) or _stage_of_reasons(stored.name)
        facts.append(ColumnFacts(stored.name, str(stored.type), stage, size, rows[stored.name], nulls, _about(stored)))
    return facts


def _about(stored: pa.Field) -> str:
    """Describes in a few words how a column's values are stored, from its metadata."""
    metadata = columns.metadata_of(stored)
    codec = metadata.get(columns.META_CODEC)
    if codec is None:
        return ""
    if columns.META_CHANNELS in metadata:
        moments = metadata.get(columns.META_MOMENTS, "mean").replace(",", " and ")
        return (
            f"{moments}, {codec}, {metadata[columns.META_CHANNELS]} channels, 1/{metadata[columns.META_DOWNSCALE]} size"
        )
    return f"{codec}, {metadata.get(columns.META_WIDTH)} wide, ragged"


def _stage_of_reasons(name: str) -> str | None:
    """Name of the stage that an error column belongs to: `embed_error` -> `embed`; None for other columns, and ingest's."""
    stage = name.removesuffix("_error")
    return stage if stage != name and stage != "ingest" else None


def _stages(dataset: lance.LanceDataset) -> list[StageFacts]:
    ids = field_ids(dataset)
    groups: dict[tuple[str, str], list[str]] = {}
    for stored in dataset.schema:
        metadata = columns.metadata_of(stored)
        if columns.META_STAGE in metadata:
            fingerprint = metadata.get(columns.META_FINGERPRINT, "{}")
            groups.setdefault((metadata[columns.META_STAGE], fingerprint), []).append(stored.name)
    facts = []
    for (stage, fingerprint), names in groups.items():
        wanted, done = {ids[name] for name in names}, 0
        for fragment in dataset.get_fragments():
            done += wanted <= {field_id for file in fragment.metadata.files for field_id in file.fields}
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:12]
        waiting = len(dataset.get_fragments()) - done
        facts.append(StageFacts(stage, names, json.loads(fingerprint), digest, done, waiting))
    return facts


def _reasons(dataset: lance.LanceDataset) -> list[Reason]:
    """Errors of every stage by reason, the commonest first."""
    found: dict[tuple[str, str], Reason] = {}
    for name in (name for name in dataset.schema.names if name.endswith("_error")):
        stage = name.removesuffix("_error")
        read = dataset.to_batches(
            columns=[columns.IMAGE_ID, name], filter=f"`{name}` IS NOT NULL", batch_size=READ_ROWS
        )
        for batch in read:
            for image_id, text in zip(*(batch.column(which).to_pylist() for which in (columns.IMAGE_ID, name))):
                pattern = NUMBERS.sub("N", text)
                key = (stage, pattern if (stage, pattern) in found or len(found) < MOST_REASONS else OTHER_REASONS)
                reason = found.setdefault(key, Reason(*key, 0))
                reason.count += 1
                if len(reason.examples) < EXAMPLES:
                    reason.examples.append((image_id, text))
    return sorted(found.values(), key=lambda reason: -reason.count)


def _encoders(store: str) -> list[dict[str, Any]]:
    """Reads the encoders table; of its states only the number of tokens."""
    table = encoders_of(store)
    if not table.exists():
        return []
    facts = []
    for row in table.open().to_table().to_pylist():
        width = row[columns.EMBED_WIDTH]
        facts.append(
            {
                "encoder": row[columns.ENCODER],
                "width": width,
                "instruction_tokens": len(row[columns.INSTRUCTION_EMBEDS] or b"") // (4 * width),
                "null_tokens": len(row[columns.NULL_EMBEDS] or b"") // (4 * width),
                "digest": hashlib.sha256(row[columns.FINGERPRINT].encode()).hexdigest()[:12],
                "model": shown(str(json.loads(row[columns.ENCODER_CONFIG]).get("model", ""))),
            }
        )
    return facts


def _runs(store: str) -> list[dict[str, Any]]:
    """Lists the newest runs: job, when, and what their summaries say; `state` is done, alive or stopped."""
    fs, root = runs_folder(store)
    if not fs.exists(root):
        return []
    names = [path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False)]
    runs, looker = [], Run(store, "inspect")
    for name in sorted(names, key=lambda name: name.split("-")[-2:], reverse=True)[:RUNS_SHOWN]:
        job, when, _ = name.rsplit("-", 2)
        run = {"run": name, "job": job, "when": f"{when[:4]}-{when[4:6]}-{when[6:8]} {when[9:11]}:{when[11:13]}"}
        if fs.exists(f"{root}/{name}/summary.json"):
            summary = _summary_of(fs, f"{root}/{name}/summary.json")
            run |= {key: summary.get(key) for key in ("rows", "errors", "seconds")} | {"state": "done"}
        else:
            run["state"] = "works" if looker.state(name) == "alive" else "stopped"
        runs.append(run)
    return runs


def _summary_of(fs: Any, path: str) -> dict[str, Any]:
    """A run's summary; an empty one where the file holds something else."""
    try:
        summary = json.loads(fs.cat_file(path))
    except (ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}

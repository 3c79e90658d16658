"""Runs any stage on a table: what is missing, actors to do it, one committer, a summary.

Send ids, work where the data is, commit once. The driver asks the table which fragments lack the stage's columns and
sends their ids through a pool of actors; each actor reads its fragment's columns, computes, and writes one column file;
the driver attaches finished files in batches. Whatever is killed, and whenever: run the same command again.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import lance
import pyarrow as pa
import yaml
from lance.file import LanceFileReader

from lidit.runtime.fields import Fraction, JobConfig
from lidit.runtime.places import settled
from lidit.store import columns
from lidit.store.checksum import is_ours
from lidit.store.columns import metadata_of
from lidit.store.stale import stale_columns
from pipelines.engine.column_file import ColumnFile
from pipelines.engine.field_prints import field_differences, unrecorded_keys
from pipelines.engine.pool import ActorsConfig, resolve_actors, start_ray_data
from pipelines.engine.runs import Run
from pipelines.engine.stamp import stamp
from pipelines.engine.summary import Summary
from pipelines.engine.table import Guard, Table, samples_of
from pipelines.engine.unit_pass import CommitConfig, Result, UnitPass
from pipelines.engine.versions import check_versions
from pipelines.engine.worker import EXAMPLES, MAY_BE_NULL, READS, FragmentWorker, Stage, add_examples, columns_read

PASSES = 5  # over what is still missing, when others changed fragments under this run
SAMPLE_ROWS = 256  # that a dry run estimates from


@dataclass(frozen=True)
class StageConfig(JobConfig):
    """Fields that every stage's config has."""

    store: str = "./store"
    """Folder or URI of the feature store; the table is `<store>/samples.lance`."""
    actors: ActorsConfig = ActorsConfig()
    """The pool of workers."""
    commit: CommitConfig = CommitConfig()
    """When finished fragments become visible."""
    max_error_rate: Fraction = 0.01
    """Share of rows that may fail (0 to 1); above it the job stops and says so."""
    overwrite: bool = False
    """Replace columns that were made with another fingerprint, or anew if they are complete."""
    stamp: bool = False
    """For columns made before something was part of the fingerprint: make a sample of their rows again, record what was not
    recorded where all agrees, and exit."""
    strict_versions: bool = False
    """Refuse to go on with columns that were begun with another minor version of transformers, tokenizers, torch, diffusers or
    Pillow, instead of a warning."""
    dry_run: bool = False
    """Print the plan (fragments, rows, resources, bytes) and exit."""


def run_stage(stage: type[Stage], config: StageConfig) -> Summary:
    """Brings the stage's columns up to date on every fragment of `<store>/samples.lance`.

    Raises:
        ValueError: no table, no column to read, or columns made with another fingerprint (or, with `strict_versions`, other
            versions of libraries).
        ErrorRateExceeded: too many rows failed; fragments without errors up to then are committed.
        RuntimeError: an actor failed, or fragments stayed missing; what is committed is kept.
    """
    config = settled(config)
    table = samples_of(config.store)
    fields = [*stage.writes(config), pa.field(columns.error(stage.name), pa.string())]
    dataset = table.open()
    _check_reads(stage, fields[:-1], dataset, table)
    _check_owner(stage, fields[:-1], dataset, table)
    start = time.monotonic()
    if config.dry_run:
        return _plan(stage, config, table, fields[:-1])
    if config.stamp:
        return stamp(stage, config, table, fields[:-1])
    with Run(config.store, stage.name) as run:
        run.write("config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        if config.overwrite:
            _overwrite(table, fields, run.check)
        table.declare(fields, columns.META_FINGERPRINT)
        summary: Summary = getattr(stage, "summary", Summary)(stage.name, config.store, run.id)
        for number in range(PASSES):
            units, summary.fragments_waiting = _units(table, fields[:-1])
            if not units:
                break
            if number == 0:
                check_versions(table.open().schema, fields[:-1], config.strict_versions)
            summary.fragments_stale += sum(unit.pop("stale") for unit in units)
            rows, rate = sum(unit.pop("rows") for unit in units), config.max_error_rate
            stage_pass = StagePass(stage.name, table, run, summary, rows=rows, when=config.commit, max_error_rate=rate)
            stage_pass.send(FragmentWorker, {"stage": stage, "config": config}, units, config.actors)
        else:
            raise RuntimeError(
                f"{len(units)} fragments are still missing after {PASSES} passes: other jobs keep changing them. Run the "
                f"same command when those are over; what is committed is kept"
            )
        summary.orphans_removed = len(table.remove_orphans(lambda: run.end_dead(table) | {run.id}))
        summary.seconds, summary.ok = time.monotonic() - start, True
        summary.next = f"lidit verify --store {config.store} --sample 64"
        run.write("summary.json", summary.to_json())
    return summary


class StagePass(UnitPass):
    """Attaches column files to their fragments; counts only what this run really added."""

    commit_share = (
        0.005  # a table of many fragments is dear to commit to, and a GPU's hour is dearer than what a kill undoes
    )

    def accept(self, result: Result) -> bool:
        """A fragment that another run did first, or that is gone, has no file."""
        return result["file"] is not None

    def commit(self, results: list[Result]) -> bool:
        """Attaches the files in one commit. One whose fragment has changed meanwhile is left out: the next pass looks again."""
        files = [ColumnFile(**result["file"]) for result in results]
        attached = {file.path for file in self.table.attach(files, self.run.check).done}
        summary, counts = self.summary, Counter(self.summary.counts)
        for file, result in zip(files, results):
            if file.path not in attached:
                continue
            summary.fragments += 1
            summary.rows += int(result["counts"].get("rows", 0))
            summary.errors += result["errors"]
            summary.bytes_written += file.size
            add_examples(summary.examples, result["kinds"])
            summary.error_examples += [{"fragment": result["fragment"], **example} for example in result["examples"]]
            counts.update({key: value for key, value in result["counts"].items() if key not in ("rows", "errors")})
        summary.counts, summary.error_examples = dict(counts), summary.error_examples[:EXAMPLES]
        return True


def _check_reads(stage: type[Stage], fields: list[pa.Field], dataset: lance.LanceDataset, table: Table) -> None:
    absent = [name for name in _reads(fields) if name not in dataset.schema.names]
    if absent:
        raise ValueError(
            f"{stage.name} reads column {absent[0]!r}, which {table.uri} does not have; it has "
            f"{', '.join(dataset.schema.names)}"
        )


def _check_owner(stage: type[Stage], fields: list[pa.Field], dataset: lance.LanceDataset, table: Table) -> None:
    """Refuses to touch, `--overwrite` or not, a column that this stage did not make."""
    for wanted in fields:
        if wanted.name in dataset.schema.names:
            owner = metadata_of(dataset.schema.field(wanted.name)).get(columns.META_STAGE, "")
            if owner != stage.name:
                raise ValueError(
                    f"column {wanted.name!r} of {table.uri} was {f'made by {owner}' if owner else 'ingested'}, not made by "
                    f"{stage.name}: it stays as it is; give the new column another name, or use another store"
                )


def _reads(fields: list[pa.Field]) -> list[str]:
    """The columns that these are made from."""
    return sorted({metadata_of(f)[READS] for f in fields})


def _units(table: Table, fields: list[pa.Field], with_stale: bool = True) -> tuple[list[dict[str, Any]], int]:
    """(fragments with the columns they lack and can get now, number of fragments that wait for a column to read).

    A column is lacking, too, where what it was made from has changed since (`lidit.store.stale`). A compaction by another tool
    writes nulls where a column was missing: such fragments are looked into, and done again.
    """
    dataset = table.open()
    reads = {f.name: metadata_of(f)[READS] for f in fields}
    unread = table.missing(_reads(fields), dataset)
    lacking = table.missing(list(reads), dataset)
    rows = {fragment.fragment_id: fragment.count_rows() for fragment in dataset.get_fragments()}
    stale = stale_columns(LanceFileReader, dataset, table.uri, fields) if with_stale else {}
    units, waiting = [], 0

    def add(fragment: int, wanted: list[str], again: bool) -> None:
        changed = stale.pop(fragment, [])
        wanted = [name for name in reads if name in {*wanted, *changed}]
        if wanted and rows[fragment]:
            about = {"again": again or bool(changed), "stale": bool(changed), "rows": rows[fragment]}
            units.append({"fragment": fragment, "wanted": wanted, **about})

    for fragment, absent in lacking.items():
        wanted = [name for name in absent if reads[name] not in unread.get(fragment, ())]
        waiting += not wanted
        add(fragment, wanted, again=False)
    for fragment in dataset.get_fragments():
        if fragment.fragment_id not in lacking and not all(is_ours(file.path) for file in fragment.metadata.files):
            wanted = [f.name for f in fields if _has_gaps(fragment, f)]
            group = [f.name for f in fields if reads[f.name] in {reads[name] for name in wanted}]
            add(fragment.fragment_id, group, again=True)
    for fragment in list(stale):
        add(fragment, [], again=True)
    return units, waiting


def _has_gaps(fragment: lance.LanceFragment, stored: pa.Field) -> bool:
    """Whether some row has the column read, and neither the column made from it nor a reason."""
    metadata = metadata_of(stored)
    if pa.types.is_large_binary(stored.type) or MAY_BE_NULL in metadata:
        return False  # another column of the same stage tells as well
    reason = columns.error(metadata[columns.META_STAGE])
    gaps = f"{metadata[READS]} IS NOT NULL AND {stored.name} IS NULL AND {reason} IS NULL"
    return fragment.count_rows(filter=gaps) > 0


def _overwrite(table: Table, fields: list[pa.Field], guard: Guard | None = None) -> None:
    """Drops the columns that were made differently, or are complete; half-done ones of this fingerprint go on.

    What other stages made from a dropped column goes with it: it would no longer be true.
    """
    schema = table.open().schema
    present = [f for f in fields[:-1] if f.name in schema.names]
    complete = not _units(table, present, with_stale=False)[0]
    drop = {f.name for f in present if complete or field_differences(schema.field(f.name), f, columns.META_FINGERPRINT)}
    stage = metadata_of(fields[0])[columns.META_STAGE]
    kept = [f for f in schema if metadata_of(f).get(columns.META_STAGE) == stage and f.name not in drop]
    made_from = {f.name for f in schema if metadata_of(f).get(READS) in drop}
    if made_from:
        print(
            f"dropped with {', '.join(sorted(drop))}, being made from it: {', '.join(sorted(made_from))}",
            file=sys.stderr,
        )
    table.drop(drop | made_from if kept else drop | made_from | {fields[-1].name}, guard)


def _plan(stage: type[Stage], config: StageConfig, table: Table, fields: list[pa.Field]) -> Summary:
    """Prints what a run would do, changing nothing."""
    dataset = table.open()
    schema = dataset.schema
    units, waiting = _units(table, fields)
    rows = sum(unit["rows"] for unit in units)
    start_ray_data()
    smallest, largest, num_gpus = resolve_actors(config.actors)
    per_row = stage.bytes_per_row(config, dataset.head(SAMPLE_ROWS, columns=columns_read(fields, schema.names)), fields)
    plan = [f"table      {table.uri}, version {dataset.version}, {dataset.count_rows():,} rows"]
    for wanted in fields:
        state = "new"
        if wanted.name in schema.names:
            present, key = schema.field(wanted.name), columns.META_FINGERPRINT
            remedy = "--stamp" if unrecorded_keys(present, wanted, key) else "--overwrite"
            differences = field_differences(present, wanted, key)
            state = f"REFUSED unless {remedy}: {'; '.join(differences)}" if differences else "there, same fingerprint"
        plan.append(f"column     {wanted.name}: {state}")
    stale = sum(unit["stale"] for unit in units)
    plan.append(
        f"to do      {len(units):,} fragments, {rows:,} rows{f'; {waiting:,} fragments wait' if waiting else ''}"
        f"{f'; {stale:,} of them anew, as what they were made from has changed' if stale else ''}"
    )
    plan.append(f"actors     {smallest} to {largest}, each {config.actors.num_cpus:g} CPUs, {num_gpus:g} GPUs")
    plan.append(
        f"to write   about {rows * per_row / 1e6:,.1f} MB ({per_row:,.0f} bytes a row, from {SAMPLE_ROWS} rows)"
    )
    return Summary(stage.name, config.store, dry_run=True, ok=True, plan=plan, fragments_waiting=waiting)

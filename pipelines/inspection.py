"""Shows a store: schema, stages with their fingerprints, rows, errors by reason, bytes per column; as text or as a page.

    lidit inspect --store ./store
    lidit inspect --store ./store --html page.html

The page is one file that needs nothing else: sample images with both captions, histograms, latents decoded back beside the
images they were made of, examples of errors. Nothing in the store is changed, and no large column is read but for the samples.
(The module is not called `inspect`: run as a script it would hide the standard library's.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import lance
import numpy as np
import pyarrow as pa

from lidit.cli import run
from lidit.runtime.fields import JobConfig, NonNegativeInt
from lidit.runtime.printable import one_line
from lidit.runtime.result import JobResult, filled, table
from lidit.store import columns
from pipelines.engine.table import Table
from pipelines.report.charts import bars, histogram
from pipelines.report.facts import REASONS_SHOWN, Facts, gather, labels, numbers
from pipelines.report.page import Chart, Page, human, render
from pipelines.report.samples import draw_samples, open_decoder

BUCKETS_SHOWN = 16
HISTOGRAM_ROWS = 1_000_000  # first rows that histograms are made of
SHORT = 88  # characters of a line's text


@dataclass(frozen=True)
class InspectConfig(JobConfig):
    """The inspect job."""

    store: str = "./store"
    """Folder or URI of the feature store."""
    version: int | None = None
    """Version of the table. Default: the newest."""
    html: str | None = None
    """File (or URI) that the page is written to. Default: no page."""
    samples: NonNegativeInt = 24
    """Rows that the page shows."""
    seed: int = 0
    """Decides which rows are shown."""
    vae: str | None = None
    """Autoencoder that latents are decoded with: folder or `owner/name@commit`. Default: the one that the newest latents run
    names."""


@dataclass
class InspectResult(JobResult):
    """Facts of a store; whether it is right is for the verify job to say."""

    facts: Facts
    html: str | None = None
    notes: Sequence[str] = ()

    def values(self) -> dict[str, Any]:
        """The facts, and what was written."""
        return {"job": "inspect", "ok": True, "html": self.html, "notes": list(self.notes), **asdict(self.facts)}

    def lines(self) -> Iterator[str]:
        """Tables for a terminal."""
        facts = self.facts
        deleted = f", {facts.deleted:,} deleted" if facts.deleted else ""
        yield f"{facts.uri}  version {facts.version}, {facts.changed}"
        yield f"{facts.rows:,} rows in {facts.fragments:,} fragments{deleted}; {human(facts.bytes)} in columns"
        for header, rows in _tables(facts):
            if rows:
                yield from ("", *table(header, rows))
        yield from filled(["stale: {stale.words}", "note: {notes}", "page       {html}"], {**vars(facts), **vars(self)})


def main(config: InspectConfig) -> InspectResult:
    """Looks at the store; writes the page if there is to be one."""
    facts = gather(config.store, config.version)
    if config.html is None:
        return InspectResult(facts)
    dataset = Table(facts.uri).open(facts.version)
    decoder = open_decoder(config.store, dataset, config.vae)
    notes = [] if decoder is None or not decoder.problem else [f"Latents are not decoded: {decoder.problem}."]
    samples = draw_samples(dataset, config.samples, config.seed, decoder)
    notes += [f"{stale.words}." for stale in facts.stale]
    page = Page(facts, list(_charts(dataset)), samples, notes)
    with fsspec.open(config.html, "w", encoding="utf-8") as file:
        file.write(render(page))
    return InspectResult(facts, config.html, notes)


def _charts(dataset: lance.LanceDataset) -> Iterator[Chart]:
    """Lengths of texts, of captions in tokens, of embeddings; sizes and shapes of images; buckets."""
    names = dataset.schema.names
    seen = min(dataset.count_rows(), HISTOGRAM_ROWS)
    rows = f"of {seen:,} rows" if seen == dataset.count_rows() else f"of the first {seen:,} rows"

    def of(name: str, title: str, unit: str) -> Iterator[Chart]:
        values = numbers(dataset, name, HISTOGRAM_ROWS)
        if len(values):
            yield Chart(title, f"{name}: {len(values):,} values {rows}", histogram(values, unit))

    for name in (columns.CAPTION, columns.CAPTION_ORIGINAL):
        if name in names:
            yield from of(name, f"Length of {name}", "characters")
    for stored in dataset.schema:
        if stored.name.endswith("_tokens") and pa.types.is_integer(stored.type):
            yield from of(stored.name, "Length of captions", "tokens of the VLM")
        elif "_length_" in stored.name and (encoder := columns.metadata_of(stored).get(columns.META_ENCODER)):
            yield from of(stored.name, f"Prompt tokens of {encoder}", "tokens")
    if columns.HEIGHT in names and columns.WIDTH in names:
        height, width = (numbers(dataset, name, HISTOGRAM_ROWS) for name in (columns.HEIGHT, columns.WIDTH))
        if len(height) and len(height) == len(width):
            about = f"{len(height):,} images {rows}"
            yield Chart("Shorter side", about, histogram(np.minimum(height, width), "pixels"))
            yield Chart("Aspect ratio", about, histogram(width / height, "(width over height)"))
    for name in names:
        if name.startswith(columns.BUCKET) and pa.types.is_string(dataset.schema.field(name).type):
            yield _bar_chart("Buckets, height x width", name, labels(dataset, name, HISTOGRAM_ROWS), rows, True)
        elif name.endswith("_status") and pa.types.is_string(dataset.schema.field(name).type):
            yield _bar_chart("What the gate says of captions", name, labels(dataset, name, HISTOGRAM_ROWS), rows)


def _bar_chart(title: str, name: str, counts: Counter[str], rows: str, with_shape: bool = False) -> Chart:
    shown = counts.most_common(BUCKETS_SHOWN)
    more = f"; {len(counts) - len(shown):,} rarer ones are not shown" if len(counts) > len(shown) else ""
    return Chart(title, f"{name}: {sum(counts.values()):,} values {rows}{more}", bars(shown, with_shape))


def _tables(facts: Facts) -> Iterator[tuple[Sequence[str], list[list[str]]]]:
    """(header, rows) of the columns, stages, encoders and reasons of errors."""
    yield (
        ["column", "type", "stored as", "from", ">rows", ">nulls", ">bytes", ">a row"],
        [
            [c.name, c.type, c.about, c.stage or "ingest", f"{c.rows:,}", "" if c.nulls is None else f"{c.nulls:,}",
             human(c.bytes), f"{c.bytes / c.rows:,.1f}" if c.rows else ""]
            for c in facts.columns
        ],
    )  # fmt: skip
    yield (
        ["stage", "fingerprint", ">fragments", ">waiting", "columns"],
        [
            [s.name, s.digest, f"{s.fragments:,}", f"{s.waiting:,}" if s.waiting else "", _cut(", ".join(s.columns))]
            for s in facts.stages
        ],
    )
    yield (
        ["encoder", "fingerprint", ">width", ">instruction", "model"],
        [
            [e["encoder"], e["digest"], f"{e['width']:,}", str(e["instruction_tokens"]), e["model"]]
            for e in facts.encoders
        ],
    )
    yield (
        ["errors of", ">rows", "reason"],
        [[reason.stage, f"{reason.count:,}", _cut(reason.text)] for reason in facts.reasons[:REASONS_SHOWN]],
    )


def _cut(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= SHORT else line[: SHORT - 1] + "…"


if __name__ == "__main__":
    run("inspect")

"""One self-contained HTML page about a store: no script, no font, no image from elsewhere. All that comes from the table
is escaped: captions and error messages are strangers' text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lidit.runtime.printable import printable
from pipelines.report.facts import REASONS_SHOWN, Facts, Reason, StageFacts
from pipelines.report.samples import Picture, Sample
from pipelines.report.style import STYLE

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass
class Chart:
    """A histogram of the page."""

    title: str
    about: str
    svg: str


@dataclass
class Page:
    """All that is on it."""

    facts: Facts
    charts: list[Chart] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # such as why latents are not shown


def render(page: Page) -> str:
    """The page as HTML."""
    facts = page.facts
    name = facts.uri.rstrip("/").rpartition("/")[0].rpartition("/")[2] or facts.uri
    parts = [
        _header(facts, name),
        _section("Samples", _samples(page.samples), "" if page.samples else "The table has no rows."),
        _section("Distributions", "".join(map(_chart, page.charts)), "", "charts"),
        _section("Columns", _columns(facts)),
        _section(
            "Stages", "".join(map(_stage, facts.stages)), "" if facts.stages else "No stage has run yet.", "cards"
        ),
        _section("Encoders", _encoders(facts.encoders)) if facts.encoders else "",
        _section("Errors", "".join(map(_reason, facts.reasons[:REASONS_SHOWN])), _error_words(facts.reasons)),
        _section("Runs", _runs(facts.runs)) if facts.runs else "",
    ]
    notes = "".join(f'<p class="hint">{escape(note)}</p>' for note in page.notes)
    return printable(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - lidit</title><style>{STYLE}</style></head><body><main>{parts[0]}{notes}"
        f"{''.join(parts[1:])}<footer>lidit inspect, version {facts.version} of {escape(facts.uri)}</footer></main></body>"
        "</html>"
    )


def human(size: float) -> str:
    """Bytes in words: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError("TB is the last unit")


def _header(facts: Facts, name: str) -> str:
    errors = sum(reason.count for reason in facts.reasons)
    tiles = [
        (f"{facts.rows:,}", "rows"),
        (f"{facts.fragments:,}", "fragments"),
        (human(facts.bytes), "in columns"),
        (f"{len({stage.name for stage in facts.stages}):,}", "stages"),
        (f"{errors:,}", "errors"),
    ]
    boxes = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{what}</span></div>' for value, what in tiles)
    deleted = f", {facts.deleted:,} rows deleted" if facts.deleted else ""
    return (
        f'<header><p class="kicker">feature store</p><h1>{escape(name)}</h1><p class="path">{escape(facts.uri)} · version '
        f'{facts.version}, {escape(facts.changed)}{deleted}</p><div class="tiles">{boxes}</div></header>'
    )


def _section(title: str, inside: str, words: str = "", kind: str = "") -> str:
    hint = f'<p class="hint">{escape(words)}</p>' if words else ""
    if not inside and not hint:
        return ""
    return f'<section><h2>{title}</h2>{hint}<div class="{kind or "plain"}">{inside}</div></section>'


def _samples(samples: Sequence[Sample]) -> str:
    return f'<div class="samples">{"".join(map(_sample, samples))}</div>' if samples else ""


def _sample(sample: Sample) -> str:
    pictures = [("original", sample.image)]
    if sample.decoded is not None:
        psnr = f"decoded, {sample.psnr:.1f} dB" if sample.psnr is not None else "decoded"
        pictures = [("as encoded", sample.cropped), (psnr, sample.decoded)]
    shown = "".join(_figure(words, picture) for words, picture in pictures if picture is not None)
    texts = "".join(_text(name, text) for name, text in sample.texts.items())
    about = [
        part for part in (sample.size and f"{sample.size} px", human(sample.bytes) if sample.bytes else "") if part
    ]
    notes = "".join(f"<li><span>{escape(name)}</span> {escape(value)}</li>" for name, value in sample.notes.items())
    where = (
        f'<p class="where">{escape(sample.source)}</p>' if sample.source and sample.source != sample.image_id else ""
    )
    empty = '<div class="none">no image</div>' if not shown else ""
    return (
        f'<article><div class="pictures">{shown}{empty}</div><h3>{escape(sample.image_id)}</h3>{where}'
        f'<p class="where" title="height x width, bytes">{escape(" · ".join(about))}</p>'
        f'{texts}<ul class="notes">{notes}</ul></article>'
    )


def _figure(words: str, picture: Picture) -> str:
    return (
        f'<figure><img src="{escape(picture.uri)}" width="{picture.width}" height="{picture.height}" alt="">'
        f"<figcaption>{escape(words)}</figcaption></figure>"
    )


def _text(name: str, text: str | None) -> str:
    inside = f"<q>{escape(text)}</q>" if text is not None else '<span class="null">null</span>'
    return f'<p class="caption"><span>{escape(name)}</span>{inside}</p>'


def _chart(chart: Chart) -> str:
    return (
        f'<div class="chart"><h3>{escape(chart.title)}</h3><p class="where">{escape(chart.about)}</p>{chart.svg}</div>'
    )


def _columns(facts: Facts) -> str:
    largest = max((column.bytes for column in facts.columns), default=1) or 1
    rows = []
    for column in facts.columns:
        share = 100 * column.bytes / largest
        per_row = f"{column.bytes / column.rows:,.1f}" if column.rows else "–"
        nulls = "" if column.nulls is None else f"{column.nulls:,}"
        rows.append(
            f"<tr><td><code>{escape(column.name)}</code></td><td>{escape(column.type)}</td><td>{escape(column.about)}</td>"
            f"<td>{escape(column.stage or 'ingest')}</td><td class='n'>{column.rows:,}</td><td class='n'>{nulls}</td>"
            f"<td class='n'>{human(column.bytes)}</td><td class='n'>{per_row}</td>"
            f'<td class="size"><i style="width:{share:.1f}%"></i></td></tr>'
        )
    head = (
        "<th>column<th>type<th>stored as<th>from<th class=n>rows<th class=n>nulls<th class=n>bytes<th class=n>a row<th>"
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _stage(stage: StageFacts) -> str:
    total = stage.fragments + stage.waiting
    state = f"{stage.fragments:,} of {total:,} fragments" if stage.waiting else f"complete, {total:,} fragments"
    names = " ".join(f"<code>{escape(name)}</code>" for name in stage.columns)
    whole = escape(json.dumps(stage.fingerprint, indent=1, ensure_ascii=False))
    share = 100 * stage.fragments / total if total else 0
    return (
        f'<div class="card"><h3>{escape(stage.name)} <code class="digest">{escape(stage.digest)}</code></h3>'
        f'<div class="progress{" part" if stage.waiting else ""}"><i style="width:{share:.1f}%"></i></div>'
        f'<p class="where">{state}</p><p>{names}</p><details><summary>fingerprint</summary><pre>{whole}</pre></details></div>'
    )


def _encoders(encoders: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(str(row['encoder']))}</code></td><td class='n'>{row['width']:,}</td>"
        f"<td class='n'>{row['instruction_tokens']:,}</td><td class='n'>{row['null_tokens']:,}</td>"
        f"<td>{escape(str(row['model']))}</td><td><code>{escape(row['digest'])}</code></td></tr>"
        for row in encoders
    )
    head = "<th>encoder<th class=n>width<th class=n>instruction tokens<th class=n>null tokens<th>model<th>fingerprint"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _error_words(reasons: Sequence[Reason]) -> str:
    if not reasons:
        return "None: every row has what it should have."
    hidden = len(reasons) - REASONS_SHOWN
    return f"{hidden:,} rarer reasons are not shown." if hidden > 0 else ""


def _reason(reason: Reason) -> str:
    rows = "".join(f"<li><code>{escape(image_id)}</code> {escape(text)}</li>" for image_id, text in reason.examples)
    return (
        f'<div class="reason"><b>{reason.count:,}</b> <span class="stage">{escape(reason.stage)}</span> '
        f"{escape(reason.text)}<ul>{rows}</ul></div>"
    )


def _runs(runs: Sequence[dict[str, Any]]) -> str:
    def number(value: Any, form: str = ",.0f") -> str:
        return format(value, form) if isinstance(value, (int, float)) else ""

    rows = "".join(
        f"<tr><td>{escape(run['when'])}</td><td>{escape(run['job'])}</td><td class='{escape(run['state'])}'>"
        f"{escape(run['state'])}</td><td class='n'>{number(run.get('rows'))}</td><td class='n'>{number(run.get('errors'))}</td>"
        f"<td class='n'>{number(run.get('seconds'), ',.1f')}</td><td><code>{escape(run['run'])}</code></td></tr>"
        for run in runs
    )
    head = "<th>when (UTC)<th>job<th>state<th class=n>rows<th class=n>errors<th class=n>seconds<th>run"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'

"""Charts as inline SVG, for a page that needs nothing else. All text in them is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 460, 150  # of a histogram, in SVG units
LEFT, BOTTOM, TOP = 6, 22, 18
BINS = 40
TAIL = 0.995  # quantile beyond which values share the last bar
ROW, LABEL = 22, 110  # height of a bar of `bars`, width of its label
ICON = 14


def histogram(values: np.ndarray, unit: str) -> str:
    """Bars of equal width from the smallest value to the 99.5 % quantile; the last one holds what is beyond."""
    if not len(values):
        return ""
    least, most = float(values.min()), float(np.quantile(values, TAIL))
    whole = np.issubdtype(values.dtype, np.integer)
    bins = min(BINS, int(most - least) + 1) if whole else BINS
    if most <= least:
        most, bins = least + 1, 1
    edges = np.linspace(least, most + (1 if whole and most - least >= 1 else 0), bins + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    width, plot = (WIDTH - 2 * LEFT) / bins, HEIGHT - BOTTOM - TOP
    parts = []
    for number, count in enumerate(counts.tolist()):
        tall = plot * count / max(1, counts.max())
        last = number == bins - 1 and values.max() > edges[-1]
        span = f"{_short(edges[number])} {'and more' if last else f'to {_short(edges[number + 1])}'} {unit}: {count:,} rows"
        parts.append(
            f'<rect class="bar" x="{LEFT + number * width:.2f}" y="{TOP + plot - tall:.2f}" width="{max(1.0, width - 1):.2f}" '
            f'height="{max(tall, 0.5 if count else 0):.2f}"><title>{escape(span)}</title></rect>'
        )
    median = float(np.median(values))
    place = LEFT + (WIDTH - 2 * LEFT) * min(1.0, (median - edges[0]) / (edges[-1] - edges[0]))
    anchor = "end" if place > WIDTH * 0.5 else "start"
    parts.append(f'<line class="median" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP - 4}" y2="{TOP + plot}"/>')
    words = f"median {_short(median)}, mean {_short(float(values.mean()))}, max {_short(float(values.max()))} {unit}"
    parts.append(f'<text class="note" x="{place:.1f}" y="{TOP - 7}" text-anchor="{anchor}">{escape(words)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{TOP + plot}" y2="{TOP + plot}"/>')
    for share, side in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        at = edges[0] + (edges[-1] - edges[0]) * share
        at = round(at) if whole else at
        where = LEFT + (WIDTH - 2 * LEFT) * share
        parts.append(
            f'<text class="tick" x="{where:.1f}" y="{HEIGHT - 6}" text-anchor="{side}">{escape(_short(at))}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def bars(counts: Sequence[tuple[str, int]], with_shape: bool = False) -> str:
    """A horizontal bar per label; `with_shape`: labels are HEIGHTxWIDTH, and a small frame of that shape stands beside."""
    if not counts:
        return ""
    most, total = max(count for _, count in counts), sum(count for _, count in counts)
    height, room = len(counts) * ROW + 4, WIDTH - LABEL - 90
    parts = []
    for number, (label, count) in enumerate(counts):
        y, wide = number * ROW + 4, max(1.0, room * count / most)
        if with_shape:
            parts.append(_frame(label, y))
        text = label if len(label) <= 16 else label[:15] + "…"
        parts.append(
            f'<text class="label" x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(text)}</text>'
            f'<rect class="bar" x="{LABEL}" y="{y}" width="{wide:.1f}" height="{ROW - 8}" rx="2"><title>{escape(label)}: '
            f'{count:,}</title></rect><text class="note" x="{LABEL + wide + 6:.1f}" y="{y + 12}">{count:,} '
            f"({count / total:.0%})</text>"
        )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def curves(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """Lines through (x, y) points, one per name, with a legend; classes `s0`, `s1` ... tell them apart. All start at x = 0."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    width, height = 2 * WIDTH, 2 * HEIGHT
    left, plot = 46, height - BOTTOM - 2 * TOP
    most_x = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + (width - left - LEFT) * x / most_x:.1f},{2 * TOP + plot * (high - y) / span:.1f}"

    parts = [f'<line class="axis" x1="{left}" x2="{width - LEFT}" y1="{2 * TOP + plot}" y2="{2 * TOP + plot}"/>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = 2 * TOP + plot * (1 - share)
        parts.append(
            f'<line class="axis" x1="{left}" x2="{width - LEFT}" y1="{y:.1f}" y2="{y:.1f}"/><text class="tick" x="{left - 6}" '
            f'y="{y + 4:.1f}" text-anchor="end">{low + span * share:.2f}</text>'
        )
        x, side = left + (width - left - LEFT) * share, "end" if share == 1 else "middle"
        words = f"{across} {most_x:,.0f}" if share == 1 else f"{most_x * share:,.0f}"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="{side}">{escape(words)}</text>')
    at = left
    for number, (name, line) in enumerate(series.items()):
        parts.append(f'<polyline class="line s{number}" points="{" ".join(place(x, y) for x, y in line)}"/>')
        words = f"{name} {up}: {line[-1][1]:.3f}"
        parts.append(f'<text class="s{number}" x="{at}" y="{TOP - 2}">{escape(words)}</text>')
        at += 8 * len(words)
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def intervals(figures: Mapping[str, Mapping[str, float]]) -> str:
    """A bar from 0 to 1 per name, `value`, with a whisker from `low` to `high`."""
    room, label = WIDTH + 40, 2 * LABEL
    parts = []
    for number, (name, figure) in enumerate(figures.items()):
        y = number * ROW + 4
        wide, low, high = (room * figure[key] for key in ("value", "low", "high"))
        middle = y + (ROW - 8) / 2
        words = f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}], {figure['images']:,.0f} images"
        parts.append(
            f'<text class="label" x="{label - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar" x="{label}" y="{y}" width="{max(1.0, wide):.1f}" height="{ROW - 8}" rx="2"/>'
            f'<line class="whisker" x1="{label + low:.1f}" x2="{label + high:.1f}" y1="{middle}" y2="{middle}"/>'
            f'<text class="note" x="{label + room + 8}" y="{y + 12}">{escape(words)}</text>'
        )
    return f'<svg viewBox="0 0 {label + room + 220} {len(figures) * ROW + 8}" role="img">{"".join(parts)}</svg>'


def _frame(label: str, y: float) -> str:
    height, _, width = label.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        return ""
    scale = ICON / max(int(height), int(width))
    tall, wide = int(height) * scale, int(width) * scale
    return (
        f'<rect class="frame" x="{LEFT + (ICON - wide) / 2:.1f}" y="{y + (ICON - tall) / 2:.1f}" width="{wide:.1f}" '
        f'height="{tall:.1f}"/>'
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"

"""Charts as inline SVG, for a page that needs nothing else. All text in them is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 460, 150  # a histogram's size, in SVG units
LEFT, BOTTOM, TOP = 6, 22, 18
BINS = 40
TAIL = 0.995  # quantile beyond which values share the last bar
ROW, LABEL = 22, 110  # height of a bar of `bars`, width of its label
ICON = 14


def element(name: str, *inside: str, **attributes: object) -> Markup:
    """Writes an SVG element; what is not `Markup` is escaped, floats are rounded, `text_anchor` stands for `text-anchor`."""
    parts = [Markup("<{}").format(name)]
    for key, value in attributes.items():
        shown = round(value, 2) if isinstance(value, float) else value
        parts.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), shown))
    return Markup("{}>{}</{}>").format(Markup("").join(parts), Markup("").join(inside), name)


def histogram(values: np.ndarray, unit: str) -> Markup:
    """Bars of equal width from the smallest value to the 99.5 % quantile; the last one holds what is beyond."""
    if not len(values):
        return Markup("")
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
        tall = max(plot * count / max(1, counts.max()), 0.5 if count else 0)
        last = number == bins - 1 and values.max() > edges[-1]
        span = f"{_short(edges[number])} {'and more' if last else f'to {_short(edges[number + 1])}'} {unit}: {count:,} rows"
        parts.append(_bar(LEFT + number * width, TOP + plot - tall, max(1.0, width - 1), tall, span))
    median = float(np.median(values))
    place = LEFT + (WIDTH - 2 * LEFT) * min(1.0, (median - edges[0]) / (edges[-1] - edges[0]))
    words = f"median {_short(median)}, mean {_short(float(values.mean()))}, max {_short(float(values.max()))} {unit}"
    parts += [
        element("line", class_="median", x1=place, x2=place, y1=TOP - 4, y2=TOP + plot),
        _text("note", place, TOP - 7, words, "end" if place > WIDTH * 0.5 else "start"),
        element("line", class_="axis", x1=LEFT, x2=WIDTH - LEFT, y1=TOP + plot, y2=TOP + plot),
    ]
    for share, side in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        at = edges[0] + (edges[-1] - edges[0]) * share
        words = _short(round(at) if whole else at)
        parts.append(_text("tick", LEFT + (WIDTH - 2 * LEFT) * share, HEIGHT - 6, words, side))
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img")


def bars(counts: Sequence[tuple[str, int]], with_shape: bool = False) -> Markup:
    """A horizontal bar per label; `with_shape`: labels are HEIGHTxWIDTH, and a small frame of that shape stands beside."""
    if not counts:
        return Markup("")
    most, total = max(count for _, count in counts), sum(count for _, count in counts)
    parts = []
    for number, (label, count) in enumerate(counts):
        y, wide = number * ROW + 4, max(1.0, (WIDTH - LABEL - 90) * count / most)
        parts += [
            _frame(label, y) if with_shape else "",
            _text("label", LABEL - 8, y + 12, label if len(label) <= 16 else label[:15] + "…", "end"),
            _bar(LABEL, y, wide, ROW - 8, f"{label}: {count:,}", rx=2),
            _text("note", LABEL + wide + 6, y + 12, f"{count:,} ({count / total:.0%})"),
        ]
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {len(counts) * ROW + 4}", role="img")


def curves(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> Markup:
    """Lines through (x, y) points, one per name, with a legend; classes `s0`, `s1` ... tell them apart. All start at x = 0."""
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup("")
    width, height = 2 * WIDTH, 2 * HEIGHT
    left, plot = 46, height - BOTTOM - 2 * TOP
    most_x = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + (width - left - LEFT) * x / most_x:.1f},{2 * TOP + plot * (high - y) / span:.1f}"

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + (width - left - LEFT) * share, 2 * TOP + plot * (1 - share)
        words = f"{across} {most_x:,.0f}" if share == 1 else f"{most_x * share:,.0f}"
        parts += [
            element("line", class_="axis", x1=left, x2=width - LEFT, y1=y, y2=y),
            _text("tick", left - 6, y + 4, f"{low + span * share:.2f}", "end"),
            _text("tick", x, height - 6, words, "end" if share == 1 else "middle"),
        ]
    at = left
    for number, (name, line) in enumerate(series.items()):
        words = f"{name} {up}: {line[-1][1]:.3f}"
        parts.append(element("polyline", class_=f"line s{number}", points=" ".join(place(x, y) for x, y in line)))
        parts.append(_text(f"s{number}", at, TOP - 2, words))
        at += 8 * len(words)
    return element("svg", *parts, viewBox=f"0 0 {width} {height}", role="img")


def intervals(figures: Mapping[str, Mapping[str, float]]) -> Markup:
    """A bar from 0 to 1 per name, `value`, with a whisker from `low` to `high`."""
    room, label = WIDTH + 40, 2 * LABEL
    parts = []
    for number, (name, figure) in enumerate(figures.items()):
        y, middle = number * ROW + 4, number * ROW + ROW / 2
        wide, low, high = room * figure["value"], label + room * figure["low"], label + room * figure["high"]
        words = f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}], {figure['images']:,.0f} images"
        parts += [
            _text("label", label - 8, y + 12, name, "end"),
            _bar(label, y, max(1.0, wide), ROW - 8, rx=2),
            element("line", class_="whisker", x1=low, x2=high, y1=middle, y2=middle),
            _text("note", label + room + 8, y + 12, words),
        ]
    return element("svg", *parts, viewBox=f"0 0 {label + room + 220} {len(figures) * ROW + 8}", role="img")


def _frame(label: str, y: float) -> str:
    height, _, width = label.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        return ""
    scale = ICON / max(int(height), int(width))
    tall, wide = int(height) * scale, int(width) * scale
    return element("rect", class_="frame", x=LEFT + (ICON - wide) / 2, y=y + (ICON - tall) / 2, width=wide, height=tall)


def _bar(x: float, y: float, width: float, height: float, title: str = "", **attributes: float) -> Markup:
    inside = [element("title", title)] if title else []
    return element("rect", *inside, class_="bar", x=x, y=y, width=width, height=height, **attributes)


def _text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> Markup:
    return element("text", words, class_=kind, x=x, y=y, text_anchor=anchor)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"

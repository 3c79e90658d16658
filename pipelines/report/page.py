"""One self-contained HTML page about a store: no script, no font, no image from elsewhere. All that comes from the table
is escaped: captions and error messages are strangers' text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lidit.runtime.printable import printable
from pipelines.report.facts import REASONS_SHOWN, Facts
from pipelines.report.samples import Sample


@dataclass
class Chart:
    """A chart of the page: title, a line about it, and its SVG."""

    title: str
    about: str
    svg: Markup


@dataclass
class Page:
    """Everything that the page shows."""

    facts: Facts
    charts: list[Chart] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # such as why latents are not shown


def render(page: Page) -> str:
    """Renders the page as HTML."""
    facts = page.facts
    name = facts.uri.rstrip("/").rpartition("/")[0].rpartition("/")[2] or facts.uri
    largest = max((column.bytes for column in facts.columns), default=1) or 1
    return fill("page.html.j2", name=name, largest=largest, reasons_shown=REASONS_SHOWN, **vars(page))


def fill(template: str, *folders: Path, **values: Any) -> str:
    """Fills a template of this folder or of `folders`.

    Values are escaped, but for `Markup`, and no character of theirs turns the reading order.
    """
    loader = FileSystemLoader([*folders, Path(__file__).parent])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "human": human, "number": number, "json": partial(json.dumps, indent=1, ensure_ascii=False)
    }  # fmt: skip
    return printable(environment.get_template(template).render(values))


def human(size: float) -> str:
    """Writes a number of bytes for a person: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} B" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError("TB is the last unit")


def number(value: object, form: str = ",.0f") -> str:
    """A number as text; nothing for what is no number."""
    return format(value, form) if isinstance(value, int | float) else ""

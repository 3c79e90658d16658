"""Results of jobs: one line of JSON for scripts, lines of text for a person, and how those lines and tables are laid out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from lidit.runtime.printable import one_line, printable

FIRST_NAME = re.compile(r"\{(\w+)")


class JobResult:
    """Base of every job's result, which is a dataclass: its fields are the keys of the JSON, and `LINES` its text."""

    LINES: ClassVar[Sequence[str]] = ()
    ok: bool = True
    """The job did what it was asked to: decides the exit status."""
    dry_run: bool = False
    plan: Sequence[str] = ()
    """What a dry run would do."""

    def values(self) -> dict[str, Any]:
        """The keys of the JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}  # type: ignore[call-overload]  # a subclass is a dataclass

    def lines(self) -> Iterable[str]:
        """The text, line by line."""
        return filled(self.LINES, vars(self))

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(self.values())

    def to_text(self) -> str:
        """A few lines for a person. A text from outside, such as a caption, makes no line of its own."""
        lines = [*self.plan, "dry run: nothing was changed"] if self.dry_run else self.lines()
        return "\n".join(printable(" ".join(line.splitlines())) for line in lines)


def filled(forms: Iterable[str], values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the forms with the values in place of their {names}.

    A form whose first value is zero, empty or not there is left out; one whose first value is a list comes once for each item.
    """
    known = defaultdict(int, values)
    for form in forms:
        first = FIRST_NAME.search(form)
        name, value = (first[1], known[first[1]]) if first else ("", True)
        for item in value if isinstance(value, (list, tuple)) else [value] if value else []:
            yield form.format_map(known | {name: item})


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows as aligned lines; a name in the header that begins with `>` is of numbers, to the right."""
    cells = [[name.lstrip(">") for name in header], *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    sides = [">" if name.startswith(">") else "<" for name in header]
    return ["  ".join(map(format, row, map("{}{}".format, sides, widths))).rstrip() for row in cells]

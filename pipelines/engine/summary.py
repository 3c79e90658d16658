"""Result of a job that goes over a table: its figures, and the lines that every such job says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lidit.runtime.result import JobResult, filled
from lidit.store import columns

SPEED = (
    "{rows_per_second:,.0f} rows/s",
    "{tokens_per_second:,.0f} tokens/s",
    "{images_per_second:,.1f} images/s (equal ones counted once)",
    "padding waste {padding_waste:.1%}",
)
DONE = (
    "{job}: {state}, {rows:,} rows in {fragments:,} fragments, {seconds:,.1f} s ({work_seconds:,.1f} s of work, {commits} "
    "commits in {commit_seconds:.2f} s)",
    "  speed      {speed}",
    "  written    {written}, {bytes_per_row:,.0f} bytes a row",
    "  truncated  {truncated:,.0f} prompts were longer than the limit and cut",
)
LEFT = (
    "  waiting    {fragments_waiting:,} fragments lack the column to read",
    "  again      {fragments_stale:,} fragments: what they were made from has changed since",
    "  errors     {errors:,} rows have nulls and a reason in `{job}_error`; such as",
    "             {error_examples[error]}",
    "  {plan}",
    "  cleaned    {orphans_removed} unfinished files of killed runs",
    f"  table      {{store}}/{columns.SAMPLES_TABLE}",
    "  next       {next}",
)


@dataclass
class Summary(JobResult):
    """Figures of one run. `ok` only if every fragment that has the columns read now has the columns written.

    A job with more to say has a subclass, and its stage names that as `summary`.
    """

    job: str
    store: str
    run: str = ""
    ok: bool = False
    dry_run: bool = False
    plan: list[str] = field(default_factory=list)  # what a dry run would do; what a stamp has recorded
    fragments: int = 0  # committed by this run
    fragments_waiting: int = 0  # fragments that lack the column to read
    fragments_stale: int = 0  # done again, as a column that theirs were made from has changed
    rows: int = 0
    errors: int = 0
    error_examples: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)  # kind, such as a status -> a few texts
    bytes_written: int = 0
    seconds: float = 0.0  # the whole run
    work_seconds: float = 0.0  # first actor's begin to last actor's end, writing included
    commits: int = 0
    commit_seconds: float = 0.0
    orphans_removed: int = 0
    next: str = ""

    @property
    def rates(self) -> dict[str, float]:
        """Speeds, padding waste and bytes a row: those that there is anything to say of."""
        per_row = {"bytes_per_row": self.bytes_written / self.rows} if self.rows else {}
        return {**rates(self.rows, self.counts, self.work_seconds), **per_row}

    def values(self) -> dict[str, Any]:
        """The fields and the rates."""
        return {**super().values(), **self.rates}

    def lines(self) -> Iterator[str]:
        """Says what was done, how fast, what the job adds, what went wrong, and where the table is."""
        words = {
            **self.counts,
            **vars(self),
            **self.rates,
            "state": "done" if self.ok else "NOT DONE",
            "speed": ", ".join(filled(SPEED, self.rates)),
            "written": f"{self.bytes_written / 1e6:,.1f} MB" if self.rows else "",
            "store": self.store.rstrip("/"),
        }
        yield from filled(DONE, words)
        yield from self.own_lines()
        yield from filled(LEFT, words)

    def own_lines(self) -> Iterable[str]:
        """Lines that this job alone has."""
        return ()

    def counts_of(self, prefix: str) -> list[tuple[str, float]]:
        """The counts whose names begin so, by the rest of their names, the largest first."""
        found = [(name.removeprefix(prefix), count) for name, count in self.counts.items() if name.startswith(prefix)]
        return sorted(found, key=lambda item: (-item[1], item[0]))


def rates(rows: float, counts: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Speeds and padding waste, those that the counts tell of."""
    done = {"rows": rows, **{name: counts[name] for name in ("tokens", "images") if counts.get(name)}}
    rates = {f"{name}_per_second": count / seconds for name, count in done.items()} if seconds else {}
    if counts.get("slots"):
        rates["padding_waste"] = 1 - counts.get("tokens", 0) / counts["slots"]
    return rates

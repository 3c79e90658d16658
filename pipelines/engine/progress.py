"""Progress of a job for a person: a bar with rate and ETA on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lidit.runtime.result import filled
from pipelines.engine.summary import SPEED, rates

LOG_SECONDS = 30.0


class JobProgress:
    """Rows done of `total` (None: nobody knows), rows/s, tokens/s, padding waste, errors and ETA, from the run's tracker."""

    def __init__(self, job: str, total: int | None):
        self.job, self.total = job, total
        self.totals: dict[str, float] = {}
        self._start: float | None = None
        self._last_line = time.monotonic()
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(job, total=total, detail="starting actors")
        self._bar.start()

    def show(self, tracker: Any, final: bool = False) -> None:
        """Fetches the counts and displays them."""
        self.totals = ray.get(tracker.totals.remote())
        rows, now = int(self.totals.get("rows", 0)), time.monotonic()
        if rows and self._start is None:
            self._start = now
        detail = self._detail(now - self._start) if self._start is not None and now > self._start else "starting actors"
        self._bar.update(self._task, completed=rows, detail=detail)
        if self._bar.disable and (final or now - self._last_line > LOG_SECONDS):
            of = "" if self.total is None else f" of {self.total:,}"
            print(f"{self.job}: {rows:,}{of} rows, {detail}", file=sys.stderr, flush=True)
            self._last_line = now

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()

    def _detail(self, seconds: float) -> str:
        totals = self.totals
        parts = [*filled(SPEED, rates(totals.get("rows", 0), totals, seconds))]
        rejected = sum(count for name, count in totals.items() if name.startswith("status_") and name != "status_ok")
        if rejected:
            parts.append(f"{rejected:,.0f} without a caption")
        if totals.get("errors"):
            parts.append(f"{totals['errors']:,.0f} errors")
        return ", ".join(parts)

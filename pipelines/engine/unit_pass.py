"""One pass of the actors over units: what comes back is committed in batches, and whatever ends the pass, too.

The one committer of all jobs. A job says how finished results are committed (`commit`), and which count (`accept`).
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from lidit.runtime.fields import Config, NonNegativeFloat, PositiveInt
from pipelines.engine.pool import ActorsConfig, run_units, start_ray_data, start_tracker
from pipelines.engine.progress import JobProgress
from pipelines.engine.runs import Run
from pipelines.engine.summary import Summary
from pipelines.engine.table import Table

ERROR_BASE = 1000  # rows that the error rate is taken over at least (or all, if there are fewer)

Result = dict[str, Any]


@dataclass(frozen=True)
class CommitConfig(Config):
    """When finished fragments become visible: whichever comes first."""

    fragments: PositiveInt = 32
    """Finished fragments that wait at most."""
    seconds: NonNegativeFloat = 30.0
    """Seconds that a finished fragment waits at most (longer where committing would take over a hundredth of the time)."""


class ErrorRateExceeded(RuntimeError):
    """More rows failed than `max_error_rate` allows."""


class UnitPass(ABC):
    """Sends units to the actors and commits their results, in this order of calls: `accept`, `check_errors`, `commit`.

    Args:
        job: the job's name, of its progress and metrics.
        rows: rows of all units; None: nobody knows yet.
        max_error_rate: share of rows that may fail (0 to 1).
    """

    failed = "failed"
    """What an error message says of rows with an error."""
    finished = "fragments"
    """What an error message calls units."""
    remedy = "Mend the cause, or raise max_error_rate"
    commit_share = 1.0
    """Share of the time that commits may take, the last one apart."""

    def __init__(
        self,
        job: str,
        table: Table,
        run: Run,
        summary: Summary,
        *,
        rows: int | None,
        when: CommitConfig = CommitConfig(),
        max_error_rate: float = 1.0,
    ):
        self.job, self.table, self.run, self.summary = job, table, run, summary
        self.rows, self.when, self.max_error_rate = rows, when, max_error_rate
        self.pending: list[Result] = []  # results that wait for the commit
        self.oldest = self.last_commit = time.monotonic()
        self.last_commit_took = 0.0

    @abstractmethod
    def commit(self, results: list[Result]) -> bool:
        """Makes finished results part of the table and counts them in the summary; returns whether there was a commit."""

    def accept(self, result: Result) -> bool:
        """Whether a result is to be committed: Ray may give more than one of a unit."""
        return True

    def send(self, worker: type, arguments: dict[str, Any], units: list[dict[str, Any]], actors: ActorsConfig) -> None:
        """Has actors work on the units; on any end but a crash, what is finished is committed.

        Args:
            arguments: of the worker, beside `table_uri`, `run_id` and `tracker`.

        Raises:
            ErrorRateExceeded: too many rows failed; units without errors up to then are committed.
            RuntimeError: an actor failed.
        """
        start_ray_data()
        tracker = start_tracker(self.job.partition(" ")[0])
        arguments = {**arguments, "table_uri": self.table.uri, "run_id": self.run.id, "tracker": tracker}
        begun, ended = float("inf"), 0.0
        progress = JobProgress(self.job, self.rows)

        def first_error() -> str:
            return ray.get(tracker.first_error.remote())

        try:
            with contextlib.closing(run_units(worker, arguments, units, actors, self.run.seen)) as results:
                for result in results:
                    progress.show(tracker)
                    if result is not None and self.take(result):
                        begun, ended = min(begun, result.get("begun", begun)), max(ended, result.get("ended", ended))
                    self.check_errors(progress.totals, first_error)
                    if self.is_due():
                        self.flush()
            progress.show(tracker, final=True)
            self.check_errors(progress.totals, first_error, at_end=True)
        except ErrorRateExceeded:
            self.pending = [result for result in self.pending if not result["errors"]]
            raise
        finally:
            progress.close()
            ray.kill(tracker)
            self.flush()
            self.summary.work_seconds += max(0.0, ended - begun)

    def take(self, result: Result) -> bool:
        """Keeps a result for the next commit; False where it does not count."""
        if not self.accept(result):
            return False
        self.oldest = self.oldest if self.pending else time.monotonic()
        self.pending.append(result)
        return True

    def waiting(self) -> int:
        """Finished fragments that wait for the commit."""
        return len(self.pending)

    def is_due(self) -> bool:
        """Whether enough waits, or has waited for long, and the last commit was not too dear for another one now."""
        now = time.monotonic()
        if not self.pending or now - self.last_commit < self.last_commit_took / self.commit_share:
            return False
        return self.waiting() >= self.when.fragments or now - self.oldest >= self.when.seconds

    def flush(self) -> None:
        """Commits all that waits."""
        if not self.pending:
            return
        start = time.monotonic()
        committed, self.pending = self.commit(self.pending), []
        self.last_commit = time.monotonic()
        self.last_commit_took = self.last_commit - start
        self.summary.commits += committed
        self.summary.commit_seconds += self.last_commit_took

    def check_errors(self, totals: dict[str, float], first_error: Callable[[], str], at_end: bool = False) -> None:
        """Raises ErrorRateExceeded where too many rows failed. A few at the start are no rate yet."""
        errors, rows = int(totals.get("errors", 0)), int(totals.get("rows", 0))
        expected = self.rows if self.rows is not None else rows if at_end else ERROR_BASE
        if errors > self.max_error_rate * max(rows, min(expected, ERROR_BASE)):
            raise ErrorRateExceeded(
                f"{errors:,} of {rows:,} rows {self.failed}, more than max_error_rate {self.max_error_rate:g} allows; such as: "
                f"{first_error()}. Finished {self.finished} without errors are committed. {self.remedy}, and run the same "
                f"command again"
            )

"""Ray's part of a stage: a pool of actors that work on units, and the tracker that knows who was doing what.

Units and results are small JSON-able dictionaries: features never pass through Ray. Ray repeats a call whose actor died,
for ever; the tracker bounds that. It hears of every piece of work before it is begun, so when a process dies it knows the
piece that was in hand: next time that piece is taken row by row, and a row that kills its process twice is left out. Of a
unit on which a process has died it also hears, where a worker tells it, which part is read: one that kills twice is read up to
where it does.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lidit.runtime.cluster import start_ray
from lidit.runtime.fields import Config, PositiveInt
from pipelines.engine.job_metrics import JobMetrics

DEATHS_OF_A_ROW = 2  # before it is quarantined
DEATHS_OF_A_PART = 2  # while it is read, before it is set aside
DEATHS_OF_A_UNIT = 16  # before the job gives up on it
POLL_SECONDS = 0.5
LEAVE_SECONDS = 20.0  # that a driver which leaves early waits for its own threads to leave Ray
MAX_BLOCKS = 2000  # blocks that Ray Data is given; more units than that share blocks

Window = TypeVar("Window")


@dataclass(frozen=True)
class ActorsConfig(Config):
    """The pool of actors, each with its own copy of the models."""

    min: PositiveInt = 1
    """Actors to start with."""
    max: PositiveInt | None = None
    """Actors at most. Default: as many as the cluster's GPUs (or CPUs, without GPUs) hold now."""
    num_cpus: float = 1.0
    """CPU cores per actor; also its torch threads."""
    num_gpus: float | None = None
    """GPUs per actor, fractions allowed. Default: 1 where the cluster has GPUs, else 0."""
    accelerator_type: str | None = None
    """Kind of GPU that every actor must have, as Ray names it (`L40S`, `H100`). Default: any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max is not None and self.max < self.min:
            raise ValueError(f"actors: expected min <= max, received min {self.min}, max {self.max}")

    def device(self) -> str:
        """The device that models are on in an actor: "cuda" where it has a GPU, or a part of one."""
        import torch  # an ingest's actors need none

        return "cuda" if self.num_gpus != 0 and torch.cuda.is_available() else "cpu"


@dataclass
class Attempt:
    """Tells an actor what it must know before it begins a unit."""

    careful: list[tuple[int, int]]  # row ranges to take row by row
    quarantined: list[int]  # rows to leave out
    deaths: int = 0  # of processes on this unit so far
    suspects: list[int] = field(default_factory=list)
    """Parts that a process died on while it read them: the tracker is told of each record."""
    set_aside: dict[int, int] = field(default_factory=dict)
    """Parts that are read no further -> how many records of each are."""


@dataclass
class _UnitState:
    process: str = ""
    deaths: int = 0
    in_hand: tuple[int, int] | None = None
    reading: tuple[int, int] | None = None  # a part, and how many of its records have been read
    careful: list[tuple[int, int]] = field(default_factory=list)
    row_deaths: Counter[int] = field(default_factory=Counter)
    part_deaths: Counter[int] = field(default_factory=Counter)
    set_aside: dict[int, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


class Tracker:
    """Tracks which rows of which unit are in hand, and how far all is. One small actor beside the driver.

    `job`: under whose name the counts are exported as metrics; none: not at all.
    """

    def __init__(self, job: str = "") -> None:
        self._metrics = JobMetrics(job) if job else None
        self._units: dict[str, _UnitState] = {}
        self._finished: Counter[str] = Counter()
        self._first_error = ""

    def begin(self, unit: str, process: str = "") -> Attempt:
        """An actor takes up a unit. If another process left it in the middle, that has died, be it while it was reading.

        Args:
            process: names the process; the same one may begin anew, as after an outage.

        Raises:
            RuntimeError: processes died on this unit too often.
        """
        if (state := self._units.get(unit)) is None:
            state = self._units[unit] = _UnitState()
        elif not process or process != state.process:
            self._died(unit, state)
        state.process, state.in_hand, state.reading, state.counts = process, None, None, Counter()
        quarantined = [row for row, deaths in state.row_deaths.items() if deaths >= DEATHS_OF_A_ROW]
        return Attempt(state.careful, quarantined, state.deaths, list(state.part_deaths), state.set_aside)

    def _died(self, unit: str, state: _UnitState) -> None:
        state.deaths += 1
        where = "with no rows in hand: while it was reading them?"
        if state.in_hand is not None:
            first, stop = state.in_hand
            where = f"at rows {first} to {stop - 1}"
            if stop - first == 1:
                state.row_deaths[first] += 1
            else:
                state.careful.append((first, stop))
        elif state.reading is not None:
            part, records = state.reading
            where = f"while it read part {part} behind its record {records}"
            state.part_deaths[part] += 1
            if state.part_deaths[part] >= DEATHS_OF_A_PART:
                state.set_aside[part] = min(records, state.set_aside.get(part, records))
                state.careful, state.row_deaths = [], Counter()  # from here on rows have other numbers
        explained = DEATHS_OF_A_PART * len(state.set_aside)
        if state.deaths - explained > DEATHS_OF_A_UNIT:
            raise RuntimeError(
                f"processes died {state.deaths} times on unit {unit}, last {where}: out of memory? Have an actor hold less at "
                f"a time (a job's --help names its batch size), or give it more; what is committed is kept"
            )

    def enter(self, unit: str, first: int, stop: int) -> None:
        """The actor is about to work on rows first to stop - 1."""
        state = self._units[unit]
        state.in_hand, state.reading = (first, stop), None

    def read(self, unit: str, part: int, records: int) -> None:
        """The actor is about to read on in a part of the unit, of which it has read so many records."""
        self._units[unit].reading = (part, records)

    def first_error(self) -> str:
        """Why the first row that failed did; empty if none has."""
        return self._first_error

    def leave(self, unit: str, counts: dict[str, float], error: str = "") -> None:
        """These rows are done; `counts` are added up for the progress display. `error`: why one of them failed."""
        self._first_error = self._first_error or error
        state = self._units[unit]
        state.in_hand = state.reading = None
        state.counts.update(counts)  # type: ignore[arg-type]
        if self._metrics is not None:
            self._metrics.add(counts)

    def end(self, unit: str) -> None:
        """The unit's file is written."""
        self._finished.update(self._units.pop(unit).counts)

    def totals(self) -> dict[str, float]:
        """Counts over all units, those in hand included."""
        return dict(sum((state.counts for state in self._units.values()), Counter(self._finished)))


def read_ahead(windows: Iterator[Window], attempt: Attempt) -> Iterator[Window]:
    """The windows of a unit, the next one read while one is worked on.

    Where a process has died on the unit, one thing is done after the other, so that it is known which of them kills.
    """
    if attempt.deaths:
        yield from windows
        return
    with ThreadPoolExecutor(1) as reading:
        upcoming = reading.submit(next, windows, None)
        while (window := upcoming.result()) is not None:
            upcoming = reading.submit(next, windows, None)
            yield window


def start_ray_data() -> None:
    """Ray, and Ray Data without its own progress bars and logs: what fails a job is raised, and told by the command line."""
    start_ray(ray, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def start_tracker(job: str) -> Any:
    """The tracker of a run, kept on the driver's own node, which must not go away either."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Tracker).options(num_cpus=0, scheduling_strategy=here).remote(job)  # type: ignore[attr-defined]


def resolve_actors(config: ActorsConfig) -> tuple[int, int, float]:
    """(min, max, num_gpus) as the cluster at hand allows."""
    resources = ray.cluster_resources()
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
    num_gpus = config.num_gpus if config.num_gpus is not None else float(gpus > 0)
    if not os.environ.get("RAY_ADDRESS") and (config.num_cpus > cpus or num_gpus > gpus):
        raise ValueError(
            f"actors: each needs {config.num_cpus:g} CPUs and {num_gpus:g} GPUs, this machine has {cpus:g} and {gpus:g}; "
            f"lower actors.num_cpus or actors.num_gpus"
        )
    fit = gpus / num_gpus if num_gpus else cpus / max(config.num_cpus, 1e-3)
    largest = config.max or max(config.min, int(fit), 1)
    return config.min, largest, num_gpus


def run_units(
    worker: type,
    worker_kwargs: dict[str, Any],
    units: list[dict[str, Any]],
    actors: ActorsConfig,
    before: Callable[[], None] = lambda: None,
) -> Generator[dict[str, Any] | None, None, None]:
    """Sends units through a Ray Data actor pool; yields results as they come, and None every half second without one.

    `before()`, then `worker(**worker_kwargs)` is called once per actor, the object then with each unit. An exception in them
    ends the run here; the death of their process does not.
    """
    smallest, largest, num_gpus = resolve_actors(actors)
    largest = min(largest, len(units))
    kind: dict[str, Any] = {"accelerator_type": actors.accelerator_type} if num_gpus and actors.accelerator_type else {}
    texts = [{"unit": json.dumps(unit)} for unit in units]  # as text: Ray would turn lists into arrays
    dataset = ray.data.from_items(texts, override_num_blocks=min(len(units), MAX_BLOCKS)).map_batches(
        _UnitCaller,
        fn_constructor_args=(worker, worker_kwargs, before),
        batch_size=1,
        zero_copy_batch=True,
        num_cpus=actors.num_cpus,
        num_gpus=num_gpus,
        **kind,
        compute=ray.data.ActorPoolStrategy(min_size=min(smallest, largest), max_size=largest),
    )
    name = f"StreamingExecutor-{dataset.get_dataset_id()}"

    return _poll(lambda: (json.loads(row["result"]) for row in dataset.iter_rows()), lambda: _stop_executor(name))


def _stop_executor(name: str) -> None:
    """Ends the thread in which Ray Data drives its actors; an iterator over their results ends for want of more.

    Ray Data has no public way to leave a dataset before its end, and `ray.shutdown` beside a thread that still calls Ray may
    crash the process.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(name) and hasattr(thread, "shutdown"):
            thread.shutdown(force=False)


class _UnitCaller:
    """The batch function that Ray Data calls: unwraps the unit, wraps the result."""

    def __init__(self, worker: type, worker_kwargs: dict[str, Any], before: Callable[[], None] = lambda: None):
        before()
        self.worker = worker(**worker_kwargs)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        return {"result": [json.dumps(self.worker(json.loads(unit))) for unit in batch["unit"]]}


def _poll(source: Callable[[], Iterator[Any]], stop: Callable[[], None] = lambda: None) -> Generator[Any, None, None]:
    """Runs an iterator in a thread; yields its items, or None after each `POLL_SECONDS` without one.

    Args:
        stop: ends the iterator from without, where the consumer leaves early; it then waits for the threads.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue()
    stopped = threading.Event()

    def pump() -> None:
        try:
            for item in source():
                items.put(("item", item))
                if stopped.is_set():
                    break
            items.put(("end", None))
        except BaseException as error:  # handed to the consumer, which raises it
            items.put(("error", error))

    thread = threading.Thread(target=pump, name="results", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = items.get(timeout=POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        if thread.is_alive():
            stop()
            thread.join(LEAVE_SECONDS)
            for other in threading.enumerate():
                if other.name == "iter_threaded":  # Ray Data's, behind the iterator
                    other.join(LEAVE_SECONDS)

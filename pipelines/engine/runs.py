"""A run's folder in the store, `<store>/runs/<run id>/`: its config, its summary, and what it may still do.

    alive   its heartbeat, while it works
    fence   it may not commit any more: written by a run that took it for dead, or by itself when it failed
    over    nothing of it can be committed any more: files that it wrote and no version refers to are garbage

Whether a run is dead is a judgement and may be wrong, so nothing is taken from it before it is fenced: the fence is written,
then a version of the table that every commit in flight conflicts with (`Table.barrier`), then `over`. A run asks for its fence
(`check`) after it has opened the version that it commits to. So each of its commits lands before the barrier, and counts, or
never does. docs/consistency.md has the whole protocol.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lidit.runtime.files import is_there, make_folder, remove_file, replace_file
from lidit.runtime.heartbeat import Heartbeat, is_alive, make_heartbeat, read_heartbeat
from lidit.runtime.outage import outlast
from lidit.store import columns
from pipelines.engine.table import Table

SEEN_SECONDS, SEEN_PAUSE = 10.0, 0.5  # a network disk may show a new folder late
ALIVE, FENCE, OVER = "alive", "fence", "over"
OF_EARLIER_VERSIONS = {"config.yaml", "summary.json"}  # of lidit: a run that ended left these and no `over`

State = Literal["alive", "dead", "over", "unknown"]


class Fenced(RuntimeError):
    """This run was taken for dead, and another one goes on in its place."""


class Run:
    """One run of a job on a store. Use as a context: alive inside, over after.

    Args:
        store: folder or URI of the store.
        job: name of the job, the first part of the run's id.
    """

    def __init__(self, store: str, job: str):
        self.store = store
        self.id = f"{job}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        self._fs, self._root = runs_folder(store)
        self._heartbeat = Heartbeat(self._beat, f"run {self.id}")

    def __enter__(self) -> Run:
        outlast(lambda: make_folder(self._fs, f"{self._root}/{self.id}"), "making the run's folder")
        outlast(self._beat, "writing the run's heartbeat")
        self._heartbeat.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._heartbeat.stop()
        try:  # a commit of a run that failed may still be on its way: only the next run knows, behind its barrier
            self._mark(self.id, OVER if exc[0] is None else FENCE)
            remove_file(self._fs, self._path(self.id, ALIVE))
        except Exception:
            if exc[0] is None:  # else what ended the run is what its reader must be told
                raise

    def write(self, name: str, text: str) -> str:
        """Puts a file into the run's folder; returns where."""
        path = self._path(self.id, name)
        outlast(lambda: self._fs.pipe_file(path, text.encode()), f"writing {name}")
        return self._fs.unstrip_protocol(path).removeprefix("file://")

    @property
    def seen(self) -> Callable[[], None]:
        """Gives what a worker calls first: `check_seen` of this run, from this machine."""
        return functools.partial(check_seen, self.store, self.id, socket.gethostname())

    def check(self) -> None:
        """Asks the store whether this run may still commit.

        Raises:
            Fenced: another run took this one for dead; it may have removed its unfinished files.
        """
        fence = self._path(self.id, FENCE)
        if outlast(lambda: is_there(self._fs, fence), "looking for a fence"):
            raise Fenced(
                f"run {self.id} was silent for so long (suspended, or cut off from the store?) that another one took it for "
                f"dead and may have removed its unfinished files; run the same command again: what is committed is kept"
            )

    def alive(self, jobs: Iterable[str] = ()) -> list[str]:
        """Ids of the other runs that are alive in the store, of these jobs (default: of any)."""
        return [run_id for run_id, state in self.states(jobs).items() if state == "alive"]

    def rivals(self, table: Table, jobs: Iterable[str]) -> list[str]:
        """Fences the runs that are dead, then looks which other runs of these jobs may still commit.

        In this order: a run that wakes up between two looks is either fenced or a rival, never neither.

        Returns:
            Their ids. Where there are none, only runs that begin later can still commit, and those find this one.
        """
        self.end_dead(table)
        return [run_id for run_id, state in self.states(jobs).items() if state in ("alive", "dead")]

    def end_dead(self, table: Table) -> set[str]:
        """Fences the runs that are dead, for good.

        Returns:
            Ids of all runs that are over: no commit of theirs can land any more.
        """
        states = self.states()
        dead = [run_id for run_id, state in states.items() if state == "dead"]
        for run_id in dead:
            self._mark(run_id, FENCE)
        if dead:
            table.barrier()
        for run_id in dead:
            self._mark(run_id, OVER)
        return {run_id for run_id, state in states.items() if state in ("dead", "over")}

    def states(self, jobs: Iterable[str] = ()) -> dict[str, State]:
        """Id -> state of every other run of these jobs (default: of any), by id."""
        jobs = tuple(f"{job}-" for job in jobs)
        found = outlast(self._marks, "looking after other runs")
        return {
            run_id: self._state(run_id, found[run_id])
            for run_id in sorted(found)
            if run_id != self.id and (not jobs or run_id.startswith(jobs))
        }

    def state(self, run_id: str) -> State:
        """Tells what a run may still do: `dead` looks so, and is not fenced or its commits in flight are not yet excluded."""
        return self._state(run_id, outlast(lambda: self._marks(run_id), "looking after a run").get(run_id, set()))

    def _state(self, run_id: str, marks: set[str]) -> State:
        if OVER in marks:
            return "over"
        if FENCE in marks:
            return "dead"
        if ALIVE not in marks:
            return "over" if marks & OF_EARLIER_VERSIONS else "unknown"
        return outlast(lambda: self._judged(run_id), "reading a heartbeat")

    def _judged(self, run_id: str) -> State:
        path = self._path(run_id, ALIVE)
        try:
            heartbeat = read_heartbeat(self._fs.cat_file(path))
        except FileNotFoundError:  # it ended at this moment
            return self.state(run_id)
        return "alive" if is_alive(heartbeat, self._fs, path) else "dead"

    def _marks(self, run_id: str = "") -> dict[str, set[str]]:
        """Id -> names of the files in its folder; one listing, however many runs there were."""
        self._fs.invalidate_cache()  # s3fs remembers listings
        root = f"{self._root}/{run_id}".rstrip("/")
        try:
            paths = self._fs.find(root)
        except FileNotFoundError:
            return {}
        found: dict[str, set[str]] = {}
        for path in paths:
            parts = str(path)[len(self._root) :].strip("/").split("/")
            if len(parts) == 2:
                found.setdefault(parts[0], set()).add(parts[1])
        return found

    def _mark(self, run_id: str, mark: str) -> None:
        content = json.dumps({**make_heartbeat(), "by": self.id}).encode()
        outlast(lambda: replace_file(self._fs, self._path(run_id, mark), content), f"writing {mark} of {run_id}")

    def _path(self, run_id: str, name: str) -> str:
        return f"{self._root}/{run_id}/{name}"

    def _beat(self) -> None:
        replace_file(self._fs, self._path(self.id, ALIVE), json.dumps(make_heartbeat()).encode())


def check_seen(store: str, run_id: str, driver: str = "") -> None:
    """Tells whether this process sees the folder that a run's driver has made in the store: the same place for both.

    Args:
        store, run_id: of the run.
        driver: name of the driver's machine, for the message.

    Raises:
        ValueError: another place has that path here, or none.
    """
    fs, root = runs_folder(store)
    deadline = time.monotonic() + SEEN_SECONDS
    while not outlast(lambda: is_there(fs, f"{root}/{run_id}"), "looking for the run"):
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{store}: expected to see there what the job's driver on {driver or 'another machine'} has written "
                f"({columns.RUNS_FOLDER}/{run_id}); this worker on {socket.gethostname()} sees another place, or none. A path "
                f"must be the same storage on every machine of the cluster (a network disk, an object store): mount it there, "
                f"or name a store that all see"
            )
        time.sleep(SEEN_PAUSE)


def runs_folder(store: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(file system, path) of the folder of a store's runs: beside its table, also where the store only links to that."""
    fs, root = fsspec.core.url_to_fs(store.rstrip("/"))
    if isinstance(fs, LocalFileSystem):
        table = Path(root, columns.SAMPLES_TABLE)
        root = str(Path(os.path.realpath(table)).parent)
    return fs, f"{root}/{columns.RUNS_FOLDER}"

"""What the simulated hosts of `consistency_world` do: the jobs, cut down to what touches the store, in their real order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from lidit.runtime.lease import Lease, check_number
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.runs import Run
from pipelines.engine.table import Table
from tests.support.consistency_ground import ground
from tests.support.consistency_world import Host, World

ROWS = pa.schema([pa.field("id", pa.string())])
FEATURE = pa.schema([pa.field("feature", pa.int64())])
PASSES = 5
MIXES = (("ingest",), ("ingest", "stage"), ("ingest", "stage", "preprocess", "train"), ("preprocess",), ("train",))
NOT_OURS = (
    "samples.lance/data/0f3a.lance",
    "samples.lance/data/some-other-tool-0f3a.lance",
    "samples.lance/data/embed-20200101T000000-abcdef-0123456789abcdef0123456789abcdef.lance",  # of a run of another store
    "samples.lance/data/ingest-notes.txt",
    "runs/notes.txt",
)


def run_schedule(folder: Path, seed: int) -> World:
    """Runs the schedule of that seed: first with faults, then a fresh host that finds all well and completes the work.

    The world's `faults` say which promises were broken.
    """
    world = World(folder, seed)
    with ground(world):
        for name in NOT_OURS:
            path = world.folder / "store" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"precious")
        _begin(world)
        world.settle()
        world.calm, world.now = True, world.now + 2_000.0
        jobs = Jobs(world, 4)
        fresh = world.spawn(Host("fresh", world.rng.uniform(-7200, 7200)), "fresh", jobs.preprocess, 0.0)
        fresh.disturbed = False
        world.settle()
        _check_end(world, jobs)
    return world


def _begin(world: World) -> None:
    """Two to four hosts, and the processes that each of them starts, at any time."""
    rng = world.rng
    mix = rng.choice(
        (("ingest",), ("ingest", "stage"), ("ingest", "stage", "preprocess", "train"), ("preprocess",), ("train",))
    )
    hosts = [Host(f"host{number}", rng.choice((0.0, rng.uniform(-7200, 7200)))) for number in range(rng.randint(2, 4))]
    jobs = Jobs(world, 3)
    starts = (lambda: 0.0, lambda: rng.uniform(0, 30), lambda: rng.uniform(900, 2_000), lambda: rng.uniform(0, 5_000))
    if rng.random() < 0.5:
        job, nth = rng.choice(("ingest", "ingest", "stage")), rng.randint(0, 2)
        first = world.spawn(hosts[0], job, getattr(jobs, job), 0.0)
        first.ambush = rng.choice(
            (("commit", nth), ("commit", nth), ("scan", 0), ("open", nth), ("", rng.randint(0, 50)))
        )
        mix, starts = (job, "ingest"), starts[2:]
    for host in hosts:
        for _ in range(rng.randint(1, 3)):
            job = rng.choice(mix)
            world.spawn(host, job, getattr(jobs, job), rng.choice(starts)())


class Jobs:
    """The jobs on one source of so many units, two rows each."""

    def __init__(self, world: World, units: int):
        self.world, self.table = world, Table(world.uri)
        self.source = {f"unit{unit}": [f"unit{unit}-{row}" for row in range(2)] for unit in range(units)}

    def ingest(self) -> None:
        """As `pipelines.ingest.main`."""
        with Run(self.world.store, "ingest") as run:
            if others := run.rivals(self.table, ["ingest"]):
                raise ValueError(f"another ingest works on the store: {others}")
            known = set(self.read("id"))
            rng, pending = self.world.rng, []
            for rows in self.source.values():
                if new := [row for row in rows if row not in known]:
                    pending.append(self._write(run, ROWS, new))
                    self._work()
                    if rng.random() < 0.4:
                        self._append(run, pending)
                        pending = []
            if pending:
                self._append(run, pending)
            self._clean(run)
            run.write("summary.json", "{}")

    def stage(self) -> None:
        """As `pipelines.engine.stage.run_stage`."""
        self.table.open()
        with Run(self.world.store, "embed") as run:
            self.table.declare(list(FEATURE), "fingerprint")
            for _ in range(PASSES):
                dataset = self.table.open()
                if not (missing := self.table.missing(["feature"], dataset)):
                    break
                pending = []
                for fragment in sorted(missing):
                    rows = dataset.get_fragment(fragment).count_rows()
                    pending.append(self._write(run, FEATURE, list(range(rows)), fragment))
                    self._work()
                    if self.world.rng.random() < 0.4:
                        self._attach(run, pending)
                        pending = []
                if pending:
                    self._attach(run, pending)
            else:
                raise RuntimeError(f"{len(missing)} fragments are still missing")
            self._clean(run)
            run.write("summary.json", "{}")

    def preprocess(self) -> None:
        """As `pipelines.preprocess.main`."""
        wait = self.world.rng.choice((0.0, 1200.0))
        with Lease(self.world.store, "preprocess", wait) as lease, Run(self.world.store, "preprocess"):
            self.world.check(lease, lease.check)
            self.ingest()
            self.world.check(lease, lease.check)
            self.stage()
            self.world.check(lease, lease.check)

    def train(self) -> None:
        """As `trainer.train.only_driver` and its saves, each of which asks for a later lease first."""
        folder = f"{self.world.store}/training"
        with Lease(folder, "driver") as lease:
            for _ in range(3):
                self._work()
                self.world.check(lease, lambda: check_number(folder, "driver", lease.number))
                self._work()

    # -- parts --------------------------------------------------------------------------------------------------------

    def read(self, column: str) -> list[Any]:
        """All values of a column in the newest version."""
        dataset = self.table.open()
        return self.world.request(
            "scan", lambda: dataset.to_table(columns=[column]).column(0).to_pylist(), lambda: OSError("reset")
        )

    def _append(self, run: Run, files: list[Any]) -> None:
        self.table.append(files, run.check)

    def _attach(self, run: Run, files: list[Any]) -> None:
        self.table.attach(files, run.check)

    def _clean(self, run: Run) -> None:
        self.table.remove_orphans(lambda: run.end_dead(self.table) | {run.id})

    def _write(self, run: Run, schema: pa.Schema, values: list[Any], fragment: int | None = None) -> Any:
        writer = ColumnFileWriter(self.table.uri, schema, run.id)
        writer.write(pa.record_batch([pa.array(values, schema.field(0).type)], schema=schema))
        return writer.finish(self.table.open(), fragment)

    def _work(self) -> None:
        self.world.task.wait(self.world.rng.choice((0.1, self.world.rng.uniform(0, 400))))


def _check_end(world: World, jobs: Jobs) -> None:
    """What must be true when all is over."""
    try:
        rows = Counter(jobs.read("id"))
        features = jobs.read("feature")
    except (OSError, ValueError, RuntimeError) as error:
        world.fault(f"the table cannot be read: {str(error)[:200]}")
        return
    if doubled := sorted(row for row, count in rows.items() if count > 1):
        world.fault(f"rows that are there twice: {doubled}")
    wanted = {row for rows in jobs.source.values() for row in rows}
    if rows.keys() != wanted or None in features:
        world.fault(f"the work is not complete: lacks {sorted(wanted - rows.keys())}, {features.count(None)} features")
    for name in NOT_OURS:
        path = world.folder / "store" / name
        if not path.exists() or path.read_bytes() != b"precious":
            world.fault(f"not ours, and gone: {name}")
    data = {path.name for path in (world.folder / "store/samples.lance/data").iterdir()}
    if left := data - world.committed - {Path(name).name for name in NOT_OURS}:
        world.fault(f"garbage that stays for ever: {sorted(left)}")

"""Hosts that share a store, in one process and in virtual time: pauses, cuts, lost answers, kills and wrong clocks.

The code of runs, leases and tables is the real one, with real Lance commits to a local table. Only what it stands on is
scripted (`consistency_ground`): clocks, threads, process ids, the file system and the moment at which a request reaches the
storage. Each simulated process runs in threads of its own, and exactly one runs at a time; each request to the storage is a
point at which others may go first and something may go wrong. A schedule is a function of one integer: `run_schedule` of
`consistency_jobs`.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance

START = 1_700_000_000.0
FAULTS_END = 6_000.0  # seconds after the start
MOST_STEPS = 20_000
DECIDING, OFTEN = ("commit", "data", "create", "rm", "scan", "tracked_files"), 6  # requests at which more goes wrong
KINDS = ("pause", "suspend", "refuse", "lose", "late", "cut", "mute", "kill", "forbid")


class Killed(BaseException):
    """The simulated process is gone: nothing that it does afterwards has an effect."""


class Host:
    """A machine: its name, its clock, and until when the storage is out of its reach."""

    def __init__(self, name: str, skew: float):
        self.name, self.skew, self.cut_until = name, skew, 0.0


class Process:
    """One process of a host, and whether it runs."""

    def __init__(self, host: Host, pid: int, name: str):
        self.host, self.pid, self.name = host, pid, name
        self.dead, self.disturbed = False, False
        self.paused_until = self.mute_until = self.stood_still = 0.0
        self.ambush: tuple[str, int] | None = None  # paused at the n-th request of that name (any, where empty)


class Task:
    """A thread of a process; runs only when the world says so."""

    def __init__(self, world: World, process: Process, act: Callable[[], None], beats: bool):
        self.world, self.process, self.beats = world, process, beats
        self.turn, self.token, self.done = threading.Semaphore(0), 0, False
        self._act = act
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, delay: float = 0.0) -> None:
        """Has its first turn after so many seconds."""
        self._thread.start()
        self.world.wake(self, delay)

    def wait(self, delay: float) -> None:
        """Lets others run for so many seconds of virtual time."""
        if self.process.dead:
            raise Killed
        self.world.wake(self, delay)
        self.world.turn.release()
        self.turn.acquire()
        if self.process.dead:
            raise Killed

    def _run(self) -> None:
        self.turn.acquire()
        self.world.local.task = self
        try:
            if not self.process.dead:
                self._act()
        except Killed:
            pass
        except BaseException as error:
            self.world.fault(f"crash of {self.process.name}: {type(error).__name__}: {error}")
        finally:
            self.done = True
            self.world.turn.release()


class World:
    """A store, two to four hosts, and a schedule of what they do and what goes wrong.

    Args:
        folder: an empty one, for the store.
        seed: says everything else.

    Attributes:
        faults: promises that were broken, in the order in which it was seen.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.rng = folder, seed, random.Random(seed)
        self.now, self.turn, self.local = START, threading.Semaphore(0), threading.local()
        self.faults: list[str] = []
        self.log: list[str] = []
        self.counts = dict.fromkeys((*KINDS, "step", "requests", "commits", "fenced"), 0)
        self.committed: set[str] = set()
        self.written: dict[str, float] = {}  # path -> when, by the storage's clock
        self.leases: dict[str, dict[int, tuple[float, str]]] = {}
        self.processes: dict[int, Process] = {}
        self.calm = False
        self.nobody = Process(Host("nowhere", 0.0), 1, "the test")
        self.store = f"sim://{folder}/store"
        self.uri = f"{self.store}/samples.lance"
        self._order, self._queue = itertools.count(), []  # type: ignore[var-annotated]
        self._budget = self.rng.randint(1, 8)
        self._chance = self.rng.choice((0.01, 0.03, 0.08))
        self._kinds = self.rng.sample(KINDS, self.rng.randint(2, len(KINDS)))

    # -- time and turns -----------------------------------------------------------------------------------------------

    def spawn(self, host: Host, name: str, job: Callable[[], None], delay: float) -> Process:
        """A process that begins its job after so many seconds."""
        process = Process(host, 1000 + len(self.processes), f"{name}@{host.name}/{1000 + len(self.processes)}")
        self.processes[process.pid] = process

        def act() -> None:
            self.note(f"{process.name} begins")
            try:
                job()
                self.note(f"{process.name} ends")
            except (OSError, RuntimeError, ValueError) as error:
                self.note(f"{process.name} fails: {type(error).__name__}: {str(error)[:300]}")
                taken = type(error).__name__ in ("Fenced", "LeaseLost") or "could not show" in str(error)
                self.counts["fenced"] += taken
                if taken and not process.disturbed:
                    self.fault(f"{process.name} was taken for dead though nothing had happened to it")
                if self.calm:
                    self.fault(f"{process.name} failed after all was well again: {type(error).__name__}: {error}")
            finally:
                process.dead = True

        Task(self, process, act, beats=False).start(delay)
        return process

    def wake(self, task: Task, delay: float) -> None:
        """The task's next turn, instead of any that was planned."""
        task.token += 1
        heapq.heappush(self._queue, (self.now + delay, next(self._order), task, task.token))

    def later(self, delay: float, act: Callable[[], Any]) -> None:
        """A request that reaches the storage when nobody waits for it any more."""
        heapq.heappush(self._queue, (self.now + delay, next(self._order), act, 0))

    def settle(self) -> None:
        """Runs until nobody has anything to do."""
        for _ in range(MOST_STEPS):
            if not self._queue:
                return
            when, _, what, token = heapq.heappop(self._queue)
            if not isinstance(what, Task):
                self.now = max(self.now, when)
                what()
                continue
            if what.done or token != what.token:
                continue
            if not what.process.dead and what.process.paused_until > max(when, self.now):
                heapq.heappush(self._queue, (what.process.paused_until, next(self._order), what, token))
                continue
            self.now = max(self.now, when)
            what.turn.release()
            self.turn.acquire()
        self.fault(f"no end after {MOST_STEPS} steps")
        for process in self.processes.values():
            process.dead = True
        self._queue.clear()

    @property
    def task(self) -> Task | None:
        """Whose turn it is; None for the test itself."""
        return getattr(self.local, "task", None)

    @property
    def process(self) -> Process:
        """The process whose turn it is."""
        return self.task.process if self.task else self.nobody

    # -- requests and what goes wrong ---------------------------------------------------------------------------------

    def request(
        self,
        what: str,
        act: Callable[[], Any],
        error: Callable[[], Exception],
        writes: bool = False,
        sent: Callable[[], Callable[[], Any]] | None = None,
    ) -> Any:
        """Does what a process asks of the storage, or what the schedule makes of it.

        Args:
            what, act: the request, for the story, and what it does when it reaches the storage.
            error: what the process gets where there is no answer.
            writes: whether it may reach the storage after the process has given it up.
            sent: called where it is given up; returns what it then does on its arrival. Default: `act`.
        """
        task = self.task
        if task is None:
            return act()
        self.counts["requests"] += 1
        process, kind = task.process, self._draw(task, what)
        task.wait(self.rng.uniform(0.001, 2.0))
        if kind in ("pause", "suspend") and self.rng.random() < 0.6:
            self._pause(process, kind)
            task.wait(0.0)
        elif kind == "kill":
            process.dead = True
            if writes and self.rng.random() < 0.5:  # the request was on its way
                self._send_late(what, sent() if sent else act)
            raise Killed
        if self.now < process.host.cut_until or (task.beats and self.now < process.mute_until):
            if writes and self.rng.random() < 0.1:
                self._send_late(what, sent() if sent else act)
            task.wait(1.0)
            raise error()
        if kind == "refuse":
            raise error()
        if kind == "forbid":
            raise PermissionError(f"{what}: access denied")
        if kind == "late":
            if writes:
                self._send_late(what, sent() if sent else act)
            raise error()
        result = act()
        if kind == "lose":
            raise error()
        if kind in ("pause", "suspend") and process.paused_until <= self.now:
            self._pause(process, kind)
        task.wait(self.rng.uniform(0.001, 1.0))
        return result

    def _draw(self, task: Task, what: str) -> str | None:
        if task.process.ambush and not task.beats and what.startswith(task.process.ambush[0]):
            name, left = task.process.ambush
            task.process.ambush = (name, left - 1) if left else None
            if not left:
                return self._begin(task.process, self.rng.choice(("pause", "suspend")), what)
        chance = self._chance * (OFTEN if what.split()[0] in DECIDING else 1)
        if self.calm or self._budget <= 0 or self.now > START + FAULTS_END or self.rng.random() > chance:
            return None
        self._budget -= 1
        return self._begin(task.process, self.rng.choice(self._kinds), what)

    def _begin(self, process: Process, kind: str, what: str) -> str:
        self.counts[kind] += 1
        self.note(f"FAULT {kind} of {process.name} at {what}")
        process.disturbed = True
        if kind == "cut":
            process.host.cut_until = self.now + self._duration()
            for other in self.processes.values():
                other.disturbed |= other.host is process.host
        elif kind == "mute":
            process.mute_until = self.now + self._duration()
        if self.rng.random() < 0.2:  # and somebody sets the clock
            self.counts["step"] += 1
            process.host.skew += self.rng.uniform(-7200, 7200)
        return kind

    def _duration(self) -> float:
        return self.rng.uniform(901, 2500) if self.rng.random() < 0.7 else self.rng.uniform(1, 120)

    def _pause(self, process: Process, kind: str) -> None:
        seconds = self._duration()
        stopped = [process]
        if kind == "suspend":  # the whole machine, and its clock of running time
            stopped = [other for other in self.processes.values() if other.host is process.host]
        for one in stopped:
            one.disturbed = True
            one.paused_until = max(one.paused_until, self.now + seconds)
            one.stood_still += seconds if kind == "suspend" else 0.0
        self.note(f"{kind} of {[one.name for one in stopped]} for {seconds:.0f} s")

    def _send_late(self, what: str, act: Callable[[], Any]) -> None:
        def arrive() -> None:
            try:
                act()
                self.note(f"late {what} arrives")
            except (OSError, RuntimeError, ValueError) as error:
                self.note(f"late {what} is refused: {type(error).__name__}")

        self.later(self._duration(), arrive)

    # -- what is promised ---------------------------------------------------------------------------------------------

    def fault(self, text: str) -> None:
        """A promise was broken."""
        self.note(f"BROKEN {text}")
        self.faults.append(text)

    def note(self, text: str) -> None:
        """A line of the story."""
        self.log.append(f"{self.now - START:9.2f}  {text}")

    def story(self) -> str:
        """All that happened, for a failing test."""
        return "\n".join([f"seed {self.seed}: {'; '.join(self.faults)}", *self.log])

    def committed_version(self, dataset: lance.LanceDataset, who: str) -> None:
        """Looks at a version that has just landed."""
        files = {file.path for fragment in dataset.get_fragments() for file in fragment.metadata.files}
        new = files - self.committed
        self.counts["commits"] += 1
        self.note(f"version {dataset.version} by {who}: {sorted(new)}")
        for path in sorted(new):
            if not (self.folder / "store/samples.lance/data" / path).exists():
                self.fault(f"committed though deleted before: {path}")
        for path in sorted(self.committed - files):
            self.fault(f"vanished from the table: {path}")
        self.committed = files

    def removing(self, path: str) -> None:
        """Looks at what is about to be deleted."""
        name = path.rpartition("/")[2]
        self.note(f"{self.task.process.name if self.task else 'late'} deletes {name}")
        if name in self.committed:
            self.fault(f"deleted though committed: {name}")

    def lease_made(self, path: str) -> None:
        """Remembers who holds which number."""
        folder, _, name = path.rpartition("/")
        number = int(name.removeprefix("lease-"))
        who = self.task.process.name if self.task else "late"
        self.note(f"lease {number} of {folder.rpartition('/')[2]} by {who}")
        self.leases.setdefault(folder, {}).setdefault(number, (self.now, who))

    def check(self, lease: Any, look: Callable[[], None]) -> None:
        """Asks after a lease; who asks when another has a higher number must be told."""
        begun, folder = self.now, lease._folder
        look()
        number = getattr(lease, "number", None) or lease._number
        higher = [other for other, (when, _) in self.leases.get(folder, {}).items() if other > number and when < begun]
        if higher:
            self.fault(f"lease {number} passed its check though {higher} had been taken")

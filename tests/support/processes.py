"""Waiting for a job's moments, and stopping or killing its processes there."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def wait_until(
    condition: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120
) -> None:
    """Polls until the condition holds; fails if the time is over, or the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        assert process is None or process.poll() is None, f"the job ended first:\n{process.communicate()[1]}"
        time.sleep(0.005)


def stop_when(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Waits like `wait_until`, and leaves the process stopped (SIGSTOP) at the moment that was looked for.

    It is stopped for every look, and the actors of its units with it: on a busy machine a look takes longer than what is
    looked for lasts, and a driver that finds all units done commits them at once. The actors go on in the end: a stopped
    one would outlive its driver.
    """

    def reached() -> bool:
        process.send_signal(signal.SIGSTOP)
        actors = unit_actors(process.pid)
        send(signal.SIGSTOP, actors)
        try:
            if condition():
                return True
        finally:
            send(signal.SIGCONT, actors)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.05)
        return False

    wait_until(reached, process, seconds)


def unit_actors(pid: int) -> list[int]:
    """Process ids of the actors that work on the units of a driver (or of a raylet)."""
    return [child for child, name in descendants(pid).items() if "_UnitCaller" in name]


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    """Sends a signal to those of the processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of all processes below one."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                names[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile
            parents[int(entry.name)] = int(stat[1])
    below, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in below} - below
        below |= more
        grown = bool(more)
    return {child: names[child] for child in below - {pid}}


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

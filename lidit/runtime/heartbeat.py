"""Heartbeats: how a process shows others that it is alive, and how they judge one that has fallen silent.

A judgment may be wrong: a process that is suspended, or cut off from its store, looks dead and is not. So it never decides
by itself what is safe. Who takes over writes into the store that the other one is over, and the other one looks there before
it changes anything (`pipelines/engine/runs.py`, `lidit/runtime/lease.py`, docs/consistency.md).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lidit.runtime.files import seconds_since_written

HEARTBEAT_SECONDS = 30.0
DEAD_AFTER_SECONDS = 900.0  # of silence, for a process that this one cannot see
TELL_AFTER_MISSED = 4  # heartbeats in a row


def make_heartbeat() -> dict[str, Any]:
    """Makes what a process leaves in the store to show that it is alive: host, process, time (for people to read)."""
    pid = os.getpid()
    return {"host": host_id(), "pid": pid, "started": _process_start(pid), "beat": time.time()}


def read_heartbeat(content: bytes) -> dict[str, Any]:
    """Reads what `make_heartbeat` gave; where a power cut has emptied the file, it is of a process that nobody can see."""
    try:
        heartbeat = json.loads(content)
    except ValueError:
        heartbeat = None
    if isinstance(heartbeat, dict) and "host" in heartbeat:
        return heartbeat
    return {"host": "unknown", "pid": 0, "started": "", "beat": 0.0}


def is_alive(heartbeat: dict[str, Any], fs: Any, path: str) -> bool:
    """Tells whether the process that left a heartbeat lives, as far as can be told.

    Where it would see this process and this one it (same boot, process namespace and user), the kernel is asked. Elsewhere
    it is taken for dead after `DEAD_AFTER_SECONDS` of silence, by the clock of the storage.

    Args:
        heartbeat: what `make_heartbeat` gave.
        fs, path: fsspec file system, and the file that the heartbeat was read from.
    """
    if heartbeat["host"] == host_id():
        return _process_start(heartbeat["pid"]) == heartbeat["started"]
    return silent_seconds(heartbeat, fs, path) <= DEAD_AFTER_SECONDS


def silent_seconds(heartbeat: dict[str, Any], fs: Any, path: str) -> float:
    """Seconds since a heartbeat's file was written last; 0 where it is gone, since who removed it was alive."""
    try:
        return seconds_since_written(fs, path)
    except FileNotFoundError:
        return 0.0
    except NotImplementedError:  # a storage without times: the hosts' clocks must agree
        return time.time() - heartbeat["beat"]


class Heartbeat:
    """A thread that beats until it is stopped; no error ends it.

    Args:
        beat: writes the heartbeat.
        what: it shows to be alive, for messages.
    """

    def __init__(self, beat: Callable[[], None], what: str):
        self._beat, self._what = beat, what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name=f"heartbeat of {what}", daemon=True)

    def start(self) -> None:
        """Begins; the first beat is the caller's."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it, after the beat in hand."""
        self._over.set()
        self._thread.join()

    def _keep_beating(self) -> None:
        missed = 0
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
                missed = 0
            except Exception as error:  # whatever it is: storage may be back at the next beat, and then it counts
                missed += 1
                if missed == TELL_AFTER_MISSED:
                    print(
                        f"{self._what}: {missed} heartbeats in a row could not be written ({type(error).__name__}: {error}); "
                        f"after {DEAD_AFTER_SECONDS:.0f} s of silence another run may take over",
                        file=sys.stderr,
                        flush=True,
                    )


def host_id() -> str:
    """This machine's name and boot, process namespace and user: within these a pid means one process, and can be seen."""
    parts = [socket.gethostname()]
    for read in (lambda: _first_line("/proc/sys/kernel/random/boot_id"), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:
            parts.append("?")
    return " ".join([*parts, f"uid:{os.getuid()}"])


def _first_line(path: str) -> str:
    with open(path) as file:
        return file.readline().strip()


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's own clock; None where there is none (or it is a zombie)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]

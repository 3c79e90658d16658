"""One driver at a time for a job that must not run twice: a lease in a folder, on any storage that can create exclusively.

    <folder>/<name>/lease-00000007    who holds it: host, process, time of its last heartbeat; `released` when it is over

Every holder creates the file of the next number, which only one of several can; the highest number holds. A holder that was
taken for dead, rightly or not, finds a higher number than its own (`check`), and so does whoever works on its behalf with the
number at hand (`check_number`): what was silent for too long is over, whatever it believes.
"""

from __future__ import annotations

import json
import time
from typing import Any

import fsspec

from lidit.runtime.files import create_exclusively, is_there, make_folder, remove_file, replace_file
from lidit.runtime.heartbeat import Heartbeat, is_alive, make_heartbeat, read_heartbeat, silent_seconds
from lidit.runtime.outage import is_away, outlast

POLL_SECONDS = 2.0  # between two looks while waiting
KEPT = 3  # files of earlier holders that stay, to be looked at
PREFIX = "lease-"


class LeaseHeld(RuntimeError):
    """Another process holds the lease."""


class LeaseLost(RuntimeError):
    """Another process has taken over the lease."""


class Lease:
    """Use as a context: inside, no other process holds the lease of that name in the folder.

    Args:
        store: folder or URI: a store, or a training run's.
        name: of the lease, and of its folder there.
        wait_seconds: how long to wait for another holder; 0: not at all.

    Attributes:
        number: of this holder, once it holds; later holders have higher ones.

    Raises:
        LeaseHeld: on entering, where another one holds it, still.
    """

    def __init__(self, store: str, name: str, wait_seconds: float = 0.0):
        self.store, self.wait_seconds = store, wait_seconds
        self._fs, self._folder = fsspec.core.url_to_fs(f"{store.rstrip('/')}/{name}")
        self.number = 0
        self._heartbeat = Heartbeat(self._beat, f"lease {store.rstrip('/')}/{name}")

    def __enter__(self) -> Lease:
        deadline = time.monotonic() + self.wait_seconds
        outlast(lambda: make_folder(self._fs, self._folder), "making the lease's folder")
        while (holder := outlast(self._take, "taking the lease")) is not None:
            if time.monotonic() >= deadline:
                waited = f", waited {self.wait_seconds:g} s" if self.wait_seconds else ""
                silent = silent_seconds(holder, self._fs, self._path(holder["number"]))
                raise LeaseHeld(
                    f"{self.store} is being worked on by process {holder['pid']} on {holder['host'].split()[0]}, last "
                    f"heartbeat {silent:.0f} s ago{waited}"
                )
            time.sleep(POLL_SECONDS)
        self._heartbeat.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._heartbeat.stop()
        try:
            replace_file(self._fs, self._path(self.number), json.dumps({**make_heartbeat(), "released": True}).encode())
            for number in _numbers(self._fs, self._folder)[: -1 - KEPT]:
                remove_file(self._fs, self._path(number))
        except Exception as error:  # where the store is away now, the next one finds this process gone
            if exc[0] is None and not is_away(error) and not isinstance(error, OSError):
                raise

    def check(self, wait: bool = True) -> None:
        """Asks the store whether this process still holds the lease; to be asked before a new piece of work.

        Args:
            wait: until the store answers, where it is away.

        Raises:
            LeaseLost: another process may work on the store now.
        """
        look = lambda: _check(self._fs, self._folder, self.number)  # noqa: E731
        outlast(look, "looking after the lease") if wait else look()

    def _take(self) -> dict[str, Any] | None:
        """Tries once: None where the lease is ours now, else its holder's heartbeat."""
        numbers = _numbers(self._fs, self._folder)
        if numbers:
            holder = self._read(numbers[-1])
            if not holder.get("released") and is_alive(holder, self._fs, self._path(numbers[-1])):
                return holder
        number = numbers[-1] + 1 if numbers else 1
        mine = make_heartbeat()
        try:
            create_exclusively(self._fs, self._path(number), json.dumps(mine).encode())
        except FileExistsError:  # somebody else was faster, or our own first try did land and its answer was lost
            there = self._read(number)
            if {**there, "number": None} != {**mine, "number": None}:
                return there
        self.number = number
        return None

    def _read(self, number: int) -> dict[str, Any]:
        return {**read_heartbeat(self._fs.cat_file(self._path(number))), "number": number}

    def _path(self, number: int) -> str:
        return f"{self._folder}/{PREFIX}{number:08d}"

    def _beat(self) -> None:
        if is_there(self._fs, self._path(self.number)):  # an old holder's file that was cleaned up stays away
            replace_file(self._fs, self._path(self.number), json.dumps(make_heartbeat()).encode())


def check_number(store: str, name: str, number: int) -> None:
    """Checks that the holder of that number still holds the lease, for whoever works on its behalf.

    Args:
        store, name: as of `Lease`.
        number: `Lease.number` of the holder.

    Raises:
        LeaseLost: another process may work on the store now.
    """
    fs, folder = fsspec.core.url_to_fs(f"{store.rstrip('/')}/{name}")
    outlast(lambda: _check(fs, folder, number), "looking after the lease")


def _check(fs: Any, folder: str, number: int) -> None:
    numbers = _numbers(fs, folder)
    if not numbers:
        raise LeaseLost(f"{folder} is empty: expected this process's lease {number}; was it removed by hand?")
    if numbers[-1] != number:
        raise LeaseLost(
            f"this process was taken for dead (suspended, or cut off from the store?) and another one has taken over, lease "
            f"{numbers[-1]}; what is committed is kept"
        )


def _numbers(fs: Any, folder: str) -> list[int]:
    fs.invalidate_cache()
    try:
        names = [str(path).rpartition("/")[2] for path in fs.ls(folder, detail=False)]
    except FileNotFoundError:  # an object store has no empty folders
        return []
    tails = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return sorted(int(tail) for tail in tails if tail.isdecimal())

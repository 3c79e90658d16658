"""One driver at a time for a job that must not run twice: a lease in a folder, on any storage that can create exclusively.

    <folder>/<name>/lease-00000007    who holds it: host, process, time of the last sign of life; `released` when it is over

Every holder creates the file of the next number, which only one of several can; the highest number holds. So there is no
moment in which two believe that they hold it, and a holder that was taken for dead finds a higher number than its own
(`check`). On the holder's own host the kernel is asked whether it lives; elsewhere a holder is dead after
`lidit.alive.DEAD_AFTER_SECONDS` of silence.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lidit.alive import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS, shows_life, sign_of_life

POLL_SECONDS = 2.0  # between two looks while waiting
CREATE_TRIES = 3  # of a file that is refused and yet not there
KEPT = 3  # files of earlier holders that stay, to be looked at


class LeaseHeld(RuntimeError):
    """Another process holds the lease."""


class LeaseLost(RuntimeError):
    """This process was taken for dead, or cannot show that it lives."""


class Lease:
    """Use as a context: inside, no other process holds the lease of that name in the folder.

    Args:
        store: folder or URI: a store, or a training run's.
        name: of the lease, and of its folder there.
        wait_seconds: how long to wait for another holder; 0: not at all.

    Raises:
        LeaseHeld: on entering, where another one holds it, still.
    """

    def __init__(self, store: str, name: str, wait_seconds: float = 0.0):
        self.store, self.wait_seconds = store, wait_seconds
        self._fs, self._folder = fsspec.core.url_to_fs(f"{store.rstrip('/')}/{name}")
        self._number = 0
        self._over = threading.Event()
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        deadline = time.monotonic() + self.wait_seconds
        self._fs.makedirs(self._folder, exist_ok=True)
        while (holder := self._take()) is not None:
            if time.monotonic() >= deadline:
                waited = f", waited {self.wait_seconds:g} s" if self.wait_seconds else ""
                raise LeaseHeld(
                    f"{self.store} is being worked on by process {holder['pid']} on {holder['host'].split()[0]}, last sign of "
                    f"life {time.time() - holder['beat']:.0f} s ago{waited}"
                )
            time.sleep(POLL_SECONDS)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # where the store is away now, the next one finds this process gone
            _replace(self._fs, self._path(self._number), json.dumps({**sign_of_life(), "released": True}).encode())
            for number in self._numbers()[: -1 - KEPT]:
                self._fs.rm_file(self._path(number))

    def check(self) -> None:
        """Raises LeaseLost where another process may work on the store now; to be asked before a new piece of work."""
        silent = time.monotonic() - self._last_beat
        if silent > DEAD_AFTER_SECONDS / 2:
            raise LeaseLost(f"this process could not show that it lives for {silent:.0f} s; what is committed is kept")
        if (highest := self._numbers()[-1]) != self._number:
            raise LeaseLost(
                f"this process was taken for dead (suspended?) and another one has taken over, lease {highest}; what is "
                f"committed is kept"
            )

    def _take(self) -> dict[str, Any] | None:
        """Tries once: None where the lease is ours now, else its holder's sign."""
        numbers = self._numbers()
        if numbers:
            sign = json.loads(self._fs.cat_file(self._path(numbers[-1])))
            if not sign.get("released") and shows_life(sign):
                return sign
        number = numbers[-1] + 1 if numbers else 1
        mine = sign_of_life()
        try:
            create_exclusively(self._fs, self._path(number), json.dumps(mine).encode())
        except FileExistsError:  # somebody else was faster, or our own first try did land and its answer was lost
            there = json.loads(self._fs.cat_file(self._path(number)))
            if there != mine:
                return there
        self._number = number
        return None

    def _numbers(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [str(path).rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False)]
        except FileNotFoundError:  # an object store has no empty folders
            return []
        return sorted(int(name[6:]) for name in names if name.startswith("lease-") and name[6:].isdecimal())

    def _path(self, number: int) -> str:
        return f"{self._folder}/lease-{number:08d}"

    def _keep_alive(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                _replace(self._fs, self._path(self._number), json.dumps(sign_of_life()).encode())
            except OSError:
                continue  # the store is away for a moment; for how long at most, `check` knows
            self._last_beat = time.monotonic()


def create_exclusively(fs: Any, path: str, content: bytes) -> None:
    """Writes a file that must not be there; of several at once, one succeeds, and nobody sees half a file.

    Raises:
        FileExistsError: it is there already.
    """
    if isinstance(fs, LocalFileSystem):
        beside = Path(f"{path}.{secrets.token_hex(4)}")
        beside.write_bytes(content)
        try:
            os.link(beside, path)
        finally:
            beside.unlink()
        return
    for attempt in range(CREATE_TRIES):
        try:
            fs.pipe_file(path, content, mode="create")
            return
        except OSError as error:  # PreconditionFailed (412), or ConditionalRequestConflict (409) of two at one moment
            fs.invalidate_cache(path)
            if fs.exists(path):
                raise FileExistsError(path) from error
            if attempt == CREATE_TRIES - 1:
                raise
            time.sleep(random.uniform(0, 0.2))


def _replace(fs: Any, path: str, content: bytes) -> None:
    """Writes a file anew in one step: who reads must never meet half of it. An object store does so by itself."""
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)
        return
    beside = Path(f"{path}.{secrets.token_hex(4)}")
    beside.write_bytes(content)
    beside.replace(path)

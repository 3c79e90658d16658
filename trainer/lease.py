"""One driver at a time for a run: a file `alive` in its folder, written anew while the driver lives."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from typing import Any

from trainer.storage import Storage

ALIVE = "alive"
HEARTBEAT_SECONDS = 30.0
DEAD_AFTER_SECONDS = 900.0  # of silence, for a driver on another machine


class Lease:
    """Use as a context: inside, nobody else trains the run.

    Raises:
        ValueError: on entering, where another driver that trains it is alive.
    """

    def __init__(self, storage: Storage):
        self.storage = storage
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        other = self._holder()
        if other is not None:
            raise ValueError(
                f"{self.storage.uri} is being trained by process {other['pid']} on {other['host'].split()[0]}: wait for it, "
                f"stop it (it saves first), or give this run another `name`"
            )
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        self.storage.remove(ALIVE)

    def _holder(self) -> dict[str, Any] | None:
        try:
            sign = json.loads(self.storage.read(ALIVE))
        except (FileNotFoundError, ValueError):
            return None
        if sign["host"] == _host():
            return sign if _process_start(sign["pid"]) == sign["started"] else None
        return sign if time.time() - sign["beat"] < DEAD_AFTER_SECONDS else None

    def _keep_alive(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
            except OSError:
                continue  # the store is away for a moment

    def _beat(self) -> None:
        sign = {"host": _host(), "pid": os.getpid(), "started": _process_start(os.getpid()), "beat": time.time()}
        self.storage.write(ALIVE, json.dumps(sign).encode())


def _host() -> str:
    """This machine's name and boot, so that a pid means one process only."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's own clock; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]

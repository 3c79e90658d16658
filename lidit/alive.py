"""A sign that a process lives, left where others can read it: whether its unfinished work may be taken over or removed."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

HEARTBEAT_SECONDS = 30.0
DEAD_AFTER_SECONDS = 900.0  # of silence, for a process on another host


def sign_of_life() -> dict[str, Any]:
    """What this process leaves in the store to show that it is there: host, process, time."""
    pid = os.getpid()
    return {"host": _host(), "pid": pid, "started": _process_start(pid), "beat": time.time()}


def shows_life(sign: dict[str, Any]) -> bool:
    """Whether who left the sign lives: asked of the kernel on the same host; elsewhere, whether the sign is fresh."""
    if sign["host"] == _host():
        return _process_start(sign["pid"]) == sign["started"]
    return time.time() - sign["beat"] <= DEAD_AFTER_SECONDS


def _host() -> str:
    """This machine's name and boot, so that a pid means one process only."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's own clock; None where there is none (or it is a zombie)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]

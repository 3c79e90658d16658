"""Ends a process in which a decoder hangs: C code cannot be interrupted, but its process can be ended.

Ray then begins the unit of work again, and the tracker, which knows what was in hand, takes it row by row: what hangs
twice by itself is left out with a reason. Nothing is watched in a process that has not asked for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time

DECODE_SECONDS = 120.0  # of one picture; the largest that is let in takes a few
EXIT_STATUS = 71

_since: dict[int, float] = {}  # thread -> when the work that it has in hand was begun
_armed = threading.Lock()


def arm(seconds: float = DECODE_SECONDS) -> None:
    """Ends this process, with `EXIT_STATUS`, as soon as one piece of `watched` work takes longer. The first call counts."""
    if _armed.acquire(blocking=False):
        threading.Thread(target=_watch, args=(seconds,), name="watchdog", daemon=True).start()


class watched:  # a class, and no generator: every picture goes through it
    """Work that is given up, process and all, if it takes too long; it must let other threads run meanwhile (the GIL)."""

    def __enter__(self) -> None:
        _since[threading.get_ident()] = time.monotonic()

    def __exit__(self, *error: object) -> None:
        _since.pop(threading.get_ident(), None)


def _watch(seconds: float) -> None:
    while True:
        time.sleep(seconds / 8)
        now = time.monotonic()
        if any(now - begun > seconds for begun in list(_since.values())):
            print(f"a picture was not decoded within {seconds:g} s: this process ends", file=sys.stderr, flush=True)
            os._exit(EXIT_STATUS)

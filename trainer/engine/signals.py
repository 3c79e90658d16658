"""Stop requests, and how they reach the loop of every rank.

A run stops at the end of its step, saved, when

- the file `stop` appears in the run's folder: the driver writes it on SIGTERM or Ctrl-C, and anybody may
  (`touch runs/NAME/stop`); rank 0 looks for it now and then;
- a worker process gets SIGTERM: its node is about to go. All ranks save, then end with an error, and Ray Train starts them
  again, here or elsewhere, from that checkpoint.

Where Ray says that a node is being drained, the run is saved once and goes on: Ray starts the ranks again when it is gone.

What one rank knows the others learn from the sums of the step (loop.py), so that all stop after the same one.
"""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from trainer.storage import Storage

STOP = "stop"
POLL_SECONDS = {True: 0.5, False: 10.0}  # local storage, remote storage

_terminated = threading.Event()


def install_sigterm() -> None:
    """In the main thread of a worker: SIGTERM sets a flag instead of ending the process in the middle of a step."""
    signal.signal(signal.SIGTERM, lambda signum, frame: _terminated.set())


class Terminated(RuntimeError):
    """This process got SIGTERM; raised after the run was saved, so that Ray Train counts it as failed."""


def terminated() -> bool:
    """Whether this process got SIGTERM."""
    return _terminated.is_set()


def draining() -> bool:
    """Whether Ray Train has marked this worker's group as about to lose a node (its public call waits for all ranks)."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        context: Any = get_train_context()
    except (ImportError, RuntimeError):  # not under Ray Train, or another version of it
        return False
    preemption = getattr(getattr(context, "preemption_context", None), "preemption_info", None)
    return preemption is not None


class StopFile:
    """Looks for the run's stop file in a thread of its own. Use as a context; on rank 0."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self._seen, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-file", daemon=True)

    def __enter__(self) -> StopFile:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def requested(self) -> bool:
        """Whether the file was there."""
        return self._seen.is_set()

    def _watch(self) -> None:
        warned = False
        while not self._over.is_set():
            try:
                if self.storage.exists(STOP):
                    self._seen.set()
                    return
            except Exception as error:  # a thread that ended would never see the file: ask again
                if not warned:
                    print(f"lidit train: the file `{STOP}` cannot be looked for ({error})", file=sys.stderr, flush=True)
                warned = True
            self._over.wait(POLL_SECONDS[self.storage.local])

"""The driver's own process: the only one of its run, and it takes signals while Ray Train works."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lidit.runtime.heartbeat import HEARTBEAT_SECONDS
from lidit.runtime.lease import Lease, LeaseHeld, LeaseLost
from lidit.runtime.outage import is_away
from trainer.engine.signals import STOP
from trainer.storage import Storage


@contextmanager
def only_driver(storage: Storage) -> Iterator[Lease]:
    """Inside, no other driver trains the run. Raises ValueError where one does."""
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(Lease(storage.uri, "driver"))
        except LeaseHeld as held:
            raise ValueError(
                f"{held}: wait for it, stop it (it saves first), or give this run another `name`"
            ) from held
        yield lease


@contextmanager
def stopped_by_signals(storage: Storage) -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C ask the workers to save and stop; a second Ctrl-C gives up waiting for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = (
        threading.Event()
    )  # here, and not in the storage: that may be away, and a second Ctrl-C must not wait for it

    def handle(signum: int, frame: Any) -> None:
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        print("lidit train: stopping after this step; it is saved first", file=sys.stderr, flush=True)
        storage.write(STOP, b"")

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        storage.remove(STOP)


def in_thread(act: Callable[[], Any], lease: Lease) -> Any:
    """Runs it in another thread, so that this one takes signals meanwhile; raises what it raises.

    Raises:
        LeaseLost: this driver was suspended for so long that another one may train the run now.
    """
    made: list[Any] = [None, None]

    def run() -> None:
        try:
            made[0] = act()
        except BaseException as error:
            made[1] = error

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    checked = time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        if time.monotonic() - checked > HEARTBEAT_SECONDS:
            checked = time.monotonic()
            _check(lease)
    if made[1] is not None:
        raise made[1]
    return made[0]


def _check(lease: Lease) -> None:
    """Whether this driver is still the one; where the storage cannot tell now, it is asked again, and every save asks too."""
    try:
        lease.check(wait=False)
    except LeaseLost:
        raise
    except Exception as error:
        if not is_away(error) and not isinstance(error, OSError):
            raise

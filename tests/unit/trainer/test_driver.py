"""The driver's own process: one at a time, and it gives up where it may no longer be the only one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from lidit.runtime import lease
from lidit.runtime.lease import Lease, LeaseLost
from trainer import train
from trainer.storage import Storage

pytestmark = pytest.mark.unit


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    refused = r"run is being worked on by process \d+ on .*stop it \(it saves first\), or give this run another `name`"
    with train.only_driver(storage), pytest.raises(ValueError, match=refused), train.only_driver(storage):
        pass
    with train.only_driver(storage):
        pass


def test_a_driver_that_lost_its_lease_does_not_wait_for_its_workers(tmp_path: Path, monkeypatch) -> None:
    """As after a suspension of more than `alive.DEAD_AFTER_SECONDS`, seen from this host through the other one's file."""
    monkeypatch.setattr(train, "HEARTBEAT_SECONDS", 0.0)
    over = threading.Event()
    storage = Storage(str(tmp_path))
    with train.only_driver(storage) as held:
        monkeypatch.setattr(lease, "is_alive", lambda heartbeat, fs, path: False)
        with Lease(storage.uri, "driver"), pytest.raises(LeaseLost, match="another one has taken over, lease 2"):
            train.in_thread(over.wait, held)
    over.set()


def test_what_the_thread_returns_and_raises(tmp_path: Path) -> None:
    held = Lease(str(tmp_path), "driver")
    assert train.in_thread(lambda: 7, held) == 7
    with pytest.raises(KeyError, match="gone"):
        train.in_thread(lambda: {}["gone"], held)


def test_a_second_ctrl_c_waits_for_no_storage(tmp_path: Path, monkeypatch, capsys) -> None:
    """The first one asks the workers to stop by a file in the storage, which is away."""
    storage, written = Storage(str(tmp_path)), []

    def write(name: str, content: bytes) -> None:
        written.append(name)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)  # the second one, while the first is at it
            raise AssertionError("it went on waiting")

    monkeypatch.setattr(storage, "write", write)
    with pytest.raises(KeyboardInterrupt), train.stopped_by_signals(storage):
        os.kill(os.getpid(), signal.SIGINT)
    assert len(written) == 1 and "it is saved first" in capsys.readouterr().err

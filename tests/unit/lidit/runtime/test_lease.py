"""The lease: one holder at a time, whoever is killed, suspended or fast."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lidit.runtime import heartbeat as alive
from lidit.runtime import lease as lease_file
from lidit.runtime.heartbeat import DEAD_AFTER_SECONDS, make_heartbeat
from lidit.runtime.lease import Lease, LeaseHeld, LeaseLost, check_number

pytestmark = pytest.mark.unit

KILLED = """
import os, sys
from lidit.runtime.lease import Lease
Lease(sys.argv[1], "job").__enter__()
os._exit(9)
"""


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def put(store, number, silent=0.0, **changes):
    """The file of a holder, as another host might have left it, `silent` seconds ago by the storage's clock."""
    folder = os.path.join(store, "job")
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"lease-{number:08d}")
    with open(path, "w") as file:
        json.dump({**make_heartbeat(), **changes}, file)
    os.utime(path, (time.time() - silent,) * 2)


def sign(store, number):
    return json.loads(Path(store, "job", f"lease-{number:08d}").read_text())


def files(store):
    return sorted(os.listdir(os.path.join(store, "job")))


def test_one_at_a_time(store):
    with Lease(store, "job") as held:
        held.check()
        with pytest.raises(LeaseHeld, match=rf"worked on by process {os.getpid()} on \S+, last heartbeat -?0 s ago$"):
            Lease(store, "job").__enter__()
        with Lease(store, "other job") as other:
            other.check()
    with Lease(store, "job") as again:
        again.check()
    assert files(store) == ["lease-00000001", "lease-00000002"]


def test_a_few_files_of_earlier_holders_stay(store):
    for _ in range(9):
        with Lease(store, "job"):
            pass
    assert files(store) == [f"lease-{number:08d}" for number in (6, 7, 8, 9)]


def test_released_also_by_who_fails(store):
    with pytest.raises(KeyError), Lease(store, "job"):
        raise KeyError
    with Lease(store, "job"):
        pass


def test_killed_on_this_host_is_gone_at_once(store):
    assert subprocess.run([sys.executable, "-c", KILLED, store]).returncode == 9
    assert files(store) == ["lease-00000001"]
    with Lease(store, "job") as lease:
        lease.check()


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_silent_on_another_host_is_gone_after_a_while(store, ahead):
    """By the clock of the storage, whatever the hosts' clocks say."""
    put(store, 3, DEAD_AFTER_SECONDS - 60, host="far away", beat=time.time() - DEAD_AFTER_SECONDS + 60 + ahead)
    with pytest.raises(LeaseHeld, match="on far, last heartbeat 840 s ago"):
        Lease(store, "job").__enter__()
    put(store, 3, DEAD_AFTER_SECONDS + 1, host="far away", beat=time.time() - DEAD_AFTER_SECONDS - 1 + ahead)
    with Lease(store, "job"):
        assert files(store)[-1] == "lease-00000004"


def test_waits_until_the_holder_is_over(store, monkeypatch):
    monkeypatch.setattr(lease_file, "POLL_SECONDS", 0.01)
    order = []
    inside, go_on = threading.Event(), threading.Event()

    def first():
        with Lease(store, "job"):
            inside.set()
            assert go_on.wait(30)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.1, go_on.set).start()
    with Lease(store, "job", wait_seconds=30):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_waits_no_longer_than_asked(store, monkeypatch):
    monkeypatch.setattr(lease_file, "POLL_SECONDS", 0.01)
    with Lease(store, "job"), pytest.raises(LeaseHeld, match=r", waited 0.05 s$"):
        Lease(store, "job", wait_seconds=0.05).__enter__()


def test_who_was_taken_for_dead_finds_out(store):
    with Lease(store, "job") as suspended:
        put(store, 2)
        with pytest.raises(LeaseLost, match=r"another one has taken over, lease 2; what is committed is kept"):
            suspended.check()
    assert "released" not in sign(store, 2)


def test_who_was_silent_and_was_not_replaced_goes_on(store):
    """Silence alone takes nothing away: the store tells whether another one has taken over."""
    with Lease(store, "job") as lease:
        os.utime(os.path.join(store, "job", "lease-00000001"), (0, 0))
        lease.check()
        check_number(store, "job", lease.number)
        put(store, 2)
        for check in (lease.check, lambda: check_number(store, "job", lease.number)):
            with pytest.raises(LeaseLost, match="lease 2"):
                check()


def test_folder_that_was_emptied_by_hand(store):
    with Lease(store, "job") as lease:
        os.unlink(os.path.join(store, "job", "lease-00000001"))
        with pytest.raises(LeaseLost, match=r"is empty: expected this process's lease 1; was it removed by hand\?"):
            lease.check()


def test_full_disk_leaves_nothing_behind(store, monkeypatch):
    with Lease(store, "job") as lease:
        honest = Path.write_bytes

        def full(self, content):
            honest(self, content[:3])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            for _ in range(3):
                with pytest.raises(OSError, match="No space"):
                    lease._beat()
        assert files(store) == ["lease-00000001"] and sign(store, 1)["pid"] == os.getpid()


def test_shows_that_it_lives(store, monkeypatch):
    monkeypatch.setattr(alive, "HEARTBEAT_SECONDS", 0.01)
    with Lease(store, "job"):
        first = sign(store, 1)["beat"]
        deadline = time.monotonic() + 30
        while sign(store, 1)["beat"] == first:
            assert time.monotonic() < deadline
    assert sign(store, 1)["released"] is True


def test_no_error_ends_the_heartbeat(store, monkeypatch):
    monkeypatch.setattr(alive, "HEARTBEAT_SECONDS", 0.01)
    honest, calls = Lease._beat, []

    def fails_twice(self):
        calls.append(None)
        if len(calls) <= 2:
            raise [OSError("no route to the store"), ZeroDivisionError()][len(calls) - 1]
        honest(self)

    monkeypatch.setattr(Lease, "_beat", fails_twice)
    with Lease(store, "job") as lease:
        deadline = time.monotonic() + 30
        while len(calls) < 4:
            assert time.monotonic() < deadline
        lease.check()

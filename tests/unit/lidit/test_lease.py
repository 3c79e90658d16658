"""The lease: one holder at a time, whoever is killed, suspended or fast."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lidit import lease as lease_file
from lidit.alive import DEAD_AFTER_SECONDS, sign_of_life
from lidit.lease import Lease, LeaseHeld, LeaseLost, create_exclusively

pytestmark = pytest.mark.unit

KILLED = """
import os, sys
from lidit.lease import Lease
Lease(sys.argv[1], "job").__enter__()
os._exit(9)
"""


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def put(store, number, **changes):
    """The file of a holder, as another host might have left it."""
    folder = os.path.join(store, "job")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f"lease-{number:08d}"), "w") as file:
        json.dump({**sign_of_life(), **changes}, file)


def sign(store, number):
    return json.loads(Path(store, "job", f"lease-{number:08d}").read_text())


def files(store):
    return sorted(os.listdir(os.path.join(store, "job")))


def test_one_at_a_time(store):
    with Lease(store, "job") as held:
        held.check()
        with pytest.raises(LeaseHeld, match=rf"worked on by process {os.getpid()} on \S+, last sign of life 0 s ago$"):
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


def test_silent_on_another_host_is_gone_after_a_while(store):
    put(store, 3, host="far away", beat=time.time() - DEAD_AFTER_SECONDS + 60)
    with pytest.raises(LeaseHeld, match="on far, last sign of life 840 s ago"):
        Lease(store, "job").__enter__()
    put(store, 3, host="far away", beat=time.time() - DEAD_AFTER_SECONDS - 1)
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


def test_who_cannot_show_that_it_lives_finds_out(store):
    with Lease(store, "job") as lease:
        lease._last_beat -= DEAD_AFTER_SECONDS / 2 + 1
        with pytest.raises(LeaseLost, match="could not show that it lives for 45"):
            lease.check()


def test_shows_that_it_lives(store, monkeypatch):
    monkeypatch.setattr(lease_file, "HEARTBEAT_SECONDS", 0.01)
    with Lease(store, "job"):
        first = sign(store, 1)["beat"]
        deadline = time.monotonic() + 30
        while sign(store, 1)["beat"] == first:
            assert time.monotonic() < deadline
    assert sign(store, 1)["released"] is True


def test_a_store_that_is_away_for_a_moment_ends_no_heartbeat(store, monkeypatch):
    monkeypatch.setattr(lease_file, "HEARTBEAT_SECONDS", 0.01)
    honest, calls = lease_file._replace, []

    def fails_twice(fs, path, content):
        calls.append(path)
        if len(calls) <= 2:
            raise OSError("no route to the store")
        honest(fs, path, content)

    monkeypatch.setattr(lease_file, "_replace", fails_twice)
    with Lease(store, "job") as lease:
        deadline = time.monotonic() + 30
        while len(calls) < 4:
            assert time.monotonic() < deadline
        lease.check()


def test_of_many_at_once_one_creates(tmp_path):
    import fsspec

    fs = fsspec.filesystem("file")
    barrier, made = threading.Barrier(16), []

    def create(number):
        barrier.wait()
        try:
            create_exclusively(fs, str(tmp_path / "file"), str(number).encode())
        except FileExistsError:
            return
        made.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (tmp_path / "file").read_text() == str(made[0])
    assert os.listdir(tmp_path) == ["file"], "nothing is left beside it"

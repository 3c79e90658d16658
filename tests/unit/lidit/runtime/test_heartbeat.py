"""Whether who left a heartbeat lives: by the kernel where that can see it, by silence elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lidit.runtime import heartbeat as alive
from lidit.runtime.heartbeat import DEAD_AFTER_SECONDS, _process_start, host_id, is_alive, make_heartbeat

pytestmark = pytest.mark.unit

FS = fsspec.filesystem("file")


@pytest.fixture
def child() -> Any:
    """A process of this host that lives until its input ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def place(tmp_path: Path) -> str:
    """Where the heartbeat lies."""
    path = tmp_path / "alive"
    path.touch()
    return str(path)


def age(path: str, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def heartbeat(pid: int, **changes: Any) -> dict[str, Any]:
    """What that process of this host would leave."""
    return {**make_heartbeat(), "pid": pid, "started": _process_start(pid), **changes}


def test_own(place: str) -> None:
    assert is_alive(make_heartbeat(), FS, place)


def test_process_of_this_host(child: Any, place: str) -> None:
    living = heartbeat(child.pid)
    age(place, 10 * DEAD_AFTER_SECONDS)
    assert is_alive(living, FS, place), "on this host the process counts, not the clock"
    other = {**living, "started": str(int(living["started"]) - 1)}
    assert not is_alive(other, FS, place), "the pid was given to another process"
    child.communicate(b"\n")
    assert not is_alive(living, FS, place)


def test_zombie_is_dead(child: Any, place: str) -> None:
    left = heartbeat(child.pid)
    assert left["started"] is not None and is_alive(left, FS, place)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert not is_alive(left, FS, place)


@pytest.mark.parametrize("ahead", [-7200.0, 0.0, 7200.0])
@pytest.mark.parametrize(
    "silent, lives", [(0, True), (DEAD_AFTER_SECONDS - 60, True), (DEAD_AFTER_SECONDS + 60, False)]
)
def test_process_of_another_host_by_its_silence(silent: float, lives: bool, ahead: float, place: str) -> None:
    """By the clock of the storage; what the other host's clock says is for people to read."""
    age(place, silent)
    left = heartbeat(os.getpid(), host="elsewhere 123", beat=time.time() - silent + ahead)
    assert is_alive(left, FS, place) is lives


def test_storage_without_times(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(type(FS), "modified", none)
    assert is_alive(heartbeat(1, host="elsewhere", beat=time.time() - 60), FS, place)
    assert not is_alive(heartbeat(1, host="elsewhere", beat=time.time() - DEAD_AFTER_SECONDS - 60), FS, place)
    assert os.listdir(os.path.dirname(place)) == ["alive"], "nothing is left beside it"


@pytest.mark.parametrize("part", [1, 2, 3])
def test_who_cannot_be_seen_is_judged_by_silence(part: int, place: str) -> None:
    """Before a reboot, in another pid namespace (a container with this host's name), or of another user (`hidepid`)."""
    parts = host_id().split()
    parts[part] += "-other"
    left = heartbeat(2**22 + 1, host=" ".join(parts), started="1")
    assert is_alive(left, FS, place)
    age(place, DEAD_AFTER_SECONDS + 60)
    assert not is_alive(left, FS, place)


def test_another_pid_namespace_has_another_id() -> None:
    """Asked in one, where this machine lets us make one."""
    command = [sys.executable, "-c", "from lidit.runtime.heartbeat import host_id; print(host_id())"]
    inside = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", *command], capture_output=True, text=True)
    if inside.returncode:
        pytest.skip(f"no new pid namespace here: {inside.stderr.strip()}")
    assert inside.stdout.strip() != host_id()
    assert inside.stdout.split()[:2] == host_id().split()[:2], "same name, same boot"


def test_heartbeat_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alive, "HEARTBEAT_SECONDS", 3600.0)
    beating = alive.Heartbeat(lambda: None, "a test")
    beating.start()
    assert "heartbeat of a test" in {thread.name for thread in threading.enumerate()}
    begun = time.monotonic()
    beating.stop()
    assert "heartbeat of a test" not in {thread.name for thread in threading.enumerate()}
    assert time.monotonic() - begun < 60

"""Whether who left a sign of life lives: by the kernel on this host, by silence elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from lidit.alive import DEAD_AFTER_SECONDS, _host, _process_start, shows_life, sign_of_life

pytestmark = pytest.mark.unit


@pytest.fixture
def child() -> Any:
    """A process of this host that lives until its input ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def sign(pid: int, **changes: Any) -> dict[str, Any]:
    """What that process of this host would leave."""
    return {"host": _host(), "pid": pid, "started": _process_start(pid), "beat": time.time(), **changes}


def test_own_sign() -> None:
    assert shows_life(sign_of_life())


def test_process_of_this_host(child: Any) -> None:
    living = sign(child.pid)
    old = {**living, "beat": 0.0}
    assert shows_life(living)
    assert shows_life(old), "on this host the process counts, not the clock"
    assert not shows_life({**living, "started": str(int(living["started"]) - 1)}), (
        "the pid was given to another process"
    )
    child.communicate(b"\n")
    assert not shows_life(living) and not shows_life(old)


def test_zombie_is_dead(child: Any) -> None:
    left = sign(child.pid)
    assert left["started"] is not None and shows_life(left)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert not shows_life(left)


@pytest.mark.parametrize(
    "silent, lives", [(0, True), (DEAD_AFTER_SECONDS - 60, True), (DEAD_AFTER_SECONDS + 60, False)]
)
def test_process_of_another_host_by_its_silence(silent: float, lives: bool) -> None:
    assert shows_life(sign(os.getpid(), host="elsewhere 123", beat=time.time() - silent)) is lives


def test_same_host_before_a_reboot_is_judged_by_silence() -> None:
    before = f"{_host().split()[0]} other-boot"
    assert shows_life(sign(os.getpid(), host=before))
    assert not shows_life(sign(os.getpid(), host=before, beat=0.0))

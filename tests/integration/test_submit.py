"""What a scheduler's pod starts: one driver, whatever happens to the pod. A real head behind a token."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import cluster, processes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.faults]


@pytest.fixture(scope="module")
def head() -> Any:
    made = cluster.RayNodes({}, head_cpus=1)
    try:
        yield made
    finally:
        made.stop()


def submit(head: Any, name: str, *command: object) -> subprocess.Popen[str]:
    argv = [sys.executable, ROOT / "infra/submit.py", "--address", head.address, "--name", name, "--", *command]
    return subprocess.Popen(
        list(map(str, argv)), env=head.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def driver(folder: Path) -> tuple[str, str, str]:
    """A command that notes its start, and ends when it is told to."""
    code = f"""
import os, pathlib, time
from tests.support import cluster
from tests.support import processes
folder = pathlib.Path({str(folder)!r})
(folder / f"started-{{os.getpid()}}").touch()
print("at work", flush=True)
while not (folder / "end").exists():
    time.sleep(0.1)
"""
    return ("python", "-c", code)


def started(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("started-*")]


def test_the_pods_end_stops_the_driver(head: Any, tmp_path: Path) -> None:
    pod = submit(head, "night-1", *driver(tmp_path))
    processes.wait_until(lambda: len(started(tmp_path)) == 1, pod, 120)
    (pid,) = started(tmp_path)
    pod.send_signal(signal.SIGTERM)
    said, _ = pod.communicate(timeout=90)
    assert pod.returncode == 143, said
    assert not processes.running(pid), f"the driver runs on: {said}"
    again = submit(head, "night-1", "python", "-c", "print('once more')")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "once more" in said and "night-1-try2: SUCCEEDED" in said


def test_a_second_pod_follows_the_first_ones_driver(head: Any, tmp_path: Path) -> None:
    first = submit(head, "night-2", *driver(tmp_path))
    processes.wait_until(lambda: len(started(tmp_path)) == 1, first, 120)
    first.kill()  # its machine is gone: nothing stops the driver
    first.communicate(timeout=30)
    second = submit(head, "night-2", *driver(tmp_path))
    assert second.stdout is not None
    first_words = second.stdout.readline()
    (tmp_path / "end").touch()
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and "nothing is started" in first_words and "at work" in said, first_words + said
    assert len(started(tmp_path)) == 1, "a second driver was started"


def test_a_failed_job_is_a_failed_pod(head: Any) -> None:
    pod = submit(head, "night-3", "python", "-c", "raise SystemExit(3)")
    said, _ = pod.communicate(timeout=120)
    assert pod.returncode == 1 and "night-3-try1: FAILED" in said, said

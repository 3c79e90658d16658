"""A process that hangs ends; one that works, or has not asked, does not."""

import subprocess
import sys
import time

import pytest

from lidit.runtime.watchdog import EXIT_STATUS

pytestmark = pytest.mark.unit

BEGIN = "import time; from threading import Thread; from lidit.runtime.watchdog import arm, watched\n"
HANG = "def hang():\n  with watched(): time.sleep(60)\n"


def run(script):
    return subprocess.run([sys.executable, "-c", BEGIN + script], capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize("where", ["hang()", "Thread(target=hang).start(); time.sleep(60)"])
def test_a_process_that_hangs_ends(where):
    start = time.monotonic()
    ended = run(f"{HANG}arm(0.4); arm(1000)\n{where}")
    assert ended.returncode == EXIT_STATUS and "not decoded within 0.4 s" in ended.stderr
    assert time.monotonic() - start < 40


def test_a_process_that_works_does_not():
    assert run("arm(0.4)\nfor _ in range(20):\n  with watched(): time.sleep(0.05)\ntime.sleep(1)").returncode == 0


def test_nobody_watches_unasked():
    assert run("with watched(): time.sleep(1)").returncode == 0

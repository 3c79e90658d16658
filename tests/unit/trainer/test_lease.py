"""One driver at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer import lease
from trainer.lease import ALIVE, Lease
from trainer.storage import Storage

pytestmark = pytest.mark.unit


def test_a_second_driver_is_refused_and_the_first_leaves_no_trace(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "run"))
    with (
        Lease(storage),
        pytest.raises(ValueError, match=r"being trained by process \d+ .*another `name`"),
        Lease(storage),
    ):
        pass
    assert not storage.exists(ALIVE)
    with Lease(storage):
        pass


def test_a_killed_driver_is_no_obstacle(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    code = (
        "import os, signal, sys; from trainer.lease import Lease; from trainer.storage import Storage\n"
        "Lease(Storage(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert storage.exists(ALIVE)
    with Lease(storage):
        pass


@pytest.mark.parametrize(("silent", "refused"), [(10.0, True), (lease.DEAD_AFTER_SECONDS + 1, False)])
def test_on_another_machine_silence_tells(tmp_path: Path, silent: float, refused: bool) -> None:
    storage = Storage(str(tmp_path))
    sign = {"host": "elsewhere boot", "pid": 1, "started": "1", "beat": time.time() - silent}
    storage.write(ALIVE, json.dumps(sign).encode())
    if refused:
        with pytest.raises(ValueError, match="on elsewhere"), Lease(storage):
            pass
    else:
        with Lease(storage):
            pass

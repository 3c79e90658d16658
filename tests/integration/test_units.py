"""Units on real actors: a driver that leaves before the end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import ray

from pipelines.engine.pool import ActorsConfig, run_units

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("results", [0, 2])
def test_a_driver_that_leaves_early_has_no_thread_left_in_ray(ray_here: Any, results: int) -> None:
    """Ray may crash the process that shuts it down beside a thread that still calls it."""

    class Slow:
        def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
            time.sleep(0.2)
            return unit

    before = set(threading.enumerate())
    running = run_units(Slow, {}, [{"name": str(number)} for number in range(200)], ActorsConfig(1, 1, num_gpus=0))
    came = 0
    while came < results:
        came += next(running) is not None
    next(running)
    mine = {thread.name for thread in set(threading.enumerate()) - before}
    assert "results" in mine and any("StreamingExecutor" in name for name in mine)
    start = time.monotonic()
    running.close()
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert left <= {"Prefetcher"}, "that one waits for work, and calls nothing"
    assert time.monotonic() - start < 15
    assert ray.is_initialized()

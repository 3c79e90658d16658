"""Randomised schedules of hosts that share a store: whatever is paused, cut off, killed or lost, no promise is broken.

docs/consistency.md says what is promised; `tests/consistency_world.py` how a schedule is made of a seed.
"""

import pytest

from tests.consistency_jobs import run_schedule

pytestmark = pytest.mark.unit

SEEDS = range(100)
MANY = range(1_000, 5_000)
BATCH = 50  # schedules of one test


def broken(folder, seeds):
    """Stories of the schedules that broke a promise."""
    worlds = (run_schedule(folder / str(seed), seed) for seed in seeds)
    return [world.story() for world in worlds if world.faults]


def batches(seeds):
    return [seeds[start : start + BATCH] for start in range(0, len(seeds), BATCH)]


@pytest.mark.parametrize("seeds", batches(SEEDS), ids=str)
def test_no_promise_is_broken(tmp_path, seeds):
    stories = broken(tmp_path, seeds)
    assert not stories, "\n\n".join(stories[:3])


@pytest.mark.slow
@pytest.mark.parametrize("seeds", batches(MANY), ids=str)
def test_no_promise_is_broken_by_many_schedules(tmp_path, seeds):
    stories = broken(tmp_path, seeds)
    assert not stories, "\n\n".join(stories[:3])


def test_a_seed_is_a_schedule(tmp_path):
    first, again = (run_schedule(tmp_path / name, 7) for name in ("first", "again"))
    assert len(first.log) > 20
    assert [line.replace("/first/", "/again/") for line in first.log] == again.log

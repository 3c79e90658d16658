"""Randomised schedules of hosts that share a store: whatever is paused, cut off, killed or lost, no promise is broken.

docs/consistency.md says what is promised; `tests/support/consistency_world.py` how a schedule is made of a seed.
"""

import pytest

from pipelines.engine.runs import Run
from pipelines.engine.table import Table
from tests.support.consistency_jobs import run_schedule

pytestmark = pytest.mark.unit

SEEDS = range(100)
SEEDS_THAT_FENCE = (10, 24, 28, 44)  # an ingest is paused, and another one takes over
SEEDS_THAT_BAR = (7, 51, 60, 137)  # it is paused between its look for a fence and its commit
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


@pytest.mark.parametrize(
    ("owner", "without", "seeds", "sign"),
    [
        pytest.param(Run, "check", SEEDS_THAT_FENCE, "there twice", id="fence"),
        pytest.param(Table, "barrier", SEEDS_THAT_BAR, "committed though deleted", id="barrier"),
    ],
)
def test_the_schedules_reach_what_they_are_for(tmp_path, monkeypatch, owner, without, seeds, sign):
    monkeypatch.setattr(owner, without, lambda self: None)
    assert any(sign in story for story in broken(tmp_path, seeds))


def test_a_seed_is_a_schedule(tmp_path):
    first, again = (run_schedule(tmp_path / name, 7) for name in ("first", "again"))
    assert len(first.log) > 20
    assert [line.replace("/first/", "/again/") for line in first.log] == again.log

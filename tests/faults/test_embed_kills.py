"""Kill -9 of an actor and of the driver at the points that matter; the same command again gives a clean run's table."""

from __future__ import annotations

import shutil
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lidit.store.codec import decode_bytes
from tests.support import processes
from tests.support.stores import World

pytestmark = pytest.mark.faults

ROWS, FRAGMENTS = 960, 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llms: Any) -> Any:
    """A world whose store holds the rows, and what an unbroken run makes of them."""
    world = World(tmp_path_factory.mktemp("clean"), llms)
    world.ingest(world.prompts(ROWS), ROWS // FRAGMENTS)
    shutil.copytree(world.store, world.folder / "ingested")
    world.run("embed", "--config", world.config())
    return SimpleNamespace(ingested=world.folder / "ingested", rows=world.rows())


@pytest.fixture
def clean(world: Any, made: Any) -> dict[str, dict[str, Any]]:
    """The rows of an unbroken run; the world has the same rows, not embedded yet."""
    shutil.copytree(made.ingested, world.store)
    return made.rows


def assert_like(world: Any, clean: dict[str, dict[str, Any]]) -> None:
    """Same rows, same lengths, embeddings within the codec's tolerance; nothing left over."""
    rows, schema = world.rows(), world.table.schema
    assert rows.keys() == clean.keys()
    for image_id, row in rows.items():
        for name, value in row.items():
            if "_embeds_" not in name:
                assert value == clean[image_id][name], (image_id, name)
                continue
            width = int(schema.field(name).metadata[b"lidit:width"])
            mine, theirs = (decode_bytes(data, "bf16", width) for data in (value, clean[image_id][name]))
            np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=1e-4)
    assert world.committed() == FRAGMENTS
    assert world.orphans() == set()


@pytest.mark.parametrize(
    ("moment", "commit_fragments"),
    [
        pytest.param("before the first file", 1, marks=pytest.mark.slow),
        ("between write and commit", 1000),
        ("after a commit", 1),
    ],
)
def test_driver_killed(world: Any, clean: Any, moment: str, commit_fragments: int) -> None:
    config = world.config(commit={"fragments": commit_fragments, "seconds": 1000.0}, batch_tokens=16)
    conditions = {
        "before the first file": lambda: "embed_error" in world.table.schema.names,
        "between write and commit": lambda: len(world.data_files()) >= 3,
        "after a commit": lambda: world.committed() >= 1,
    }
    job = world.start("embed", "--config", config)
    processes.stop_when(conditions[moment], job)
    actors = processes.unit_actors(job.pid)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    done_before = world.committed()
    assert done_before < FRAGMENTS, "the job was over before it was killed"
    assert (done_before > 0) == (moment == "after a commit")
    processes.wait_until(lambda: not any(map(processes.running, actors)))
    again = world.run("embed", "--config", config)
    assert again.summary["fragments"] == FRAGMENTS - done_before
    assert_like(world, clean)


def test_actor_killed_in_the_middle_of_a_fragment(world: Any, clean: Any) -> None:
    job = world.start("embed", "--config", world.config(batch_tokens=16))
    processes.stop_when(lambda: world.committed() >= 1, job)
    actors = processes.unit_actors(job.pid)
    assert actors, "no actor found"
    processes.send(signal.SIGKILL, actors)
    assert world.committed() < FRAGMENTS
    job.send_signal(signal.SIGCONT)
    result = world.finish(job)
    assert result.summary["ok"] and result.summary["errors"] == 0
    assert_like(world, clean)


def test_two_runs_at_once(world: Any, clean: Any) -> None:
    config = world.config(batch_tokens=64)
    jobs = [world.start("embed", "--config", config) for _ in range(2)]
    results = [world.finish(job) for job in jobs]
    assert sum(result.summary["fragments"] for result in results) == FRAGMENTS
    world.run("embed", "--config", config)  # whoever ended last has cleaned up; one more run finds nothing to do
    assert_like(world, clean)


def test_stopped_by_ctrl_c_keeps_what_is_finished(world: Any, clean: Any) -> None:
    config = world.config(commit={"fragments": 1000, "seconds": 1000.0}, batch_tokens=16)
    job = world.start("embed", "--config", config)
    processes.stop_when(lambda: len(world.data_files()) >= 4, job)
    job.send_signal(signal.SIGINT)
    job.send_signal(signal.SIGCONT)
    result = world.finish(job, expect=130)
    assert "the same command goes on" in result.stderr
    done = world.committed()
    assert 0 < done < FRAGMENTS
    assert world.run("embed", "--config", config).summary["fragments"] == FRAGMENTS - done
    assert_like(world, clean)

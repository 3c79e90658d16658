"""Kill -9 of an actor and of the driver of the latents job, and images that kill their process: nothing lost, nothing twice."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from lidit.store.codec import decode_latents_bytes
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.stage import run_stage
from pipelines.engine.table import Table
from pipelines.engine.unit_pass import CommitConfig
from pipelines.latents import EncodeLatents, LatentsConfig
from tests.support import processes
from tests.support.stores import World

pytestmark = pytest.mark.faults

ROWS, FRAGMENTS = 480, 12
FLAGS = ("--actors.min", 1, "--actors.max", 1, "--batch-pixels", 4096)  # an image at a time: time enough to be killed
EAGER = ("--commit.fragments", 1, "--commit.seconds", 0)
NEVER = ("--commit.fragments", 1000, "--commit.seconds", 1000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llms: Any) -> Any:
    """A store of scenes, and the rows that an unbroken run makes of it."""
    world = World(tmp_path_factory.mktemp("clean"), llms)
    rows = ("--rows-per-fragment", ROWS // FRAGMENTS)
    world.run("ingest", "--store", world.store, "--source", f"scenes:{ROWS}", *rows)
    shutil.copytree(world.store, world.folder / "ingested")
    summary = world.run("latents", "--store", world.store, *FLAGS).summary
    assert summary["ok"] and summary["counts"]["images"] == ROWS
    return SimpleNamespace(ingested=world.folder / "ingested", rows=world.rows())


@pytest.fixture
def clean(world: Any, made: Any) -> dict[str, dict[str, Any]]:
    """The rows of an unbroken run; the world has the same rows, not encoded yet."""
    shutil.copytree(made.ingested, world.store)
    return made.rows


def committed(world: Any) -> int:
    return world.committed("latents") if "latents" in world.table.schema.names else 0


def column_files(world: Any) -> int:
    """Files that latents runs have finished, committed or not."""
    return len(list((world.store / "samples.lance" / "data").glob("latents-*.lance")))


def assert_like(world: Any, clean: dict[str, dict[str, Any]]) -> None:
    """Same rows, same buckets, latents within bf16's rounding; nothing left over."""
    rows = world.rows()
    assert rows.keys() == clean.keys()
    channels = int(world.table.schema.field("latents").metadata[b"lidit:channels"])
    downscale = int(world.table.schema.field("latents").metadata[b"lidit:downscale"])
    for image_id, row in rows.items():
        wanted = clean[image_id]
        assert {name: row[name] for name in row if name != "latents"} == {
            name: wanted[name] for name in wanted if name != "latents"
        }
        height, width = map(int, row["bucket"].split("x"))
        shape = (channels, height // downscale, width // downscale)
        mine, theirs = (decode_latents_bytes(data, "bf16", shape) for data in (row["latents"], wanted["latents"]))
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=1e-3)
    assert committed(world) == FRAGMENTS
    assert world.orphans() == set()


@pytest.mark.parametrize(
    ("moment", "flags"),
    [pytest.param("between write and commit", NEVER, marks=pytest.mark.slow), ("after a commit", EAGER)],
)
def test_driver_killed(world: Any, clean: Any, moment: str, flags: Any) -> None:
    conditions = {
        "between write and commit": lambda: column_files(world) >= 3,
        "after a commit": lambda: committed(world) >= 1,
    }
    job = world.start("latents", "--store", world.store, *FLAGS, *flags)
    processes.stop_when(conditions[moment], job)
    actors = processes.unit_actors(job.pid)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    done_before = committed(world)
    assert done_before < FRAGMENTS, "the job was over before it was killed"
    assert (done_before > 0) == (moment == "after a commit")
    processes.wait_until(lambda: not any(map(processes.running, actors)))
    again = world.run("latents", "--store", world.store, *FLAGS)
    assert again.summary["fragments"] == FRAGMENTS - done_before
    assert_like(world, clean)


@pytest.mark.slow
def test_actor_killed_in_the_middle_of_a_fragment(world: Any, clean: Any) -> None:
    job = world.start("latents", "--store", world.store, *FLAGS, *EAGER)
    processes.stop_when(lambda: committed(world) >= 1, job)
    actors = processes.unit_actors(job.pid)
    assert actors, "no actor found"
    processes.send(signal.SIGKILL, actors)
    assert committed(world) < FRAGMENTS
    job.send_signal(signal.SIGCONT)
    result = world.finish(job)
    assert result.summary["ok"] and result.summary["errors"] == 0
    assert_like(world, clean)


# -- decoders that kill their process --------------------------------------------------------------------------------------

DEADLY = b"kills its decoder"


class Fragile(EncodeLatents):
    """The stage, with a decoder that dies of one image, as a bug in a C library would have it."""

    def _decode(self, data: pa.Buffer) -> Any:
        if data.to_pybytes() == DEADLY:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._decode(data)


def scene(seed: int) -> bytes:
    from demo.world import scenes

    return scenes.example(seed, 64, 64)["image_bytes"]


@pytest.mark.slow
def test_an_image_that_kills_its_decoder_is_set_aside(world: Any, ray_here: Any) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    schema = pa.schema([pa.field("image_id", pa.string()), pa.field("image", pa.large_binary())])
    table = Table(str(world.store / "samples.lance"))
    table.create(schema)
    for first in (0, 20):
        images = [DEADLY if row in (7, 33) else scene(row) for row in range(first, first + 20)]
        writer = ColumnFileWriter(table.uri, schema, "ingest-test")
        rows = [{"image_id": str(first + row), "image": data} for row, data in enumerate(images)]
        writer.write(pa.RecordBatch.from_pylist(rows, schema))
        table.append([writer.finish(table.open())])
    config = LatentsConfig(
        str(world.store), ActorsConfig(min=1, max=1, num_gpus=0), CommitConfig(1, 0.0), max_error_rate=0.5
    )
    summary = run_stage(Fragile, config)
    assert (summary.ok, summary.rows, summary.errors) == (True, 40, 2)
    made = world.rows()
    for image_id, row in made.items():
        if image_id in ("7", "33"):
            assert row["latents"] is row["bucket"] is None and "process died on this row" in row["latents_error"]
        else:
            assert row["latents"] and row["bucket"] == "64x64" and row["latents_error"] is None
    assert made["8"]["latents"] != made["9"]["latents"]
    assert world.orphans() == set()
    assert run_stage(Fragile, config).fragments == 0, "set aside once, not tried again by the next run"

"""Kill -9 of the recaption job's actor and driver; damaged images; the same command again gives a clean run's table."""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from pipelines import recaption
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.table import Table, field_ids, missing_in
from pipelines.recaption import RecaptionConfig
from pipelines.sources.base import IMAGE_FIELDS
from tests.support import processes
from tests.support.stores import World

pytestmark = pytest.mark.faults

ROWS, FRAGMENTS = 96, 12
FLAGS = ("--actors.max", 1, "--max-new-tokens", 96, "--temperature", 0.5, "--commit.seconds", 0, "--commit.fragments")


def image_rows(store: Path, images: list[bytes | None], rows_per_fragment: int) -> None:
    """Puts images straight into a table, also such as no source would let in."""
    schema = pa.schema([pa.field("image_id", pa.string()), *IMAGE_FIELDS])
    table = Table(str(store / "samples.lance"))
    table.create(schema)
    for first in range(0, len(images), rows_per_fragment):
        part = images[first : first + rows_per_fragment]
        writer = ColumnFileWriter(table.uri, schema, "ingest-test")
        records = [{"image_id": f"{first + row:04d}", "image": image} for row, image in enumerate(part)]
        writer.write(pa.RecordBatch.from_pylist(records, schema))
        table.append([writer.finish(table.open())])


def scene_bytes(count: int) -> list[bytes]:
    from demo.world.scenes import example, image_size

    return [example(seed, *image_size(seed))["image_bytes"] for seed in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llms: Any) -> Any:
    """A world whose store holds the rows, and what an unbroken run makes of them."""
    world = World(tmp_path_factory.mktemp("clean"), llms)
    image_rows(world.store, scene_bytes(ROWS), ROWS // FRAGMENTS)
    shutil.copytree(world.store, world.folder / "ingested")
    world.run("recaption", "--store", world.store, *FLAGS, 1)
    return SimpleNamespace(ingested=world.folder / "ingested", rows=world.rows())


@pytest.fixture
def clean(world: Any, made: Any) -> dict[str, dict[str, Any]]:
    """The rows of an unbroken run; the world has the same rows, not described yet."""
    shutil.copytree(made.ingested, world.store)
    return made.rows


def described(world: Any) -> int:
    """Fragments that have captions; 0 before the column is there."""
    dataset = world.table
    if "caption" not in dataset.schema.names:
        return 0
    ids = field_ids(dataset)
    return sum(not missing_in(fragment, ["caption"], ids) for fragment in dataset.get_fragments())


def column_files(world: Any) -> list[Path]:
    return sorted((world.store / "samples.lance" / "data").glob("recaption-*.lance"))


@pytest.mark.parametrize(
    ("moment", "commit_fragments"),
    [pytest.param("between write and commit", 1000, marks=pytest.mark.slow), ("after a commit", 1)],
)
def test_driver_killed(world: Any, clean: Any, moment: str, commit_fragments: int) -> None:
    """Captions are drawn at a temperature, and still equal the unbroken run's: the draws belong to the rows."""
    reached = {
        "between write and commit": lambda: len(column_files(world)) >= 2,
        "after a commit": lambda: described(world) >= 1,
    }[moment]
    job = world.start("recaption", "--store", world.store, *FLAGS[:-1], *FLAGS[-1:], commit_fragments)
    processes.stop_when(reached, job)
    actors = processes.unit_actors(job.pid)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    done_before = described(world)
    assert done_before < FRAGMENTS, "the job was over before it was killed"
    assert (done_before > 0) == (moment == "after a commit")
    processes.wait_until(lambda: not any(map(processes.running, actors)))
    again = world.run("recaption", "--store", world.store, *FLAGS, 1)
    assert again.summary["fragments"] == FRAGMENTS - done_before
    assert world.rows() == clean and world.orphans() == set()


@pytest.mark.slow
def test_actor_killed(world: Any, clean: Any) -> None:
    job = world.start("recaption", "--store", world.store, *FLAGS, 1)
    processes.stop_when(lambda: described(world) >= 1, job)
    actors = processes.unit_actors(job.pid)
    assert actors, "no actor found"
    processes.send(signal.SIGKILL, actors)
    assert described(world) < FRAGMENTS
    job.send_signal(signal.SIGCONT)
    result = world.finish(job)
    assert result.summary["ok"] and result.summary["errors"] == 0
    assert world.rows() == clean and world.orphans() == set()


@pytest.mark.slow
def test_odd_and_damaged_images(world: Any, zoo: Any, ray_here: Any) -> None:
    """Unusual images are described like others; damaged ones have a reason; the rest of the window is not touched."""
    good, bad = list(zoo.good.values()), [content for content, _ in zoo.bad.values()]
    scenes = scene_bytes(2)
    image_rows(world.store, [scenes[0], *good, *bad, None, scenes[1]], 64)
    summary = recaption.main(
        RecaptionConfig(
            store=str(world.store), actors=ActorsConfig(min=1, max=1, num_gpus=0), max_error_rate=0.9, retries=0
        )
    )
    assert (summary.ok, summary.errors) == (True, len(bad))
    rows = [row for _, row in sorted(world.rows().items())]
    assert rows[0]["caption_status"] == rows[-1]["caption_status"] == "ok"
    for name, row in zip(zoo.good, rows[1:]):
        assert row["caption_status"] and row["recaption_error"] is None, name
    for name, row in zip(zoo.bad, rows[1 + len(good) :]):
        assert row["caption_status"] is row["caption"] is row["caption_tokens"] is None, name
        assert row["recaption_error"].startswith("caption: "), name
    nothing = rows[-2]
    assert nothing["caption_status"] is nothing["recaption_error"] is nothing["caption"] is None


@pytest.mark.slow
def test_too_many_damaged_images_stop_the_job(world: Any, ray_here: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    image_rows(world.store, [buffer.getvalue()[:100]] * 30, 10)
    with pytest.raises(RuntimeError, match=r"more than max_error_rate 0.01 allows.*caption: "):
        recaption.main(RecaptionConfig(store=str(world.store), actors=ActorsConfig(min=1, max=1, num_gpus=0)))
    assert described(world) == 0

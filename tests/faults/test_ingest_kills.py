"""Kill -9 of an ingest's driver and actors, on tars and on Parquet; the same command again gives a clean run's table."""

from __future__ import annotations

import io
import signal
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import processes

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SHARDS, ROWS, SIDE = 18, 30, 320  # images of some 30 kB: a shard takes its worker a good part of a second
FRAGMENT = 5  # rows; the driver commits every 32 fragments


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photo: Callable[..., bytes]) -> dict[str, Any]:
    """The same pictures as tars and as one Parquet file of as many row groups, and what a clean run makes of them."""
    folder = tmp_path_factory.mktemp("shards")
    base = [photo(seed, size=(SIDE, SIDE), noise=30, quality=90) for seed in range(20)]
    images, captions = [], []
    for number in range(SHARDS * ROWS):
        images.append(base[number % 20] + number.to_bytes(4, "big"))  # bytes behind a JPEG's end make it another one
        captions.append(f"caption {number}")
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for number in range(shard * ROWS, shard * ROWS + ROWS):
                for name, content in ((f"{number}.jpg", images[number]), (f"{number}.txt", captions[number].encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    table = pa.table({"jpg": pa.array(images, pa.binary()), "caption": captions})
    pq.write_table(table, folder / "all.parquet", row_group_size=ROWS, compression="none")
    return {
        "webdataset": f"webdataset:{folder}/{{0000..{SHARDS - 1:04d}}}.tar",
        "parquet": f"parquet:{folder}/all.parquet",
        "rows": dict(zip(captions, images)),
    }


def flags(world: Any, spec: str) -> tuple[Any, ...]:
    return ("--store", world.store, "--source", spec, "--rows-per-fragment", FRAGMENT, "--actors.max", 2)


def files(world: Any) -> list[Path]:
    return list((world.store / "samples.lance" / "data").glob("ingest-*"))


def count(world: Any) -> int:
    return world.table.count_rows() if any((world.store / "samples.lance").glob("_versions/*.manifest")) else 0


def ended(job: subprocess.Popen[str]) -> bool:
    """Whether the job is over, at the latest a moment from now."""
    try:
        job.wait(timeout=0.05)
    except subprocess.TimeoutExpired:
        return False
    return True


def assert_clean(world: Any, shards: dict[str, Any]) -> None:
    """Every picture once, with its caption and its very bytes; nothing left over."""
    rows = world.rows().values()
    assert {row["caption_original"]: row["image"] for row in rows} == shards["rows"]
    assert len(rows) == SHARDS * ROWS and not any(row["ingest_error"] for row in rows)
    assert world.orphans() == set()
    world.table.validate()


@pytest.mark.parametrize(
    ("kind", "moment"),
    [("webdataset", "between write and commit"), ("webdataset", "after a commit"), ("parquet", "after a commit")],
)
def test_driver_killed(world: Any, shards: dict[str, Any], kind: str, moment: str) -> None:
    job = world.start("ingest", *flags(world, shards[kind]))
    if moment == "after a commit":
        processes.stop_when(lambda: count(world) > 0, job)
    else:
        processes.stop_when(lambda: len(files(world)) >= 3, job)
    actors = processes.unit_actors(job.pid)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    processes.wait_until(lambda: not any(map(processes.running, actors)))
    before = count(world)
    assert before < SHARDS * ROWS, "the job was over before it was killed"
    assert before % ROWS == 0, "a unit is there whole or not at all"
    assert (before > 0) == (moment == "after a commit")
    again = world.run("ingest", *flags(world, shards[kind])).summary
    assert again["rows"] == SHARDS * ROWS - before and again["errors"] == 0
    noted = again["counts"]["shards_done_before"]
    assert noted * ROWS <= before, "what is not committed is never noted as done"
    assert again["counts"]["read"] == (SHARDS - noted) * ROWS
    assert again["counts"].get("already_there", 0) == before - noted * ROWS
    assert_clean(world, shards)


def test_actors_killed(world: Any, shards: dict[str, Any]) -> None:
    """Twice, in the middle of their units: Ray begins these again, and no row is there twice."""
    job = world.start("ingest", *flags(world, shards["webdataset"]))
    for files_written in (4, 50):
        processes.stop_when(
            lambda wanted=files_written: len(files(world)) >= wanted and processes.unit_actors(job.pid), job
        )
        processes.send(signal.SIGKILL, processes.unit_actors(job.pid))
        assert count(world) < SHARDS * ROWS
        job.send_signal(signal.SIGCONT)
    summary = world.finish(job).summary
    assert (summary["ok"], summary["rows"], summary["errors"]) == (True, SHARDS * ROWS, 0)
    assert summary["counts"]["read"] == SHARDS * ROWS, "only what the last attempts read is counted"
    assert_clean(world, shards)
    assert world.run("ingest", *flags(world, shards["webdataset"])).summary["counts"] == {"shards_done_before": SHARDS}


def test_memory_stays_flat_with_bombs(world: Any, zoo: Any, photo: Callable[..., bytes]) -> None:
    """Thirty images that claim 900 million pixels each, among good ones: not one is decoded."""
    with tarfile.open(world.folder / "0.tar", "w") as tar:
        for number in range(60):
            content = zoo.bad["bomb.png"][0] + bytes([number]) if number % 2 else photo(number)
            info = tarfile.TarInfo(f"{number:04d}.{'png' if number % 2 else 'jpg'}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    job = world.start("ingest", "--store", world.store, "--source", f"webdataset:{world.folder}/0.tar", "--actors.max", 1,
                      "--filters.near_duplicates", 0)  # fmt: skip
    peak = 0
    while not ended(job):
        for pid in processes.unit_actors(job.pid):
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue  # it ended meanwhile
            peak = max(peak, int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0)
    summary = world.finish(job).summary
    assert (summary["rows"], summary["errors"]) == (60, 30)
    assert 50_000 < peak < 850_000, f"{peak} kB: one decoded bomb alone takes 900,000"


@pytest.mark.parametrize("moment", ["commit", "write"])
def test_driver_killed_in_an_update(world: Any, photo: Callable[..., bytes], moment: str) -> None:
    """The same command again takes the rest: every picture once, with its new bytes, under its old id."""
    folder = world.folder / "set"
    folder.mkdir()
    for number in range(90):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    update = ("--store", world.store, "--source", f"folder:{folder}", "--rows-per-fragment", 1, "--actors.max", 1)
    world.run("ingest", *update)
    before, written, version = world.rows(), len(files(world)), world.table.version
    for number in range(90):
        (folder / f"{number}.jpg").write_bytes(photo(number + 1000))
        (folder / f"{number}.txt").write_text(f"new {number}")
    job = world.start("ingest", *update, "--update", "true")
    if moment == "commit":
        processes.stop_when(lambda: world.table.version > version, job)
    else:
        processes.stop_when(lambda: len(files(world)) >= written + 3, job)
    actors = processes.unit_actors(job.pid)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    processes.wait_until(lambda: not any(map(processes.running, actors)))
    assert (world.table.version > version) == (moment == "commit") and world.rows().keys() == before.keys()
    result = world.run("ingest", *update, "--update", "true").summary
    left = 90 if moment == "write" else 90 - 32 * (world.table.version > version)
    assert result["ok"] and 0 < result["counts"]["updated"] <= left, "what was committed is not done again"
    rows = {image_id.rpartition("/")[2]: row for image_id, row in world.rows().items()}
    assert set(world.rows()) == set(before) and len(rows) == 90
    for number in range(90):
        row = rows[f"{number}.jpg"]
        assert (row["image"], row["caption_original"]) == (photo(number + 1000), f"new {number}")
    assert world.orphans() == set()

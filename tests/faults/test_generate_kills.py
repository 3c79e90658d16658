"""Kill -9 of the generate job's driver and actor, and a full disk: every image once, the same as of an unbroken run."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import pytest

from tests.support import processes

pytestmark = pytest.mark.faults

PROMPTS, ROWS_PER_FRAGMENT = 48, 4
FLAGS = (
    "--sampler.num_inference_steps", 8, "--rows-per-fragment", ROWS_PER_FRAGMENT, "--batch-size", 1, "--layout", "drawbench",
    "--commit.fragments", 1, "--commit.seconds", 0, "--actors.max", 1,
)  # fmt: skip


@pytest.fixture
def command(world: Any, scene_weights: Any) -> tuple[Any, ...]:
    """The job's arguments, without its output folder."""
    prompts = world.folder / "prompts.txt"
    prompts.write_text("\n".join(f"{number} red circles and a blue star" for number in range(PROMPTS)))
    return ("generate", "--weights", scene_weights, "--prompts", prompts, *FLAGS)


def images(folder: Any) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def committed(world: Any) -> int:
    return world.committed("image") if (world.store / "samples.lance").exists() and has_image(world) else 0


def has_image(world: Any) -> bool:
    return "image" in world.table.schema.names


def test_driver_and_actor_are_killed(world: Any, command: tuple[Any, ...]) -> None:
    clean = world.folder / "clean"
    assert (
        world.run(*command, "--store", world.folder / "clean_store", "--out", clean).summary["counts"]["files"]
        == PROMPTS
    )

    out = world.folder / "out"
    for done in (0, 1):  # a job's first commit comes at once; the next may wait until all is done
        job = world.start(*command, "--store", world.store, "--out", out)
        processes.stop_when(lambda before=done: committed(world) > before, job)
        below = processes.descendants(job.pid)
        job.kill()
        for pid in below:
            if processes.running(pid):
                os.kill(pid, signal.SIGKILL)
        job.communicate()
    assert not out.exists(), "files are written when all images are there"
    before = committed(world)
    job = world.start(*command, "--store", world.store, "--out", out)
    processes.stop_when(lambda: committed(world) > before, job)
    processes.send(signal.SIGKILL, processes.unit_actors(job.pid)[:1])
    job.send_signal(signal.SIGCONT)
    summary = world.finish(job).summary
    assert summary["ok"] and summary["rows"] < PROMPTS
    assert images(out) == images(clean)
    rows = world.rows().values()
    assert len(rows) == PROMPTS and all(row["image"] is not None for row in rows)
    assert world.orphans() == set()


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_lost(world: Any, command: tuple[Any, ...]) -> None:
    out = world.folder / "out"
    out.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", out]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        failed = world.run(*command, "--store", world.store, "--out", out, expect=1)
        assert "No space left" in failed.stderr
    finally:
        subprocess.run(["umount", out], check=True)
    again = world.run(*command, "--store", world.store, "--out", out).summary
    assert again["ok"] and again["rows"] == 0 and again["counts"]["files"] == PROMPTS
    assert len(images(out)) == PROMPTS

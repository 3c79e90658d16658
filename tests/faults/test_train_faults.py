"""A rank killed wherever it hurts, processes told to go, disks that are full: the run goes on from the newest valid
checkpoint by itself, or stops with a word, and comes out as one that nothing happened to."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.support import processes, training
from trainer import train
from trainer.config import CheckpointConfig, TrainConfig

pytestmark = pytest.mark.faults
STEPS = 24
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store, and what a run that nothing happens to gives."""
    folder = tmp_path_factory.mktemp("faults")
    store = training.make_store(folder / "store", codec="fp32")
    config = training.make_config(store, folder / "runs", "calm", checkpoint=CheckpointConfig(every_steps=4))
    config = training.steps(config, STEPS)
    training.run_ranks(2, "train_all", [config])
    return SimpleNamespace(folder=folder, store=store, config=config, losses=training.losses(config))


def starts(config: TrainConfig) -> list[int]:
    """Steps that the ranks were started from, one after the other."""
    text = Path(config.storage, config.name, "starts.jsonl").read_text()
    return [json.loads(line)["step"] for line in text.splitlines()]


def no_remains(config: TrainConfig) -> bool:
    """Whether nothing is left of saves that were killed."""
    folder = Path(config.storage, config.name, "checkpoints")
    return all((path / "manifest.json").exists() for path in folder.iterdir())


def test_killed_in_forward_step_and_save(world: Any, ray_for_training: Any) -> None:
    """Kill -9 of one rank: in the forward pass of step 7, in the optimizer step of 10, among the shards of the save at 12, when
    all shards are there but no manifest at 16, while files are moved to their place at 20. One run outlives them all."""
    folder = world.folder

    def kill(number: int, part: str, times: int, rank: int) -> Any:
        return training.At(part, times, rank, str(folder / f"killed-{number}"))

    # Counted from the start of the processes: after each kill they begin again at the last checkpoint.
    kills = [
        kill(0, "forward", 7, 1),  # starts at 0; 4 is saved
        kill(1, "step", 6, 0),  # starts at 4; 8 is saved
        kill(2, "save:shard", 2, 1),  # starts at 8; the save of 12 is the first of these processes
        kill(3, "save:manifest", 2, 0),  # starts at 8 again; 12 is saved, then 16
        kill(4, "save:publish-file", 5, 1),  # starts at 12; 16 is saved, 20 is not
    ]
    order = training.InOrder(kills)
    config = dataclasses.replace(world.config, name="killed", max_failures=len(kills))
    summary = train.main(config, observe=order)
    assert summary.ok and summary.step == STEPS
    assert all(os.path.exists(at.marker) for at in kills), "some kill never happened"
    assert starts(config) == [0, 4, 8, 8, 12, 16]
    assert training.losses(config) == world.losses
    assert training.checkpoints(config) == [20, 24] and no_remains(config)


@pytest.mark.slow
def test_sigterm_of_a_rank_saves_and_goes_on(world: Any, ray_for_training: Any) -> None:
    config = dataclasses.replace(world.config, name="terminated")
    at = training.Terminate("step", 6, 1, str(world.folder / "terminated-marker"))
    summary = train.main(config, observe=at)
    assert summary.ok and summary.step == STEPS
    first, second = starts(config)  # told when the ranks had already summed up step 6: saved after the next, or soon
    assert first == 0 and second in (6, 7, 9, 10, 11), "saved where no checkpoint was due"
    assert training.losses(config) == world.losses


@pytest.mark.slow
def test_more_failures_than_allowed(world: Any, ray_for_training: Any) -> None:
    config = dataclasses.replace(world.config, name="doomed", max_failures=0)
    at = training.At("forward", 6, 0, str(world.folder / "doomed-marker"))
    with pytest.raises(RuntimeError, match=r"failed more than max_failures 0 times, at last with rank 0: .*goes on"):
        train.main(config, observe=at)
    summary = train.main(config)
    assert (summary.resumed_from, summary.ok) == (4, True)
    assert training.losses(config) == world.losses


@pytest.mark.slow
def test_full_disk_while_saving(world: Any, ray_for_training: Any, tmp_path: Path) -> None:
    """On a file system with room for one checkpoint: the second one stops the run, the first one is whole; with room again
    the same command finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    first = Path(world.config.storage, "calm", "checkpoints", f"step_{STEPS:08d}")
    size = sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    options = f"size={int(size * 1.5) >> 10}k"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        config = dataclasses.replace(world.config, name="full", storage=str(disk))
        with pytest.raises(RuntimeError, match=r"checkpoint of step 8 could not be saved.*(?i:no space left)"):
            train.main(config)
        assert training.checkpoints(config) == [4] and no_remains(config)
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        summary = train.main(config)
        assert (summary.resumed_from, summary.ok) == (4, True)
        assert training.losses(config) == world.losses
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


class Driver:
    """`lidit train` in a process of its own."""

    def __init__(self, config: TrainConfig, folder: Path, environment: dict[str, str]):
        path = folder / f"{config.name}.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        command = [sys.executable, str(ROOT / "trainer" / "train.py"), "--config", str(path)]
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            command, env={**env, **environment}, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.lines = Path(config.storage, config.name, "metrics.jsonl")

    def steps(self) -> int:
        """Lines that it has written."""
        return len(self.lines.read_text().splitlines()) if self.lines.exists() else 0

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) once it is over."""
        stdout, stderr = self.process.communicate(timeout=400)
        return self.process.returncode, stdout, stderr


@pytest.mark.slow
def test_driver_told_to_stop_then_killed(world: Any, tmp_path: Path) -> None:
    """SIGTERM saves and ends with status 1; the next start goes on; kill -9 of it; the third one finishes."""
    config = dataclasses.replace(world.config, name="driven", storage=str(tmp_path))
    slow = training.steps(config, 4000)
    with Driver(slow, tmp_path, training.ENVIRONMENT) as driver:
        processes.wait_until(lambda: driver.steps() >= 3, driver.process)
        second = subprocess.run(
            [sys.executable, str(ROOT / "trainer" / "train.py"), "--config", str(tmp_path / "driven.yaml")],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert second.returncode == 2 and "is being worked on by process" in second.stderr
        driver.process.send_signal(signal.SIGTERM)
        status, stdout, stderr = driver.end()
    assert status == 1 and json.loads(stdout)["status"] == "stopped", stderr
    stopped = json.loads(stdout)["step"]
    assert training.checkpoints(config)[-1] == stopped and not Path(tmp_path, "driven", "stop").exists()

    with Driver(slow, tmp_path, training.ENVIRONMENT) as driver:
        processes.wait_until(lambda: training.checkpoints(config)[-1] >= stopped + 4, driver.process)
        workers = [pid for pid, name in processes.descendants(driver.process.pid).items() if "RayTrainWorker" in name]
        driver.process.send_signal(signal.SIGKILL)
        driver.end()
    processes.wait_until(
        lambda: not any(map(processes.running, workers)), seconds=15
    )  # before another driver has begun to write
    reached = training.checkpoints(config)[-1]

    with Driver(training.steps(config, reached + 6), tmp_path, training.ENVIRONMENT) as driver:
        status, stdout, stderr = driver.end()
    assert status == 0, stderr
    summary = json.loads(stdout)
    assert summary["step"] == reached + 6 and summary["resumed_from"] in (reached, reached - reached % 4)
    assert training.losses(config)[: len(world.losses)] == world.losses[: reached + 6]

"""Training with nothing but an S3 server: table, checkpoints and metrics on it; a rank is killed, a machine is replaced."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support import cluster, processes, training
from tests.support.stores import World
from trainer.config import CheckpointConfig, TrainConfig
from trainer.storage import Storage

pytestmark = [pytest.mark.integration, pytest.mark.faults]
STEPS = 24


@pytest.fixture(scope="module")
def world(s3: Any, llms: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A store on S3, a config to train on it, and the losses of a plain loop."""
    s3.filesystem().mkdir("train")
    made = World(tmp_path_factory.mktemp("train"), llms)
    with cluster.environment({**s3.env(), **training.ENVIRONMENT}):
        store = training.make_store("s3://train/store", codec="fp32")
        config = training.make_config(store, "s3://train/runs", checkpoint=CheckpointConfig(every_steps=4))
        config = training.steps(config, STEPS)
        with tempfile.TemporaryDirectory(prefix="lidit-") as disks:  # of short names: Ray's sockets lie there
            yield SimpleNamespace(
                world=made, disks=Path(disks), config=config, losses=training.reference(config).losses, s3=s3
            )


def start(world: Any, config: TrainConfig, machine: str) -> Any:
    """`lidit train` on a machine of that name: an empty disk of its own."""
    disk = world.disks / machine
    disk.mkdir()
    path = world.world.folder / f"{config.name}-{machine}.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(disk)
    try:
        return world.world.start("train", "--config", path)
    finally:
        os.environ.pop("TMPDIR") if before is None else os.environ.update(TMPDIR=before)


def losses(world: Any, name: str) -> list[float]:
    """Of every step, once each, as the run's metrics on S3 have them."""
    text = world.s3.filesystem().cat_file(f"train/runs/{name}/metrics.jsonl").decode()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def starts(world: Any, name: str) -> list[int]:
    text = world.s3.filesystem().cat_file(f"train/runs/{name}/starts.jsonl").decode()
    return [json.loads(line)["step"] for line in text.splitlines()]


def manifests(world: Any, name: str) -> int:
    fs = world.s3.filesystem()
    return sum(path.endswith("manifest.json") for path in fs.find(f"train/runs/{name}"))


def test_a_rank_is_killed(world: Any) -> None:
    config = dataclasses.replace(world.config, name="killed", max_failures=2)
    job = start(world, config, "one")
    processes.wait_until(lambda: manifests(world, "killed") >= 1, job, 300)
    ranks = [pid for pid, name in processes.descendants(job.pid).items() if "RayTrainWorker" in name]
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    summary = world.world.finish(job).summary
    assert (summary["ok"], summary["step"]) == (True, STEPS)
    begun = starts(world, "killed")
    assert len(begun) == 2 and begun[0] == 0 and 4 <= begun[1] < STEPS, "from a checkpoint, not from the start"
    np.testing.assert_allclose(losses(world, "killed"), world.losses, atol=1e-4)


def test_another_machine_goes_on(world: Any) -> None:
    """The first one stops in the middle and is gone with its disk; the second has nothing but the command."""
    config = dataclasses.replace(world.config, name="moved", stop_after_steps=10)
    stopped = world.world.finish(start(world, config, "first")).summary
    assert (stopped["ok"], stopped["step"]) == (True, 10)
    shutil.rmtree(world.disks / "first")
    summary = world.world.finish(start(world, dataclasses.replace(config, stop_after_steps=None), "second")).summary
    assert (summary["ok"], summary["resumed_from"], summary["step"]) == (True, 10, STEPS)
    np.testing.assert_allclose(losses(world, "moved"), world.losses, atol=1e-4)


def test_the_secret_is_nowhere_to_be_seen(world: Any) -> None:
    """Not in checkpoints, metrics or configs, and not in what is pickled on its way to the ranks."""
    stored, secret = world.s3.contents(), world.s3.secret.encode()
    assert any(path.endswith("config.json") for path in stored)
    assert [path for path, content in stored.items() if secret in content] == []
    assert secret not in pickle.dumps(Storage("s3://train/runs").fs) + pickle.dumps(world.config)

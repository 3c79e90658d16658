"""The store is away in the middle of every job: the server is stopped, and the jobs wait until it is back."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipelines.engine.table import Table
from tests.support import cluster, training
from trainer.config import CheckpointConfig

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
SECONDS = [20.0, pytest.param(120.0, marks=pytest.mark.slow)]
ROWS, FRAGMENT = 240, 12
STEPS = 24


@pytest.fixture
def switched(tmp_path: Path) -> Any:
    """An S3 server that can be stopped; its environment is this test's."""
    server = Switched(tmp_path)
    server.filesystem().mkdir("away")
    with cluster.environment(server.env()):
        yield server
    server.service.stop()


def Switched(folder: Path) -> Any:
    """`cluster.S3Server` on `tests/support/s3_switch.py`."""

    class Server(cluster.S3Server):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.port, self.secret = cluster.free_port(), "x" * 40
            command = [sys.executable, str(ROOT / "tests" / "support" / "s3_switch.py"), str(self.port)]
            self.service = cluster.Service(command, folder / "s3.log", {**os.environ})
            self.url = f"http://127.0.0.1:{self.port}"
            self.service.wait_for(self.url)

        def away(self, seconds: float) -> None:
            """Nobody listens for so long."""
            self.service.process.send_signal(signal.SIGUSR1)
            with pytest.raises(ConnectionRefusedError):
                while True:
                    socket.create_connection(("127.0.0.1", self.port)).close()
                    time.sleep(0.01)
            time.sleep(seconds)
            self.service.process.send_signal(signal.SIGUSR2)
            self.service.wait_for(self.url)

    return Server()


def interrupt(server: Any, job: subprocess.Popen[str], seconds: float, begun: Callable[[Any], bool]) -> None:
    """Takes the server away at the first moment at which `begun(file system)`."""
    deadline = time.monotonic() + 300
    fs = server.filesystem()
    while not begun(fs):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.away(seconds)
    assert job.poll() is None, "it was in the middle, and waits or works"


@pytest.mark.parametrize("seconds", SECONDS)
def test_preprocessing(switched: Any, world: Any, seconds: float) -> None:
    """Ingest, embed and latents, each interrupted at its first file: nothing is lost, doubled or marked as failed."""
    store = "s3://away/store"
    config = world.config(store=store, text=["caption_original"])
    embed = {key: value for key, value in yaml.safe_load(config.read_text()).items() if key != "store"}
    values = {
        "store": store,
        "stages": ["ingest", "embed", "latents", "verify"],
        "ingest": [{"source": f"scenes:{ROWS}", "rows_per_fragment": FRAGMENT, "actors": {"max": 1}}],
        "embed": embed,
        "latents": {"model": "demo/vae", "resolution": 64, "actors": {"max": 1}},
    }
    path = world.folder / "preprocess.yaml"
    path.write_text(yaml.safe_dump(values))
    job = world.start("preprocess", "--config", path)

    def first_file(stage: str) -> Callable[[Any], bool]:
        return lambda fs: 0 < len(fs.glob(f"away/store/samples.lance/data/{stage}-*")) < ROWS // FRAGMENT

    for stage in ("ingest", "embed", "latents"):
        interrupt(switched, job, seconds, first_file(stage))
    summary = world.finish(job).summary
    assert summary["ok"] and summary["new_rows"] == ROWS
    assert [one["errors"] for one in summary["stages"][:3]] == [0, 0, 0]
    rows = Table(f"{store}/samples.lance").open().to_table()
    assert len(set(rows["image_id"].to_pylist())) == rows.num_rows == ROWS
    assert rows["image"].null_count == rows["latents"].null_count == 0
    for name in ("one", "two"):
        assert rows[f"caption_original_embeds_{name}"].is_null().equals(rows["caption_original"].is_null())
    left = switched.filesystem().find("away/store/runs")
    assert {Path(path).parent.name for path in left if path.endswith("/over")} == {
        Path(path).parent.name for path in left
    }


@pytest.mark.parametrize("seconds", SECONDS)
def test_training(switched: Any, world: Any, seconds: float) -> None:
    """Interrupted at a save, and in the middle of the steps: it loses no step, and needs no second start."""
    with cluster.environment(training.ENVIRONMENT):
        store = training.make_store("s3://away/store", codec="fp32")
        config = training.make_config(store, "s3://away/runs", checkpoint=CheckpointConfig(every_steps=4))
        config = dataclasses.replace(training.steps(config, STEPS), max_failures=0)
        wanted = training.reference(config).losses
        path = world.folder / "train.yaml"
        path.write_text(yaml.safe_dump(config.to_dict()))
        job = world.start("train", "--config", path)
        saved = lambda fs: any("/checkpoints/" in path for path in fs.find(f"away/runs/{config.name}"))  # noqa: E731
        interrupt(switched, job, seconds, saved)
        summary = world.finish(job).summary
    assert (summary["ok"], summary["step"], summary["resumed_from"]) == (True, STEPS, 0)
    np.testing.assert_allclose(losses(switched, config.name), wanted, atol=1e-4)


def losses(server: Any, name: str) -> list[float]:
    """Of every step, once each."""
    import json

    text = server.filesystem().cat_file(f"away/runs/{name}/metrics.jsonl").decode()
    lines = [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]

"""Servers that jobs talk to: a VLM behind OpenAI's protocol, object storage, a local Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.processes import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def ray_here() -> Any:
    """A local Ray for jobs that run inside the test's own process."""
    import ray

    from pipelines.engine.pool import start_ray_data

    start_ray_data()
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def vlm_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`transformers serve` with the demo's VLM on this machine's loopback: a real server of the OpenAI protocol.

    `url` is its base URL, `model` the name to ask for.
    """
    import socket
    import urllib.error
    import urllib.request

    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = str(ROOT / "demo" / "vlm")
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        command = [str(Path(sys.executable).with_name("transformers")), "serve", model, *flags]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)

    def answers() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()
            return False

    try:
        wait_until(answers)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", model=model, port=port)
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server of S3's protocol; its buckets are the tests' to name."""
    from tests.support.cluster import S3Server

    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.service.stop()


@pytest.fixture(scope="module")
def ray_for_training() -> Any:
    """One local Ray for all training jobs of a file; its workers get the observers of `training` by value."""
    import ray

    from tests.support import training

    before = {name: os.environ.get(name) for name in training.ENVIRONMENT}
    os.environ.update(training.ENVIRONMENT)
    ray.cloudpickle.register_pickle_by_value(training)
    yield
    ray.cloudpickle.unregister_pickle_by_value(training)
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})

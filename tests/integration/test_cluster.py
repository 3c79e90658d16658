"""Two Ray nodes that share nothing but an S3 server: jobs by `ray job submit`, behind a token; a node that dies meanwhile."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import cluster, processes
from tests.support.stores import World

pytestmark = [pytest.mark.integration, pytest.mark.faults]

ROWS, FRAGMENTS = 1440, 24
STORE = "s3://cluster/store"
COLUMN = "caption_original_embeds_llama"
TEXT = ("--text", '["caption_original"]')


@pytest.fixture(scope="module")
def nodes(s3: Any, llms: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head and a worker, and the demo's table on S3, with scenes in it."""
    world = World(tmp_path_factory.mktemp("laptop"), llms)
    s3.filesystem().mkdir("cluster")
    with cluster.environment(s3.env()):
        source = ("--source", f"scenes:{ROWS}", "--rows-per-fragment", ROWS // FRAGMENTS)
        world.run("ingest", "--store", STORE, *source)
    made = cluster.RayNodes(s3.env(), head_cpus=1)
    try:
        worker = made.add_worker(cpus=2)
        yield SimpleNamespace(ray=made, worker=worker, world=world)
    finally:
        made.stop()


def table(s3: Any) -> Any:
    from pipelines.engine.table import Table

    with cluster.environment(s3.env()):
        return Table(f"{STORE}/samples.lance").open()


def column_files(s3: Any) -> int:
    """Files that embed has finished, committed or not."""
    files = s3.filesystem().ls("cluster/store/samples.lance/data", detail=False)
    return sum("/embed-" in path for path in files)


def test_nobody_submits_without_the_token(nodes: Any, s3: Any) -> None:
    version = table(s3).version
    entrypoint = ("python", "pipelines/embed.py", "--store", STORE, *TEXT)
    for env in (nodes.ray.base | {"RAY_AUTH_MODE": "disabled"}, nodes.ray.env | {"RAY_AUTH_TOKEN": "f" * 64}):
        submitted = nodes.ray.submit(*entrypoint, env=env)
        said, _ = submitted.communicate(timeout=120)
        assert submitted.returncode != 0, said
        assert re.search("401|403|[Uu]nauthorized|[Uu]nauthenticated|[Ii]nvalid.*token|[Aa]uthentication", said), said
    assert table(s3).version == version


LOCAL = """
import ray
from lidit.runtime.cluster import start_ray
start_ray(ray, num_cpus=1)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""


def test_the_ray_of_a_local_job_wants_a_token(tmp_path: Path) -> None:
    """It listens on all addresses of the machine."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    job = subprocess.Popen(
        [sys.executable, "-c", LOCAL],
        env=plain | {"HOME": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = job.stdout.readline().strip()  # type: ignore[union-attr]
        join = f"import ray; ray.init('{address}'); print('joined', ray.cluster_resources()['CPU'])"
        owner = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
        strangers = [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}]
        for who in (owner, *strangers):
            command = [sys.executable, "-c", join]
            said = subprocess.run(command, env=plain | who, capture_output=True, text=True, timeout=120)
            assert ("joined 1.0" in said.stdout) == (who is owner), said.stderr[-3000:]
    finally:
        job.communicate("\n", timeout=60)


def test_preflight_looks_at_both_nodes(nodes: Any) -> None:
    flags = ("--store", STORE, "--all-nodes", "--all-reduce", "--min-disk-gb", 0.001)
    job = nodes.ray.submit("python", "infra/preflight.py", *flags)
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said[-6000:]
    (result,) = [json.loads(line) for line in said.splitlines() if line.startswith('{"ok"')]
    *each, (together,) = result["nodes"].values()
    assert len(each) == 2 and all(len(checks) == 6 for checks in each) and result["ok"]
    assert together["found"].startswith("2 ranks, gloo: ")


def test_a_node_dies_in_the_middle_of_a_job(nodes: Any, s3: Any) -> None:
    flags = ("--actors.min", 2, "--actors.max", 2, "--batch-tokens", 16, "--commit.fragments", 1, "--commit.seconds", 0)
    job = nodes.ray.submit("python", "pipelines/embed.py", "--store", STORE, *TEXT, *flags)
    processes.wait_until(lambda: column_files(s3) >= 2, job, 300)
    below = processes.descendants(nodes.worker.process.pid)
    (raylet,) = [pid for pid, name in below.items() if "/raylet/raylet " in name]
    assert processes.unit_actors(raylet), "the worker node has an actor"
    os.kill(raylet, signal.SIGKILL)
    assert column_files(s3) < FRAGMENTS - 2, "the job was nearly over when the node died"
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said[-6000:]
    assert '"ok": true' in said and "succeeded" in said

    with cluster.environment(s3.env()):
        verified = nodes.world.run("verify", "--store", STORE, "--sample", 64).summary
        dataset = table(s3)
        assert (
            dataset.count_rows(f"caption_original IS NOT NULL AND {COLUMN} IS NULL OR embed_error IS NOT NULL") == 0
            and dataset.count_rows() == ROWS
        )
        files, known = (
            set(made.read_all()["path"].to_pylist()) for made in (dataset.all_files(), dataset.tracked_files())
        )
    assert verified["ok"], "each row once, every byte as written, and as plain transformers encode it"
    assert {path for path in files - known if path.startswith("data/")} == set(), (
        "what the dead node had begun is removed"
    )
    counted = nodes.ray.metric("ray_lidit_rows_total", stage="embed")
    assert counted is not None and ROWS <= counted <= 2 * ROWS, "exported to Prometheus; repeated work counts again"


def test_the_secret_is_nowhere_to_be_seen(nodes: Any, s3: Any) -> None:
    """After what ran above: neither in the store nor in what Ray has written down."""
    stored, left = s3.contents(), nodes.ray.logs()
    assert any(path.endswith("config.yaml") for path in stored) and any("job-driver" in path for path in left)
    secret = s3.secret.encode()
    assert [path for path, content in {**stored, **left}.items() if secret in content] == []
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True).stdout
    assert secret not in shown, "nor on a command line"

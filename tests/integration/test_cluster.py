"""Two Ray nodes that share nothing but an S3 server: jobs by `ray job submit`, behind a token; a node that dies meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lidit.codec import decode_bytes

pytestmark = [pytest.mark.integration, pytest.mark.faults]

ROWS, FRAGMENTS = 360, 12
STORE = "s3://cluster/store"
COLUMN = "caption_original_embeds_llama"


@pytest.fixture(scope="module")
def nodes(cloud: Any, s3: Any, make_world: Any, llms: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A head and a worker, a store of scenes on S3, and the rows that an unbroken run on a disk makes of the same scenes."""
    world = make_world(tmp_path_factory.mktemp("clean"), llms)
    source = ("--source", f"scenes:{ROWS}", "--rows-per-fragment", ROWS // FRAGMENTS)
    text = ("--text", '["caption_original"]')
    s3.filesystem().mkdir("cluster")
    with cloud.environment(s3.env()):
        world.run("ingest", "--store", STORE, *source)
    world.run("ingest", "--store", world.store, *source)
    world.run("embed", "--store", world.store, *text)
    made = cloud.RayNodes(s3.env(), head_cpus=1)
    try:
        worker = made.add_worker(cpus=2)
        yield SimpleNamespace(ray=made, worker=worker, clean=world.rows(), text=text)
    finally:
        made.stop()


def table(cloud: Any, s3: Any) -> Any:
    from pipelines.table import Table

    with cloud.environment(s3.env()):
        return Table(f"{STORE}/samples.lance").open()


def committed(cloud: Any, s3: Any) -> int:
    """Fragments of the table on S3 that have the column."""
    from pipelines.table import Table

    with cloud.environment(s3.env()):
        store = Table(f"{STORE}/samples.lance")
        dataset = store.open()
        return len(dataset.get_fragments()) - len(store.missing([COLUMN], dataset))


def test_nobody_submits_without_the_token(nodes: Any, cloud: Any, s3: Any) -> None:
    version = table(cloud, s3).version
    entrypoint = ("python", "pipelines/embed.py", "--store", STORE, *nodes.text)
    for env in (nodes.ray.base | {"RAY_AUTH_MODE": "disabled"}, nodes.ray.env | {"RAY_AUTH_TOKEN": "f" * 64}):
        submitted = nodes.ray.submit(*entrypoint, env=env)
        said, _ = submitted.communicate(timeout=120)
        assert submitted.returncode != 0, said
        assert re.search("401|403|[Uu]nauthorized|[Uu]nauthenticated|[Ii]nvalid.*token|[Aa]uthentication", said), said
    assert table(cloud, s3).version == version


def test_a_node_dies_in_the_middle_of_a_job(nodes: Any, cloud: Any, s3: Any, tools: Any) -> None:
    flags = ("--actors.min", 2, "--actors.max", 2, "--batch-tokens", 16, "--commit.fragments", 1, "--commit.seconds", 0)
    job = nodes.ray.submit("python", "pipelines/embed.py", "--store", STORE, *nodes.text, *flags)
    tools.wait_until(lambda: committed(cloud, s3) >= 2, job, 300)
    below = tools.descendants(nodes.worker.process.pid)
    (raylet,) = [pid for pid, name in below.items() if "/raylet/raylet " in name]
    assert any("_UnitCaller" in name for name in tools.descendants(raylet).values()), "the worker node has an actor"
    os.kill(raylet, signal.SIGKILL)
    done_before = committed(cloud, s3)
    assert done_before < FRAGMENTS, "the job was over before the node died"
    said, _ = job.communicate(timeout=300)
    assert job.returncode == 0, said[-6000:]
    assert '"ok": true' in said and "succeeded" in said

    dataset = table(cloud, s3)
    assert committed(cloud, s3) == FRAGMENTS
    with cloud.environment(s3.env()):
        rows = dataset.to_table(columns=["image_id", COLUMN, "embed_error"]).to_pylist()
    width = int(dataset.schema.field(COLUMN).metadata[b"lidit:width"])
    assert len(rows) == ROWS == len({row["image_id"] for row in rows})
    for row in rows:
        mine, theirs = (decode_bytes(v[COLUMN], "bf16", width) for v in (row, nodes.clean[row["image_id"]]))
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=1e-3)
        assert row["embed_error"] is None
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

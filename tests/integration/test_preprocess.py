"""The scheduled job on real shards with real models: only what is new is worked on, whatever was killed before."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from demo.world import scenes
from lidit.runtime.fields import to_plain
from pipelines import preprocess
from pipelines.embed import EmbedConfig
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.retention import RetentionConfig
from pipelines.engine.unit_pass import CommitConfig
from pipelines.ingest import IngestConfig
from pipelines.latents import LatentsConfig
from pipelines.preprocess import PreprocessConfig
from pipelines.recaption import RecaptionConfig
from tests.support import processes

pytestmark = pytest.mark.integration

ROWS = 16  # of a shard
COLUMNS = ("caption", "caption_embeds_one", "caption_embeds_two", "latents", "bucket")


def write_shard(world: Any, number: int) -> None:
    """A tar of rendered scenes that are nowhere else; whole at once, as an object store shows it."""
    folder = world.folder / "shards"
    folder.mkdir(exist_ok=True)
    with tarfile.open(world.folder / "beside.tar", "w") as tar:
        for seed in range(number * ROWS, (number + 1) * ROWS):
            made = scenes.example(seed, 64, 64)
            for suffix, content in (("png", made["image_bytes"]), ("txt", f"scene {seed}".encode())):
                info = tarfile.TarInfo(f"{seed:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    os.replace(world.folder / "beside.tar", folder / f"{number:04d}.tar")


def config_of(world: Any, **changes: Any) -> PreprocessConfig:
    """Tars -> the demo's VLM -> two tiny LLMs -> the demo's autoencoder."""
    encoders = EmbedConfig.encoders[0].__class__
    actors, commit = ActorsConfig(min=1, max=1, num_gpus=0.0), CommitConfig(1, 0.0)
    common = {"actors": actors, "commit": commit}
    return PreprocessConfig(
        str(world.store),
        ingest=(IngestConfig(f"webdataset:{world.folder}/shards", rows_per_fragment=ROWS, actors=actors),),
        recaption=RecaptionConfig(**common, batch_tokens=1024, blank_share=0.0),
        embed=EmbedConfig(
            **common,
            encoders=tuple(
                encoders(name, model=str(path), template="plain", dtype="fp32") for name, path in world.llms.items()
            ),
            batch_tokens=256,
        ),
        latents=LatentsConfig(**common, batch_pixels=4096),
        **changes,
    )


def as_yaml(world: Any, config: PreprocessConfig) -> Path:
    """The config as a file for the command line."""
    values = to_plain(config)
    for part in (*values["ingest"], *(values[name] for name in ("recaption", "embed", "latents", "verify"))):
        part.pop("store")
    path = world.folder / "preprocess.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def assert_whole(world: Any, shards: int) -> None:
    """Every row of every shard is there once, with all columns."""
    rows = world.rows()
    assert len(rows) == shards * ROWS
    assert {row["caption_original"] for row in rows.values()} == {f"scene {seed}" for seed in range(shards * ROWS)}
    for row in rows.values():
        assert all(row[name] is not None for name in COLUMNS if row["caption"] is not None), row["image_id"]
        assert (
            row["latents"] is not None and row["recaption_error"] is row["embed_error"] is row["latents_error"] is None
        )
    assert sum(row["caption"] is not None for row in rows.values()) > 0.8 * len(rows)
    assert world.orphans() == set()


def by_job(result: Any) -> dict[str, dict[str, Any]]:
    return {stage["job"]: stage for stage in result.stages}


@pytest.mark.usefixtures("ray_here")
def test_new_shards_between_runs(world: Any) -> None:
    config = config_of(world, retention=RetentionConfig(days=0.0))
    write_shard(world, 0)
    first = preprocess.main(config)
    assert (first.ok, first.status, first.new_rows) == (True, "done", ROWS), first.error
    assert first.retention["removed"] > 0, "every version but the newest and the verified one"
    world.table.tags.create("pinned-by-training", first.version)

    write_shard(world, 1)
    write_shard(world, 2)
    second = preprocess.main(config)
    assert (second.ok, second.new_rows) == (True, 2 * ROWS), second.error
    stages = by_job(second)
    assert stages["ingest"]["counts"]["shards_done_before"] == 1
    assert {name: stages[name]["rows"] for name in ("ingest", "recaption", "embed", "latents")} == dict.fromkeys(
        ("ingest", "recaption", "embed", "latents"), 2 * ROWS
    )
    assert stages["verify"]["checks"]["content"] == "digests of every column, 2 fragments changed since lidit-verified"
    assert set(second.retention["tagged"]) == {"pinned-by-training", "lidit-verified"}
    assert world.table.checkout_version("pinned-by-training").count_rows() == ROWS, "its version is still whole"

    third = preprocess.main(config)
    assert (third.ok, third.new_rows, third.version) == (True, 0, second.version), "nothing new: nothing is changed"
    assert all(by_job(third)[name]["fragments"] == 0 for name in ("ingest", "recaption", "embed", "latents"))
    assert by_job(third)["verify"]["checks"]["content"].startswith("digests of every column, 0 fragments")
    assert_whole(world, 3)


def test_a_second_one_leaves_while_the_first_works(world: Any) -> None:
    """By the command line, as two schedules would start it; the first is stopped politely and gives the lease back."""
    write_shard(world, 0)
    path = as_yaml(world, config_of(world))
    first = world.start("preprocess", "--config", path)
    processes.wait_until(lambda: (world.store / "preprocess" / "lease-00000001").exists(), first)
    second = world.run("preprocess", "--config", path)
    assert (second.summary["status"], second.summary["ok"], second.summary["stages"]) == ("busy", True, [])
    assert f"worked on by process {first.pid} on" in second.summary["error"]
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode != 0
    sign = json.loads((world.store / "preprocess" / "lease-00000001").read_text())
    assert sign["released"] is True


# -- the whole command, killed in every stage ------------------------------------------------------------------------------


def begun(world: Any, stage: str) -> bool:
    """Whether a run of the stage has begun and left a trace of its work."""
    if stage == "verify":
        return any((world.store / "runs").glob("latents-*/summary.json"))
    return any((world.store / "samples.lance" / "data").glob(f"{stage}-*.lance"))


@pytest.mark.faults
def test_killed_in_every_stage_and_finished_by_the_next(world: Any) -> None:
    for number in range(3):
        write_shard(world, number)
    path = as_yaml(world, config_of(world))
    for stage in preprocess.STAGES:
        job = world.start("preprocess", "--config", path)
        processes.stop_when(lambda stage=stage: begun(world, stage), job)
        actors = processes.unit_actors(job.pid)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert not (world.store / "preprocess" / "last.json").exists(), f"it was over before {stage} was killed"
        processes.wait_until(lambda actors=actors: not any(map(processes.running, actors)))
    result = world.run("preprocess", "--config", path)
    assert result.summary["ok"] and result.summary["status"] == "done"
    assert_whole(world, 3)
    assert world.run("preprocess", "--config", path).summary["version"] == result.summary["version"]


@pytest.mark.slow
def test_two_at_once_one_waits(world: Any) -> None:
    for number in range(2):
        write_shard(world, number)
    path = as_yaml(world, config_of(world))
    jobs = [world.start("preprocess", "--config", path, "--if-busy", "wait", "--wait-seconds", 300) for _ in range(2)]
    results = [world.finish(job).summary for job in jobs]
    assert sorted(result["new_rows"] for result in results) == [0, 2 * ROWS] and all(r["ok"] for r in results)
    late = max(results, key=lambda result: result["seconds"])
    assert late["new_rows"] == 0 and all(stage.get("fragments", 0) == 0 for stage in late["stages"])
    assert_whole(world, 2)

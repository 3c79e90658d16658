"""Dirty prompts, broken models, damaged files, full disks: a clear message, nothing lost, nothing half-visible."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from lidit.frozen.text import EncoderConfig
from lidit.store import columns
from pipelines import embed, ingest, verify
from pipelines.embed import EmbedConfig
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.stage import StageConfig, run_stage
from pipelines.engine.unit_pass import CommitConfig, ErrorRateExceeded
from pipelines.engine.worker import READS, Columns
from pipelines.ingest import IngestConfig
from pipelines.verify import VerifyConfig
from tests.support import processes

pytestmark = pytest.mark.faults
ONE = ActorsConfig(min=1, max=1, num_gpus=0)

ODD = {
    "empty": "",
    "space": "   ",
    "long": "red circle " * 4600,
    "nul": "red\0circle",
    "emoji": "👩‍🚀🔴 a red circle",
    "right to left": "دائرة حمراء",
    "newline": "red\ncircle\r\nblue",
    "chinese": "一个红色的圆",
}


def put(world: Any, source: str, rows_per_fragment: int = 50) -> Any:
    return ingest.main(IngestConfig(source, str(world.store), rows_per_fragment, ONE))


@pytest.fixture
def config(world: Any, ray_here: Any) -> EmbedConfig:
    encoders = tuple(
        EncoderConfig(name, str(path), template="plain", dtype="fp32", codec="fp32")
        for name, path in world.llms.items()
    )
    return EmbedConfig(store=str(world.store), encoders=encoders, actors=ONE, commit=CommitConfig(1, 0.0))


def write_rows(world: Any, texts: list[str | None]) -> None:
    """Puts texts straight into a table, also such as no source would give."""
    from pipelines.engine.column_file import ColumnFileWriter
    from pipelines.engine.table import Table
    from pipelines.sources.base import CAPTION_FIELD, ID_FIELD

    table, schema = Table(str(world.store / "samples.lance")), pa.schema([ID_FIELD, CAPTION_FIELD])
    table.create(schema)
    writer = ColumnFileWriter(table.uri, schema, "ingest-test")
    writer.write(pa.RecordBatch.from_pylist([{"image_id": str(n), "caption": t} for n, t in enumerate(texts)], schema))
    table.append([writer.finish(table.open())])


def test_odd_prompts(world: Any, config: EmbedConfig) -> None:
    write_rows(world, [*ODD.values(), None])
    summary = embed.main(config)
    assert (summary.ok, summary.rows, summary.errors) == (True, len(ODD) + 1, 0)
    rows = world.rows()
    by_name = {name: rows[str(number)] for number, name in enumerate(ODD)}
    assert by_name["empty"]["caption_embeds_one"] == b"" and by_name["empty"]["caption_length_one"] == 0
    assert by_name["long"]["caption_length_one"] == 256 and by_name["long"]["caption_truncated_one"] > 5000
    assert summary.counts["truncated"] == 2  # once per encoder
    assert all(row["caption_length_two"] > 0 for name, row in by_name.items() if name != "empty")
    assert rows[str(len(ODD))]["caption_embeds_one"] is None and rows[str(len(ODD))]["embed_error"] is None
    report = verify.main(VerifyConfig(str(world.store), sample=20))
    assert report.ok, report.to_text()


def test_nan_for_one_prompt_is_a_row_error_and_survives_a_second_encoder(
    world: Any, config: EmbedConfig, tmp_path: Path
) -> None:
    broken = shutil.copytree(world.llms["one"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(broken)("Z", add_special_tokens=False)["input_ids"][0]
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    encoders = (dataclasses.replace(config.encoders[0], model=str(broken)), config.encoders[1])
    config = dataclasses.replace(config, encoders=encoders, max_error_rate=0.5)
    write_rows(world, ["red circle", "red Z circle", "blue star", "green"])
    first = embed.main(config.only(["one"]))
    assert (first.ok, first.errors) == (True, 1) and "NaN" in first.error_examples[0]["error"]
    embed.main(config)
    rows = world.rows()
    assert rows["1"]["caption_embeds_one"] is None and "caption_embeds_one: NaN" in rows["1"]["embed_error"]
    assert rows["1"]["caption_length_one"] is None
    assert rows["1"]["caption_embeds_two"] is not None
    assert all(rows[n]["embed_error"] is None and rows[n]["caption_embeds_one"] for n in "023")
    assert verify.main(VerifyConfig(str(world.store), sample=4)).ok


def test_error_rate_exceeded_stops_and_keeps_clean_fragments(world: Any, config: EmbedConfig) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    write_rows(world, ["red"] * 60)
    write_rows(world, ["red"] * 10 + ["RAISE"] * 50)
    with pytest.raises(ErrorRateExceeded, match=r"max_error_rate 0.1 .*run the same command again"):
        run_stage(Fragile, FragileConfig(str(world.store), actors=ONE, max_error_rate=0.1))
    clean, dirty = (f.to_table(columns=["shout"])["shout"].null_count for f in world.table.get_fragments())
    assert clean in (0, 60) and dirty == 60, "a fragment is there whole or not at all, and not with too many errors"
    assert run_stage(Fragile, FragileConfig(str(world.store), actors=ONE, max_error_rate=0.9)).errors == 50


def test_rows_that_raise_or_kill_their_process_are_set_aside(world: Any, config: EmbedConfig) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    texts = [f"row {n}" for n in range(40)]
    texts[7], texts[23] = "RAISE", "DIE"
    write_rows(world, texts)
    write_rows(world, ["fine"] * 10)
    summary = run_stage(Fragile, FragileConfig(str(world.store), actors=ONE, max_error_rate=0.5))
    assert (summary.ok, summary.rows, summary.errors) == (True, 50, 2)
    rows = world.table.to_table().to_pylist()
    assert [row["shout"] for row in rows[:40]] == [None if text in ("RAISE", "DIE") else text.upper() for text in texts]
    assert "ArithmeticError: cannot" in rows[7]["fragile_error"]
    assert "process died" in rows[23]["fragile_error"]
    assert sum(row["fragile_error"] is not None for row in rows) == 2
    assert world.orphans() == set()


def test_two_stages_at_once(world: Any, config: EmbedConfig) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    put(world, f"prompts:{world.prompts(200)}", 20)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(embed.main, config)
        two = pool.submit(run_stage, Fragile, FragileConfig(str(world.store), actors=ONE))
        assert one.result().fragments == two.result().fragments == 10
    rows = world.rows().values()
    assert all(row["shout"] == row["caption"].upper() and row["caption_embeds_one"] for row in rows)
    assert world.orphans() == set()


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "missing"])
def test_damaged_column_file_is_found(world: Any, config: EmbedConfig, damage: str) -> None:
    put(world, f"prompts:{world.prompts(60)}")
    embed.main(config)
    victim = max(world.data_files(), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif damage == "cut short":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    report = verify.main(VerifyConfig(str(world.store), sample=0))
    assert not report.ok
    assert victim.name in " ".join(report.problems["content"])


BROKEN = {
    "missing": (lambda folder: shutil.rmtree(folder), "nothing is there"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cut short or damaged"),
    "other shapes": (
        lambda folder: edit(folder, '"hidden_size": 32', '"hidden_size": 64'),
        "do not fit its config.json",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "expected config.json"),
}


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


@pytest.mark.parametrize("what", BROKEN)
def test_broken_model_folder(world: Any, tmp_path: Path, what: str) -> None:
    """Through the command line: the exit status is not 0, the message says what to do, no column has data."""
    folder = shutil.copytree(world.llms["one"], tmp_path / "broken")
    damage, message = BROKEN[what]
    write_rows(world, ["red"] * 10)
    world.llms = {"one": folder}
    damage(folder)
    job = world.start("embed", "--config", world.config())
    stdout, stderr = job.communicate(timeout=300)
    assert job.returncode in (1, 2) and stdout == ""
    assert message in stderr, stderr
    assert world.committed() == 0 and not world.data_files()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stor": "x"}, "Option 'stor' is not accepted"),
        ({"store": "/nonexistent/store"}, "ingest rows first"),
        ({"text": ["captoin"]}, "reads column 'captoin'"),
        ({"max_error_rate": 2}, "max_error_rate: expected a number >= 0 and <= 1, received 2"),
        ({"encoders": []}, "encoders: expected at least one"),
    ],
)
def test_wrong_config(world: Any, change: dict[str, Any], message: str) -> None:
    write_rows(world, ["red"] * 10)
    result = world.run("embed", "--config", world.config(**change), expect=2)
    assert message in result.stderr and result.stdout == ""


def test_full_disk(world: Any, config: EmbedConfig) -> None:
    """On a file system of 3 MB: stops with the reason, the table stays whole; with room again it finishes."""
    world.store.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", world.store]).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        put(world, f"prompts:{world.prompts(2000)}", 100)
        result = world.run("embed", "--config", world.config(), expect=1)
        assert "No space left" in result.stderr or "os error 28" in result.stderr, result.stderr
        world.table.validate()
        done = world.committed()
        assert 0 < done < 20
        subprocess.run(["mount", "-o", "remount,size=64m", world.store], check=True)
        assert world.run("embed", "--config", world.config()).summary["fragments"] == 20 - done
        assert all(row["caption_embeds_two"] is not None for row in world.rows().values())
        assert world.orphans() == set()
    finally:
        subprocess.run(["umount", "-l", world.store], check=True)


def test_ingest_killed_and_run_again(world: Any) -> None:
    flags = ("--store", world.store, "--source", "scenes:3000", "--rows-per-fragment", 40)
    job = world.start("ingest", *flags)
    data = world.store / "samples.lance" / "data"
    processes.stop_when(lambda: len(list(data.glob("ingest-*"))) >= 5, job)
    actors = processes.unit_actors(job.pid)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    processes.wait_until(lambda: not any(map(processes.running, actors)))
    before = world.table.count_rows()
    again = world.run("ingest", *flags)
    assert again.summary["rows"] == 3000 - before
    assert sorted(world.rows()) == [f"scene-{seed:08d}" for seed in range(3000)]
    assert world.orphans() == set()


@dataclasses.dataclass(frozen=True)
class FragileConfig(StageConfig):
    """A stage that breaks on some rows."""


class Fragile:
    """`caption` -> `shout`; raises on RAISE, and its process dies on DIE."""

    name = "fragile"
    window_rows = 16

    def __init__(self, config: FragileConfig):
        self.config = config

    @classmethod
    def writes(cls, config: FragileConfig) -> list[pa.Field]:
        metadata = {READS: "caption", columns.META_STAGE: cls.name, columns.META_FINGERPRINT: "{}"}
        return [pa.field("shout", pa.string(), metadata=metadata)]

    @classmethod
    def bytes_per_row(cls, config: FragileConfig, sample: pa.Table, fields: list[pa.Field]) -> float:
        return 10.0

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        texts = window.column("caption").to_pylist()
        if "DIE" in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "RAISE" in texts:
            raise ArithmeticError("cannot")
        return Columns({"shout": pa.array([text.upper() for text in texts], pa.string())})

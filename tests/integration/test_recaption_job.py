"""The recaption job on real engines: local Ray, Lance, the demo's VLM here and behind `transformers serve`."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from demo import store
from demo.world.caption_check import check_caption
from lidit import cli
from lidit.frozen.text import EncoderConfig
from pipelines import embed, ingest, recaption, verify
from pipelines.captioning.request import CaptionRequest, prompt_text
from pipelines.captioning.transformers_engine import Captioner
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.unit_pass import CommitConfig
from pipelines.ingest import IngestConfig
from pipelines.recaption import DEMO_VLM, RecaptionConfig
from pipelines.verify import VerifyConfig

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_here")]
ONE = ActorsConfig(min=1, max=1, num_gpus=0)
SECRET = "sk-planted-0123456789abcdef"


@pytest.fixture
def config(world: Any) -> RecaptionConfig:
    return RecaptionConfig(store=str(world.store), max_new_tokens=128, actors=ONE, commit=CommitConfig(2, 5.0))


def put(world: Any, source: str, rows_per_fragment: int = 25) -> Any:
    return ingest.main(IngestConfig(source, str(world.store), rows_per_fragment, actors=ONE))


def test_scenes_are_described_as_they_are(world: Any, config: RecaptionConfig) -> None:
    put(world, "scenes:60")
    summary = recaption.main(dataclasses.replace(config, blank_share=0.2))
    assert (summary.ok, summary.rows, summary.fragments, summary.errors) == (True, 60, 3, 0)
    rows = world.rows()
    kept = [row for row in rows.values() if row["caption_status"] == "ok"]
    assert summary.counts["status_ok"] == len(kept) >= 57
    verdicts = [check_caption(row["caption"], json.loads(row["truth"])) for row in kept]
    assert sum(verdict.objects for verdict in verdicts) >= 0.8 * len(kept)
    assert all(0 < row["caption_tokens"] < 128 and row["recaption_error"] is None for row in kept)
    assert summary.counts["blank_checked"] > 2 and not summary.counts.get("blank_same"), "the model does look"
    assert summary.examples["ok"][0] in {row["caption"] for row in kept}
    # a caption is the engine's own, whatever was in its batch
    engine = Captioner(DEMO_VLM, config.max_new_tokens, config.image_side, config.batch_tokens, "cpu")
    for image_id in list(rows)[::19]:
        (answer,) = engine([CaptionRequest(rows[image_id]["image"], prompt_text(config.instruction))])
        assert (answer.text, answer.tokens) == (rows[image_id]["caption"], rows[image_id]["caption_tokens"])
    assert recaption.main(dataclasses.replace(config, blank_share=0.2)).fragments == 0
    assert verify.main(VerifyConfig(str(world.store), sample=0)).ok and world.orphans() == set()


def test_new_rows_other_settings_and_a_second_column(world: Any, config: RecaptionConfig) -> None:
    put(world, "scenes:10")
    recaption.main(config)
    first = world.rows()
    put(world, "scenes:16")
    assert recaption.main(config).rows == 6
    with pytest.raises(ValueError, match=r"column 'caption'.*max_new_tokens: the table has 128, this run makes 96"):
        recaption.main(dataclasses.replace(config, max_new_tokens=96))
    beside = dataclasses.replace(config, column="caption_hinted", hint=True, temperature=1.0)
    assert recaption.main(beside).rows == 16
    rows = world.rows()
    assert all(rows[image_id]["caption"] == row["caption"] for image_id, row in first.items())
    assert all((row["caption_hinted"] is None) == (row["caption_hinted_status"] != "ok") for row in rows.values())
    assert Counter(row["caption_hinted_status"] for row in rows.values())["ok"] > 8
    plan = recaption.main(dataclasses.replace(config, column="third", dry_run=True)).plan
    assert "column     third_status: new" in plan


def test_what_was_ingested_is_never_replaced(world: Any, config: RecaptionConfig) -> None:
    put(world, f"prompts:{world.prompts(5)}")
    put(world, "scenes:5")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"column 'caption' of .* was ingested, not made by recaption"):
            recaption.main(dataclasses.replace(config, overwrite=overwrite))
    summary = recaption.main(dataclasses.replace(config, column="caption_vlm"))
    assert (summary.rows, summary.fragments_waiting) == (5, 1), "prompts have no image to be described"


def test_the_gate_finds_that_the_demo_vlm_knows_no_photographs(world: Any, config: RecaptionConfig, data: Path) -> None:
    """35 COCO photos, five rows each: every photo is described once, and what the tiny model says of it does not pass."""
    put(world, f"coco:{data / 'coco-mini-cc'}", 1024)
    summary = recaption.main(dataclasses.replace(config, retries=1, blank_share=1.0))
    assert (summary.ok, summary.rows, summary.errors) == (True, 175, 0)
    rows = list(world.rows().values())
    by_status = Counter(row["caption_status"] for row in rows)
    assert {f"status_{status}": count for status, count in by_status.items()} == {
        name: count for name, count in summary.counts.items() if name.startswith("status_")
    }
    assert by_status["ok"] <= 0.1 * len(rows), by_status
    assert all((row["caption"] is None) == (row["caption_status"] != "ok") for row in rows)
    assert summary.counts["blank_checked"] == 35, "equal images are described once"


def test_both_captions_are_embedded_in_one_run_and_equal_texts_once(world: Any, config: RecaptionConfig) -> None:
    put(world, "scenes:40")
    recaption.main(config)
    encoders = tuple(
        EncoderConfig(name, str(path), template="plain", dtype="fp32", codec="fp32")
        for name, path in world.llms.items()
    )
    job = embed.EmbedConfig(store=str(world.store), text=("caption", "caption_original"), encoders=encoders, actors=ONE)
    summary = embed.main(job)
    assert (summary.ok, summary.rows, summary.errors) == (True, 40, 0)
    rows = world.rows()
    for row in rows.values():
        for text in ("caption", "caption_original"):
            for encoder in world.llms:
                assert (row[f"{text}_embeds_{encoder}"] is None) == (row[text] is None)
    tokens = 0
    for encoder in encoders:
        alone = embed.PromptEncoder(encoder, "cpu")
        for fragment in world.table.get_fragments():  # a fragment of 25 rows is one window
            texts = fragment.to_table(columns=["caption", "caption_original"])
            distinct = {text for name in texts.column_names for text in texts[name].to_pylist() if text is not None}
            tokens += sum(map(len, alone.tokenize(sorted(distinct))[0]))
    assert summary.counts["tokens"] == tokens
    assert verify.main(VerifyConfig(str(world.store), sample=16)).ok


def test_the_demo_world_is_made_in_one_command(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `lidit embed` with no argument at all does, on fewer scenes: ingest, recaption, embed."""
    monkeypatch.setattr(store, "DemoConfig", functools.partial(store.DemoConfig, scenes=12, actors=ONE))
    monkeypatch.chdir(world.store.parent)
    assert world.store.name == "store"
    cli._make_demo("embed")
    config = embed.EmbedConfig(store=str(world.store), text=("caption", "caption_original"), actors=ONE)
    assert embed.main(config).rows == 12
    rows = world.rows().values()
    assert all(row["caption_embeds_llama"] and row["caption_embeds_qwen"] for row in rows if row["caption"])
    assert sum(row["caption_status"] == "ok" for row in rows) >= 10
    said = capsys.readouterr().err
    assert said.startswith("lidit embed: no arguments, so this is the demo: its store is ./store\n")
    assert "recaption: done, 12 rows" in said
    cli._make_demo("latents")
    assert "recaption: done, 0 rows" in capsys.readouterr().err and embed.main(config).fragments == 0
    assert world.table.count_rows() == 12


def test_somebody_s_own_rows_are_never_the_demo_s(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world.ingest(world.prompts(2), 2)
    monkeypatch.chdir(world.store.parent)
    cli._make_demo("embed")
    assert world.table.count_rows() == 2
    with pytest.raises(ValueError, match=r"store: .* has rows that are none of the demo's"):
        store.main(store.DemoConfig(str(world.store)))


def test_a_server_of_the_protocol_gives_the_same_captions_and_its_key_stays_secret(
    world: Any, config: RecaptionConfig, vlm_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model here and behind `transformers serve`, in a process of its own with a planted key."""
    put(world, "scenes:8", 4)
    recaption.main(config)
    monkeypatch.setenv("LIDIT_TEST_KEY", SECRET)
    flags = [
        "--store",
        world.store,
        "--column",
        "caption_served",
        "--engine",
        "openai",
        "--endpoint.url",
        vlm_server.url,
    ]
    flags += ["--endpoint.model", vlm_server.model, "--endpoint.key-variable", "LIDIT_TEST_KEY", "--actors.max", 1]
    flags += ["--max-new-tokens", 128, "--blank-share", 0.5, "--endpoint.concurrency", 4]
    job = world.start("recaption", *flags)
    result = world.finish(job)
    assert result.summary["rows"] == 8 and result.summary["errors"] == 0
    rows = world.rows().values()
    assert [row["caption_served"] for row in rows] == [row["caption"] for row in rows]
    assert result.summary["counts"]["blank_checked"] > 0
    assert SECRET not in result.stdout + result.stderr
    (session,) = Path("/tmp/ray").glob(f"session_*_{job.pid}")  # Ray names it after the process that started it
    written = [path for folder in (world.store, session / "logs") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 20 and not [path for path in written if SECRET.encode() in path.read_bytes()]

"""The embedding job on real engines: local Ray, Lance tables of tiny fragments, two tiny LLMs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.store.codec import decode
from pipelines import embed, ingest, verify
from pipelines.embed import EmbedConfig
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.unit_pass import CommitConfig
from pipelines.ingest import IngestConfig
from pipelines.verify import VerifyConfig

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_here")]
ONE = ActorsConfig(min=1, max=1, num_gpus=0)


@pytest.fixture
def config(world: Any) -> EmbedConfig:
    encoders = tuple(
        EncoderConfig(name, str(path), template="plain", dtype="fp32", codec="fp32")
        for name, path in world.llms.items()
    )
    return EmbedConfig(store=str(world.store), encoders=encoders, actors=ONE, commit=CommitConfig(2, 5.0))


def put(world: Any, source: str, rows_per_fragment: int = 50) -> Any:
    return ingest.main(IngestConfig(source, str(world.store), rows_per_fragment, ONE))


def values(world: Any, name: str) -> list[np.ndarray | None]:
    return decode(world.table.to_table(columns=[name])[name], world.table.schema.field(name))


def test_fused_rows_equal_the_encoder_alone_and_verify_agrees(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(120)}")
    summary = embed.main(config)
    assert (summary.ok, summary.rows, summary.fragments, summary.errors) == (True, 120, 3, 0)
    prompts = world.table.to_table(columns=["caption"])["caption"].to_pylist()
    for encoder_config in config.encoders:
        encoder = PromptEncoder(encoder_config, "cpu")
        stored = values(world, f"caption_embeds_{encoder_config.name}")
        lengths = world.table.to_table()[f"caption_length_{encoder_config.name}"].to_pylist()
        for prompt, value, length in list(zip(prompts, stored, lengths))[::17]:
            prompt_embeds, _ = encoder([prompt])
            assert value is not None and value.shape == (length, encoder.width)
            np.testing.assert_allclose(value, prompt_embeds[0].numpy(), atol=1e-5)
        row = lance.dataset(str(world.store / "encoders.lance")).to_table(filter=f"encoder = '{encoder_config.name}'")
        kept = np.frombuffer(row["instruction_embeds"][0].as_py(), np.float32).reshape(-1, encoder.width)
        np.testing.assert_allclose(kept, encoder.instruction_embeds, atol=1e-5)
    for fragment in world.table.get_fragments():  # one file for what came in, one for both encoders together
        assert len(fragment.metadata.files) == 2
    report = verify.main(VerifyConfig(str(world.store), sample=16))
    assert report.ok, report.to_text()
    assert world.orphans() == set()


def test_new_rows_are_the_only_work_of_the_next_run(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(60)}")
    embed.main(config)
    before = world.rows()
    grown = world.prompts(100)  # the same 60 and 40 more
    assert put(world, f"prompts:{grown}").rows == 40
    summary = embed.main(config)
    assert (summary.rows, summary.fragments) == (40, 1)
    after = world.rows()
    assert len(after) == 100 and all(after[image_id] == row for image_id, row in before.items())
    assert embed.main(config).fragments == 0


def test_a_second_encoder_is_added_without_touching_the_first(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(60)}")
    embed.main(config.only(["one"]))
    assert "caption_embeds_two" not in world.table.schema.names
    files = {file.path for fragment in world.table.get_fragments() for file in fragment.metadata.files}
    first = values(world, "caption_embeds_one")
    summary = embed.main(config)
    assert summary.rows == 60
    assert files <= {file.path for fragment in world.table.get_fragments() for file in fragment.metadata.files}
    assert all(np.array_equal(a, b) for a, b in zip(first, values(world, "caption_embeds_one")))
    assert all(value is not None for value in values(world, "caption_embeds_two"))
    assert verify.main(VerifyConfig(str(world.store), sample=8)).ok


def test_another_fingerprint_is_refused_and_overwrite_replaces(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(60)}")
    embed.main(config)
    first = values(world, "caption_embeds_one")
    other = dataclasses.replace(
        config, encoders=(dataclasses.replace(config.encoders[0], instruction="red"), config.encoders[1])
    )
    with pytest.raises(ValueError, match=r"caption_embeds_one.*instruction.*--overwrite"):
        embed.main(other)
    assert all(np.array_equal(a, b) for a, b in zip(first, values(world, "caption_embeds_one")))
    second = values(world, "caption_embeds_two")
    version = world.table.version
    embed.main(dataclasses.replace(other, overwrite=True))
    assert not np.allclose(first[0], values(world, "caption_embeds_one")[0])
    assert all(np.array_equal(a, b) for a, b in zip(second, values(world, "caption_embeds_two")))
    old = lance.dataset(str(world.store / "samples.lance"), version=version)
    kept = decode(
        old.to_table(columns=["caption_embeds_one"])["caption_embeds_one"], old.schema.field("caption_embeds_one")
    )
    assert all(np.array_equal(a, b) for a, b in zip(first, kept)), "a reader of the old version lost its rows"


def test_dry_run_changes_nothing(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(60)}")
    version = world.table.version
    summary = embed.main(dataclasses.replace(config, dry_run=True))
    plan = "\n".join(summary.plan)
    assert "2 fragments, 60 rows" in plan and "caption_embeds_two: new" in plan
    assert world.table.version == version and not world.data_files()


def test_deleted_rows_and_compaction(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(120)}")
    first_ids = sorted(world.rows())
    gone = [first_ids[0], first_ids[7], first_ids[49], first_ids[50], first_ids[119]]
    world.table.delete(f"image_id in ({', '.join(map(repr, gone))})")
    embed.main(config.only(["one"]))
    rows = world.rows()
    assert len(rows) == 115
    encoder = PromptEncoder(config.encoders[0], "cpu")
    for image_id in (first_ids[1], first_ids[8], first_ids[51], first_ids[118]):
        stored = np.frombuffer(rows[image_id]["caption_embeds_one"], np.float32).reshape(-1, encoder.width)
        np.testing.assert_allclose(stored, encoder([rows[image_id]["caption"]])[0][0].numpy(), atol=1e-5)
    before = world.rows()
    world.table.optimize.compact_files(target_rows_per_fragment=1000)
    assert embed.main(config.only(["one"])).fragments == 0, "compaction must not make embedded rows look missing"
    embed.main(config)
    after = world.rows()
    assert all(after[image_id]["caption_embeds_one"] == row["caption_embeds_one"] for image_id, row in before.items())
    assert all(row["caption_embeds_two"] is not None for row in after.values())


def test_compaction_of_a_half_done_table_hides_nothing(world: Any, config: EmbedConfig) -> None:
    """Compaction writes the nulls of fragments not done yet as if they were values; they are found and done."""
    put(world, f"prompts:{world.prompts(60)}")
    embed.main(config)
    put(world, f"prompts:{world.prompts(100)}")
    world.table.optimize.compact_files(target_rows_per_fragment=1000)
    assert len(world.table.get_fragments()) == 1
    assert sum(row["caption_embeds_one"] is None for row in world.rows().values()) == 40
    assert embed.main(config).rows == 100
    assert all(row["caption_embeds_one"] and row["caption_embeds_two"] for row in world.rows().values())
    assert embed.main(config).fragments == 0


def test_null_texts_and_fragments_without_the_column(world: Any, config: EmbedConfig) -> None:
    put(world, "scenes:40")
    put(world, f"prompts:{world.prompts(60)}")
    summary = embed.main(dataclasses.replace(config, text=("caption", "caption_original")))
    assert summary.ok and summary.fragments == 3
    rows = world.rows()
    nulls = [row for row in rows.values() if row["caption_original"] is None]
    assert 60 < len(nulls) < 70
    assert all(
        (row["caption_original_embeds_one"] is None) == (row["caption_original"] is None) for row in rows.values()
    )
    assert all((row["caption_embeds_one"] is None) == (row["caption"] is None) for row in rows.values())
    assert all(row["embed_error"] is None for row in rows.values())
    report = verify.main(VerifyConfig(str(world.store), sample=8))
    assert report.ok, report.to_text()


@pytest.mark.parametrize("codec", ["bf16", "fp8_e4m3"])
def test_codecs(world: Any, config: EmbedConfig, codec: Any) -> None:
    put(world, f"prompts:{world.prompts(30)}")
    embed.main(
        dataclasses.replace(config, encoders=tuple(dataclasses.replace(e, codec=codec) for e in config.encoders))
    )
    report = verify.main(VerifyConfig(str(world.store), sample=30))
    assert report.ok, report.to_text()


def test_the_reading_example_of_the_docs_runs(world: Any, config: EmbedConfig) -> None:
    put(world, f"prompts:{world.prompts(30)}")
    embed.main(config)
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    example = re.search(r"```python\n# reads with lance and numpy alone\n(.*?)```", text, re.DOTALL)
    assert example is not None and "lidit" not in re.sub(r'"[^"]*"', "", example[1])
    names: dict[str, Any] = {"store": str(world.store), "column": "caption_embeds_one"}
    exec(example[1], names)
    expected = values(world, "caption_embeds_one")
    assert len(names["embeds"]) == 30
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(names["embeds"], expected))


@pytest.mark.slow
def test_all_real_prompts_and_captions(world: Any, data: Path) -> None:
    """T2I-CompBench, GenEval, PartiPrompts, dense DrawBench and COCO captions, with two trained LLMs together."""
    sources = sorted((data / "t2i-compbench" / "dataset").glob("*_val.txt"))
    sources += [data / "geneval" / "evaluation_metadata.jsonl", data / "parti" / "PartiPrompts.tsv"]
    sources += [data / "drawbench" / "drawbench_upsampled.txt"]
    counts = [put(world, f"prompts:{source}", 1024).rows for source in sources]
    assert counts == [300] * 8 + [553, 1632, 200]
    assert put(world, f"coco:{data / 'coco-mini-cc'}").rows == 175
    encoders = tuple(
        EncoderConfig(name, str(data / "models" / model), template="plain", dtype="fp32", codec="fp32")
        for name, model in (("stories", "stories260K"), ("baby", "babyllama-tok105"))
    )
    config = EmbedConfig(store=str(world.store), text=("caption", "caption_original"), encoders=encoders, actors=ONE)
    summary = embed.main(config)
    assert (summary.ok, summary.rows, summary.errors) == (True, 4785 + 175, 0)
    assert summary.rates["padding_waste"] < 0.05
    report = verify.main(VerifyConfig(str(world.store), sample=64))
    assert report.ok, report.to_text()

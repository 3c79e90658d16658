"""The embed stage called as a worker calls it, on a tiny LLM, and checked by the verify job; no Ray."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.store import columns
from lidit.store.codec import decode
from pipelines import verify
from pipelines.embed import WINDOW_ROWS, EmbedConfig, EmbedPrompts, window_rows
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.table import Table
from pipelines.engine.worker import READS

pytestmark = pytest.mark.unit

PROMPTS = ["red circle", None, "", "two large green squares on the left of a star", "red circle", "blue"]


@pytest.fixture
def config(tmp_path, llms):
    encoders = tuple(
        EncoderConfig(name, str(path), template="plain", dtype="fp32", max_prompt_tokens=6)
        for name, path in llms.items()
    )
    actors = ActorsConfig(num_gpus=0.0)
    return EmbedConfig(store=str(tmp_path / "store"), encoders=encoders, batch_tokens=64, actors=actors)


def window(*texts):
    return pa.record_batch({"caption": pa.array(texts, pa.string())})


def all_names(config):
    return [f.name for f in EmbedPrompts.writes(config)]


def test_fields(config):
    fields = EmbedPrompts.writes(config)
    assert [f.name for f in fields] == [
        f"caption_{kind}_{encoder}" for encoder in ("one", "two") for kind in ("embeds", "length", "truncated")
    ]
    for f in fields:
        metadata = {key.decode(): value.decode() for key, value in f.metadata.items()}
        assert f.nullable and metadata[READS] == metadata[columns.META_TEXT] == "caption"
        assert json.loads(metadata[columns.META_FINGERPRINT])["max_prompt_tokens"] == 6
        assert "transformers" in json.loads(metadata[columns.META_VERSIONS])
    assert fields[0].metadata[columns.META_WIDTH.encode()] == b"32"
    assert fields[3].metadata[columns.META_WIDTH.encode()] == b"48"
    assert fields[0].metadata[b"lance-encoding:compression"] == b"none"


def test_columns_of_a_window(config):
    stage = EmbedPrompts(config)
    made = stage(window(*PROMPTS), all_names(config))
    assert set(made.arrays) == set(all_names(config)) and made.errors == {}
    for f, encoder in zip(EmbedPrompts.writes(config)[::3], stage.encoders, strict=True):
        name = encoder.config.name
        values = decode(made.arrays[f.name], f)
        lengths = made.arrays[columns.length("caption", name)].to_pylist()
        excess = made.arrays[columns.truncated("caption", name)].to_pylist()
        ids, cut = encoder.tokenize([prompt or "" for prompt in PROMPTS])
        assert lengths == [None if p is None else len(row) for p, row in zip(PROMPTS, ids)]
        assert excess == [None if p is None else int(n) for p, n in zip(PROMPTS, cut)]
        assert excess[3] > 0 and lengths[2] == 0 and values[1] is None and values[2].shape == (0, encoder.width)
        np.testing.assert_array_equal(values[0], values[4])
        for prompt, value in zip(PROMPTS, values):
            if prompt:
                wanted = encoder([prompt])[0][0].bfloat16().float().numpy()
                np.testing.assert_allclose(value, wanted, atol=2**-7 * np.abs(wanted).max())
    assert made.counts["truncated"] == 2, "one prompt, for two encoders"


def test_the_same_text_is_encoded_once(config):
    stage = EmbedPrompts(config)
    once = stage(window("red circle", "blue"), all_names(config)).counts
    often = stage(window(*["red circle", "blue"] * 20), all_names(config)).counts
    assert once["tokens"] == often["tokens"] and once["slots"] == often["slots"]


def test_only_what_is_wanted(config):
    stage = EmbedPrompts(config)
    wanted = [name for name in all_names(config) if name.endswith("_two")]
    assert set(stage(window("blue"), wanted).arrays) == set(wanted)


@pytest.mark.parametrize("texts", [[None, None], [""], [None, ""]])
def test_windows_without_tokens(config, texts):
    made = EmbedPrompts(config)(window(*texts), all_names(config))
    values = made.arrays["caption_embeds_one"]
    assert values.to_pylist() == [None if text is None else b"" for text in texts]
    assert all(len(array) == len(texts) for array in made.arrays.values())
    values.validate(full=True)


def test_states_that_are_not_finite_become_nulls_with_a_reason(config):
    import torch

    stage = EmbedPrompts(config)
    encoder = stage.encoders[1]
    (bad,) = encoder.tokenizer("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        encoder.model.get_input_embeddings().weight[bad] = float("nan")
    made = stage(window("red", "Z blue", None, "Z blue", "green"), all_names(config))
    assert made.errors == dict.fromkeys([1, 3], "caption_embeds_two: NaN or Inf in the LLM's states")
    for kind in ("embeds", "length", "truncated"):
        nulls = made.arrays[f"caption_{kind}_two"].is_null().to_pylist()
        assert nulls == [False, True, True, True, False]
        assert made.arrays[f"caption_{kind}_one"].is_null().to_pylist() == [False, False, True, False, False]
    values = decode(made.arrays["caption_embeds_two"], EmbedPrompts.writes(config)[3])
    assert all(np.isfinite(value).all() for value in values if value is not None)


def test_encoders_table(config):
    stage = EmbedPrompts(config)
    EmbedPrompts(config)
    table = Table(f"{config.store}/{columns.ENCODERS_TABLE}")
    rows = {row["encoder"]: row for row in table.open().to_table().to_pylist()}
    assert set(rows) == {"one", "two"} and table.open().count_rows() == 2
    for encoder in stage.encoders:
        row = rows[encoder.config.name]
        assert json.loads(row["fingerprint"]) == encoder.fingerprint()
        assert EncoderConfig(**json.loads(row["config"])) == encoder.config
        states = np.frombuffer(row["instruction_embeds"], np.float32).reshape(-1, row["width"])
        np.testing.assert_array_equal(states, encoder.instruction_embeds)
        assert row["null_embeds"] == b""


def test_changed_encoder_replaces_its_row(config):
    EmbedPrompts(config)
    changed = dataclasses.replace(config.encoders[0], instruction="Look at this:")
    EmbedPrompts(dataclasses.replace(config, encoders=(changed, config.encoders[1])))
    table = Table(f"{config.store}/{columns.ENCODERS_TABLE}")
    rows = {row["encoder"]: row for row in table.open().to_table().to_pylist()}
    assert table.open().count_rows() == 2 and "Look at this" in rows["one"]["fingerprint"]


def test_bytes_per_row_is_about_right(config):
    sample = pa.table({"caption": pa.array(["red circle"] * 3 + [None], pa.string())})
    estimate = EmbedPrompts.bytes_per_row(config, sample, [])
    tokens = [len(PromptEncoder(encoder, "cpu").tokenize(["red circle"])[0][0]) for encoder in config.encoders]
    assert estimate == pytest.approx(0.75 * (tokens[0] * 64 + tokens[1] * 96) + 16)


def test_window_rows():
    class Wide:
        def __init__(self, width):
            self.width, self.config = width, EncoderConfig("one", "m")

    config = EmbedConfig()
    assert window_rows(config, [Wide(32)]) == WINDOW_ROWS[1]
    assert window_rows(config, [Wide(4096), Wide(4096)]) == (512 << 20) // (2 * 2 * 4096 * 64)
    assert window_rows(config, [Wide(1 << 20)]) == WINDOW_ROWS[0]


def test_only(config):
    assert [encoder.name for encoder in config.only(["two"]).encoders] == ["two"]
    assert [encoder.name for encoder in config.only(["two", "one"]).encoders] == ["one", "two"]
    with pytest.raises(ValueError, match="--encoders three"):
        config.only(["three"])


# -- the store is right, and verify would notice if not --------------------------------------------------------------


@pytest.fixture
def embedded(config, fill):
    """A store of two fragments, embedded."""
    table = fill([PROMPTS, ["blue star", "a"]])
    fields = EmbedPrompts.writes(config)
    error = pa.field(columns.error("embed"), pa.string())
    table.declare([*fields, error], columns.META_FINGERPRINT)
    stage = EmbedPrompts(config)
    files = []
    for fragment in table.open().get_fragments():
        batch = fragment.to_table(columns=["caption"]).combine_chunks().to_batches()[0]
        made = stage(batch, [f.name for f in fields])
        arrays = [*(made.arrays[f.name] for f in fields), pa.nulls(batch.num_rows, pa.string())]
        schema = pa.schema([*fields, error])
        writer = ColumnFileWriter(table.uri, schema, "embed-1")
        writer.write(pa.record_batch(arrays, schema=schema))
        files.append(writer.finish(table.open(), fragment.fragment_id))
    assert len(table.attach(files).done) == 2
    return table, files


def problems(config, sample=8):
    report = verify.main(verify.VerifyConfig(store=config.store, sample=sample))
    assert json.loads(report.to_json())["ok"] == report.ok == ("nothing wrong" in report.to_text())
    return {name: found for name, found in report.problems.items() if found}


def test_verify_finds_nothing_wrong(config, embedded):
    assert problems(config) == {}


def test_verify_finds_a_changed_byte(config, embedded, tmp_path):
    table, files = embedded
    path = tmp_path / "store" / "samples.lance" / "data" / files[0].path
    value = table.open().to_table(columns=["caption_embeds_one"])["caption_embeds_one"][0].as_py()
    data = bytearray(path.read_bytes())
    place = bytes(data).index(value)
    data[place + 5] ^= 1
    path.write_bytes(data)
    found = problems(config, sample=0)
    assert set(found) == {"content"} and "caption_embeds_one is not what was written" in found["content"][0]


def test_verify_finds_a_missing_fragment_and_a_double_row(config, embedded):
    table, _ = embedded
    schema = pa.schema([table.open().schema.field(name) for name in ("image_id", "caption")])
    writer = ColumnFileWriter(table.uri, schema, "ingest-2")
    writer.write(pa.record_batch([["0-0"], ["blue"]], schema=schema))
    table.append([writer.finish(table.open())])
    found = problems(config, sample=0)
    assert "'0-0' is there 2 times" in found["rows"][0]
    assert "fragment 2 lacks caption_embeds_one" in found["complete"][0]
    assert found["complete"][0].endswith(": run the embed job")
    (field,) = (f for f in table.open().schema if f.name == "caption_embeds_one")
    other = pa.field("marks", pa.string(), metadata={**field.metadata, columns.META_STAGE.encode(): b"score"})
    assert [*verify._complete(table, table.open(), [other])] == [
        f"fragment {number} lacks marks: run the score job" for number in range(3)
    ]


def test_verify_finds_embeddings_of_another_model(config, embedded, llms, monkeypatch):
    """The independent path is independent: with another instruction it disagrees."""
    other = dataclasses.replace(config.encoders[0], instruction="Something else:")
    table = Table(f"{config.store}/{columns.ENCODERS_TABLE}")
    row = next(row for row in table.open().to_table().to_pylist() if row["encoder"] == "one")
    table.upsert("encoder", {**row, "config": json.dumps(dataclasses.asdict(other))})
    assert set(problems(config)) == {"again"}

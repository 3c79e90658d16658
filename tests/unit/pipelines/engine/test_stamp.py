"""Columns made before something was recorded: no job goes on with them, and a stamp needs rows that come out the same."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from lance.commit import CommitConflictError

from demo.world.scenes import example
from lidit.frozen.text import EncoderConfig
from lidit.store import columns
from pipelines import verify
from pipelines.captioning.transformers_engine import VlmConfig
from pipelines.embed import EmbedConfig, EmbedPrompts
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.stage import run_stage
from pipelines.engine.table import Table
from pipelines.recaption import Recaption, RecaptionConfig

pytestmark = pytest.mark.unit

FRAGMENTS = [
    ["red circle", None, "blue square"],
    ["two green stars", "a"],
    ["left of it", ""],
    ["a dog on a table", "b c"],
]


@pytest.fixture
def config(tmp_path, llms):
    """Encoders in folders of the test's own."""
    folders = {name: shutil.copytree(path, tmp_path / name) for name, path in llms.items()}
    encoders = tuple(EncoderConfig(name, str(path), template="plain", dtype="fp32") for name, path in folders.items())
    return EmbedConfig(store=str(tmp_path / "store"), encoders=encoders, actors=ActorsConfig(num_gpus=0.0))


def older(fingerprint):
    """As it was before a model's config was part of it."""
    return json.dumps({key: value for key, value in json.loads(fingerprint).items() if key != "model_config"})


def samples(config):
    return Table(f"{config.store}/{columns.SAMPLES_TABLE}")


def write(table, stage, fields, reads="caption"):
    """All fragments by one stage, as its workers would."""
    error, files = pa.field(columns.error(stage.name), pa.string()), []
    table.declare([*fields, error], columns.META_FINGERPRINT)
    for fragment in table.open().get_fragments():
        batch = fragment.to_table(columns=[reads]).combine_chunks().to_batches()[0]
        made = stage(batch, [f.name for f in fields])
        schema = pa.schema([*fields, error])
        writer = ColumnFileWriter(table.uri, schema, "embed-1")
        arrays = [*(made.arrays[f.name] for f in fields), pa.nulls(batch.num_rows, pa.string())]
        writer.write(pa.record_batch(arrays, schema=schema))
        files.append(writer.finish(table.open(), fragment.fragment_id))
    table.attach(files)


@pytest.fixture
def old_store(config, fill):
    """A store as an earlier version left it."""
    table = fill(FRAGMENTS)
    fields = [
        f.with_metadata({**f.metadata, columns.META_FINGERPRINT: older(f.metadata[columns.META_FINGERPRINT.encode()])})
        for f in EmbedPrompts.writes(config)
    ]
    write(table, EmbedPrompts(config), fields)
    encoders = Table(f"{config.store}/{columns.ENCODERS_TABLE}")
    for row in encoders.open().to_table().to_pylist():
        encoders.upsert("encoder", {**row, "fingerprint": older(row["fingerprint"])})
    return table


def recorded(config):
    """Whether each column of states, and each encoder's row, says what config made it."""
    fields = [f for f in samples(config).open().schema if columns.META_CODEC.encode() in (f.metadata or {})]
    rows = lance.dataset(f"{config.store}/{columns.ENCODERS_TABLE}").to_table().to_pylist()
    return {
        **{f.name: "model_config" in json.loads(f.metadata[columns.META_FINGERPRINT.encode()]) for f in fields},
        **{row["encoder"]: "model_config" in json.loads(row["fingerprint"]) for row in rows},
    }


def edit(config, number=0, **changes):
    """Changes config.json of an encoder."""
    path = f"{config.encoders[number].model}/config.json"
    with open(path) as file:
        values = json.load(file)
    with open(path, "w") as file:
        json.dump({**values, **changes}, file)


def stamp(config):
    return run_stage(EmbedPrompts, dataclasses.replace(config, stamp=True))


def test_a_job_does_not_go_on_with_an_older_column_and_says_what_to_do(config, old_store):
    with pytest.raises(ValueError) as caught:
        run_stage(EmbedPrompts, config)
    said = str(caught.value)
    assert "'caption_embeds_one'" in said and "was made before model_config was recorded" in said
    assert "run the same `lidit embed` command with --stamp once" in said and "made differently" not in said


def test_a_stamp_records_what_was_not_and_changes_nothing_else(config, old_store):
    before = old_store.open()
    verified = verify.main(verify.VerifyConfig(store=config.store, sample=4))
    summary = stamp(config)
    assert summary.ok and summary.counts == {"stamped": 6, "compared": 8} and "caption_embeds_one" in summary.to_text()
    assert set(recorded(config).values()) == {True}
    after = old_store.open()
    assert after.to_table().equals(before.to_table()) and verified.ok
    for stored, now in zip(before.schema, after.schema, strict=True):
        old, new = dict(stored.metadata or {}), dict(now.metadata or {})
        old.pop(columns.META_FINGERPRINT.encode(), None), new.pop(columns.META_FINGERPRINT.encode(), None)
        assert old == new
    old_store.declare(EmbedPrompts.writes(config), columns.META_FINGERPRINT)
    assert verify.main(verify.VerifyConfig(store=config.store, sample=4)).ok
    assert stamp(config).counts == {"stamped": 0, "compared": 0}
    assert old_store.open().version == after.version


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 0.01}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_theta": 9.0}}]
)
def test_another_config_is_never_stamped(config, old_store, change):
    version = old_store.open().version
    edit(config, **change)
    with pytest.raises(ValueError, match=r"--overwrite|is not what|are not what"):
        stamp(config)
    assert old_store.open().version == version and set(recorded(config).values()) == {False}


def test_rows_of_another_model_further_back_are_found(config, old_store):
    """The encoders' rows and the first fragments are right; the last fragment was made after an edit."""
    fields = [old_store.open().schema.field(f.name) for f in EmbedPrompts.writes(config)]
    fragment = old_store.open().get_fragments()[-1]
    batch = fragment.to_table(columns=["caption"]).combine_chunks().to_batches()[0]
    with open(f"{config.encoders[0].model}/config.json") as file:
        right = json.load(file)
    edit(config, hidden_act="gelu")
    names = [f.name for f in fields if f.name.endswith("_one")]
    made = EmbedPrompts(config, publish=False)(batch, names)
    schema = pa.schema([f for f in fields if f.name in names])
    writer = ColumnFileWriter(old_store.uri, schema, "embed-2")
    writer.write(pa.record_batch([made.arrays[name] for name in names], schema=schema))
    holder = fragment.metadata.files[-1].path
    file = writer.finish(old_store.open(), fragment.fragment_id, dict.fromkeys(names, holder))
    assert old_store.attach([file]).done
    edit(config, **right)
    with pytest.raises(ValueError, match="caption_embeds_one in 2 of 8 rows"):
        stamp(config)
    assert set(recorded(config).values()) == {False}


def test_a_real_difference_is_no_matter_for_a_stamp(config, old_store):
    other = dataclasses.replace(config.encoders[0], layer_index=-2)
    with pytest.raises(
        ValueError, match=r"made differently: layer: the table has 2, this run makes 3; model_config: the"
    ):
        stamp(dataclasses.replace(config, encoders=(other, config.encoders[1])))
    with pytest.raises(ValueError, match=r"was made differently.*Pass --overwrite.*the encoder another name"):
        old_store.declare(EmbedPrompts.writes(dataclasses.replace(config, encoders=(other,))), columns.META_FINGERPRINT)


def test_a_column_without_a_value_cannot_be_stamped(config, fill):
    table = fill(FRAGMENTS)
    fields = EmbedPrompts.writes(config)
    metadata = {columns.META_FINGERPRINT: older(fields[0].metadata[columns.META_FINGERPRINT.encode()])}
    table.declare([fields[0].with_metadata({**fields[0].metadata, **metadata})], columns.META_FINGERPRINT)
    with pytest.raises(ValueError, match="caption_embeds_one has no value in the sample"):
        stamp(config)


def test_a_new_text_beside_an_older_one_does_not_take_the_encoders_row_along(config, old_store):
    """The row of the encoders table is shared: it is brought up to date only where its states are the model's."""
    edit(config, hidden_act="gelu")
    with pytest.raises(
        ValueError, match=r"instruction_embeds in encoders.lance were made before model_config was recorded"
    ):
        EmbedPrompts(config)
    assert not recorded(config)["one"]


def test_metadata_written_while_another_job_attaches(config, old_store):
    """Whoever is second tries again on the newest version: neither loses what the other did."""
    dataset = old_store.open()
    old_store.record({"caption": {"a": "1"}})
    merge = lance.LanceOperation.Merge(
        [fragment.metadata for fragment in dataset.get_fragments()], dataset.lance_schema, preserves_nullability=True
    )
    with contextlib.suppress(CommitConflictError):  # attach reads anew and tries again
        lance.LanceDataset.commit(old_store.uri, merge, read_version=dataset.version)
    assert old_store.open().schema.field("caption").metadata[b"a"] == b"1"


@pytest.fixture
def captions(tmp_path):
    """Two fragments of pictures with captions of the demo's VLM, as an earlier version left them; (job, table)."""
    folder = shutil.copytree(Path(__file__).parents[4] / "demo" / "vlm", tmp_path / "vlm")
    job = RecaptionConfig(
        store=str(tmp_path / "store"),
        vlm=VlmConfig(str(folder), dtype="fp32"),
        retries=0,
        max_new_tokens=128,
        blank_share=0.0,
        actors=ActorsConfig(num_gpus=0.0),
    )
    table = samples(job)
    schema = pa.schema([pa.field("image_id", pa.string()), pa.field("image", pa.large_binary())])
    table.create(schema)
    for number in range(2):
        writer = ColumnFileWriter(table.uri, schema, "ingest-1")
        rows = [
            [f"{number}-{row}" for row in range(2)],
            [example(2 * number + row, 80, 80)["image_bytes"] for row in range(2)],
        ]
        writer.write(pa.record_batch([pa.array(rows[0]), pa.array(rows[1], pa.large_binary())], schema=schema))
        table.append([writer.finish(table.open())])
    fields = [
        f.with_metadata({**f.metadata, columns.META_FINGERPRINT: older(f.metadata[columns.META_FINGERPRINT.encode()])})
        for f in Recaption.writes(job)
    ]
    write(table, Recaption(job), fields, "image")
    return job, table


def test_captions_are_stamped_where_they_come_out_word_for_word(captions):
    job, table = captions
    with pytest.raises(
        ValueError, match=r"before model_config was recorded: run the same `lidit recaption` command with --stamp"
    ):
        run_stage(Recaption, job)
    assert table.open().to_table(columns=["caption"])["caption"].null_count < 4, "nothing was written"
    assert run_stage(Recaption, dataclasses.replace(job, stamp=True)).counts == {"stamped": 3, "compared": 4}
    table.declare(Recaption.writes(job), columns.META_FINGERPRINT)


def test_captions_of_another_config_are_not_stamped(captions):
    job, table = captions
    version, path = table.open().version, Path(job.vlm.model) / "config.json"
    values = json.loads(path.read_text())
    values["text_config"]["rms_norm_eps"] = 0.5
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"caption_?\w* in \d of \d rows.*cannot be verified here"):
        run_stage(Recaption, dataclasses.replace(job, stamp=True))
    assert table.open().version == version

"""Library versions: a column begun with others is said or refused, and every file says what made it."""

import json
from importlib.metadata import version

import pyarrow as pa
import pytest
from lance.file import LanceFileReader

from lidit.store import columns
from lidit.store.checksum import data_file_uri
from pipelines.embed import EmbedConfig, EmbedPrompts
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.stage import run_stage
from pipelines.engine.versions import MADE_WITH, check_versions, made_with
from pipelines.engine.worker import FragmentWorker
from pipelines.latents import EncodeLatents, LatentsConfig
from pipelines.recaption import Recaption, RecaptionConfig

pytestmark = pytest.mark.unit

CPU = ActorsConfig(num_gpus=0.0)


def field(name="a", **versions):
    return pa.field(name, pa.int32(), metadata={columns.META_VERSIONS: json.dumps(versions)})


@pytest.mark.parametrize(
    ("then", "now", "differs"),
    [
        ({"torch": "2.13.0+cpu"}, {"torch": "2.13.1+cu130"}, False),
        ({"torch": "2.13.0"}, {"torch": "2.14.0"}, True),
        ({"pillow": "13.0.0"}, {"pillow": "14.0.0"}, True),
        ({"tokenizers": "0.23.3"}, {"tokenizers": "0.24"}, True),
        ({"openai": "1.0.0"}, {"openai": "2.0.0"}, False),
        ({}, {"torch": "2.14.0"}, False),
        ({"torch": "2.13.0"}, {}, False),
    ],
)
def test_another_minor_version_is_said_once_or_refused(then, now, differs, capsys):
    schema, fields = (
        pa.schema([field("a", **then), field("b", **then)]),
        [field("a", **now), field("b", **now), field("c")],
    )
    check_versions(schema, fields, strict=False)
    said = capsys.readouterr().err
    assert said.count("warning: a, b: begun with other versions") == said.count("then,") == int(differs)
    if differs:
        with pytest.raises(ValueError, match=r"then, .* now\. Install those versions, leave --strict_versions off"):
            check_versions(schema, fields, strict=True)
    else:
        check_versions(schema, fields, strict=True)


@pytest.fixture
def begun(fill, monkeypatch):
    """A table whose demo columns were begun by another transformers, and the job that would go on."""
    table = fill([["a red circle", "two squares"]])
    config = EmbedConfig(store=table.uri.rpartition("/")[0], actors=CPU, strict_versions=True)
    old = json.dumps({"transformers": "4.0.0", "torch": version("torch")})
    fields = [f.with_metadata({**f.metadata, columns.META_VERSIONS: old}) for f in EmbedPrompts.writes(config)]
    table.declare([*fields, pa.field(columns.error("embed"), pa.string())], columns.META_FINGERPRINT)
    return table, config


def test_a_job_that_must_not_mix_versions_does_not_begin(begun):
    table, config = begun
    before = table.open().version
    with pytest.raises(ValueError, match=r"caption_embeds_llama.*transformers 4.0.0 then"):
        run_stage(EmbedPrompts, config)
    assert table.open().version == before


def test_nor_does_a_worker_on_a_node_of_other_versions(begun):
    table, config = begun
    with pytest.raises(ValueError, match=r"transformers 4\.0\.0 then"):
        FragmentWorker(EmbedPrompts, config, table.uri, "embed-1", None)


def test_every_file_says_what_made_it(fill):
    table = fill([["a red circle"]])
    config = EmbedConfig(store=table.uri.rpartition("/")[0], actors=CPU)
    notes = made_with(EmbedPrompts.writes(config), config)
    schema = pa.schema([pa.field("caption", pa.string())])
    writer = ColumnFileWriter(table.uri, schema, "embed-1", notes)
    writer.write(pa.record_batch([["x"]], schema=schema))
    file = writer.finish(table.open())
    held = LanceFileReader(data_file_uri(table.uri, file.path)).metadata().schema.metadata
    said = json.loads(held[MADE_WITH.encode()])
    assert said == {
        **{name: version(name) for name in ("transformers", "tokenizers", "torch")},
        "device": said["device"],
    }
    assert said["device"].startswith("cpu ")


@pytest.mark.parametrize(
    ("stage", "config", "names"),
    [
        (Recaption, RecaptionConfig(actors=CPU), {"transformers", "tokenizers", "torch", "pillow"}),
        (EncodeLatents, LatentsConfig(actors=CPU), {"diffusers", "torch", "pillow"}),
    ],
)
def test_the_libraries_of_each_stage(stage, config, names):
    assert set(json.loads(made_with(stage.writes(config), config)[MADE_WITH])) == {*names, "device"}

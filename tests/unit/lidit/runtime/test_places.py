"""Places in configs: one meaning for driver, workers and libraries, or a refusal."""

from dataclasses import dataclass, replace
from pathlib import Path

import fsspec
import lance
import pyarrow as pa
import pytest
from PIL import Image

from lidit.frozen.text import DEMO_ENCODERS, EncoderConfig
from lidit.runtime.places import absolute, model_place, settled, source_place, store_place
from pipelines import ingest
from pipelines.embed import EmbedConfig
from pipelines.engine.table import Table
from pipelines.generate import GenerateConfig
from pipelines.ingest import IngestConfig
from pipelines.preprocess import PreprocessConfig
from pipelines.score import ScoreConfig
from pipelines.sources.registry import open_source
from trainer.config import PhaseConfig, TrainConfig
from trainer.export import ExportConfig


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_paths_are_absolute_whatever_way_they_are_written(tmp_path):
    for written in ("store", "./store", f"{tmp_path}/store/", f"file://{tmp_path}/store", f"FILE://{tmp_path}/store"):
        assert absolute(written) == str(tmp_path / "store")
    assert absolute("~/store") == str(tmp_path / "home" / "store")
    assert absolute("a/../store") == str(tmp_path / "store")
    assert absolute("S3://Bucket/Key") == "s3://Bucket/Key"


def test_a_linked_store_keeps_the_name_by_which_other_machines_know_it(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert store_place("data/store") == str(tmp_path / "data" / "store")


def test_every_place_of_every_job_is_settled_and_settling_again_changes_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    here = str(tmp_path)
    ingested = settled(IngestConfig(source="folder:pictures", store="s"))
    assert (ingested.source, ingested.store) == (f"folder:{here}/pictures", f"{here}/s")
    encoder = EncoderConfig(name="mine", model="mine")
    embedded = settled(EmbedConfig(store="s", encoders=(encoder, *DEMO_ENCODERS)))
    assert embedded.encoders == (replace(encoder, model=f"{here}/mine"), *DEMO_ENCODERS)
    generated = settled(
        GenerateConfig(weights="mine", prompts="p.txt", out="o", encoders={"llama": "mine"}, vae="mine")
    )
    assert (generated.weights, generated.prompts, generated.out) == (f"{here}/mine", f"{here}/p.txt", f"{here}/o")
    assert (generated.encoders, generated.vae, generated.store) == (
        {"llama": f"{here}/mine"}, f"{here}/mine", f"{here}/generated",
    )  # fmt: skip
    scored = settled(ScoreConfig(clip="mine", fid_model=f"mine@sha256:{'0' * 64}", fid_reference="r"))
    assert (scored.clip, scored.fid_reference) == (f"{here}/mine", f"{here}/r")
    assert scored.fid_model == f"{here}/mine@sha256:{'0' * 64}"
    phase = PhaseConfig(steps=1, global_batch_size=1, resolution=64, store="t")
    trained = settled(TrainConfig(phases=[phase], vae="mine"))
    assert (trained.store, trained.storage, trained.vae) == (f"{here}/store", f"{here}/runs", f"{here}/mine")
    assert trained.phases[0].store == f"{here}/t"
    scheduled = settled(PreprocessConfig(store="s", ingest=(IngestConfig(source="folder:pictures"),)))
    assert (scheduled.store, scheduled.ingest[0].source) == (f"{here}/s", f"folder:{here}/pictures")
    for config in (ingested, embedded, generated, scored, trained, scheduled):
        assert settled(config) == config


def test_a_word_that_is_no_place_stays_though_a_folder_has_that_name(tmp_path):
    (tmp_path / "raw").mkdir()
    assert settled(ExportConfig(weights="raw")).weights == "raw"


def test_a_worker_in_another_folder_opens_what_the_driver_named(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "elsewhere" / "store").mkdir(parents=True)
    config = settled(IngestConfig(source="folder:.", store="./store"))
    items = open_source(config.source, config.columns).items()
    Table(f"{config.store}/samples.lance").create(pa.schema([pa.field("image_id", pa.string())]))
    monkeypatch.chdir(tmp_path / "elsewhere")  # where somebody has started the cluster, who has a ./store too
    assert open_source(config.source, config.columns).items() == items != []
    assert Table(f"{config.store}/samples.lance").open().uri.endswith(f"{tmp_path}/store/samples.lance")


def test_hub_ids_and_models_of_the_project_stay(tmp_path):
    for model in ("owner/name", f"owner/name@{'0' * 40}", "demo/encoders/llama-tuned"):
        assert model_place(model) == model
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert model_place("owner/name") == str(tmp_path / "owner" / "name")
    assert model_place("~/model") == str(tmp_path / "home" / "model")


def test_sources_are_settled_by_kind(tmp_path):
    assert source_place("scenes:100") == "scenes:100"
    assert source_place("webdataset:x-{000..003}.tar") == f"webdataset:{tmp_path}/x-{{000..003}}.tar"
    assert source_place("parquet:s3://bucket/a?b[0-9]") == "parquet:s3://bucket/a?b[0-9]"
    assert source_place("s3://bucket/x") == "s3://bucket/x"  # for the source to refuse


NAMES = (
    "a%20b",
    "a#b",
    "a?b",
    "a[b]c",
    "a//b",
    "a b",
    "a*b",
    "a{b}c",
    "a\nb",
    "a\tb",
    "a\\b",
    "a::b",
    "a/./b",
    "a/../b",
    "é",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_lance_and_fsspec_find_the_same_store_or_it_is_refused(tmp_path, scheme, name):
    try:
        place = store_place(f"{scheme}{tmp_path}/{name}")
    except ValueError as error:
        assert "received" in str(error)
        return
    lance.write_dataset(pa.table({"x": [1]}), f"{place}/samples.lance")
    fs, path = fsspec.core.url_to_fs(f"{place}/samples.lance")
    assert fs.isdir(f"{path}/_versions")


def test_only_what_diverges_is_refused(tmp_path):
    for name in ("a%20b", "a#b", "a?b", "a[b]c", "a//b", "a b", "a*b", "a{b}c", "a\\b", "é", "trailing/"):
        store_place(f"{tmp_path}/{name}")
    for name in ("a b", "a{b}", "a]b", "é", "a+b", "trailing//"):
        store_place(f"s3://bucket/{name}")
    for name in ("a%20b", "a#b", "a?b", "a[b]c", "a//b", "a*b", "a\nb", "a::b", "a/./b", "a/../b", "./b"):
        with pytest.raises(ValueError, match="expected a"):
            store_place(f"s3://bucket/{name}")


@pytest.mark.parametrize("uri", ["file://./store", "file://localhost/store", "file:store", "file:///a%20b"])
def test_file_uris_of_two_meanings_are_refused(uri):
    with pytest.raises(ValueError, match="expected a path"):
        store_place(uri)


def test_a_store_in_memory_is_refused_by_the_job_and_names_the_field():
    with pytest.raises(ValueError, match=r"^store: .*workers are other processes"):
        ingest.main(IngestConfig(source="scenes:1", store="memory://mem"))
    with pytest.raises(ValueError, match=r"^phases\.0\.store: "):
        phase = PhaseConfig(steps=1, global_batch_size=1, resolution=64, store="memory://mem")
        settled(TrainConfig(phases=[phase]))


def test_nothing_is_written_where_a_place_is_refused(tmp_path):
    with pytest.raises(ValueError, match="store: "):
        ingest.main(IngestConfig(source="scenes:1", store=f"file://{tmp_path}/a%20b"))
    assert not list(Path(tmp_path).iterdir())


def test_other_dataclasses_stay_as_they_are():
    @dataclass(frozen=True)
    class Other:
        name: str = "./name"

    config = Other()
    assert settled(config) is config

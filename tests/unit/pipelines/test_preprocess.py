"""The scheduled job's config and result; what it does with stages that fail, without running real ones."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lidit.cli import parse_config
from lidit.runtime.lease import Lease
from pipelines import preprocess
from pipelines.embed import EmbedConfig
from pipelines.engine.summary import Summary
from pipelines.ingest import IngestConfig
from pipelines.latents import LatentsConfig
from pipelines.preprocess import PreprocessConfig, PreprocessResult, main
from pipelines.verify import VerifyResult

pytestmark = pytest.mark.unit

SCENES = (IngestConfig("scenes:10"),)


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def ran(monkeypatch):
    """Stages that only note that they were called, with what; `fail` says which of them raises what."""
    calls = SimpleNamespace(stages=[], configs=[], fail={})

    def stand_in(name):
        def act(config):
            calls.stages.append(name)
            calls.configs.append(config)
            if name in calls.fail:
                raise calls.fail[name]
            return Summary(name, config.store, rows=5, ok=True)

        return act

    for name in ("ingest", "recaption", "embed", "latents"):
        monkeypatch.setattr(getattr(preprocess, name), "main", stand_in(name))
    monkeypatch.setattr(preprocess, "_verify", lambda config: stand_in("verify")(config))
    monkeypatch.setattr(preprocess, "clean_up", lambda store, config: {"removed": 0, "bytes_freed": 0, "tagged": {}})
    monkeypatch.setattr(preprocess, "_samples", lambda config: SimpleNamespace(open=lambda: SimpleNamespace(version=7)))
    return calls


def last(store, name="last.json"):
    path = Path(store, "preprocess", name)
    return json.loads(path.read_text()) if path.exists() else None


def test_stages_run_in_order_on_the_one_store(store, ran):
    config = PreprocessConfig(store, ingest=(IngestConfig("scenes:10"), IngestConfig("scenes:20")))
    result = main(config)
    assert ran.stages == ["ingest", "ingest", "recaption", "embed", "latents", "verify"]
    assert [config.source for config in ran.configs[:2]] == ["scenes:10", "scenes:20"]
    assert {config.store for config in ran.configs} == {store}
    assert (result.ok, result.status, result.new_rows, result.version) == (True, "done", 10, 7)
    assert last(store) == last(store, "last_ok.json") and last(store)["run"] == result.run
    assert json.loads(Path(store, "runs", result.run, "summary.json").read_text()) == last(store)
    assert "preprocess: done, 10 new rows" in result.to_text()


def test_only_the_stages_asked_for(store, ran):
    assert main(PreprocessConfig(store, stages=("verify", "embed"))).ok
    assert ran.stages == ["embed", "verify"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), OSError("no route"), ValueError("wrong"), KeyError("odd")])
def test_a_stage_that_fails_ends_the_run_and_is_told(store, ran, error):
    assert main(PreprocessConfig(store, ingest=SCENES)).ok
    good = last(store)
    ran.stages.clear()
    ran.fail["embed"] = error
    result = main(PreprocessConfig(store, ingest=SCENES))
    assert ran.stages == ["ingest", "recaption", "embed"]
    assert (result.ok, result.status, result.failed_stage) == (False, "failed", "embed")
    assert result.error == f"{type(error).__name__}: {error}"
    assert last(store)["status"] == "failed" and last(store, "last_ok.json") == good
    assert "FAILED in embed" in result.to_text() and str(error) in result.to_text()


def test_the_innermost_cause_is_told(store, ran):
    outer = RuntimeError("a worker failed, with a long remote traceback")
    outer.__cause__ = ValueError("no such model")
    ran.fail["latents"] = outer
    assert main(PreprocessConfig(store, ingest=SCENES)).error == "ValueError: no such model"


def test_problems_found_are_a_failure(store, ran, monkeypatch):
    found = VerifyResult(store, problems={"rows": [], "content": ["fragment 3: not what was written"]})
    monkeypatch.setattr(preprocess, "_verify", lambda config: found)
    result = main(PreprocessConfig(store, ingest=SCENES))
    assert (result.failed_stage, result.error) == ("verify", "fragment 3: not what was written")


def test_leaves_where_another_run_is_at_work(store, ran):
    with Lease(store, "preprocess"):
        result = main(PreprocessConfig(store, ingest=SCENES))
    assert (result.ok, result.status, ran.stages) == (
        True,
        "busy",
        [],
    ) and "is being worked on by process" in result.error
    assert last(store) is None, "that one writes its own"


def test_waits_as_long_as_asked(store, ran, monkeypatch):
    monkeypatch.setattr("lidit.runtime.lease.POLL_SECONDS", 0.01)
    config = PreprocessConfig(store, ingest=SCENES, if_busy="wait", wait_seconds=0.1)
    with Lease(store, "preprocess"):
        result = main(config)
    assert (result.ok, result.status, result.failed_stage, ran.stages) == (False, "failed", "lease", [])
    assert main(config).ok and len(ran.stages) == 5


def test_stops_where_another_run_has_taken_over(store, ran, monkeypatch):
    def suspended(config):
        Path(store, "preprocess", "lease-00000002").write_text("{}")
        return Summary("recaption", store, ok=True)

    monkeypatch.setattr(preprocess.recaption, "main", suspended)
    result = main(PreprocessConfig(store, ingest=SCENES))
    assert result.failed_stage == "embed" and "another one has taken over" in result.error and ran.stages == ["ingest"]
    assert not Path(store, "preprocess", "last.json").exists(), "it is the other one's to write"


def test_from_yaml_and_flags(tmp_path):
    path = tmp_path / "preprocess.yaml"
    path.write_text(
        """
        store: s3://bucket/store
        ingest:
          - {source: "webdataset:s3://bucket/a", rows_per_fragment: 64, columns: {caption: json.text}}
          - {source: "parquet:s3://bucket/b", filters: {min_side: 256}}
        embed: {batch_tokens: 4096, encoders: [{name: one, model: /models/one}]}
        latents: {resolution: 128, actors: {max: 2}}
        retention: {days: null}
        """
    )
    config = parse_config(
        "preprocess", preprocess, ["--config", str(path), "--if-busy", "wait", "--latents.step", "32"]
    )
    assert [(part.source, part.rows_per_fragment) for part in config.ingest] == [
        ("webdataset:s3://bucket/a", 64), ("parquet:s3://bucket/b", 1024),
    ]  # fmt: skip
    assert (config.ingest[0].columns.caption, config.ingest[1].filters.min_side) == ("json.text", 256)
    assert (config.embed.batch_tokens, config.embed.encoders[0].name) == (4096, "one")
    assert (config.latents.resolution, config.latents.step, config.latents.actors.max) == (128, 32, 2)
    assert (config.retention.days, config.if_busy, config.verify.sample) == (None, "wait", 0)
    changed = parse_config("preprocess", preprocess, ["--config", str(path), "--ingest.1.source", "parquet:c"])
    assert changed.ingest[1].source == "parquet:c"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ingest": ()}, "ingest: expected at least one source"),
        ({"stages": ("embed", "train")}, "stages: expected some of ingest, recaption, embed, latents, verify"),
        ({"stages": ("embed", "embed")}, "each once"),
        ({"stages": ()}, "stages: expected some of"),
        ({"wait_seconds": -1}, "wait_seconds: expected a number >= 0"),
        ({"embed": EmbedConfig(store="s3://other")}, r"embed.store: expected none, .* received 's3://other'"),
        ({"latents": LatentsConfig(overwrite=True)}, "latents.overwrite: not for a job that runs by a schedule"),
        ({"ingest": (IngestConfig("scenes:1", reread=True),)}, "ingest.0.reread: .* run `lidit ingest` by hand"),
        ({"embed": EmbedConfig(dry_run=True)}, "embed.dry_run"),
    ],
)
def test_wrong_configs(store, changes, words):
    with pytest.raises(ValueError, match=words):
        PreprocessConfig(store, **{"ingest": SCENES, **changes})


def test_the_result_is_one_line_of_json():
    made = json.loads(PreprocessResult("s", status="done", ok=True).to_json())
    assert made["job"] == "preprocess" and set(made) == {"job", *(f.name for f in dataclasses.fields(PreprocessResult))}

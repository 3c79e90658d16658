"""The command line: jobs, flags, YAML, and which of them wins. No job is run."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys

import pytest
import yaml

import lidit
from lidit import cli
from lidit.cli import main, parse_config
from lidit.frozen.text import EncoderConfig
from pipelines import embed, ingest, verify
from pipelines.engine.summary import Summary

pytestmark = pytest.mark.unit


def write_yaml(tmp_path, **values):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


ENCODERS = [
    {"name": "one", "model": "models/one", "template": "plain", "dtype": "fp32"},
    {"name": "two", "model": "models/two", "layer_index": -2, "codec": "fp8_e4m3"},
]


# -- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_lists_its_jobs(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    for job, (_, sentence) in cli.JOBS.items():
        assert job in text and sentence in text


def test_every_job_has_a_config_a_main_and_a_sentence():
    for job, (module, sentence) in cli.JOBS.items():
        loaded = importlib.import_module(module)
        assert dataclasses.is_dataclass(getattr(loaded, f"{job.capitalize()}Config")) and callable(loaded.main)
        assert sentence and loaded.__doc__


def test_unknown_job(capsys):
    assert main(["embd"]) == 2
    said = capsys.readouterr()
    assert "no job 'embd'" in said.err and "embed" in said.err and said.out == ""


def test_module_is_the_command():
    process = subprocess.run([sys.executable, "-m", "lidit.cli", "nothing"], capture_output=True, text=True)
    assert process.returncode == 2 and "no job 'nothing'" in process.stderr


def test_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lidit {lidit.__version__}\n" and lidit.__version__[0].isdigit()


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_config("embed", embed, ["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    for field in dataclasses.fields(embed.EmbedConfig):
        assert f"--{field.name}" in text
    for words in ("--actors.num_gpus", "--commit.seconds", "fractions allowed", "default: 8192"):
        assert words in text


def test_users_mistake_is_one_line_and_status_2(tmp_path, capsys, whole_job):
    assert main(["verify", "--store", str(tmp_path / "none")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("lidit verify: no table at") and "lidit ingest" in said.err
    assert main(["ingest", "--source", "nothing:here", "--store", str(tmp_path)]) == 2
    assert "expected one of scenes:N" in capsys.readouterr().err
    assert main(["embed", "--batch-tokens", "many"]) == 2
    assert "lidit embed:" in capsys.readouterr().err


@pytest.mark.parametrize("error, status", [(ValueError, 2), (RuntimeError, 1), (OSError, 1), (KeyboardInterrupt, 130)])
def test_exit_status_tells_what_kind_of_failure(error, status, monkeypatch, capsys, whole_job):
    def fail(config):
        raise error("the reason")

    monkeypatch.setattr(verify, "main", fail)
    assert main(["verify"]) == status
    assert capsys.readouterr().err.startswith("lidit verify: ")


@pytest.mark.parametrize("ok, status", [(True, 0), (False, 1)])
def test_stdout_holds_the_summary_alone(ok, status, monkeypatch, capfd, whole_job):
    def job(config):
        print("printed by a job")
        os.system("echo printed by a process below it")
        return Summary("verify", config.store, ok=ok)

    monkeypatch.setattr(verify, "main", job)
    assert main(["verify", "--store", "s"]) == status
    said = capfd.readouterr()
    (line,) = said.out.strip().splitlines()[-1:]
    assert json.loads(line)["ok"] is ok
    assert "a process below it" in said.err and "process below" not in said.out


def test_last_cause_is_the_innermost():
    def nested():
        try:
            try:
                raise KeyError("innermost reason")
            except KeyError as inner:
                raise ValueError("middle") from inner
        except ValueError as middle:
            raise RuntimeError("outer") from middle

    with pytest.raises(RuntimeError) as caught:
        nested()
    assert "innermost reason" in cli._last_cause(caught.value)
    alone = RuntimeError("alone")
    alone.cause = alone
    assert cli._last_cause(alone) == "alone"


# -- flags and YAML ---------------------------------------------------------------------------------------------------


def test_defaults():
    assert parse_config("verify", verify, []) == verify.VerifyConfig()
    config = parse_config("embed", embed, [])
    assert dataclasses.replace(config, text=tuple(config.text), encoders=tuple(config.encoders)) == embed.EmbedConfig()


def test_dashes_are_underscores():
    flags = ["--source", "scenes:3", "--rows-per-fragment", "8", "--actors.num-cpus=2"]
    config = parse_config("ingest", ingest, flags)
    assert config.rows_per_fragment == 8 and config.actors.num_cpus == 2.0
    assert config == parse_config("ingest", ingest, [flag.replace("-per-", "_per_") for flag in flags])


def test_dashes_in_values_stay():
    config = parse_config("ingest", ingest, ["--source=folder:/a-b/c--d", "--store", "my-store"])
    assert (config.source, config.store) == ("folder:/a-b/c--d", "my-store")


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], False),
        (["--dry-run"], True),
        (["--dry_run"], True),
        (["--dry-run", "true"], True),
        (["--dry-run", "false"], False),
        (["--dry-run=false"], False),
        (["--dry-run", "--store", "s"], True),
    ],
)
def test_switch(words, wanted):
    assert parse_config("embed", embed, words).dry_run is wanted


def test_yaml_then_flags(tmp_path):
    path = write_yaml(
        tmp_path, store="from-yaml", batch_tokens=77, actors={"min": 2, "max": 3}, commit={"seconds": 9.0}
    )
    config = parse_config("embed", embed, ["--config", path])
    assert (config.store, config.batch_tokens, config.actors.min, config.actors.max) == ("from-yaml", 77, 2, 3)
    config = parse_config("embed", embed, ["--config", path, "--actors.max", "5", "--store", "from-flag"])
    assert (config.store, config.batch_tokens, config.actors.min, config.actors.max) == ("from-flag", 77, 2, 5)
    assert config.commit.seconds == 9.0 and config.commit.fragments == embed.EmbedConfig().commit.fragments
    with pytest.raises(ValueError, match="min 2, max 1"):
        parse_config("embed", embed, ["--config", path, "--actors.max", "1"])


def test_encoders_of_yaml(tmp_path):
    config = parse_config("embed", embed, ["--config", write_yaml(tmp_path, encoders=ENCODERS, text=["caption"])])
    assert [type(encoder) for encoder in config.encoders] == [EncoderConfig, EncoderConfig]
    assert config.encoders[0] == EncoderConfig("one", "models/one", template="plain", dtype="fp32")
    assert config.encoders[1].layer_index == -2 and config.encoders[1].codec == "fp8_e4m3"
    assert list(config.text) == ["caption"]


@pytest.mark.parametrize("names", [["one"], ["two"], ["two", "one"]])
def test_encoders_by_name(tmp_path, names):
    path = write_yaml(tmp_path, encoders=ENCODERS)
    for argv in (["--config", path, "--encoders", *names], ["--encoders", *names, "--config", path]):
        config = parse_config("embed", embed, argv)
        assert {encoder.name for encoder in config.encoders} == set(names)
        assert config.encoders[0].name == ("one" if "one" in names else "two"), "the config's order is kept"


def test_encoder_that_the_config_does_not_have(tmp_path):
    with pytest.raises(ValueError, match=r"--encoders three: not in the config, which has one, two"):
        parse_config(
            "embed", embed, ["--config", write_yaml(tmp_path, encoders=ENCODERS), "--encoders", "one", "three"]
        )


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--batch_tokns", "3"], "batch_tokns"),
        (["--batch-tokens", "many"], "batch_tokens"),
        (["--batch-tokens", "0"], "batch_tokens: expected a whole number >= 1"),
        (["--actors.maximum", "3"], "actors.maximum"),
        (["--actors.min", "0"], "actors.min: expected a whole number >= 1, received 0"),
        (["--commit.fragments", "0"], "commit.fragments: expected a whole number >= 1"),
        (["--max-error-rate", "1.5"], "max_error_rate: expected a number >= 0 and <= 1"),
        (["stray"], "stray"),
        (["--config", "/nowhere/job.yaml"], "job.yaml"),
    ],
)
def test_wrong_flags(argv, match):
    with pytest.raises(ValueError, match=match):
        parse_config("embed", embed, argv)


@pytest.mark.parametrize(
    "values, match",
    [
        ({"batch_tokns": 3}, "batch_tokns"),
        ({"batch_tokens": "many"}, "batch_tokens"),
        ({"actors": {"minimum": 1}}, "minimum"),
        ({"encoders": [{"name": "one"}]}, "model"),
        ({"encoders": [{**ENCODERS[0], "layr": 3}]}, "layr"),
        ({"encoders": [{**ENCODERS[0], "codec": "fp16"}]}, "codec"),
        ({"encoders": [{**ENCODERS[0], "name": "a-b"}]}, "encoder name"),
        ({"encoders": [ENCODERS[0], ENCODERS[0]]}, "a name of its own"),
        ({"encoders": []}, "expected at least one"),
        ({"text": []}, "text: expected at least one"),
        ({"text": ["caption", "caption"]}, "each once"),
    ],
)
def test_wrong_yaml(tmp_path, values, match):
    with pytest.raises(ValueError, match=match):
        parse_config("embed", embed, ["--config", write_yaml(tmp_path, **values)])


def test_errors_name_the_fields_that_exist(tmp_path):
    with pytest.raises(ValueError, match=r"expected flags or YAML keys: .*batch_tokens.*lidit embed --help"):
        parse_config("embed", embed, ["--config", write_yaml(tmp_path, nothing=1)])


def test_missing_source_is_named():
    with pytest.raises(ValueError, match="source"):
        parse_config("ingest", ingest, [])


def test_broken_yaml(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("encoders: [unclosed")
    with pytest.raises(ValueError, match=r"job.yaml|parse|YAML|yaml"):
        parse_config("embed", embed, ["--config", str(path)])

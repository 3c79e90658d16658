"""Configs of strangers: no module of theirs is imported, no other file is read, and none takes the machine's memory."""

import json
import os
import sys
import textwrap
import threading

import pytest
import yaml

from lidit.cli import JOBS, main, parse_config
from lidit.runtime import config_files
from lidit.runtime.config_files import check_fields, load_yaml, read_text
from pipelines import embed, ingest, preprocess, verify
from trainer import train

pytestmark = pytest.mark.unit

MODULES = {"embed": embed, "ingest": ingest, "preprocess": preprocess, "train": train}


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file when it is imported; gives the place of that file."""
    (tmp_path / "path").mkdir()
    ran = tmp_path / "ran"
    code = f"""
        import pathlib
        from pipelines.engine.pool import ActorsConfig
        pathlib.Path({str(ran)!r}).touch()
        class Actors(ActorsConfig):
            pass
        def function():
            pass
    """
    (tmp_path / "path" / "trap_of_a_config.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield ran
    sys.modules.pop("trap_of_a_config", None)


def refused(job, argv, match="."):
    with pytest.raises(ValueError, match=match):
        parse_config(job, MODULES[job], argv)


# -- no module of a config is imported --------------------------------------------------------------------------------


def test_the_trap_works(trap):
    __import__("trap_of_a_config")
    assert trap.exists()


NAMED = "trap_of_a_config.Actors"


@pytest.mark.parametrize(
    "job, text",
    [
        ("embed", f"actors: {{class_path: {NAMED}}}"),
        ("embed", f"actors: {{class_path: {NAMED}, init_args: {{min: 2}}}}"),
        ("embed", "actors: {init_args: {min: 2}}"),
        ("embed", "actors: {dict_kwargs: {min: 2}}"),
        ("embed", "actors: {__path__: /etc/passwd}"),
        ("embed", f"actors: {NAMED}"),
        ("embed", "actors: trap_of_a_config.function"),
        ("embed", f"actors.class_path: {NAMED}"),
        ("embed", f"class_path: {NAMED}"),
        ("embed", f"encoders: [{{class_path: {NAMED}}}]"),
        ("embed", f"encoders: [{NAMED}]"),
        ("embed", f"encoders: {NAMED}"),
        ("embed", f'{{"actors": {{"class_path": "{NAMED}"}}}}'),
        ("ingest", f"{{source: 'scenes:3', store: s, filters: {NAMED}}}"),
        ("preprocess", f"embed: {{actors: {NAMED}}}"),
        ("preprocess", f"embed.actors: {NAMED}"),
        ("preprocess", f"embed: {{encoders: [{{name: a, model: {{class_path: {NAMED}}}}}]}}"),
        ("preprocess", f"ingest: [{{source: 'scenes:3', actors: {NAMED}}}]"),
        ("train", f"model: {NAMED}"),
        ("train", f"model: {{changes: {{deep: [{{class_path: {NAMED}}}]}}}}"),
        ("train", f"phases: [{{steps: 1, class_path: {NAMED}}}]"),
        ("embed", "actors: !!python/object/apply:trap_of_a_config.function []"),
        ("embed", "actors: !!python/name:trap_of_a_config.function"),
        ("embed", "actors: !!python/module:trap_of_a_config"),
    ],
)
def test_file_that_names_a_class(job, text, tmp_path, trap):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    refused(job, ["--config", str(path)])
    refused(job, [f"--config={path}"])
    refused(job, ["--config", "{" + text + "}" if not text.startswith("{") else text])
    assert not trap.exists()


@pytest.mark.parametrize(
    "job, flags",
    [
        ("embed", ["--actors", NAMED]),
        ("embed", [f"--actors={NAMED}"]),
        ("embed", ["--actors", f"{{class_path: {NAMED}}}"]),
        ("embed", [f"--actors.class_path={NAMED}"]),
        ("embed", ["--actors.class-path", NAMED]),
        ("embed", ["--actors.init_args.min", "2"]),
        ("embed", ["--actors.help", NAMED]),
        ("embed", [f"--actors.help={NAMED}"]),
        ("embed", [f"--encoders.help={NAMED}"]),
        ("embed", [f"--encoders=[{{class_path: {NAMED}}}]"]),
        ("embed", ["--encoders", f'["{NAMED}"]']),
        ("embed", [f"--encoders={NAMED}"]),
        ("embed", [f"--encoders+={NAMED}"]),
        ("embed", [f"--encoders.class_path={NAMED}"]),
        ("embed", ["--acto", NAMED]),
        ("train", ["--model", NAMED]),
        ("train", ["--phases.0.class_path", NAMED]),
        ("train", ["--phases.class_path", NAMED]),
        ("preprocess", ["--embed.actors", NAMED]),
        ("preprocess", ["--embed.actors.class_path", NAMED]),
        ("preprocess", ["--ingest.0.actors.class_path", NAMED]),
        ("preprocess", [f"--ingest+={{class_path: {NAMED}}}"]),
    ],
)
def test_flag_that_names_a_class(job, flags, trap):
    refused(job, flags)
    assert not trap.exists()


def test_environment_names_nothing(trap, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("LIDIT_EMBED_ACTORS", "LIDIT_EMBED__ACTORS", "LIDIT EMBED_ACTORS"):
        monkeypatch.setenv(name, NAMED)
    assert parse_config("embed", embed, []).actors.min == 1
    assert not trap.exists()


def test_parser_itself_imports_nothing(trap, monkeypatch):
    """What the checks before it did not see."""
    monkeypatch.setattr("lidit.cli.check_flags", lambda argv, config_class: list(argv))
    for flags in (
        [f"--actors={NAMED}"],
        ["--actors", f"{{class_path: {NAMED}}}"],
        [f"--encoders=[{{class_path: {NAMED}}}]"],
        ["--config", f"{{actors: {NAMED}}}"],
    ):
        refused("embed", flags)
    assert not trap.exists()


def test_error_names_file_field_and_what_is_wrong(tmp_path, trap, capsys):
    path = tmp_path / "job.yaml"
    path.write_text(f"actors: {{class_path: {NAMED}}}")
    assert main(["embed", "--config", str(path)]) == 2
    assert "job.yaml: expected fields, received 'class_path'" in capsys.readouterr().err
    path.write_text(f"actors: {NAMED}")
    refused("embed", ["--config", str(path)], r"job\.yaml: actors: expected fields \(min, max, .*received 'trap_of_a")


def test_every_jobs_types_are_known():
    for job, (module, _) in JOBS.items():
        config_class = getattr(__import__(module, fromlist=["x"]), f"{job.capitalize()}Config")
        assert config_files.field_types(config_class)
        own = {"lidit", "pipelines", "demo" if job == "demo" else "trainer"}
        assert config_files.packages(config_class) <= own


# -- no other file is read --------------------------------------------------------------------------------------------


def test_file_takes_in_no_other_file(tmp_path):
    other, path = tmp_path / "other.yaml", tmp_path / "job.yaml"
    other.write_text("{min: 2}")
    path.write_text(f"config: {other}")
    refused("embed", ["--config", str(path)], "a file takes in no other file")
    path.write_text(f"actors: {other}")
    refused("embed", ["--config", str(path)], "names of classes or files are not read")
    refused("embed", ["--actors", str(other)], "names of classes or files are not read")
    refused("embed", ["--actors", str(tmp_path / "none.yaml")], "names of classes or files are not read")


# -- what is no attack works ------------------------------------------------------------------------------------------


def test_file_is_read_once_so_that_pipes_will_do(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("batch_tokens: 77\nactors: {min: 2, max: 3}\n",))
    writer.start()
    config = parse_config("embed", embed, ["--config", str(pipe), "--actors.max", "4"])
    writer.join()
    assert (config.batch_tokens, config.actors.min, config.actors.max) == (77, 2, 4)


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n"])
def test_file_without_fields(text, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert parse_config("embed", embed, ["--config", str(path)]).batch_tokens == 8192


def test_numbers_aliases_and_inline_values(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("max_error_rate: 1e-3\nactors: &a {min: 2, max: 2}\ncommit: {seconds: 5}\n# comment\n")
    config = parse_config("embed", embed, ["--config", str(path), "--text", '[caption, "prompt"]'])
    assert config.max_error_rate == 0.001 and config.actors.min == 2 and list(config.text) == ["caption", "prompt"]
    config = parse_config("embed", embed, ["--actors", "{min: 3, max: 4}", "--config={batch_tokens: 9}"])
    assert (config.actors.min, config.actors.max, config.batch_tokens) == (3, 4, 9)


def test_words_that_look_like_modules_stay_text(trap):
    config = parse_config("embed", embed, ["--store", NAMED, "--text", f"[{NAMED}]"])
    assert config.store == NAMED and list(config.text) == [NAMED] and not trap.exists()


# -- size -------------------------------------------------------------------------------------------------------------


def laughs(levels, width=10):
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        laughs(9),
        laughs(60),
        "a: &a {<<: {b: 1}}\n" + "\n".join(f"k{n}: {{<<: [{', '.join(['*a'] * 1000)}]}}" for n in range(200)),
        "a: &a [*a]",
        "a: &a {b: [*a]}",
        "[" * 100_000,
        "[" * 100 + "]" * 100,
        "{a: " * 5_000 + "1" + "}" * 5_000,
        "- " * 50_000 + "1",
        "[" + "1," * 200_000 + "]",
    ],
    ids=["laughs", "more laughs", "merges", "itself", "itself deeper", "open", "deep", "mappings", "dashes", "many"],
)
def test_values_that_multiply(text, tmp_path):
    with pytest.raises(ValueError, match="the config: expected"):
        load_yaml(text, "the config")
    path = tmp_path / "job.yaml"
    path.write_text(text)
    refused("embed", ["--config", str(path)], r"job\.yaml: expected")
    if len(text) < 100_000:
        refused("train", ["--phases.0.steps", text], "--phases.0.steps: expected")


def test_large_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("# " + "x" * config_files.MAX_BYTES)
    refused("embed", ["--config", str(path)], "expected a config of at most 1,048,576 bytes")
    refused("embed", ["--config", "/dev/zero"], "expected a config of at most 1,048,576 bytes")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"store: a\x00b", b"store: \xc3("])
def test_file_that_is_no_text(content, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    refused("embed", ["--config", str(path)], r"job\.yaml: expected YAML")


@pytest.mark.parametrize("text", ["[1, 2]", "word", "3", "2020-99-99", "9" * 5_000])
def test_file_of_something_else(text, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    refused("embed", ["--config", str(path)], r"job\.yaml: expected YAML")


def test_missing_file_and_folder(tmp_path):
    refused("embed", ["--config", str(tmp_path / "none.yaml")], r"none\.yaml: expected a YAML file, received: No such")
    refused("embed", ["--config", str(tmp_path)], "expected a YAML file, received: Is a directory")
    with pytest.raises(ValueError, match="No such file"):
        read_text(str(tmp_path / "none.yaml"))


def test_load_yaml_gives_plain_values():
    values = {"a": [1, 2.5, None, True, "text"], "b": {"c": "d"}}
    assert load_yaml(yaml.safe_dump(values), "x") == values == load_yaml(json.dumps(values).encode(), "x")
    assert load_yaml("a: &x [1]\nb: *x\n", "x") == {"a": [1], "b": [1]}
    check_fields(values, None, "x")


def test_dates_stay_text(tmp_path):
    assert load_yaml("[2024-01-02, 2020-99-99]", "x") == ["2024-01-02", "2020-99-99"]
    path = tmp_path / "job.yaml"
    path.write_text("since: 2024-01-02")
    assert parse_config("verify", verify, ["--config", str(path)]).since == "2024-01-02"
    assert parse_config("verify", verify, ["--since", "2020-99-99"]).since == "2020-99-99"

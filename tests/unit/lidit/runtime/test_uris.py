"""Secrets in addresses: no config takes one, and nothing that is printed or kept shows one."""

import dataclasses
import importlib
import typing
from pathlib import Path

import pytest
import yaml

from lidit.cli import JOBS, main
from lidit.runtime import uris
from lidit.runtime.uris import check_config, check_uri, shown
from pipelines.captioning.openai_engine import EndpointConfig
from pipelines.embed import EmbedConfig
from pipelines.ingest import IngestConfig
from pipelines.preprocess import PreprocessConfig
from pipelines.sources.base import Record, error_row
from pipelines.sources.locations import File, find_files
from trainer.config import PhaseConfig, TrainConfig

pytestmark = pytest.mark.unit

WITH_SECRET = """\
http://me:hunter2@host/x
https://hunter2@host/x
HTTPS://me:hunter2@host
sftp://me:hunter2@host/p
ftp://me:hunter2@host:21/p
s3://AKIA:hunter2@bucket/x
http://me:hunter2@[::1]:80/x
webdataset:http://me:hunter2@host/x-{0000..0012}.tar
simplecache::https://me:hunter2@h/x
zip://a.tar::https://me:hunter2@h/x
zip://a/b@c.tar::simplecache::sftp://me:hunter2@h/x
{http://a/x,http://me:hunter2@b/x}
http://{a,me:hunter2@host}/x
{http,https}://me:hunter2@host/x
http://me:hun@hunter2@host/x
http://me:hunter2/a@host/x
http://me:a/hunter2@host/x
sftp://me:a#hunter2@host/x
sftp://me:a?hunter2@host/x
http://me:a::hunter2@host/x
http://me:hunter2'x@host/x
http://me:hunter%402hunter2@host/x
http://me%3Ahunter2%40host/x
https%3A%2F%2Fme%3Ahunter2%40host%2Fx
https%253A%252F%252Fme%253Ahunter2%2540host%252Fx
https://proxy/?url=https%3A%2F%2Fme%3Ahunter2%40host%2Fx
https://b.s3.amazonaws.com/x?X-Amz-Signature=hunter2
https://b/x?a=1&x-amz-credential=hunter2%2F2020&b=2
https://b/x?a=1;x-amz-security-token=hunter2
https://b/x?a=1&amp;token=hunter2
https://b/x?X%2DAmz%2DSignature=hunter2
https://b/x?AWSAccessKeyId=hunter2&Expires=3
https://b/x?Expires=3&Signature=hunter2%3D
https://b/x?X-Goog-Signature=hunter2
https://b/x?GoogleAccessId=hunter2
az://c/x?sv=2020&se=3&sp=r&sig=hunter2%2Fhunter2
abfs://c@a.dfs.core.windows.net/x?sig=hunter2
lance:az://c/t?sig=hunter2
simplecache::https://b/x?sig=hunter2/hunter2
https://b/x?sig=a;hunter2
https://b/x-{0..3}.tar?token={hunter2,b}
https://b/x#access_token=hunter2
https://b/x?api_key=hunter2
https://b/x?API-KEY=hunter2
https://b/x?key=hunter2
https://b/x?password=hunter2
https://b/x?client_secret=hunter2""".splitlines()

WITHOUT = """\
s3://bucket/x
s3://bucket/a@b:c@d/x
s3://arn:aws:s3:us-west-2:123:accesspoint/name/x
s3://b/k=v/key=3/token=4
hdfs://namenode:8020/a@b
hdfs://me@namenode:8020/a
sftp://me@host/p
ssh://me@host:22/p@q
abfs://container@account.dfs.core.windows.net/x
github://owner:repository@main/a
hf://datasets/owner/name@abc/x
zip://a@b::s3://b/c@d
zip://x.tar::s3://b/c@d
simplecache::https://h/x@y
http://[::1]:80/a@b
http://host:8000/v1
http://host:{8000..8002}/a@b
http://host:80/x?a=1&b=me@c
https://h/x?max_tokens=3&page=2&sort_keys=1
https://h/x?monkey=3
https://h/x?sig=
https://h/a%20b%2Fc%40d%3De
owner/name@0123456789abcdef
/home/me@x:y/z
C:\\x@y
file:///a@b/c:d@e
file://C:/a@b
folder:/data/a@b
models/one?key=3
webdataset:s3://b/x-{0000..0012}.tar""".splitlines()


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", [*WITH_SECRET, "http://me:a hunter2@host/x", "sftp://me:hunter2@host/my photos"])
def test_secret_is_refused_and_not_shown(uri):
    with pytest.raises(
        ValueError, match=r"^store: expected an address without credentials, .*a profile, a role"
    ) as caught:
        check_uri(uri, "store")
    assert "hunter2" not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize("uri", WITH_SECRET)
def test_secret_is_struck_out_of_text(uri):
    for text in (
        uri,
        f"404, message='no', url='{uri}', code 3",
        f'("{uri}")',
        f"{uri}\n{uri} and {uri}: no",
        f"at {uri}.",
    ):
        assert "hunter2" not in shown(text) and "***" in shown(text)
        assert shown(shown(text)) == shown(text)
    assert shown(f"before {uri} after").startswith("before ") and shown(f"before {uri} after").endswith(" after")


@pytest.mark.parametrize("uri", WITHOUT)
def test_address_without_secret_stays(uri):
    check_uri(uri, "store")
    if "?key=" not in uri:
        assert shown(uri) == uri and shown(f"expected {uri} , received 'x'") == f"expected {uri} , received 'x'"


def test_rest_of_an_address_is_kept():
    assert shown("sftp://me:pw@host:22/a/b.tar") == "sftp://***@host:22/a/b.tar"
    assert shown("https://b/x?a=1&X-Amz-Signature=abc&b=2#c") == "https://b/x?a=1&X-Amz-Signature=***&b=2#c"
    assert shown("me@example.org: 3 = 3, 50% of {a: b}, x=y") == "me@example.org: 3 = 3, 50% of {a: b}, x=y"


@pytest.mark.parametrize(
    "text",
    [
        "://" * 100_000, "http://" + "a:" * 100_000, "http://a:" + "b/" * 100_000, "%40" * 100_000, "a" * 300_000 + "%40",
        "?a=" * 100_000, "{" * 300_000 + "://", "http://a:b/" * 30_000, ("x" * 50 + "%3A") * 5_000, "&key=" * 60_000,
    ],
)  # fmt: skip
@pytest.mark.timeout(30)
def test_long_text_takes_no_longer_than_its_length(text):
    shown(text)


# -- configs ----------------------------------------------------------------------------------------------------------

URI = "sftp://me:hunter2@host/x?X-Amz-Signature=hunter2"


def text_fields(of, path=()):
    """Paths of all fields of text in a config class, but sentences; 0 stands for the first of a list."""
    for field in dataclasses.fields(of):
        kind, here = typing.get_type_hints(of)[field.name], (*path, field.name)
        inner = [each for each in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(each)]
        many = typing.get_origin(kind) not in (None, typing.Union, type(str | None), typing.Literal)
        if inner:
            yield from text_fields(inner[0], (*here, 0) if many else here)
        elif kind == dict[str, str]:
            yield (*here, "key")
        elif many and typing.get_args(kind)[0] is str:
            yield (*here, 0)
        elif str in (kind, *typing.get_args(kind)) and not many and field.name not in uris.FREE_TEXT:
            yield here


def test_walk_of_this_test_finds_the_fields():
    found = set(text_fields(PreprocessConfig))
    assert {
        ("store",),
        ("ingest", 0, "source"),
        ("embed", "encoders", 0, "model"),
        ("recaption", "endpoint", "url"),
    } <= found
    assert {("storage",), ("phases", 0, "store"), ("validation", "prompts")} <= set(text_fields(TrainConfig))


def required(of):
    """Something for the fields that have no default."""
    empty = dataclasses.MISSING
    fields = [field for field in dataclasses.fields(of) if field.default is empty and field.default_factory is empty]
    return {field.name: "x" if field.type in (str, "str") else 1 for field in fields}


def nested(of, path, value):
    """The YAML that sets one field."""
    name, *rest = path
    kind = typing.get_type_hints(of).get(name)
    inner = next((each for each in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(each)), None)
    values = required(of)
    if rest and rest[0] == 0:
        values[name] = [nested(inner, rest[1:], value) if inner else value]
    elif rest:
        values[name] = nested(inner, rest, value) if inner else {rest[0]: value}
    else:
        values[name] = value
    return values


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Runs in an empty folder; gives it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_no_job_takes_a_secret_in_any_address(job, in_folder, tmp_path, capfd):
    config_class = getattr(importlib.import_module(JOBS[job][0]), f"{job.capitalize()}Config")
    paths = list(text_fields(config_class))
    assert paths
    if job == "preprocess":  # most of its fields are configs of other jobs: one of each
        paths = list({path[:1]: path for path in paths}.values())
    for path in paths:
        values = nested(config_class, path, URI)
        assert "hunter2" in str(values)
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump(values))
        assert main([job, "--config", str(file)]) == 2, path
        said = capfd.readouterr()
        assert "hunter2" not in said.out + said.err and "***" in said.err, path
        assert not list(in_folder.rglob("*")), path


def test_flags_too(in_folder, capfd):
    for argv in (
        ["ingest", "--source", f"webdataset:{URI}"],
        ["ingest", f"--store={URI}", "--source", "scenes:3"],
        ["embed", "--encoders", f'[{{"name": "a", "model": "{URI}"}}]'],
        ["train", "--phases.0.store", URI],
        ["train", "--phases.0.steps", URI],
        ["embed", "--batch_tokens", URI],
        ["embed", f"--{URI}"],
        ["embed", "--actors", URI],
        ["embed", URI],
        ["embed", "--config", URI],
        ["recaption", "--endpoint.url", URI],
    ):
        assert main(argv) == 2, argv
        said = capfd.readouterr()
        assert "hunter2" not in said.out + said.err and "***" in said.err, argv
    assert not list(in_folder.rglob("*"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: IngestConfig(source=f"parquet:{URI}", store="s"),
        lambda: EmbedConfig(store=URI),
        lambda: dataclasses.replace(EmbedConfig(), store=URI),
        lambda: EmbedConfig(encoders=[dataclasses.replace(EmbedConfig().encoders[0], model=URI)]),
        lambda: EndpointConfig(url="http://me:hunter2@host/v1"),
        lambda: EndpointConfig(url="http://hunter2@host/v1"),
        lambda: EndpointConfig(url="http://host/v1?other=hunter2"),
        lambda: EndpointConfig(url="ftp://me:hunter2@host/v1"),
        lambda: EndpointConfig(url="http://me:hunter2@ho\u2100st/v1"),
        lambda: check_config({"a": [{"b": (PhaseConfig(1, 1, store=URI),)}]}),
        lambda: check_config({URI: 1}),
    ],
)
def test_made_in_python_it_is_refused_as_well(make):
    with pytest.raises(ValueError, match=r"without credentials|no credentials") as caught:
        make()
    assert "hunter2" not in str(caught.value)


def test_sentences_may_speak_of_addresses():
    recaption = importlib.import_module("pipelines.recaption").RecaptionConfig
    assert recaption(instruction="What does https://a/?key=3 say?").instruction


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_tracebacks_and_prints_of_jobs_are_struck(monkeypatch, capfd, in_folder):
    verify = importlib.import_module("pipelines.verify")

    def fail(config):
        print(f"reading {URI}")
        raise failure(f"cannot open {URI}")

    monkeypatch.setattr(verify, "main", fail)
    for failure, status in ((ValueError, 2), (OSError, 1), (RuntimeError, 1), (KeyError, 1)):  # noqa: B007
        assert main(["verify"]) == status
        said = capfd.readouterr()
        assert "hunter2" not in said.out + said.err
        assert "reading sftp://***@host/x?X-Amz-Signature=***" in said.out + said.err
        assert "cannot open sftp://***@host" in said.err


def test_place_of_a_file_has_no_secret():
    assert File("https://h/a/b.tar?X-Amz-Signature=hunter2", 1, None).place == "a/b.tar"
    assert File("simplecache::https://h/a/b.tar?sig=hunter2", 1, None).place == "a/b.tar?sig=***"
    assert File("simplecache::https://h/a/b.tar?sig=hun/ter2", 1, None).place == "a/b.tar?sig=***"
    assert File("sftp://me:hunter2@h/b.tar", 1, None).place == "***@h/b.tar"
    assert File("s3://b/a/c.tar", 1, None).place == "a/c.tar"


def test_reasons_that_rows_keep_have_no_secret():
    row = error_row(Record("a/b.jpg"), f"OSError: cannot read {URI}")
    assert row["ingest_error"] == "OSError: cannot read sftp://***@host/x?X-Amz-Signature=***"


def test_files_that_are_not_there_are_named_without_secrets(tmp_path):
    with pytest.raises(ValueError, match="found nothing") as caught:
        find_files(f"simplecache::file://{tmp_path}/x.tar?sig=hunter2", [".tar"], "webdataset")
    assert "hunter2" not in str(caught.value) and str(Path(tmp_path)) in str(caught.value)

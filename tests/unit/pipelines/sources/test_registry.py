"""Specs of sources: kinds, and classes of one's own by import strings."""

import pytest

from pipelines.sources.base import ColumnsConfig
from pipelines.sources.registry import KINDS, open_source, parse_spec

pytestmark = pytest.mark.unit

OWN = """
from pipelines.sources.base import CAPTION_FIELD, Listed, Record, Sharded


class Words(Listed):
    fields, has_images = [CAPTION_FIELD], False

    def __init__(self, argument):
        self.words = argument.split(",")

    def items(self):
        return [{"image_id": f"word-{word}", "word": word} for word in self.words]

    def record(self, item):
        return Record(item["image_id"], values={"caption": item["word"]})


class Shards(Sharded):
    def __init__(self, argument, names):
        self.argument, self.names = argument, names

    def pieces(self):
        return []

    def read(self, piece):
        yield from ()


class Nothing:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package `own_package.sources` that can be imported."""
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "sources.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("spec", ["", "prompts", "prompts:", "nothing:x", ":x", "/a/path", "s3://b/k"])
def test_unknown_spec(spec):
    with pytest.raises(
        ValueError,
        match=r"expected one of scenes:N, folder:URI, .*img2dataset:PATH, or package.module:Class.argument; received",
    ):
        open_source(spec)


@pytest.mark.parametrize("spec", ["scenes:3", "folder:/", "prompts:a.txt"])
def test_column_names_are_for_sources_that_have_some(spec):
    with pytest.raises(ValueError, match=r"columns.\*: expected with webdataset, parquet, lance, hf, img2dataset only"):
        open_source(spec, ColumnsConfig(image="jpg"))


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "lance", "hf", "img2dataset"])
def test_nothing_there(kind, tmp_path):
    with pytest.raises(ValueError, match=f"source {kind}:.*expected"):
        open_source(f"{kind}:{tmp_path}/none").pieces()


def test_a_class_of_ones_own(own):
    source = open_source("own_package.sources:Words?a red circle,a:b?c")
    assert [item["word"] for item in source.items()] == ["a red circle", "a:b?c"]
    assert source.batch(source.items()).column("caption").to_pylist() == ["a red circle", "a:b?c"]
    names = ColumnsConfig(caption="txt")
    sharded = open_source("own_package.sources:Shards?s3://bucket/x?y", names)
    assert (sharded.argument, sharded.names) == ("s3://bucket/x?y", names)
    assert parse_spec("own_package.sources:Words") == ("own_package.sources:Words", "")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("own_package.nothing:Words?x", "source: own_package.nothing:Words cannot be imported .*on every node"),
        ("own_package.sources:Word?x", "source: own_package.sources:Word cannot be imported"),
        ("own_package.sources:Nothing?x", "source: expected a subclass of pipelines.sources.base.Source"),
        ("os.path:join?x", "source: expected a subclass of pipelines.sources.base.Source"),
    ],
)
def test_what_is_no_source_is_told(own, spec, says):
    with pytest.raises(ValueError, match=says):
        open_source(spec)


def test_every_kind_is_there():
    for kind in KINDS:
        assert parse_spec(f"{kind}:x") == (kind, "x")

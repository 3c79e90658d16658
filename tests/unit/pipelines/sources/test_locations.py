"""URIs: braces, wildcards, folders, on a disk and on another file system; stamps that tell a change."""

import os

import fsspec
import pytest
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from pipelines.sources.locations import (
    File,
    expand_braces,
    find_files,
    is_local,
    list_folder,
    real_place,
    stamp_of,
    walk_files,
)

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a.tar", ["a.tar"]),
        ("a-{0008..0011}.tar", ["a-0008.tar", "a-0009.tar", "a-0010.tar", "a-0011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{00..01}/{x,y}.tar", ["00/x.tar", "00/y.tar", "01/x.tar", "01/y.tar"]),
        ("s3://b/{000..000}.tar", ["s3://b/000.tar"]),
        ("{a}", ["a"]),
    ],
)
def test_braces(text, wanted):
    assert expand_braces(text) == wanted


def test_range_that_falls():
    with pytest.raises(ValueError, match=r"a range that rises, received \{3..1\}"):
        expand_braces("x{3..1}")


@pytest.fixture(params=["disk", "memory"])
def root(request, tmp_path):
    """A folder with files, on two kinds of storage."""
    uri = str(tmp_path / "set") if request.param == "disk" else f"memory://{tmp_path.name}-set"
    fs, path = fsspec.core.url_to_fs(uri)
    for name in ("b.tar", "a.tar", "deep/c.TAR", "deep/d.txt", "e.parquet"):
        fs.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        fs.pipe_file(f"{path}/{name}", name.encode())
    yield uri
    fs.rm(path, recursive=True)


def names(files):
    return [file.uri.rpartition("set/")[2] for file in files]


def test_find(root):
    assert names(find_files(root, (".tar",), "k")) == ["a.tar", "b.tar", "deep/c.TAR"]
    assert names(find_files(f"{root}/*.tar", (".tar",), "k")) == ["a.tar", "b.tar"]
    assert names(find_files(f"{root}/{{b,a,b}}.tar", (".tar",), "k")) == ["b.tar", "a.tar"], "in the order given, once"
    assert names(find_files(f"{root}/e.parquet", (".tar",), "k")) == ["e.parquet"], "what is named is taken"
    (file,) = find_files(f"{root}/deep/c.TAR", (".tar",), "k")
    assert file.size == 10 and file.place == "deep/c.TAR"
    with fsspec.open(file.uri) as found:
        assert found.read() == b"deep/c.TAR"


@pytest.mark.parametrize("spec", ["{a,z}.tar", "z.tar", "z*.tar", "none"])
def test_find_names_what_is_not_there(root, spec):
    with pytest.raises(ValueError, match=r"source k:.*expected .tar at .*(z|none).*found nothing"):
        find_files(f"{root}/{spec}", (".tar",), "k")


def test_find_in_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"expected .tar or .tgz at"):
        find_files(str(tmp_path), (".tar", ".tgz"), "k")


def test_list_and_walk(root):
    assert [entry["name"].rpartition("/")[2] for entry in list_folder(root)] == ["a.tar", "b.tar", "deep", "e.parquet"]
    assert list(walk_files(root).items()) == [
        ("a.tar", 5), ("b.tar", 5), ("deep/c.TAR", 10), ("deep/d.txt", 10), ("e.parquet", 9),
    ]  # fmt: skip


def test_walk_does_not_follow_a_loop(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    assert list(walk_files(str(tmp_path))) == ["a.jpg", "link.jpg", "loop"]


class Denied(AbstractFileSystem):
    """A store that may not list one of its folders."""

    protocol = "denied"
    cachable = False

    def ls(self, path, detail=True, **kwargs):
        if path.rstrip("/").endswith("closed"):
            raise PermissionError(f"may not list {path}")
        return fsspec.filesystem("memory").ls(path, detail)

    def info(self, path, **kwargs):
        return fsspec.filesystem("memory").info(path)


class DeniedAsync(AsyncFileSystem):
    """The same through fsspec's asynchronous classes, of which object stores are made."""

    protocol = "deniedasync"
    cachable = False

    async def _ls(self, path, detail=True, **kwargs):
        return Denied().ls(path, detail)

    async def _info(self, path, **kwargs):
        return Denied().info(path)


@pytest.mark.parametrize("protocol", ["denied", "deniedasync"])
def test_a_folder_that_cannot_be_listed_is_not_left_out(protocol):
    for name, kind in (("denied", Denied), ("deniedasync", DeniedAsync)):
        fsspec.register_implementation(name, kind, clobber=True)
    memory = fsspec.filesystem("memory")
    memory.pipe({"/kept/a.tar": b"x", "/kept/deep/b.tar": b"x", "/lost/a.tar": b"x", "/lost/in/closed/b.tar": b"x"})
    assert list(walk_files(f"{protocol}:///kept")) == ["a.tar", "deep/b.tar"]
    assert len(find_files(f"{protocol}:///kept", (".tar",), "k")) == 2
    with pytest.raises(PermissionError, match="may not list"):
        walk_files(f"{protocol}:///lost")
    with pytest.raises(PermissionError, match="may not list"):
        find_files(f"{protocol}:///lost", (".tar",), "k")


def test_stamp_tells_a_change(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"one")
    fs = fsspec.filesystem("file")
    first = stamp_of(fs.info(str(path)))
    assert first == stamp_of(fs.info(str(path)))
    os.utime(path, (1, 1))
    assert stamp_of(fs.info(str(path))) != first
    assert stamp_of({"ETag": "x", "size": 3}) != stamp_of({"ETag": "y", "size": 3})
    assert stamp_of({"name": "x", "size": 3}) is None


def test_place_holds_no_token():
    assert File("https://host/set/0.tar?X-Amz-Signature=secret", 1, None).place == "set/0.tar"
    assert File("/a/b/c?.tar", 1, None).place == "b/c?.tar"


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert real_place("s3://bucket/a") == "s3://bucket/a"
    assert real_place("sub/{0..3}.tar") == str(tmp_path.resolve() / "sub" / "{0..3}.tar")
    assert real_place("~/x").endswith("/x") and "~" not in real_place("~/x")
    assert is_local(str(tmp_path)) and not is_local("memory://x")

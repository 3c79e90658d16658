"""Footers of Parquet files: damaged ones are a row each and end no process, a storage that fails is no damage."""

import errno
import subprocess
import sys

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.sources.registry import open_source
from tests.unit.pipelines.sources.test_tables import pairs, records, table, wanted

pytestmark = pytest.mark.unit


def garbled(content, damage):
    """A Parquet file with another footer."""
    if damage == "no footer's bytes":
        return b"PAR1" + b"\xff" * 200 + (190).to_bytes(4, "little") + b"PAR1"
    if damage == "said to be encrypted":
        return content[:-4] + b"PARE"
    if damage == "other columns noted":
        first = content.rindex(b"ARROW:schema")
        return content[: first + 30] + b"////" + content[first + 34 :]
    old, new = {
        "a name that is not UTF-8": (b"\x18\x03url", b"\x18\x03u\xffl"),
        "orders of fewer columns": (b"\x19\x3c\x1c\x00\x00", b"\x19\x2c\x1c\x00\x00"),
    }[damage]
    return content.replace(old, new)


@pytest.mark.parametrize("stores_schema", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        "no footer's bytes",
        "said to be encrypted",
        "other columns noted",
        "orders of fewer columns",
        "a name that is not UTF-8",
    ],
)
def test_a_damaged_footer_is_one_row(tmp_path, damage, stores_schema):
    for name, first in ("a", 0), ("b", 2), ("c", 4):
        pq.write_table(
            table(2, first), tmp_path / f"{name}.parquet", store_schema=stores_schema or damage == "other columns noted"
        )
    path = tmp_path / "b.parquet"
    path.write_bytes(garbled(path.read_bytes(), damage))
    made = records(f"parquet:{tmp_path}")
    (bad,) = [record for record in made if record.error]
    assert "/b.parquet" in bad.place
    assert pairs(record for record in made if not record.error) == [*wanted(2), *wanted(2, 4)]


def test_a_footer_that_ends_a_process_is_left_to_a_worker(tmp_path):
    """Arrow gives up on statistics that do not fit their column, when it is asked for that column."""
    pq.write_table(table(2), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    optional, required = b"\x15\x0c\x25\x02\x18\x07caption", b"\x15\x0c\x25\x00\x18\x07caption"
    assert content.count(optional) == 1
    (tmp_path / "a.parquet").write_bytes(content.replace(optional, required))
    program = (
        "import sys; from pipelines.sources.registry import open_source; print(len(open_source(sys.argv[1]).pieces()))"
    )
    done = subprocess.run([sys.executable, "-c", program, f"parquet:{tmp_path}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_sizes_of_row_groups_are_shares_of_the_file(tmp_path):
    pq.write_table(table(3000), tmp_path / "a.parquet", row_group_size=1000)
    sizes = [piece["bytes"] for piece in open_source(f"parquet:{tmp_path}").pieces()]
    whole = (tmp_path / "a.parquet").stat().st_size
    assert whole - 3 <= sum(sizes) <= whole and max(sizes) < 1.2 * min(sizes)


class Away(MemoryFileSystem):
    """A storage that lists files, and fails while one is read."""

    protocol = "away"
    error: Exception
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("away://").strip("/")

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if mode == "rb":
            file.read = self.read
        return file

    def read(self, size=-1):
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError("page"), OSError(errno.EIO, "parquet"), TimeoutError("thrift")])
def test_storage_that_fails_at_a_footer_is_no_row_s_error(error, monkeypatch):
    fsspec.register_implementation("away", Away, clobber=True)
    monkeypatch.setattr(Away, "error", error, raising=False)
    fsspec.filesystem("away").pipe_file("/b/a.parquet", b"PAR1" * 1000)
    with pytest.raises(type(error)):
        open_source("parquet:away://b/a.parquet").pieces()

"""Preflight: what is right is called so, what is wrong is found, and every failure says what to do."""

import importlib.util
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lidit.store import columns
from pipelines.engine.table import Table

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def preflight():
    spec = importlib.util.spec_from_file_location("preflight", ROOT / "infra" / "preflight.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["preflight"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def test_all_is_well_here(preflight, store, capsys):
    assert preflight.main(["--store", store, "--min-disk-gb", "0.001", "--gpus", "0"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    (checks,) = result["nodes"].values()
    assert [check["name"] for check in checks] == ["versions", "gpus", "disk", "store", "clock", "table"]
    assert result["ok"] and all(check["ok"] for check in checks) and "none yet" in said.err
    assert os.listdir(os.path.join(store, "preflight")) == [], "nothing is left in the store"


def test_something_is_wrong(preflight, store, capsys):
    assert preflight.main(["--store", store, "--min-disk-gb", "1e9", "--gpus", "0"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["ok"] is False
    assert "FAILED" in said.err and "-> a larger volume" in said.err


def test_other_versions(preflight, tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text(
        "ray==0.1\n"
        + "".join(f"{name}=={preflight.version(name).partition('+')[0]}\n" for name in preflight.PACKAGES[1:])
    )
    check = preflight.check_versions(pins)
    assert (
        not check.ok
        and check.found == f"ray {preflight.version('ray')} (tested: 0.1)"
        and "infra/Dockerfile" in check.fix
    )


def test_gpus_that_are_not_there(preflight):
    import torch

    count = torch.cuda.device_count()
    check = preflight.check_gpus(count + 8)
    assert not check.ok and check.found == f"{count} GPUs, expected {count + 8}" and "nvidia-smi" in check.fix
    assert preflight.check_gpus(None).ok


@pytest.mark.gpu
def test_gpus_that_are_there(preflight):
    import torch

    check = preflight.check_gpus(torch.cuda.device_count())
    assert check.ok and torch.cuda.get_device_name(0) in check.found


def test_a_store_that_cannot_be_written(preflight, tmp_path):
    file = tmp_path / "a file"
    file.write_text("no folder")
    check = preflight.check_store(str(file))
    assert not check.ok and check.found.startswith("could not write: ") and "PutObject" in check.fix


def test_a_store_that_ignores_conditions(preflight, store, monkeypatch):
    import lidit.runtime.files

    monkeypatch.setattr(
        lidit.runtime.files, "create_exclusively", lambda fs, path, content: fs.pipe_file(path, b"preflight")
    )
    check = preflight.check_store(store)
    assert not check.ok and "twice" in check.found and "If-None-Match" in check.fix


@pytest.mark.parametrize(("hours", "ok"), [(0, True), (-2, False), (2, False)])
def test_a_clock_that_is_off(preflight, store, monkeypatch, hours, ok):
    from fsspec.implementations.local import LocalFileSystem

    os.makedirs(os.path.join(store, "preflight"))
    there = datetime.now(UTC) + timedelta(hours=hours)
    monkeypatch.setattr(LocalFileSystem, "modified", lambda self, path: there)
    check = preflight.check_clock(store)
    assert check.ok == ok and (
        ok or ("7,1" in f"{int(check.found.split()[0]):,}" or "7,2" in f"{int(check.found.split()[0]):,}")
    )
    assert "timedatectl" in check.fix


def test_a_table(preflight, store):
    import pyarrow as pa

    Table(f"{store}/{columns.SAMPLES_TABLE}").create(pa.schema([pa.field(columns.IMAGE_ID, pa.string())]))
    check = preflight.check_table(store)
    assert check.ok and check.found == "version 1, 0 rows, 1 columns"
    for file in Path(store, columns.SAMPLES_TABLE, "_versions").iterdir():
        file.write_bytes(b"damaged")
    wrong = {check.name: check for check in preflight.check_node(store, 0, 0.001)}["table"]
    assert not wrong.ok and "lidit verify" in wrong.fix


def test_a_check_that_blows_up_is_a_finding(preflight, store, monkeypatch):
    def boom(expected):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(preflight, "check_gpus", boom)
    checks = {check.name: check for check in preflight.check_node(store, 0, 0.001)}
    assert not checks["gpus"].ok and "driver version is insufficient" in checks["gpus"].found and checks["store"].ok


def test_wrong_flags(preflight, capsys):
    with pytest.raises(SystemExit) as ended:
        preflight.main(["--gpus", "eight"])
    assert ended.value.code == 2 and "--store" in capsys.readouterr().err


def test_a_failure_is_shown_with_its_fix(preflight):
    line = preflight.Check("disk", False, "1 GB free", "a larger volume").line("10.0.0.7")
    assert line.splitlines()[0].split() == ["FAILED", "10.0.0.7", "disk", "1", "GB", "free"]
    assert line.splitlines()[1].strip() == "-> a larger volume"

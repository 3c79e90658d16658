"""Saving: what a save may delete and replace, who may save, and what a checkpoint of an earlier layout is worth. A stand-in
for the engine writes files as DeepSpeed does; real shards: tests/integration/test_train_resume.py."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist

from lidit.runtime import outage
from trainer.checkpoints.manifest import BEGUN, MANIFEST, Damaged, File, Manifest, folder_of, read_manifest, steps_in
from trainer.checkpoints.resume import Layout, Resume, read_state
from trainer.checkpoints.save import Checkpoints, SaveFailed
from trainer.config import CheckpointConfig
from trainer.engine.ranks import Ranks
from trainer.storage import Storage

pytestmark = pytest.mark.unit
STATE = {"world_size": 1, "zero_stage": 0}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """One process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield Ranks(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(params=["disk", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    yield Storage(f"{tmp_path}/run" if request.param == "disk" else f"memory://{tmp_path.name}/run")
    fsspec.filesystem("memory").store.clear()


class Engine:
    """Saves one shard with the words it was given, by a writer that is replaced and put back, as DeepSpeed's."""

    def __init__(self, words: str):
        self.words, self.checkpoint_engine = words, Writer()

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        self.checkpoint_engine.save(self.words, f"{folder}/{tag}/mp_rank_00_model_states.pt")


class Writer:
    def save(self, words: str, path: str) -> None:
        Path(path).write_text(words)


def start(storage: Storage, ranks: Ranks, lease: int = 0, observe: Callable[[str], None] | None = None) -> Checkpoints:
    return Checkpoints(storage, ranks, CheckpointConfig(keep_last=2), observe or (lambda part: None), lease)


def save(checkpoints: Checkpoints, step: int, words: str = "weights") -> None:
    checkpoints.save(step, Engine(words), None, {**STATE, "step": step, "words": words})


def take_lease(storage: Storage, number: int) -> None:
    storage.write(f"driver/lease-{number:08d}", b"{}")


def contents(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(f"checkpoints/{name}") for name in storage.sizes("checkpoints")}


def words_at(storage: Storage, step: int) -> str:
    return read_state(storage, read_manifest(storage, step))["words"]


def test_files_lie_in_a_folder_of_the_start_that_saved_them(storage: Storage, ranks: Ranks) -> None:
    checkpoints = start(storage, ranks, 0)
    save(checkpoints, 4)
    names = {f"step_00000004/{checkpoints.generation}/{name}" for name in read_manifest(storage, 4).files}
    assert set(contents(storage)) == {*names, f"step_00000004/{MANIFEST}"} and len(names) == 2
    assert words_at(storage, 4) == "weights"


def to_old_layout(storage: Storage, step: int) -> None:
    """Moves a checkpoint's files beside its manifest, as earlier versions had them."""
    manifest = read_manifest(storage, step)
    for name in manifest.files:
        storage.write(f"{folder_of(step)}/{name}", storage.read(f"{manifest.place}/{name}"))
    storage.remove_folder(manifest.place)
    storage.write(f"{folder_of(step)}/{MANIFEST}", dataclasses.replace(manifest, folder="").to_json())


def test_checkpoints_of_the_old_layout_are_read_kept_and_removed(storage: Storage, ranks: Ranks) -> None:
    save(start(storage, ranks), 4, "old")
    to_old_layout(storage, 4)
    assert json.loads(storage.read(f"{folder_of(4)}/{MANIFEST}"))["format"] == 1
    assert words_at(storage, 4) == "old"
    with Resume(storage, ranks, Layout(1, 0)).newest() as found:
        assert found is not None and found.step == 4
        assert (found.engine / found.tag / "mp_rank_00_model_states.pt").read_text() == "old"
    checkpoints = start(storage, ranks)
    save(checkpoints, 8)
    assert steps_in(storage) == [4, 8]
    save(checkpoints, 12)
    assert steps_in(storage) == [8, 12] and not any("step_00000004" in name for name in contents(storage))


def test_the_holder_replaces_what_an_earlier_start_left_at_its_step(storage: Storage, ranks: Ranks) -> None:
    """Whole, in the old layout, damaged, or begun and killed: nothing of it stays."""
    for spoil in (
        lambda: None,
        lambda: to_old_layout(storage, 4),
        lambda: storage.write(f"{folder_of(4)}/{MANIFEST}", b"{"),
        lambda: kill_save(storage, ranks, 4),
    ):
        save(start(storage, ranks), 4, "before")
        spoil()
        checkpoints = start(storage, ranks)
        save(checkpoints, 4, "now")
        assert words_at(storage, 4) == "now"
        there = {name.split("/")[1] for name in contents(storage)}
        assert there == {checkpoints.generation, MANIFEST}


class Killed(BaseException):
    """Stands for kill -9: nothing of the program runs after it."""


def kill_save(storage: Storage, ranks: Ranks, step: int, part: str = "save:manifest") -> None:
    def kill(now: str) -> None:
        if now == part:
            raise Killed

    with pytest.raises(Killed):
        save(start(storage, ranks, 0, kill), step, "killed")


def test_a_stale_start_can_neither_replace_nor_delete(storage: Storage, ranks: Ranks) -> None:
    """Its driver was taken for dead while it wrote; the new one's ranks saved the same step and more, meanwhile."""
    take_lease(storage, 1)
    done: dict[str, bytes] = {}

    def be_replaced(part: str) -> None:
        if part == "save:manifest":
            take_lease(storage, 2)
            new = start(storage, ranks, 2)
            for step in (4, 8):
                save(new, step, "new")
            done.update(contents(storage))

    with pytest.raises(SaveFailed, match="another one has taken over"):
        save(start(storage, ranks, 1, be_replaced), 4, "stale")
    assert contents(storage) == done and words_at(storage, 4) == words_at(storage, 8) == "new"


def test_a_stale_start_that_is_past_its_look_at_the_lease_finds_the_manifest(
    storage: Storage, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look says that all is well; then the process is stopped for a while."""
    stale = start(storage, ranks, 1)
    new = start(storage, ranks, 2)
    monkeypatch.setattr("trainer.checkpoints.save.check_number", lambda *_: None)
    save(new, 4, "new")
    before = contents(storage)
    with pytest.raises(SaveFailed, match="saved by a later start"):
        save(stale, 4, "stale")
    assert contents(storage) == before


def test_a_stale_start_deletes_no_old_checkpoint_and_cleans_nothing_up(storage: Storage, ranks: Ranks) -> None:
    take_lease(storage, 1)

    def be_replaced(part: str) -> None:
        if part == "save:retention":
            take_lease(storage, 2)

    save(start(storage, ranks, 1), 4)
    save(start(storage, ranks, 1), 8)
    with pytest.raises(SaveFailed, match=r"is saved in .* and the run ends: .*another one has taken over"):
        save(start(storage, ranks, 1, be_replaced), 12)
    assert steps_in(storage) == [4, 8, 12]
    storage.write("checkpoints/.writing-x/rank_00000/shard", b"of the new one")
    with pytest.raises(SaveFailed, match="another one has taken over"):
        start(storage, ranks, 1).clean_up()
    assert storage.exists("checkpoints/.writing-x/rank_00000/shard")


def test_remains_are_removed_only_if_a_save_was_begun_there(
    storage: Storage, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_save(storage, ranks, 2)
    assert any(name.startswith(BEGUN) for name in storage.files(folder_of(2)))
    storage.write(f"{folder_of(3)}/engine/somebodys.pt", b"precious")
    checkpoints = start(storage, ranks)
    save(checkpoints, 4)
    save(checkpoints, 5)
    assert steps_in(storage) == [3, 4, 5] and storage.read(f"{folder_of(3)}/engine/somebodys.pt") == b"precious"
    assert capsys.readouterr().err.count("step_00000003 has no manifest.json and no mark") == 1


def test_a_failed_save_leaves_nothing(storage: Storage, ranks: Ranks) -> None:
    def fail(part: str) -> None:
        if part == "save:manifest":
            raise OSError("disk on fire")

    with pytest.raises(SaveFailed, match=r"disk on fire.*Nothing of it is left"):
        save(start(storage, ranks, 0, fail), 4)
    assert contents(storage) == {}
    assert steps_in(storage) == [] or not storage.local, "fsspec's memory keeps empty folders, which a bucket has not"


@pytest.mark.parametrize("operation", ["cat_file", "ls", "info", "exists"])
def test_an_io_error_deletes_no_checkpoint(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Of any call that asks after a manifest, each of them in turn: a whole checkpoint stays, whatever becomes of the save."""
    storage = Storage(str(tmp_path / "run"))
    checkpoints = start(storage, ranks)
    checkpoints.config = CheckpointConfig(keep_last=5)
    for step in (1000, 2000):
        save(checkpoints, step)
    honest = getattr(type(storage.fs), operation)

    def fail(fs: Any, path: str, *rest: Any, **more: Any) -> Any:
        if "step_00001000" in str(path):
            if operation == "exists":
                return False
            raise OSError(5, "Input/output error")
        return honest(fs, path, *rest, **more)

    monkeypatch.setattr(type(storage.fs), operation, fail)
    try:
        save(checkpoints, 3000)
    except (SaveFailed, OSError) as error:
        assert "Input/output" in str(error)
    monkeypatch.undo()
    assert steps_in(storage) == [1000, 2000, 3000]
    assert words_at(storage, 1000) == "weights"


def test_a_save_outlasts_an_outage(storage: Storage, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is refused a few times before it is answered."""
    monkeypatch.setattr(outage.time, "sleep", lambda seconds: None)
    refused: dict[str, int] = {}
    for name in ("cat_file", "ls", "put_file", "get_file", "rm_file", "rm", "pipe_file"):
        honest = getattr(type(storage.fs), name)

        def away(fs: Any, *arguments: Any, _name: str = name, _honest: Any = honest, **more: Any) -> Any:
            refused[_name] = refused.get(_name, 0) + 1
            if refused[_name] % 3:
                raise ConnectionError("storage is away")
            return _honest(fs, *arguments, **more)

        monkeypatch.setattr(type(storage.fs), name, away)
    checkpoints = start(storage, ranks)
    for step in (1, 2, 3):
        save(checkpoints, step)
    with Resume(storage, ranks, Layout(1, 0)).newest() as found:
        assert found is not None and found.step == 3
    monkeypatch.undo()
    assert steps_in(storage) == [2, 3] and {"cat_file", "ls"} <= refused.keys()


def test_a_checkpoint_with_states_of_random_generators_is_read_without_them(storage: Storage, ranks: Ranks) -> None:
    save(start(storage, ranks), 4)
    saved, state_of_rng = read_manifest(storage, 4), b"what earlier versions kept"
    name = "rng/rank_00000.safetensors"
    files = {**saved.files, name: File(len(state_of_rng), hashlib.sha256(state_of_rng).hexdigest())}
    storage.write(f"{saved.place}/{name}", state_of_rng)
    storage.write(f"{folder_of(4)}/{MANIFEST}", dataclasses.replace(saved, files=files).to_json())
    resume = Resume(storage, ranks, Layout(1, 0))
    with resume.newest() as found:
        assert found is not None and found.step == 4 and not resume.warnings
        assert (found.engine / found.tag / "mp_rank_00_model_states.pt").read_text() == "weights"
    checkpoints = start(storage, ranks)
    for step in (5, 6):
        save(checkpoints, step)
    assert steps_in(storage) == [5, 6] and not any(name in path for path in contents(storage)), "all of it is removed"


# -- what ranks tell each other --------------------------------------------------------------------------------------


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def test_ranks_exchange_json_and_never_objects(ranks: Ranks) -> None:
    values = {"files": {"a": [1, "x"]}, "problem": None}
    assert ranks.gather(values) == [values] and ranks.from_first(lambda: values) == values
    for exchange in (ranks.gather, lambda value: ranks.from_first(lambda: value)):
        with pytest.raises(TypeError, match="not JSON serializable"):
            exchange(Evil())


def test_the_folder_that_a_node_shares_is_for_its_user_alone(storage: Storage, ranks: Ranks) -> None:
    with contextlib.ExitStack() as stack:
        folder = Resume(storage, ranks, Layout(1, 0))._shared_folder(stack)
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


# -- a run of a stranger's -------------------------------------------------------------------------------------------------

HOSTILE = [
    "engine/zero_pp_rank_0_mp/../../../../escaped/by_resume.pt",
    "engine/mp_rank_00/../../../escaped.pt",
    "ema/../../../escaped/authorized_keys",
    "/tmp/escaped/absolute.pt",
    "engine//twice.pt",
    "engine/..\\..\\escaped.pt",
    "engine/nul\0.pt",
    "engine/./here.pt",
    "rng/rank_0.safetensors",
    "other/rank_00000.safetensors",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_no_save_makes_are_refused_and_nothing_is_written_outside(
    ranks: Ranks, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    storage = Storage(f"memory://{tmp_path.name}/run")
    try:
        save(start(storage, ranks), 4)
        good = read_manifest(storage, 4)
        source = tmp_path / "line"
        source.write_text("the attacker's line")
        hostile = dataclasses.replace(good, files={**good.files, name: File.of(source)})
        if name:
            storage.write(f"{good.place}/{name}".replace("//", "/"), source.read_bytes())
        storage.write(f"{folder_of(4)}/{MANIFEST}", hostile.to_json())
        before = sorted(tmp_path.rglob("*"))
        resume = Resume(storage, ranks, Layout(1, 0))
        with resume.newest() as found:
            assert found is None
        assert "which no save makes" in resume.warnings[0]
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("folder", ["..", "../../elsewhere", "/tmp", "g00000001-..", "engine", 5, None])
def test_a_manifest_names_no_folder_but_a_starts(folder: Any) -> None:
    content = Manifest(4, {}, folder or "none").to_json()
    with pytest.raises(Damaged, match="which no save makes"):
        Manifest.from_json(content, "manifest.json")

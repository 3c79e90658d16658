"""The manifest: what is a checkpoint and what is not, and which ones are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoints.manifest import (
    MANIFEST,
    Damaged,
    File,
    Manifest,
    check_content,
    folder_of,
    read_manifest,
    remove_checkpoint,
    steps_in,
    to_delete,
)
from trainer.storage import Storage

pytestmark = pytest.mark.unit
STEP = 1200


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """One checkpoint of two files."""
    storage = Storage(str(tmp_path / "run"))
    folder = tmp_path / "run" / folder_of(STEP)
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "shard.pt").write_bytes(b"0123456789" * 1000)
    (folder / "state.json").write_text("{}")
    files = {name: File.of(folder / name) for name in ("engine/shard.pt", "state.json")}
    storage.write(f"{folder_of(STEP)}/{MANIFEST}", Manifest(STEP, files).to_json())
    return storage


def at(storage: Storage, name: str) -> Path:
    return Path(storage.path(f"{folder_of(STEP)}/{name}"))


def test_a_whole_checkpoint_is_read_back(storage: Storage) -> None:
    manifest = read_manifest(storage, STEP)
    assert manifest.step == STEP and manifest.files["engine/shard.pt"].size == 10_000
    for name, file in manifest.files.items():
        check_content(at(storage, name), file, name)
    assert steps_in(storage) == [STEP]


DAMAGE = {
    "missing shard": (lambda s: at(s, "engine/shard.pt").unlink(), "engine/shard.pt: missing"),
    "truncated": (lambda s: cut(at(s, "engine/shard.pt"), 700), "engine/shard.pt: 700 bytes, expected 10,000"),
    "0 bytes": (lambda s: cut(at(s, "state.json"), 0), "state.json: 0 bytes, expected 2"),
    "grown": (lambda s: at(s, "state.json").write_text("{} "), "state.json: 3 bytes"),
    "no manifest": (lambda s: at(s, MANIFEST).unlink(), "manifest.json: missing, so the save was never finished"),
    "empty manifest": (lambda s: cut(at(s, MANIFEST), 0), "manifest.json: no manifest"),
    "cut manifest": (lambda s: cut(at(s, MANIFEST), 80), "manifest.json: no manifest"),
    "edited size": (lambda s: edit(s, "10000", "10001"), "manifest.json: edited or damaged"),
    "edited step": (lambda s: edit(s, str(STEP), str(STEP + 1)), "manifest.json: edited or damaged"),
    "not an object": (lambda s: at(s, MANIFEST).write_text("[]"), "manifest.json: no manifest"),
}


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit(storage: Storage, old: str, new: str) -> None:
    text = at(storage, MANIFEST).read_text()
    assert old in text
    at(storage, MANIFEST).write_text(text.replace(old, new))


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_told_with_the_name_of_the_file(storage: Storage, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(storage)
    with pytest.raises(Damaged) as raised:
        read_manifest(storage, STEP)
    assert message in str(raised.value) and f"step_{STEP:08d}" in str(raised.value)


def test_changed_content_of_the_same_length_is_found_when_it_is_read(storage: Storage) -> None:
    path = at(storage, "engine/shard.pt")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    manifest = read_manifest(storage, STEP)
    with pytest.raises(Damaged, match="its content has changed"):
        check_content(path, manifest.files["engine/shard.pt"], "engine/shard.pt")
    with pytest.raises(Damaged, match=r"nowhere\.pt: missing"):
        check_content(path.with_name("nowhere.pt"), manifest.files["engine/shard.pt"], "nowhere.pt")


def test_a_manifest_of_another_step_or_format_is_none(storage: Storage) -> None:
    other = json.loads(at(storage, MANIFEST).read_text())
    at(storage, MANIFEST).rename(at(storage, "x"))
    Path(storage.path(folder_of(STEP))).rename(storage.path(folder_of(7)))
    storage.write(f"{folder_of(7)}/{MANIFEST}", json.dumps(other).encode())
    with pytest.raises(Damaged, match="is the manifest of step 1200"):
        read_manifest(storage, 7)


def test_a_half_removed_checkpoint_is_no_checkpoint(storage: Storage, monkeypatch: Any) -> None:
    monkeypatch.setattr(Storage, "remove_folder", lambda self, name: None)  # killed between the two
    remove_checkpoint(storage, STEP)
    assert at(storage, "state.json").exists()
    with pytest.raises(Damaged, match="never finished"):
        read_manifest(storage, STEP)


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "deleted"),
    [
        ([100, 200, 300], 2, 0, [100]),
        ([100, 200, 300], 5, 0, []),
        ([100, 200, 300, 400], 1, 200, [100, 300]),
        ([300, 100, 200], 1, 0, [100, 200]),
        ([], 2, 100, []),
    ],
)
def test_keep_last_and_keep_every(steps: list[int], keep_last: int, keep_every: int, deleted: list[int]) -> None:
    assert to_delete(steps, keep_last, keep_every) == deleted

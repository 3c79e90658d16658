"""What makes a folder a checkpoint: `manifest.json`, written last, with size and sha256 of every file in it.

    checkpoints/step_00001000/
      manifest.json     format, step, files (path -> size, sha256), digest of all that
      ...               whatever it lists

A folder without a manifest, or whose manifest does not hold, is no checkpoint: the run that wrote it was killed, or somebody
damaged it. Nothing here knows what the files are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.storage import Storage

FORMAT = 1
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
STEP = re.compile(r"step_(\d{8,})")
READ_BYTES = 8 << 20


class Damaged(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str
    """Of its content, hexadecimal."""

    @classmethod
    def of(cls, path: Path) -> File:
        """Reads a file of this machine."""
        digest, size = hashlib.sha256(), 0
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
                size += len(block)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The list of a checkpoint's files."""

    step: int
    """Optimizer steps that were done."""
    files: Mapping[str, File]
    """Path inside the checkpoint -> file."""

    def to_json(self) -> bytes:
        """As it is stored, its own digest included."""
        content = {
            "format": FORMAT,
            "step": self.step,
            "files": {path: vars(file) for path, file in sorted(self.files.items())},
        }
        return json.dumps({**content, "digest": _digest(content)}, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Manifest:
        """Raises Damaged unless it is what `to_json` gave, unchanged."""
        try:
            values = json.loads(content)
            digest = values.pop("digest")
            if digest != _digest(values):
                raise Damaged(f"{where}: edited or damaged, its own digest does not hold")
            files = {path: File(int(file["size"]), str(file["sha256"])) for path, file in values["files"].items()}
            step, written = int(values["step"]), int(values["format"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{where}: no manifest ({error or type(error).__name__}; {len(content)} bytes)") from error
        if written != FORMAT:
            raise Damaged(f"{where}: format {written}, this lidit reads {FORMAT}")
        return cls(step, files)


def folder_of(step: int) -> str:
    """Where the checkpoint after that many steps is, relative to the run."""
    return f"{CHECKPOINTS}/step_{step:08d}"


def steps_in(storage: Storage) -> list[int]:
    """Steps that have a folder, whole or not, ascending."""
    matches = map(STEP.fullmatch, storage.folders(CHECKPOINTS))
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(storage: Storage, step: int) -> Manifest:
    """The manifest of a checkpoint all of whose files are there and as long as they should be.

    Contents are not read: whoever reads a file calls `check_content`.

    Raises:
        Damaged: there is no manifest, it does not hold, or a file is missing, cut short or too long.
    """
    folder = folder_of(step)
    where = f"{folder}/{MANIFEST}"
    try:
        manifest = Manifest.from_json(storage.read(where), where)
    except FileNotFoundError:
        raise Damaged(f"{where}: missing, so the save was never finished") from None
    if manifest.step != step:
        raise Damaged(f"{where}: is the manifest of step {manifest.step}")
    sizes = storage.sizes(folder)
    for path, file in manifest.files.items():
        if path not in sizes:
            raise Damaged(f"{folder}/{path}: missing")
        if sizes[path] != file.size:
            raise Damaged(f"{folder}/{path}: {sizes[path]:,} bytes, expected {file.size:,}")
    return manifest


def check_content(path: Path, expected: File, name: str) -> None:
    """Raises Damaged, naming the file, where a local copy is not what the manifest says."""
    try:
        found = File.of(path)
    except FileNotFoundError:
        raise Damaged(f"{name}: missing") from None
    if found != expected:
        difference = "its content has changed" if found.size == expected.size else f"{found.size:,} bytes"
        raise Damaged(f"{name}: {difference}, expected {expected.size:,} bytes with sha256 {expected.sha256[:12]}...")


def to_delete(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Which of the whole checkpoints are no longer wanted: neither among the newest nor one that is kept for good."""
    ordered = sorted(steps)
    newest = set(ordered[-keep_last:])
    return [step for step in ordered if step not in newest and not (keep_every_steps and step % keep_every_steps == 0)]


def remove_checkpoint(storage: Storage, step: int) -> None:
    """Deletes a checkpoint, its manifest first: what a kill leaves behind is no checkpoint."""
    storage.remove(f"{folder_of(step)}/{MANIFEST}")
    storage.remove_folder(folder_of(step))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

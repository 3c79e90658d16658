"""`manifest.json`, written last, makes a folder a checkpoint: size and sha256 of every file in it.

    checkpoints/step_00001000/
      manifest.json     format, step, folder, files (path -> size, sha256), digest of all that
      g00000007-.../    whatever it lists
      begun-...         who has begun a save here that is not finished

Every start of the ranks is a *generation*, and writes its files into a folder of its own (`new_generation`), so that no process
can write over what another one has saved; the manifest names the folder that counts. Generations are ordered by their names:
by the number of the driver's lease, then by time. Checkpoints of earlier versions have their files beside the manifest.

A folder without a manifest, or whose manifest does not hold, is no checkpoint: the run that wrote it was killed, or somebody
damaged it. A manifest may come from a stranger's storage: it is read only if all its names are such as a save makes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.storage import Storage, is_relative

FORMAT = 2  # 1: the files are beside the manifest
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
BEGUN = "begun-"  # and the generation: a save that is not finished, or is being removed
REMOVAL = "removal"
STEP = re.compile(r"step_(\d{8,})")
GENERATION = re.compile(r"g\d{8}-[0-9a-f]{16}", re.ASCII)
SAVED = re.compile(  # the files of a checkpoint; earlier versions saved generators' states in `rng`
    r"engine/[a-z0-9][a-z0-9_.-]*\.pt|(ema|rng)/rank_\d{5,}\.safetensors|state\.json", re.ASCII | re.IGNORECASE
)
OLD_FOLDERS, OLD_FILE = ("engine", "ema", "rng"), "state.json"  # beside the manifest, by earlier versions
READ_BYTES = 8 << 20


class Damaged(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    size: int
    """Size in bytes."""
    sha256: str
    """Hexadecimal sha256 of its content."""

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
    folder: str = ""
    """Generation that saved it, and folder of its files below the step's; empty: beside the manifest."""

    @property
    def place(self) -> str:
        """Folder of the files, relative to the run."""
        return f"{folder_of(self.step)}/{self.folder}" if self.folder else folder_of(self.step)

    def to_json(self) -> bytes:
        """Serializes the manifest, with its own digest."""
        content = {
            "format": FORMAT if self.folder else 1,
            "step": self.step,
            **({"folder": self.folder} if self.folder else {}),
            "files": {path: vars(file) for path, file in sorted(self.files.items())},
        }
        return json.dumps({**content, "digest": _digest(content)}, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Manifest:
        """Parses what `to_json` gave. Raises Damaged if it was changed, or has a name that no save writes."""
        try:
            values = json.loads(content)
            digest = values.pop("digest")
            if digest != _digest(values):
                raise Damaged(f"{where}: edited or damaged, its own digest does not hold")
            files = {path: File(int(file["size"]), str(file["sha256"])) for path, file in values["files"].items()}
            step, written, folder = int(values["step"]), int(values["format"]), values.get("folder", "")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{where}: no manifest ({error or type(error).__name__}; {len(content)} bytes)") from error
        if written not in (1, FORMAT):
            raise Damaged(f"{where}: format {written}, this lidit reads 1 to {FORMAT}")
        if (strange := _strange_names(folder, files)) is not None:
            raise Damaged(f"{where}: names {strange!r}, which no save makes: did somebody else write it?")
        return cls(step, files, folder)


def folder_of(step: int) -> str:
    """Returns the folder of the checkpoint after that many steps, relative to the run."""
    return f"{CHECKPOINTS}/step_{step:08d}"


def steps_in(storage: Storage) -> list[int]:
    """Returns the steps that have a checkpoint's folder, complete or not, ascending."""
    matches = map(STEP.fullmatch, storage.folders(CHECKPOINTS))
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(storage: Storage, step: int) -> Manifest:
    """Reads a checkpoint's manifest, and checks that all its files are there and have their sizes.

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
    sizes = storage.sizes(manifest.place)
    for path, file in manifest.files.items():
        if path not in sizes:
            raise Damaged(f"{manifest.place}/{path}: missing")
        if sizes[path] != file.size:
            raise Damaged(f"{manifest.place}/{path}: {sizes[path]:,} bytes, expected {file.size:,}")
    return manifest


def check_content(path: Path, expected: File, name: str) -> None:
    """Raises Damaged, naming the file, where a local copy is not what the manifest says."""
    try:
        actual = File.of(path)
    except FileNotFoundError:
        raise Damaged(f"{name}: missing") from None
    if actual != expected:
        difference = "its content has changed" if actual.size == expected.size else f"{actual.size:,} bytes"
        raise Damaged(f"{name}: {difference}, expected {expected.size:,} bytes with sha256 {expected.sha256[:12]}...")


def to_delete(steps: Iterable[int], keep_last: int, keep_every_steps: int) -> list[int]:
    """Returns the whole checkpoints that are no longer wanted: neither among the newest nor kept for good."""
    ordered = sorted(steps)
    newest = set(ordered[-keep_last:])
    return [step for step in ordered if step not in newest and not (keep_every_steps and step % keep_every_steps == 0)]


def new_generation(lease: int) -> str:
    """Returns a new name for this start of the ranks; it sorts after the names of all earlier starts."""
    return f"g{lease:08d}-{time.time_ns() // 10**6:012x}{secrets.token_hex(2)}"


def mark_begun(storage: Storage, step: int, generation: str) -> None:
    """Marks a step's folder as a save in progress: a folder with neither mark nor manifest is never removed."""
    storage.write(f"{folder_of(step)}/{BEGUN}{generation}", b"")


def is_unfinished(storage: Storage, step: int) -> bool:
    """Tells whether a save was begun there and left no manifest; storage is asked for the manifest in two ways."""
    if storage.read_if_there(f"{folder_of(step)}/{MANIFEST}") is not None:
        return False
    names = storage.files(folder_of(step))
    return MANIFEST not in names and any(name.startswith(BEGUN) for name in names)


def remove_checkpoint(storage: Storage, step: int) -> None:
    """Deletes a checkpoint, manifest first: if it is killed halfway, what remains is marked and is no checkpoint."""
    folder = folder_of(step)
    if not any(name.startswith(BEGUN) for name in storage.files(folder)):
        with contextlib.suppress(OSError):  # a full disk: room is made here
            mark_begun(storage, step, REMOVAL)
    storage.remove(f"{folder}/{MANIFEST}")
    for below in storage.folders(folder):
        storage.remove_folder(f"{folder}/{below}")
    storage.remove_folder(folder)


def remove_save(storage: Storage, step: int, generation: str) -> None:
    """Deletes the files that one generation has saved at a step, its mark last; other generations' files stay."""
    folder = folder_of(step)
    storage.remove_folder(f"{folder}/{generation}")
    storage.remove(f"{folder}/{BEGUN}{generation}")
    storage.remove_if_empty(folder)


def remove_earlier(storage: Storage, step: int, generation: str) -> None:
    """Deletes the files that earlier generations have saved at a step; never a manifest."""
    folder = folder_of(step)
    for below in storage.folders(folder):
        if below in OLD_FOLDERS or (GENERATION.fullmatch(below) and below < generation):
            storage.remove_folder(f"{folder}/{below}")
    for name in storage.files(folder):
        begun = name.removeprefix(BEGUN) if name.startswith(BEGUN) else None
        if name == OLD_FILE or begun == REMOVAL or (begun is not None and begun < generation):
            storage.remove(f"{folder}/{name}")


def _strange_names(folder: Any, files: Iterable[str]) -> Any:
    """Returns the first name that no save writes, or None."""
    if folder != "" and not (isinstance(folder, str) and GENERATION.fullmatch(folder)):
        return folder
    return next((name for name in files if not (is_relative(name) and SAVED.fullmatch(name))), None)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

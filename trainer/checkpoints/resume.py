"""Resuming: finds the newest valid checkpoint of a run and brings it to each rank, at this or another number of ranks.

A checkpoint whose manifest or files do not hold is skipped with a warning that names the file, and the next older one is
looked at. A rank reads and checks the files that it needs. At another number of ranks the engine's shards are converted once
per node (universal.py); the pieces of the average are read in any cut (engine/shards.py).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoints import universal
from trainer.checkpoints.manifest import MANIFEST, Damaged, Manifest, check_content, folder_of, read_manifest, steps_in
from trainer.checkpoints.save import EMA_FOLDER, ENGINE, STATE, rank_file
from trainer.engine.ranks import Ranks
from trainer.storage import Storage, inside


@dataclass(frozen=True)
class Layout:
    """How a run's state is sharded. Where it is the same, ranks load the shards that they saved."""

    world_size: int
    zero_stage: int

    @property
    def replicated(self) -> bool:
        """Whether every rank holds the whole state, so that any number of ranks loads what rank 0 saved."""
        return self.zero_stage == 0


@dataclass(frozen=True)
class LocalCheckpoint:
    """A checkpoint whose files are on this machine and undamaged."""

    step: int
    state: dict[str, Any]
    """Content of state.json."""
    engine: Path
    """Folder that DeepSpeed loads from."""
    tag: str
    """Its name for a folder in that."""
    universal: bool
    """Whether it was converted for another number of ranks."""
    ema: tuple[Path, ...]
    """Files with this rank's pieces, maybe among others."""


class Resume:
    """Finds what a run can go on from, for one rank of it.

    Args:
        storage: the run's folder.
        ranks: who takes part.
        layout: how the run shards its state now.
    """

    def __init__(self, storage: Storage, ranks: Ranks, layout: Layout):
        self.storage, self.ranks, self.layout = storage, ranks, layout
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def newest(self) -> Iterator[LocalCheckpoint | None]:
        """Yields the newest valid checkpoint, its files on this machine, or None. All ranks call it together."""
        refused: set[int] = set()
        with contextlib.ExitStack() as stack:
            while True:
                candidate = self.ranks.from_first(lambda: self._newest_listed(refused))
                if candidate is None:
                    yield None
                    return
                step, content, state = candidate
                manifest = Manifest.from_json(content.encode(), f"{folder_of(step)}/{MANIFEST}")
                checkpoint, problem = None, None
                try:
                    checkpoint = self._fetch(manifest, state, stack)
                except Damaged as error:
                    problem = str(error)
                problems = sorted({problem for problem in self.ranks.gather(problem) if problem})
                if not problems:
                    assert checkpoint is not None
                    yield checkpoint
                    return
                refused.add(step)
                for problem in problems:
                    self._warn(problem)

    def _newest_listed(self, refused: set[int]) -> tuple[int, str, dict[str, Any]] | None:
        """On rank 0: returns (step, manifest as stored, state) of the newest checkpoint with the right file sizes and state."""
        for step in reversed(steps_in(self.storage)):
            if step in refused:
                continue
            try:
                manifest = read_manifest(self.storage, step)
                return step, manifest.to_json().decode(), read_state(self.storage, manifest)
            except Damaged as error:
                refused.add(step)
                self._warn(str(error))
        return None

    def _fetch(self, manifest: Manifest, state: dict[str, Any], stack: contextlib.ExitStack) -> LocalCheckpoint:
        """Downloads and checks the files that this rank needs; converts them for another number of ranks."""
        saved = Layout(state["world_size"], state["zero_stage"])
        if saved == self.layout or self.layout.replicated:
            source = 0 if self.layout.replicated else self.ranks.rank
            names = [name for name in manifest.files if _belongs(name, source)]
            local = self._local_folder(manifest, stack)
            self._bring(manifest, names, local)
            ema = tuple(local / name for name in names if name.startswith(f"{EMA_FOLDER}/"))
            return LocalCheckpoint(manifest.step, state, local, ENGINE, False, ema)
        leader = self.ranks.local_rank == 0
        shared = self._shared_folder(stack)
        local = Path(self.storage.path(manifest.place)) if self.storage.local else shared
        names = [name for name in manifest.files if name.startswith((f"{ENGINE}/", f"{EMA_FOLDER}/"))]
        damage = failure = None
        if leader:
            try:
                self._bring(manifest, names, local)
                universal.check_names(local / ENGINE)
                universal.convert(local / ENGINE, shared / "universal")
            except Damaged as error:
                damage = str(error)
            except Exception as error:  # sent to the other ranks instead of raised: they wait for this one
                failure = str(error)
        outcomes = self.ranks.gather([damage, failure])
        if failures := [failure for _, failure in outcomes if failure]:
            raise RuntimeError(failures[0])
        if damages := [damage for damage, _ in outcomes if damage]:
            raise Damaged(damages[0])
        ema = tuple(local / name for name in names if name.startswith(f"{EMA_FOLDER}/"))
        return LocalCheckpoint(manifest.step, state, shared, "universal", True, ema)

    def _bring(self, manifest: Manifest, names: list[str], local: Path) -> None:
        for name in names:
            remote, path = f"{manifest.place}/{name}", inside(local, name)
            if not self.storage.local:
                self.storage.download(remote, path)
            check_content(path, manifest.files[name], remote)

    def _local_folder(self, manifest: Manifest, stack: contextlib.ExitStack) -> Path:
        """Returns the folder with this rank's files: the checkpoint's own, or a temporary one for downloads."""
        if self.storage.local:
            return Path(self.storage.path(manifest.place))
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lidit-")))

    def _shared_folder(self, stack: contextlib.ExitStack) -> Path:
        """Makes a temporary folder that the ranks of a node share; other users cannot read it.

        The node's first rank makes it, and deletes it when all ranks have left. Ranks of a node have consecutive numbers."""
        leader = self.ranks.local_rank == 0
        folders = self.ranks.gather(tempfile.mkdtemp(prefix="lidit-universal-") if leader else None)
        folder = folders[self.ranks.rank - self.ranks.local_rank]
        assert folder is not None, f"rank {self.ranks.rank - self.ranks.local_rank} is not the leader of a node"

        def leave() -> None:
            self.ranks.gather(None)
            if leader:
                shutil.rmtree(folder, ignore_errors=True)

        stack.callback(leave)
        return Path(folder)

    def _warn(self, problem: str) -> None:
        message = f"checkpoint skipped: {problem}"
        if self.ranks.first:
            self.warnings.append(message)
            print(f"lidit train: WARNING: {message}", file=sys.stderr, flush=True)


def load_engine(checkpoint: LocalCheckpoint, engine: Any) -> None:
    """Loads a checkpoint's weights and optimizer state into an engine that was built with the checkpoint's `universal`."""
    with universal.restricted_unpickling():
        path, _ = engine.load_checkpoint(str(checkpoint.engine), tag=checkpoint.tag, load_lr_scheduler_states=False)
    assert path is not None, f"DeepSpeed found nothing in {checkpoint.engine}/{checkpoint.tag}"
    if checkpoint.universal:
        universal.separate_step_counts(engine)


def read_state(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Reads a checkpoint's state.json. Raises Damaged if it is not the file that the manifest lists."""
    name = f"{manifest.place}/{STATE}"
    with tempfile.TemporaryDirectory(prefix="lidit-") as folder:
        path = Path(folder) / STATE
        storage.download(name, path)
        if STATE not in manifest.files:
            raise Damaged(f"{folder_of(manifest.step)}/{MANIFEST}: does not list {STATE}")
        check_content(path, manifest.files[STATE], name)
        return json.loads(path.read_text())


# -- parts ------------------------------------------------------------------------------------------------------------


def _belongs(name: str, rank: int) -> bool:
    """Tells whether a rank reads that file when it resumes: its own shards, and the file with the whole module."""
    if name.startswith(f"{ENGINE}/"):
        return f"zero_pp_rank_{rank}_mp" in name or name.startswith(f"{ENGINE}/mp_rank_")
    return name == f"{EMA_FOLDER}/{rank_file(rank)}"

"""Checkpoints: everything that a run needs to go on as if it had never stopped, at this or another number of ranks.

    checkpoints/step_00001000/
      engine/             DeepSpeed's shards: weights, fp32 masters, moments
      ema/                rank_00000.safetensors ...: the pieces of the average that each rank owns
      rng/                rank_00000.safetensors ...: states of the random number generators of each process
      state.json          step, images seen, plan, config, model, what the features were made with
      manifest.json       size and sha256 of all these, written last

**Saving.** Every rank writes into a folder of its own, then moves (or uploads) its files to their place and tells rank 0 their
digests; when all have, rank 0 writes the manifest. Whatever is killed before that leaves no checkpoint, and no trace in an
older one. A rank that cannot write says so, and all of them stop together.

How a run goes on from one: resume.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lidit.durable import make_folders, publish
from trainer import universal
from trainer.config import CheckpointConfig
from trainer.ema import EMA
from trainer.manifest import (
    CHECKPOINTS,
    MANIFEST,
    File,
    Manifest,
    folder_of,
    remove_checkpoint,
    steps_in,
    to_delete,
)
from trainer.ranks import Ranks
from trainer.rng import save_rng
from trainer.storage import Storage

ENGINE, EMA_FOLDER, RNG_FOLDER, STATE = "engine", "ema", "rng", "state.json"
WRITING = f"{CHECKPOINTS}/.writing-"  # of a local storage: what ranks have begun; moved from there

Observe = Callable[[str], None]
"""Called with the name of what begins now; for profilers, and for tests that kill a process there."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, on some rank; raised on all of them."""


class Checkpoints:
    """The checkpoints of one run, for one rank of it.

    Args:
        storage: the run's folder.
        ranks: who takes part.
        config: how many are kept.
        observe: called at the parts of a save.
    """

    def __init__(self, storage: Storage, ranks: Ranks, config: CheckpointConfig, observe: Observe = lambda part: None):
        self.storage, self.ranks, self.config, self.observe = storage, ranks, config, observe
        self._saved: int | None = None

    def save(self, step: int, engine: Any, ema: EMA | None, state: dict[str, Any]) -> None:
        """Saves the run after `step` optimizer steps. All ranks call it; what it has just saved it does not save again.

        Raises:
            SaveFailed: some rank could not write. Nothing is left of the attempt, older checkpoints are untouched.
        """
        if step == self._saved:
            return
        work = self._work_folder(self.ranks.from_first(lambda: os.urandom(4).hex()))
        begun = self._try(work, lambda: self._begin(work, step))
        outcomes = self.ranks.gather(begun)
        if not any(problem for _, problem in outcomes):
            written = self._try(work, lambda: self._write(work, step, engine, ema, state))
            outcomes = self.ranks.gather(written)
        shutil.rmtree(work, ignore_errors=True)
        with contextlib.suppress(OSError):  # another rank's is still there
            work.parent.rmdir()
        self.ranks.from_first(lambda: self._finish(step, outcomes))
        self._saved = step

    def _try(self, work: Path, act: Callable[[], dict[str, File]]) -> tuple[dict[str, File], str | None]:
        """(files, None), or ({}, what went wrong): told to the others instead of raised, since they wait."""
        try:
            return act(), None
        except (OSError, RuntimeError, SafetensorError) as error:
            return {}, f"rank {self.ranks.rank}: {error}{_free_space(work, error)}"

    def _begin(self, work: Path, step: int) -> dict[str, File]:
        """Makes room: what is there of that step was left by a killed run, or found damaged."""
        if self.ranks.first:
            remove_checkpoint(self.storage, step)
        (work / ENGINE).mkdir(parents=True)
        return {}

    def _write(self, work: Path, step: int, engine: Any, ema: EMA | None, state: dict[str, Any]) -> dict[str, File]:
        """Everything of this rank, into its own folder, then to its place. What DeepSpeed cannot write is raised after its
        collectives."""
        self.observe("save:shards")
        with _written_by(engine, self.observe) as failures:
            client_state = universal.client_state(step)
            engine.save_checkpoint(str(work), tag=ENGINE, save_latest=False, client_state=client_state)
        if failures:
            raise OSError(failures[0])
        if ema is not None and (self.ranks.first or engine.zero_optimization_stage() > 0):
            ema.save(work / EMA_FOLDER / rank_file(self.ranks.rank))
        save_rng(work / RNG_FOLDER / rank_file(self.ranks.rank))
        if self.ranks.first:
            (work / STATE).write_text(json.dumps(state, indent=1))
        self.observe("save:publish")
        return self._publish(work, folder_of(step))

    def _publish(self, work: Path, folder: str) -> dict[str, File]:
        """Puts this rank's files where they belong; returns them."""
        files = {}
        for path in sorted(path for path in work.rglob("*") if path.is_file()):
            name = path.relative_to(work).as_posix()
            self.observe("save:publish-file")
            files[name] = File.of(path)
            self._move(path, f"{folder}/{name}")
        return files

    def _move(self, source: Path, name: str) -> None:
        if not self.storage.local:
            self.storage.upload(source, name)
            source.unlink()
            return
        target = Path(self.storage.path(name))
        make_folders(target.parent)
        publish(source, target)

    def _finish(self, step: int, outcomes: list[tuple[dict[str, File], str | None]]) -> None:
        """Rank 0: writes the manifest if everybody has written everything, then deletes what is no longer wanted."""
        problems = [problem for _, problem in outcomes if problem]
        if not problems:
            files = {name: file for mine, _ in outcomes for name, file in mine.items()}
            try:
                self.observe("save:manifest")
                self.storage.write(f"{folder_of(step)}/{MANIFEST}", Manifest(step, files).to_json())
            except OSError as error:
                problems.append(f"{error}{_free_space(Path(self.storage.root), error)}")
        if problems:
            remove_checkpoint(self.storage, step)
            raise SaveFailed(
                f"checkpoint of step {step} could not be saved in {self.storage.uri}: {'; '.join(problems)}. Nothing of it is "
                f"left and older checkpoints are whole: mend the cause and run the same command again"
            )
        self.observe("save:retention")
        self._retain(step)

    def _retain(self, step: int) -> None:
        """Deletes checkpoints that are no longer wanted, and remains of saves that were killed.

        Later steps are left alone: they were found damaged, and are replaced when the run gets there.
        """
        whole = []
        for other in steps_in(self.storage):
            if other > step:
                continue
            if self.storage.exists(f"{folder_of(other)}/{MANIFEST}"):
                whole.append(other)
            else:
                remove_checkpoint(self.storage, other)
        for other in to_delete(whole, self.config.keep_last, self.config.keep_every_steps):
            remove_checkpoint(self.storage, other)

    def clean_up(self) -> None:
        """Rank 0, before a run begins: deletes what killed saves left beside the checkpoints."""
        for folder in self.storage.folders(CHECKPOINTS):
            if f"{CHECKPOINTS}/{folder}".startswith(WRITING):
                self.storage.remove_folder(f"{CHECKPOINTS}/{folder}")

    def _work_folder(self, token: str) -> Path:
        """A folder of this rank; of a local storage on the same disk, so that files are moved, not copied."""
        name = f"{token}/rank_{self.ranks.rank:05d}"
        beginning = self.storage.path(WRITING) if self.storage.local else f"{tempfile.gettempdir()}/lidit-"
        return Path(f"{beginning}{name}")


# -- parts ----------------------------------------------------------------------------------------------------------


def rank_file(rank: int) -> str:
    """Name of a rank's file in the folders that have one for each."""
    return f"rank_{rank:05d}.safetensors"


@contextlib.contextmanager
def _written_by(engine: Any, observe: Observe) -> Iterator[list[str]]:
    """Inside, DeepSpeed's writer records a failure where it would raise: the other ranks wait in its next barrier."""
    writer, failures = engine.checkpoint_engine, list[str]()
    original = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            original(state_dict, path)
        except (OSError, RuntimeError) as error:
            failures.append(f"{Path(path).name}: {str(error).splitlines()[0]}")
        observe("save:shard")

    writer.save = save
    try:
        yield failures
    finally:
        del writer.save


def _free_space(folder: Path, error: Exception) -> str:
    """Says so where a disk is full: torch's own message does not."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return f" (no space left: {free:,} bytes free)" if free < 1 << 20 and "No space" not in str(error) else ""

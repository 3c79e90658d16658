"""Checkpoints: everything that a run needs to go on as if it had never stopped, at this or another number of ranks.

    checkpoints/step_00001000/
      g00000007-.../        a folder for each start of the ranks that saved here: mostly one
        engine/             DeepSpeed's shards: weights, fp32 masters, moments
        ema/                rank_00000.safetensors ...: the pieces of the average that each rank owns
        state.json          step, images seen, plan, config, model, what the features were made with
      manifest.json         size and sha256 of all these, and their folder; written last

**Saving.** Every rank writes into a folder of its own, then moves (or uploads) its files to their place and tells rank 0 their
digests; when all have, rank 0 writes the manifest. Whatever is killed before that leaves no checkpoint, and no trace in an
older one. A rank that cannot write says so, and all of them stop together.

**One driver at a time.** A driver that was silent for long may have been replaced by another one, whose lease has a higher
number, and its ranks may wake up later. They cannot write over what the new one's ranks have saved: files go into folders of
their own, and a manifest is created only where there is none. Before rank 0 writes a manifest or deletes anything it looks for
a higher lease (`lidit.runtime.lease.check_number`); if there is one, the save fails and the run ends. The holder of the lease
itself replaces a checkpoint that an earlier start has left at the step that it saves: it did not go on from there, so that one
is damaged, or was finished after this run had begun; metrics and everything later come from what is saved now. Between the
look and the deletion of one file a moment remains, which object stores offer no way to close.

How a run goes on from one: resume.py.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lidit.runtime.durable import make_folders, publish
from lidit.runtime.lease import LeaseLost, check_number
from lidit.runtime.outage import outlast
from trainer.checkpoints import universal
from trainer.checkpoints.manifest import (
    BEGUN,
    CHECKPOINTS,
    MANIFEST,
    Damaged,
    File,
    Manifest,
    folder_of,
    is_unfinished,
    mark_begun,
    new_generation,
    read_manifest,
    remove_checkpoint,
    remove_earlier,
    remove_save,
    steps_in,
    to_delete,
)
from trainer.config import CheckpointConfig
from trainer.engine.ema import EMA
from trainer.engine.ranks import Ranks, told_to_ranks
from trainer.storage import Storage

COMMITS = 3  # tries to create a manifest where others write, too
DRIVER = "driver"  # the driver's lease, in the run's folder
ENGINE, EMA_FOLDER, STATE = "engine", "ema", "state.json"
WRITING = f"{CHECKPOINTS}/.writing-"  # work folders of ranks on a local storage; files are moved from there

Observe = Callable[[str], None]
"""Called with the name of what begins now; for profilers, and for tests that kill a process there."""


@told_to_ranks
class SaveFailed(RuntimeError):
    """A checkpoint could not be written, on some rank; raised on all of them."""


class Checkpoints:
    """The checkpoints of one run, for one rank of it.

    Args:
        storage: the run's folder.
        ranks: who takes part.
        config: how many are kept.
        observe: called at the parts of a save.
        lease: number of the driver's lease; 0: it has none, and nobody else is looked for.
    """

    def __init__(
        self,
        storage: Storage,
        ranks: Ranks,
        config: CheckpointConfig,
        observe: Observe = lambda part: None,
        lease: int = 0,
    ):
        self.storage, self.ranks, self.config, self.observe, self.lease = storage, ranks, config, observe, lease
        self.generation = ranks.from_first(lambda: new_generation(lease))
        self._saved: int | None = None
        self._left_alone: set[int] = set()

    def save(self, step: int, engine: Any, ema: EMA | None, state: dict[str, Any]) -> None:
        """Saves the run after `step` optimizer steps. All ranks call it; what it has just saved it does not save again.

        Raises:
            SaveFailed: some rank could not write. Nothing is left of the attempt, older checkpoints are untouched.
        """
        if step == self._saved:
            return
        with self._work_folder() as work:
            outcomes = self.ranks.gather(self._try(work, lambda: self._begin(work, step)))
            if not any(problem for _, problem in outcomes):
                written = self._try(work, lambda: self._write(work, step, engine, ema, state))
                outcomes = self.ranks.gather(written)
        self.ranks.from_first(lambda: self._finish(step, outcomes))
        self._saved = step

    def _try(self, work: Path, act: Callable[[], dict[str, File]]) -> tuple[dict[str, Any], str | None]:
        """Returns (files, None) or ({}, the error's text): errors are gathered, not raised, since the other ranks wait."""
        try:
            return {name: vars(file) for name, file in act().items()}, None
        except Exception as error:
            return {}, f"rank {self.ranks.rank}: {error}{_free_space(work, error)}"

    def _begin(self, work: Path, step: int) -> dict[str, File]:
        """Makes the work folder; rank 0 also removes what an earlier save of the step left, unless it is a valid checkpoint."""
        (work / ENGINE).mkdir(parents=True)
        if self.ranks.first:
            self._check_lease()
            try:
                read_manifest(self.storage, step)
            except Damaged:
                ours = is_unfinished(self.storage, step) or self._make_way(step)
                if ours:
                    remove_earlier(self.storage, step, self.generation)
            mark_begun(self.storage, step, self.generation)
        return {}

    def _write(self, work: Path, step: int, engine: Any, ema: EMA | None, state: dict[str, Any]) -> dict[str, File]:
        """Writes this rank's files into the work folder, then publishes them.

        What DeepSpeed cannot write is raised after its collectives."""
        self.observe("save:shards")
        with _written_by(engine, self.observe) as failures:
            client_state = universal.client_state(step)
            engine.save_checkpoint(str(work), tag=ENGINE, save_latest=False, client_state=client_state)
        if failures:
            raise OSError(failures[0])
        if ema is not None and (self.ranks.first or engine.zero_optimization_stage() > 0):
            ema.save(work / EMA_FOLDER / rank_file(self.ranks.rank))
        if self.ranks.first:
            (work / STATE).write_text(json.dumps(state, indent=1))
        self.observe("save:publish")
        return self._publish(work, Manifest(step, {}, self.generation).place)

    def _publish(self, work: Path, folder: str) -> dict[str, File]:
        """Moves or uploads this rank's files to the checkpoint's folder; returns their sizes and digests."""
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

    def _finish(self, step: int, outcomes: list[Any]) -> None:
        """Rank 0: writes the manifest if everybody has written everything, then deletes what is no longer wanted."""
        problems = [problem for _, problem in outcomes if problem]
        if not problems:
            files = {name: File(**file) for files_of_rank, _ in outcomes for name, file in files_of_rank.items()}
            try:
                self.observe("save:manifest")
                self._commit(Manifest(step, files, self.generation))
            except Exception as error:
                problems.append(f"{error}{_free_space(Path(self.storage.root), error)}")
        if problems:
            rest = self._withdraw(step)
            raise SaveFailed(
                f"checkpoint of step {step} could not be saved in {self.storage.uri}: {'; '.join(problems)}. {rest} and older "
                f"checkpoints are whole: mend the cause and run the same command again"
            )
        self.observe("save:retention")
        try:
            remove_earlier(self.storage, step, self.generation)
            self.storage.remove(f"{folder_of(step)}/{BEGUN}{self.generation}")
            self._retain(step)
        except LeaseLost as error:
            raise SaveFailed(
                f"checkpoint of step {step} is saved in {self.storage.uri}, and the run ends: {error}"
            ) from error

    def _commit(self, manifest: Manifest) -> None:
        """Creates the manifest; an earlier generation's is deleted first.

        Raises:
            LeaseLost: another driver may train the run now, or its ranks have saved this step.
        """
        for _ in range(COMMITS):
            self._check_lease()
            try:
                self.storage.create(f"{folder_of(manifest.step)}/{MANIFEST}", manifest.to_json())
                return
            except FileExistsError:
                self._make_way(manifest.step)
        raise OSError(f"{folder_of(manifest.step)}/{MANIFEST}: something else writes it again and again")

    def _make_way(self, step: int) -> bool:
        """Deletes an earlier generation's manifest, or a damaged one; returns whether there was one.

        Raises:
            LeaseLost: it is a later generation's.
        """
        name = f"{folder_of(step)}/{MANIFEST}"
        content = self.storage.read_if_there(name)
        if content is None:
            return False
        try:
            saved_by = Manifest.from_json(content, name).folder
        except Damaged:
            saved_by = ""
        if saved_by > self.generation:
            raise LeaseLost(f"step {step} was saved by a later start of this run ({saved_by}), which goes on alone")
        self._check_lease()
        if self.storage.read_if_there(name) == content:
            self.storage.remove(name)
        return True

    def _withdraw(self, step: int) -> str:
        """Deletes the files that this generation has saved at a step; returns words about what is left."""
        try:
            remove_save(self.storage, step, self.generation)
        except Exception as error:
            return f"What was written of it could not be removed ({error}), which does no harm,"
        return "Nothing of it is left"

    def _retain(self, step: int) -> None:
        """Deletes checkpoints that are no longer wanted, and remains of saves that were killed.

        Later steps are left alone: they were found damaged, and are replaced when the run gets there. So is a folder in which
        no process of a run has begun a save, as far as one can see.
        """
        whole = []
        for other in steps_in(self.storage):
            if other > step:
                continue
            if self.storage.read_if_there(f"{folder_of(other)}/{MANIFEST}") is not None:
                whole.append(other)
            elif is_unfinished(self.storage, other):
                self._remove(other)
            elif other not in self._left_alone:
                self._left_alone.add(other)
                where = f"{self.storage.uri}/{folder_of(other)}"
                print(
                    f"lidit train: WARNING: {where} has no {MANIFEST} and no mark of a save that was begun: left alone; "
                    f"delete it if nothing else needs it",
                    file=sys.stderr,
                    flush=True,
                )
        for other in to_delete(whole, self.config.keep_last, self.config.keep_every_steps):
            self._remove(other)

    def _remove(self, step: int) -> None:
        self._check_lease()
        remove_checkpoint(self.storage, step)

    def _check_lease(self) -> None:
        """Raises LeaseLost where another driver may train the run now."""
        if self.lease:
            outlast(lambda: check_number(self.storage.uri, DRIVER, self.lease), "looking for a later lease")

    def clean_up(self) -> None:
        """Deletes the work folders of killed saves; on rank 0, before a run begins.

        Raises:
            SaveFailed: another driver may train the run now.
        """
        for folder in self.storage.folders(CHECKPOINTS):
            if f"{CHECKPOINTS}/{folder}".startswith(WRITING):
                try:
                    self._check_lease()
                except LeaseLost as error:
                    raise SaveFailed(f"{self.storage.uri}: {error}") from error
                self.storage.remove_folder(f"{CHECKPOINTS}/{folder}")

    @contextlib.contextmanager
    def _work_folder(self) -> Iterator[Path]:
        """Yields this rank's work folder; on a local storage it is on the same disk, so that files are moved, not copied."""
        if not self.storage.local:
            with tempfile.TemporaryDirectory(prefix="lidit-") as temporary:
                yield Path(temporary)
            return
        of_all = Path(self.storage.path(f"{WRITING}{self.generation}"))
        work = of_all / f"rank_{self.ranks.rank:05d}"
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):  # another rank's is still there
                of_all.rmdir()


# -- parts ----------------------------------------------------------------------------------------------------------


def rank_file(rank: int) -> str:
    """Returns the name of a rank's file, in folders with one file per rank."""
    return f"rank_{rank:05d}.safetensors"


@contextlib.contextmanager
def _written_by(engine: Any, observe: Observe) -> Iterator[list[str]]:
    """Makes DeepSpeed's writer collect its failures instead of raising: the other ranks wait in its next barrier."""
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
    """Returns words about a full disk, which torch's own message leaves out."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    return f" (no space left: {free:,} bytes free)" if free < 1 << 20 and "No space" not in str(error) else ""

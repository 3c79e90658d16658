"""A run's folder in the store, `<store>/runs/<run id>/`: its config, its summary, and a sign that it is alive.

The sign tells the next run which unfinished files it may delete: those of runs that are dead, never those of a run that
works beside it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from datetime import UTC, datetime

import fsspec

from lidit import columns
from lidit.alive import DEAD_AFTER_SECONDS, HEARTBEAT_SECONDS, shows_life, sign_of_life


class Run:
    """One run of a job on a store. Use as a context: alive inside, over after.

    Args:
        store: folder or URI of the store.
        job: name of the job, the first part of the run's id.
    """

    def __init__(self, store: str, job: str):
        self.store = store
        self.id = f"{job}-{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
        self._fs, self._root = fsspec.core.url_to_fs(f"{store.rstrip('/')}/{columns.RUNS_FOLDER}")
        self._over = threading.Event()
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._keep_alive, name="alive", daemon=True)

    def __enter__(self) -> Run:
        self._fs.makedirs(f"{self._root}/{self.id}", exist_ok=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()  # a last beat would leave the sign behind, of a process that goes on to other stages
        alive = f"{self._root}/{self.id}/alive"
        try:
            if self._fs.exists(alive):
                self._fs.rm_file(alive)
        except OSError:
            if exc[0] is None:  # else what ended the run is what its reader must be told
                raise

    def write(self, name: str, text: str) -> str:
        """Puts a file into the run's folder; returns where."""
        path = f"{self._root}/{self.id}/{name}"
        self._fs.pipe_file(path, text.encode())
        return self._fs.unstrip_protocol(path).removeprefix("file://")

    def check_alive(self) -> None:
        """Raises RuntimeError where this run was silent for so long that others may take it for dead."""
        silent = time.monotonic() - self._last_beat
        if silent > DEAD_AFTER_SECONDS / 2:
            raise RuntimeError(
                f"this run could not show that it is alive for {silent:.0f} s (suspended, or the store is unreachable), so "
                f"another may have removed its unfinished files; run the same command again: what is committed is kept"
            )

    def alive(self) -> list[str]:
        """Ids of the other runs that are alive in the store."""
        self._fs.invalidate_cache()  # s3fs remembers listings
        ids = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        return [run_id for run_id in sorted(ids) if not self.is_dead(run_id)]

    def is_dead(self, run_id: str) -> bool:
        """Whether the run of that id is over, was killed, or is this very one (whose work is done when it asks)."""
        if run_id == self.id:
            return True
        path = f"{self._root}/{run_id}/alive"
        try:
            sign = json.loads(self._fs.cat_file(path))
        except FileNotFoundError:
            return True
        return not shows_life(sign)

    def _keep_alive(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                self._beat()
            except OSError:
                continue  # the store is away for a moment; for how long at most, `check_alive` knows

    def _beat(self) -> None:
        alive = f"{self._root}/{self.id}/alive"
        self._fs.pipe_file(f"{alive}.new", json.dumps(sign_of_life()).encode())
        self._fs.mv(f"{alive}.new", alive)  # in one step: who reads must never meet half a sign
        self._last_beat = time.monotonic()

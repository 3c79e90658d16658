"""What simulated hosts stand on instead of the real thing: clocks, threads, process ids, an object store and the way to it.

An object store as fsspec shows it is all that runs and leases see; Lance works on the same folder, each of its requests as one
step. What is scripted here has no logic of its own about who may do what.
"""

from __future__ import annotations

import os
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import lance
import lance.file
import pyarrow as pa
import pytest

import lidit.runtime.files
import lidit.runtime.heartbeat
import lidit.runtime.lease
import lidit.runtime.outage
import pipelines.engine.column_file
import pipelines.engine.runs
import pipelines.engine.table
from tests.support.consistency_world import Process, Task, World

HEARTBEAT = 300.0  # a third of what it takes to be taken for dead, and not less, for speed
MODULES = (
    lidit.runtime.heartbeat,
    lidit.runtime.files,
    lidit.runtime.lease,
    lidit.runtime.outage,
    pipelines.engine.runs,
    pipelines.engine.column_file,
    pipelines.engine.table,
)
SCRIPTED = ("time", "threading", "random", "secrets", "uuid", "datetime", "ThreadPoolExecutor")


@contextmanager
def ground(world: World) -> Iterator[None]:
    """Inside, the modules stand on the world's clocks, threads and storage; its folder is gone afterwards."""
    _make_table(world.folder)
    Storage.world = world
    fsspec.register_implementation("sim", Storage, clobber=True)
    scripted = _scripted(world)
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            for name in SCRIPTED:
                if hasattr(module, name):
                    patch.setattr(module, name, scripted[name])
        patch.setattr(lidit.runtime.heartbeat, "HEARTBEAT_SECONDS", HEARTBEAT)
        patch.setattr(lidit.runtime.heartbeat, "os", types.SimpleNamespace(getpid=lambda: world.process.pid))
        patch.setattr(lidit.runtime.heartbeat, "host_id", lambda: world.process.host.name)
        patch.setattr(lidit.runtime.heartbeat, "_process_start", lambda pid: _started(world, pid))
        _script_lance(world, patch)
        try:
            yield
        finally:
            shutil.rmtree(world.folder, ignore_errors=True)


def _started(world: World, pid: int) -> str | None:
    """What the kernel of the asking process's host says of a process id."""
    process: Process | None = world.processes.get(pid)
    there = process is not None and process.host is world.process.host and not process.dead
    return str(pid) if there else None


def _script_lance(world: World, patch: pytest.MonkeyPatch) -> None:
    commit, open_, whole = lance.LanceDataset.commit, lance.dataset, lance.LanceDataset

    def scripted_commit(uri: str, wanted: Any, read_version: int) -> Any:
        who = world.task.process.name if world.task else "late"

        def act() -> Any:
            made = commit(_local(uri), wanted, read_version=read_version)
            world.committed_version(made, f"{who} ({type(wanted).__name__})")
            return made

        def sent() -> Callable[[], Any]:  # Lance's last step: the manifest of the next version, if absent
            newest = open_(_local(uri)).version

            def arrive() -> Any:
                if open_(_local(uri)).version != newest:
                    raise OSError("PreconditionFailed")
                return act()

            return arrive

        return world.request("commit", act, _lance_away, writes=True, sent=sent)

    def asked_for(method: Callable[..., Any], what: str, writes: bool = False) -> Callable[..., Any]:
        def scripted(dataset: Any, *args: Any) -> Any:
            return world.request(what, lambda: method(dataset, *args), _lance_away, writes)

        return scripted

    patch.setattr(whole, "commit", staticmethod(scripted_commit))
    patch.setattr(
        lance,
        "dataset",
        lambda uri, version=None: world.request("open", lambda: open_(_local(uri), version), _lance_away),
    )
    for name in ("all_files", "tracked_files", "add_columns"):
        patch.setattr(whole, name, asked_for(getattr(whole, name), name, writes=name == "add_columns"))
    patch.setattr(pipelines.engine.column_file, "LanceFileWriter", lambda *args, **kw: _Writer(world, *args, **kw))


class _Writer:
    """Lance's writer of files, as an object store has it: a file is there once it is whole."""

    def __init__(self, world: World, uri: str, schema: pa.Schema, version: str):
        self._world, self._final = world, _local(uri)
        self._begun = f"{world.folder}/{os.path.basename(self._final)}.begun"
        self._writer = lance.file.LanceFileWriter(self._begun, schema, version=version)
        self.write_batch, self.add_schema_metadata = self._writer.write_batch, self._writer.add_schema_metadata

    def close(self) -> None:
        self._writer.close()
        self._world.request("data file", lambda: shutil.copy(self._begun, self._final), _lance_away, writes=True)


class Storage(fsspec.AbstractFileSystem):
    """An object store as fsspec shows it: whole files, times to the second by its own clock, and requests that may fail."""

    protocol = "sim"
    cachable = False
    world: World

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._ask("makedirs", path, lambda: None)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return self._ask("info", path, lambda: _info(self._strip_protocol(path)))

    def isdir(self, path: str) -> bool:
        return self._ask("isdir", path, lambda: os.path.isdir(self._strip_protocol(path)))

    def exists(self, path: str, **kwargs: Any) -> bool:
        return self._ask("exists", path, lambda: os.path.exists(self._strip_protocol(path)))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        names = self._ask("ls", path, lambda: sorted(os.listdir(path)))
        return [_info(f"{path}/{name}") for name in names] if detail else [f"{path}/{name}" for name in names]

    def find(self, path: str, **kwargs: Any) -> list[str]:
        path = self._strip_protocol(path)
        return self._ask(
            "find", path, lambda: sorted(f"{root}/{name}" for root, _, names in os.walk(path) for name in names)
        )

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        def get() -> bytes:
            if not os.path.isfile(self._strip_protocol(path)):
                raise FileNotFoundError(path)
            return Path(self._strip_protocol(path)).read_bytes()

        return self._ask("cat", path, get)

    def modified(self, path: str) -> datetime:
        def look() -> datetime:
            _info(path)
            return datetime.fromtimestamp(int(self.world.written[path]), UTC)

        path = self._strip_protocol(path)
        return self._ask("modified", path, look)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        path = self._strip_protocol(path)

        def put() -> None:
            if mode == "create" and os.path.exists(path):
                raise OSError(f"PreconditionFailed: {path}")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_bytes(value)
            self.world.written[path] = self.world.now
            if mode == "create" and os.path.basename(path).startswith("lease-"):
                self.world.lease_made(path)

        self._ask("create" if mode == "create" else "put", path, put, writes=True)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)

        def move() -> None:
            os.replace(source, target)
            self.world.written[target] = self.world.now

        self._ask("mv", target, move, writes=True)

    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)

        def remove() -> None:
            self.world.removing(path)
            os.remove(path)

        self._ask("rm", path, remove, writes=True)

    def _ask(self, what: str, path: str, act: Callable[[], Any], writes: bool = False) -> Any:
        name = "/".join(self._strip_protocol(path).split("/")[-2:])
        return self.world.request(f"{what} {name}", act, lambda: ConnectionResetError(f"{what} {name}: reset"), writes)


# -- parts ------------------------------------------------------------------------------------------------------------


def _make_table(folder: Path) -> None:
    """An empty table, copied from one that is made once."""
    template = folder.parent / "template"
    if not template.exists():
        lance.write_dataset(
            pa.schema([pa.field("id", pa.string())]).empty_table(), str(template), data_storage_version="2.0"
        )
        (template / "data").mkdir(exist_ok=True)
    shutil.copytree(template, folder / "store/samples.lance")


def _local(uri: str) -> str:
    return uri.removeprefix("sim://")


def _lance_away() -> Exception:
    return OSError(
        "LanceError(IO): Generic S3 error: error sending request: connection closed before message completed"
    )


def _info(path: str) -> dict[str, Any]:
    kind = "directory" if os.path.isdir(path) else "file"
    return {"name": path, "size": os.stat(path).st_size, "type": kind}


def _scripted(world: World) -> dict[str, Any]:
    """What the modules get in the place of clocks, threads and chance."""
    hexes = lambda count=32: f"{world.rng.getrandbits(8 * count):0{2 * count}x}"  # noqa: E731

    class Event:
        def __init__(self) -> None:
            self.happened, self.waiting = False, []  # type: ignore[var-annotated]

        def set(self) -> None:
            self.happened = True
            for task in self.waiting:
                world.wake(task, 0.0)

        def is_set(self) -> bool:
            return self.happened

        def wait(self, timeout: float) -> bool:
            if not self.happened:
                self.waiting.append(world.task)
                world.task.wait(timeout)
                self.waiting.remove(world.task)
            return self.happened

    class Thread:
        def __init__(self, target: Callable[[], None], name: str = "", daemon: bool = True):
            self.target, self.task = target, None

        def start(self) -> None:
            self.task = Task(world, world.process, self.target, beats=True)
            self.task.start()

        def join(self) -> None:
            while not self.task.done:
                world.task.wait(0.5)

        def is_alive(self) -> bool:
            return self.task is not None and not self.task.done

    class Pool:
        def __init__(self, workers: int):
            self.map = map

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

    return {
        "time": types.SimpleNamespace(
            time=lambda: world.now + world.process.host.skew,
            monotonic=lambda: world.now - world.process.stood_still,
            sleep=lambda seconds: world.task.wait(seconds),
        ),
        "threading": types.SimpleNamespace(Event=Event, Thread=Thread),
        "random": world.rng,
        "secrets": types.SimpleNamespace(token_hex=hexes),
        "uuid": types.SimpleNamespace(uuid4=lambda: types.SimpleNamespace(hex=hexes(16))),
        "datetime": types.SimpleNamespace(
            now=lambda zone: datetime.fromtimestamp(world.now + world.process.host.skew, zone)
        ),
        "ThreadPoolExecutor": Pool,
    }

"""A run's marks in the store: who is alive, who may commit, and whose unfinished files may go."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from ray import cloudpickle

from lidit.runtime import heartbeat as alive
from lidit.runtime.heartbeat import DEAD_AFTER_SECONDS
from pipelines.engine import runs
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import _UnitCaller
from pipelines.engine.runs import Fenced, Run
from pipelines.engine.table import Table

pytestmark = pytest.mark.unit

KILLED = """
import os, sys
from pipelines.engine.runs import Run
run = Run(sys.argv[1], "embed").__enter__()
print(run.id, flush=True)
os._exit(9)
"""
ROWS = pa.schema([pa.field("id", pa.string())])


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def table(store):
    made = Table(f"{store}/samples.lance")
    made.create(ROWS)
    return made


def put_heartbeat(store, run_id, silent=0.0, clock=0.0):
    """Writes the heartbeat of a run on another host as it might have been left, `silent` seconds ago by the storage's clock.

    `clock`: what the writer's own clock is ahead.
    """
    folder = os.path.join(store, "runs", run_id)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "alive")
    now = time.time()
    with open(path, "w") as file:
        json.dump({"host": "elsewhere 123", "pid": 1, "started": "1", "beat": now - silent + clock}, file)
    os.utime(path, (now - silent, now - silent))
    return run_id


def write_rows(table, run, *ids):
    writer = ColumnFileWriter(table.uri, ROWS, run.id)
    writer.write(pa.record_batch([list(ids)], schema=ROWS))
    return writer.finish(table.open())


def ids_of(table):
    return sorted(table.open().to_table().column("id").to_pylist())


def names(store, run_id):
    return sorted(os.listdir(os.path.join(store, "runs", run_id)))


def test_two_runs(store):
    with Run(store, "embed") as one:
        with Run(store, "ingest") as other:
            assert one.state(other.id) == other.state(one.id) == "alive"
            assert one.alive() == [other.id] and other.alive() == [one.id]
            assert one.alive(["ingest"]) == [other.id] and one.alive(["embed", "latents"]) == []
        assert one.state(other.id) == "over" and one.alive() == []
    with Run(store, "embed") as third:
        assert third.states() == {one.id: "over", other.id: "over"} and third.alive() == []


def test_ids_are_unique_and_begin_with_the_job(store):
    ids = {Run(store, "embed").id for _ in range(50)}
    assert len(ids) == 50 and all(run_id.startswith("embed-") for run_id in ids)


def test_files_of_a_run(store):
    with Run(store, "embed") as run:
        path = run.write("summary.json", '{"a": "\u732b"}')
    assert path == os.path.join(store, "runs", run.id, "summary.json")
    with open(path, encoding="utf-8") as file:
        assert json.load(file) == {"a": "\u732b"}
    assert names(store, run.id) == ["over", "summary.json"], "its heartbeat is gone"


def test_a_run_that_fails_is_over_behind_a_barrier(store, table):
    """Its last commit may still be on its way."""
    with pytest.raises(KeyError), Run(store, "embed") as run:
        raise KeyError
    version = table.open().version
    with Run(store, "embed") as next_one:
        assert next_one.state(run.id) == "dead" and next_one.alive() == []
        assert next_one.end_dead(table) == {run.id} and table.open().version == version + 1
        assert next_one.state(run.id) == "over"
        assert next_one.end_dead(table) == {run.id} and table.open().version == version + 1


def test_killed_process_is_dead(store):
    process = subprocess.run([sys.executable, "-c", KILLED, store], capture_output=True, text=True)
    assert process.returncode == 9, process.stderr
    run_id = process.stdout.strip()
    assert names(store, run_id) == ["alive"]
    with Run(store, "embed") as run:
        assert run.state(run_id) == "dead" and run.alive() == []


def test_runs_of_earlier_versions(store):
    """They left no mark when they ended, and a heartbeat when they were killed."""
    for run_id, left in {"embed-ended": "summary.json", "embed-failed": "config.yaml"}.items():
        os.makedirs(os.path.join(store, "runs", run_id))
        Path(store, "runs", run_id, left).write_text("{}")
    put_heartbeat(store, "embed-killed", silent=DEAD_AFTER_SECONDS + 60)
    with Run(store, "embed") as run:
        assert run.states() == {"embed-ended": "over", "embed-failed": "over", "embed-killed": "dead"}


def test_ended_runs_cost_one_listing_and_no_file_is_read(monkeypatch):
    """A start of a run asks as much after 1,000 runs as after one, but for the pages of the listing."""
    asked = Counter()

    class Counted(MemoryFileSystem):
        cachable, store, pseudo_dirs = False, {}, [""]

        def find(self, path, **options):
            asked["listings"] += 1
            return [name for name in self.store if name.startswith(f"{path.rstrip('/')}/")]

        def cat_file(self, path, **options):
            asked["reads"] += 1
            return super().cat_file(path, **options)

        def info(self, path, **options):
            asked["looks"] += 1
            return super().info(path, **options)

    fs = Counted()
    monkeypatch.setattr(runs, "runs_folder", lambda store: (fs, "/s/runs"))
    ended = {f"embed-{number:04d}": ("over", "config.yaml", "summary.json") for number in range(1000)}
    ended |= {"embed-killed": ("over", "alive", "fence"), "embed-old": ("config.yaml", "summary.json")}
    for run_id, marks in ended.items():
        for mark in marks:
            fs.pipe_file(f"/s/runs/{run_id}/{mark}", b"{}")
    with Run("s", "ingest") as run:
        asked.clear()
        assert run.alive() == [] and asked == {"listings": 1}
        assert run.end_dead(None) == ended.keys() and run.rivals(None, ["embed"]) == []
        assert asked == {"listings": 4}


def test_a_run_that_the_store_does_not_know_is_unknown(store):
    os.makedirs(os.path.join(store, "runs", "embed-empty"))
    with Run(store, "embed") as run:
        assert run.state("embed-that-never-was") == run.state("embed-empty") == "unknown"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_heartbeat_that_a_power_cut_has_emptied_is_judged_by_its_age(store, content):
    for run_id, silent in {"embed-1": DEAD_AFTER_SECONDS + 60, "embed-2": 0}.items():
        path = Path(store, "runs", put_heartbeat(store, run_id, silent), "alive")
        path.write_text(content)
        os.utime(path, (time.time() - silent,) * 2)
    with Run(store, "embed") as run:
        assert run.states() == {"embed-1": "dead", "embed-2": "alive"}


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_silence_is_judged_by_the_clock_of_the_store(store, ahead):
    """Whatever the clocks of the hosts say."""
    with Run(store, "embed") as run:
        silent = put_heartbeat(store, "embed-1", silent=DEAD_AFTER_SECONDS + 60, clock=ahead)
        fresh = put_heartbeat(store, "embed-2", silent=DEAD_AFTER_SECONDS - 60, clock=ahead)
        assert run.state(silent) == "dead" and run.alive() == [fresh]


def test_run_never_looks_dead_while_it_beats(store):
    """A reader that meets the heartbeat half written must not fence a living run."""
    over = threading.Event()
    with Run(store, "embed") as run:
        other = Run(store, "ingest")

        def beat():
            while not over.is_set():
                run._beat()

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            states = {other.state(run.id) for _ in range(1000)}
        finally:
            over.set()
            thread.join()
    assert states == {"alive"}


# -- fences -----------------------------------------------------------------------------------------------------------


def test_a_live_run_that_was_taken_for_dead_commits_nothing_any_more(store, table):
    """Its finished files are removed by the run that took it for dead; what it had committed stays; the table can be read."""
    with Run(store, "ingest") as silent:
        table.append([write_rows(table, silent, "a")], silent.check)
        finished = write_rows(table, silent, "b", "c")
        put_heartbeat(store, silent.id, silent=DEAD_AFTER_SECONDS + 1)
        with Run(store, "embed") as other:
            assert table.remove_orphans(lambda: other.end_dead(table)) == [f"data/{finished.path}"]
        silent._beat()  # it is back
        with pytest.raises(
            Fenced, match=r"silent for so long .* run the same command again: what is committed is kept"
        ):
            table.append([write_rows(table, silent, "d")], silent.check)
        assert ids_of(table) == ["a"]
    with Run(store, "ingest") as later:
        assert later.state(silent.id) == "over"


def test_taken_for_dead_between_its_look_and_its_commit(store, table):
    """The fence comes after the run has looked for one: the barrier stops the commit, which looks again."""
    looks = []
    with Run(store, "ingest") as silent, Run(store, "embed") as other:
        file = write_rows(table, silent, "b")

        def guard():
            silent.check()
            looks.append(None)
            if len(looks) == 1:
                put_heartbeat(store, silent.id, silent=DEAD_AFTER_SECONDS + 1)
                other.end_dead(table)

        with pytest.raises(Fenced):
            table.append([file], guard)
        assert len(looks) == 1 and ids_of(table) == []


def test_a_fence_without_its_barrier_is_finished_by_the_next_run(store, table):
    """Who fenced it was killed before the barrier."""
    run_id = put_heartbeat(store, "ingest-1", silent=DEAD_AFTER_SECONDS + 1)
    Path(store, "runs", run_id, "fence").write_text("{}")
    version = table.open().version
    with Run(store, "ingest") as run:
        assert run.end_dead(table) == {run_id}
    assert table.open().version == version + 1 and "over" in names(store, run_id)


def test_two_stores_that_share_a_table_share_its_runs(store, table, tmp_path):
    other_store = tmp_path / "other"
    other_store.mkdir()
    (other_store / "samples.lance").symlink_to(table.uri)
    with Run(store, "ingest") as one, Run(str(other_store), "ingest") as other:
        assert other.alive(["ingest"]) == [one.id] and one.alive() == [other.id]
        file = write_rows(table, one, "a")
        assert table.remove_orphans(lambda: other.end_dead(table)) == []
        table.append([file], one.check)
    assert ids_of(table) == ["a"]


def test_files_of_a_run_of_another_store_are_left_alone(store, table, tmp_path):
    """Whose runs this store does not know: they may be alive."""
    with Run(str(tmp_path / "elsewhere"), "ingest") as stranger:
        file = write_rows(table, stranger, "a")
        with Run(store, "embed") as run:
            assert table.remove_orphans(lambda: run.end_dead(table)) == []
        table.append([file], stranger.check)
    assert ids_of(table) == ["a"]


# -- heartbeats -------------------------------------------------------------------------------------------------------


def test_it_beats_by_itself(store, monkeypatch):
    monkeypatch.setattr(alive, "HEARTBEAT_SECONDS", 0.01)
    beaten = threading.Event()
    first = Run._beat

    def beat(self):
        first(self)
        if threading.current_thread() is not threading.main_thread():
            beaten.set()

    monkeypatch.setattr(Run, "_beat", beat)
    with Run(store, "embed"):
        assert beaten.wait(30)


@pytest.mark.parametrize("error", [OSError("no route to the store"), KeyError("anything else"), MemoryError()])
def test_no_error_ends_the_heartbeat(store, monkeypatch, error, capsys):
    monkeypatch.setattr(alive, "HEARTBEAT_SECONDS", 0.01)
    honest, calls = Run._beat, []

    def fails_at_first(self):
        calls.append(None)
        if 1 < len(calls) <= 1 + alive.TELL_AFTER_MISSED:
            raise error
        honest(self)

    monkeypatch.setattr(Run, "_beat", fails_at_first)
    with Run(store, "embed") as run:
        deadline = time.monotonic() + 30
        while len(calls) < alive.TELL_AFTER_MISSED + 3:
            assert time.monotonic() < deadline
    assert "4 heartbeats in a row could not be written" in capsys.readouterr().err
    assert names(store, run.id) == ["over"]


def test_the_heartbeat_is_gone_when_a_run_is_over(store, monkeypatch):
    """Also where a beat was in hand at that moment: the process may go on to other work."""
    monkeypatch.setattr(alive, "HEARTBEAT_SECONDS", 0.0005)
    for _ in range(20):
        with Run(store, "embed") as run:
            time.sleep(0.005)
        assert names(store, run.id) == ["over"]


def test_a_store_that_is_gone_does_not_hide_what_ended_the_run(store, monkeypatch):
    def expired(*args):
        raise PermissionError("expired")

    with pytest.raises(KeyError), Run(store, "embed") as run:
        monkeypatch.setattr(run, "_mark", expired)
        raise KeyError("the reason")


@pytest.mark.parametrize("looks", [(False, True), (True, False)], ids=["wakes_up", "falls_silent"])
def test_a_run_that_changes_between_two_looks_is_fenced_or_a_rival(store, table, monkeypatch, looks):
    other = put_heartbeat(store, "ingest-20250101T000000-abcdef", silent=DEAD_AFTER_SECONDS)
    answers = iter(looks)
    monkeypatch.setattr("pipelines.engine.runs.is_alive", lambda *args: next(answers, looks[-1]))
    with Run(store, "ingest") as run:
        rivals = run.rivals(table, ["ingest"])
        fenced = os.path.exists(os.path.join(store, "runs", other, "fence"))
        assert rivals == [other] or fenced, "neither: both would add the same rows"


def test_a_worker_that_sees_the_store_begins(store):
    with Run(store, "embed") as run:
        cloudpickle.loads(cloudpickle.dumps(run.seen))()
        assert _UnitCaller(dict, {"a": 1}, run.seen).worker == {"a": 1}


@pytest.mark.parametrize("there", ["nothing", "another store"])
def test_a_worker_that_sees_another_place_refuses_it_before_anything_is_made(tmp_path, store, monkeypatch, there):
    """As if a second machine had its own disk at that path."""
    monkeypatch.setattr("pipelines.engine.runs.SEEN_SECONDS", 0.1)
    made = []
    with Run(store, "embed") as run:
        os.rename(store, tmp_path / "disk-of-the-driver")
        if there == "another store":
            os.makedirs(os.path.join(store, "runs", "embed-of-another"))
        with pytest.raises(ValueError, match=r"sees another place, or none.*same storage on every machine"):
            _UnitCaller(lambda: made.append("worker"), {}, run.seen)
        shutil.rmtree(store, ignore_errors=True)
        os.rename(tmp_path / "disk-of-the-driver", store)
    assert made == []


def test_a_folder_that_a_network_disk_shows_late(store):
    with Run(store, "embed") as run:
        folder = os.path.join(store, "runs", run.id)
        os.rename(folder, folder + "-late")
        threading.Timer(0.7, os.rename, (folder + "-late", folder)).start()
        run.seen()

"""A run's sign of life: who may delete whose unfinished files."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from lidit.alive import DEAD_AFTER_SECONDS
from pipelines import runs
from pipelines.runs import Run

pytestmark = pytest.mark.unit

KILLED = """
import os, sys
from pipelines.runs import Run
run = Run(sys.argv[1], "embed").__enter__()
print(run.id, flush=True)
os._exit(9)
"""


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def put_sign(store, run_id, beat):
    """Writes the sign of a run on another host as it might have been left."""
    folder = os.path.join(store, "runs", run_id)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "alive"), "w") as file:
        json.dump({"host": "elsewhere 123", "pid": 1, "started": "1", "beat": beat}, file)
    return run_id


def test_two_runs(store):
    with Run(store, "embed") as one:
        with Run(store, "ingest") as other:
            assert not one.is_dead(other.id) and not other.is_dead(one.id)
            assert one.alive() == [other.id] and other.alive() == [one.id]
            assert one.is_dead(one.id), "its own files are no longer needed when it asks"
        assert one.is_dead(other.id) and one.alive() == []
    with Run(store, "embed") as third:
        assert third.is_dead(one.id) and third.is_dead(other.id) and third.alive() == []


def test_ids_are_unique_and_begin_with_the_job(store):
    ids = {Run(store, "embed").id for _ in range(50)}
    assert len(ids) == 50 and all(run_id.startswith("embed-") for run_id in ids)


def test_files_of_a_run(store):
    with Run(store, "embed") as run:
        path = run.write("summary.json", '{"a": "\u732b"}')
    assert path == os.path.join(store, "runs", run.id, "summary.json")
    with open(path, encoding="utf-8") as file:
        assert json.load(file) == {"a": "\u732b"}
    assert sorted(os.listdir(os.path.dirname(path))) == ["summary.json"], "its sign of life is gone"


def test_run_that_fails_is_over(store):
    with pytest.raises(KeyError), Run(store, "embed") as run:
        raise KeyError
    assert Run(store, "embed").is_dead(run.id)


def test_killed_process_is_dead(store):
    process = subprocess.run([sys.executable, "-c", KILLED, store], capture_output=True, text=True)
    assert process.returncode == 9, process.stderr
    run_id = process.stdout.strip()
    assert os.path.exists(os.path.join(store, "runs", run_id, "alive"))
    with Run(store, "embed") as run:
        assert run.is_dead(run_id) and run.alive() == []


def test_sign_of_another_host_ages(store):
    with Run(store, "embed") as run:
        silent = put_sign(store, "embed-1", beat=time.time() - DEAD_AFTER_SECONDS - 60)
        fresh = put_sign(store, "embed-2", beat=time.time())
        assert run.is_dead(silent) and run.alive() == [fresh]


def test_unknown_run_is_dead(store):
    with Run(store, "embed") as run:
        assert run.is_dead("embed-that-never-was")


def test_run_never_looks_dead_while_it_beats(store):
    """A reader that meets the sign half written must not delete a living run's files."""
    over = threading.Event()
    with Run(store, "embed") as run:
        other = Run(store, "ingest")

        def beat():
            while not over.is_set():
                run._beat()

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            seen_dead = sum(other.is_dead(run.id) for _ in range(2000))
        finally:
            over.set()
            thread.join()
    assert seen_dead == 0


def test_run_that_was_silent_too_long_stops_itself(store):
    with Run(store, "embed") as run:
        run.check_alive()
        run._last_beat -= DEAD_AFTER_SECONDS
        with pytest.raises(RuntimeError, match=r"could not show that it is alive for 9[0-9]{2} s"):
            run.check_alive()
        run._beat()
        run.check_alive()


def test_it_beats_by_itself(store, monkeypatch):
    monkeypatch.setattr(runs, "HEARTBEAT_SECONDS", 0.01)
    beaten = threading.Event()
    first = Run._beat

    def beat(self):
        first(self)
        if threading.current_thread() is not threading.main_thread():
            beaten.set()

    monkeypatch.setattr(Run, "_beat", beat)
    with Run(store, "embed"):
        assert beaten.wait(30)


def test_a_store_that_is_away_for_a_moment_ends_no_heartbeat(store, monkeypatch):
    monkeypatch.setattr(runs, "HEARTBEAT_SECONDS", 0.01)
    with Run(store, "embed") as run:
        honest, calls = run._beat, []

        def fails_twice():
            calls.append(None)
            if len(calls) <= 2:
                raise OSError("no route to the store")
            honest()

        monkeypatch.setattr(run, "_beat", fails_twice)
        deadline = time.monotonic() + 30
        while len(calls) < 4:
            assert time.monotonic() < deadline
    assert run.is_dead(run.id) and not os.path.exists(os.path.join(store, "runs", run.id, "alive"))


def test_the_sign_is_gone_when_a_run_is_over(store, monkeypatch):
    """Also where a beat was in hand at that moment: the process may go on to other work."""
    monkeypatch.setattr(runs, "HEARTBEAT_SECONDS", 0.0005)
    for _ in range(20):
        with Run(store, "embed") as run:
            time.sleep(0.005)
        assert not os.path.exists(os.path.join(store, "runs", run.id, "alive"))


def test_a_store_that_is_gone_does_not_hide_what_ended_the_run(store, monkeypatch):
    with pytest.raises(KeyError), Run(store, "embed") as run:
        monkeypatch.setattr(run._fs, "exists", lambda path: (_ for _ in ()).throw(PermissionError("expired")))
        raise KeyError("the reason")

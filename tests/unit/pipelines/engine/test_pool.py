"""The tracker's bookkeeping of deaths, and the polling of results; the pool itself is an integration test."""

import json
import threading
import time

import pytest

from pipelines.engine import pool
from pipelines.engine.pool import DEATHS_OF_A_UNIT, ActorsConfig, Attempt, Tracker, _poll, _UnitCaller, read_ahead

pytestmark = pytest.mark.unit


# -- Tracker ----------------------------------------------------------------------------------------------------------


def test_unit_without_deaths():
    tracker = Tracker()
    attempt = tracker.begin("7")
    assert (attempt.careful, attempt.quarantined) == ([], [])
    tracker.enter("7", 0, 100)
    tracker.leave("7", {"rows": 100, "errors": 1})
    tracker.enter("7", 100, 150)
    tracker.leave("7", {"rows": 50, "tokens": 9})
    assert tracker.totals() == {"rows": 150, "errors": 1, "tokens": 9}
    tracker.end("7")
    assert tracker.totals() == {"rows": 150, "errors": 1, "tokens": 9}


def test_the_first_error_is_kept_also_when_its_unit_has_ended():
    tracker = Tracker()
    assert tracker.first_error() == ""
    for unit, error in (("1", ""), ("2", "damaged"), ("3", "too large")):
        tracker.begin(unit)
        tracker.enter(unit, 0, 1)
        tracker.leave(unit, {"rows": 1, "errors": 1}, error)
        tracker.end(unit)
    assert tracker.first_error() == "damaged"


def test_a_death_between_pieces_blames_no_row():
    """In hand was nothing: it died while it read, or was taken away."""
    tracker = Tracker()
    tracker.begin("7")
    tracker.enter("7", 0, 100)
    tracker.leave("7", {"rows": 100})
    attempt = tracker.begin("7")
    assert (attempt.careful, attempt.quarantined, attempt.deaths) == ([], [], 1)


def test_a_process_that_begins_anew_has_not_died():
    tracker = Tracker()
    assert tracker.begin("7", "one").deaths == 0
    tracker.enter("7", 0, 100)
    again = tracker.begin("7", "one")
    assert (again.careful, again.deaths) == ([], 0)
    tracker.enter("7", 0, 100)
    other = tracker.begin("7", "two")
    assert (other.careful, other.deaths) == ([(0, 100)], 1)


def test_deaths_while_reading_end_the_job():
    tracker = Tracker()
    with pytest.raises(
        RuntimeError, match=f"died {DEATHS_OF_A_UNIT + 1} times on unit 7, last with no rows in hand"
    ) as said:
        for _ in range(1000):
            tracker.begin("7")
    assert "batch_tokens" not in str(said.value), "the tracker serves every job"


@pytest.mark.parametrize("deaths, ahead", [(0, True), (1, False)])
def test_nothing_is_read_ahead_where_a_process_died(deaths, ahead):
    read, looked = [], []

    def windows():
        for number in range(4):
            read.append(number)
            yield number

    for number in read_ahead(windows(), Attempt([], [], deaths)):
        if ahead and number < 3:
            while len(read) < number + 2:
                time.sleep(0.001)
        looked.append((number, len(read)))
    assert looked == [(number, min(4, number + 1 + ahead)) for number in range(4)]


def die(tracker, unit, first, stop):
    """An actor begins the unit and dies with these rows in hand; returns what it was told."""
    attempt = tracker.begin(unit)
    tracker.enter(unit, first, stop)
    return attempt


def test_death_makes_the_range_careful_then_the_row_quarantined():
    tracker = Tracker()
    die(tracker, "7", 100, 200)
    attempt = die(tracker, "7", 130, 131)  # row by row now, and row 130 it is
    assert (attempt.careful, attempt.quarantined) == ([(100, 200)], [])
    attempt = die(tracker, "7", 130, 131)
    assert (attempt.careful, attempt.quarantined) == ([(100, 200)], [])
    attempt = tracker.begin("7")
    assert (attempt.careful, attempt.quarantined) == ([(100, 200)], [130])
    assert tracker.begin("7").quarantined == [130], "it is not forgotten"


def test_several_ranges_and_rows():
    tracker = Tracker()
    die(tracker, "7", 0, 50)
    die(tracker, "7", 50, 100)
    for row in (3, 3, 60, 60, 61):
        die(tracker, "7", row, row + 1)
    attempt = tracker.begin("7")
    assert attempt.careful == [(0, 50), (50, 100)] and sorted(attempt.quarantined) == [3, 60]


def test_units_do_not_mix():
    tracker = Tracker()
    die(tracker, "7", 0, 50)
    assert tracker.begin("8").careful == []
    assert tracker.begin("7").careful == [(0, 50)]


def test_counts_start_again_with_a_retry():
    tracker = Tracker()
    tracker.begin("1")
    tracker.leave("1", {"rows": 5})
    tracker.end("1")
    tracker.begin("7")
    tracker.enter("7", 0, 100)
    tracker.leave("7", {"rows": 100, "errors": 100})
    tracker.enter("7", 100, 200)
    assert tracker.totals() == {"rows": 105, "errors": 100}
    tracker.begin("7")
    assert tracker.totals() == {"rows": 5}
    tracker.enter("7", 0, 100)
    tracker.leave("7", {"rows": 100, "errors": 2})
    tracker.end("7")
    assert tracker.totals() == {"rows": 105, "errors": 2}


def test_gives_up_after_too_many_deaths():
    tracker = Tracker()
    for death in range(DEATHS_OF_A_UNIT + 1):
        die(tracker, "7", 10 * death, 10 * death + 10)
    with pytest.raises(RuntimeError, match=rf"died {DEATHS_OF_A_UNIT + 1} times on unit 7, last at rows 160 to 169"):
        tracker.begin("7")


def die_reading(tracker, unit, part, records):
    """An actor begins the unit and dies while it reads on in a part; returns what it was told."""
    attempt = tracker.begin(unit)
    tracker.read(unit, part, records)
    return attempt


def test_a_part_that_kills_twice_is_read_up_to_where_it_does():
    tracker = Tracker()
    tracker.begin("7")  # reads ahead and tells nothing
    attempt = die_reading(tracker, "7", 3, 0)
    assert (attempt.deaths, attempt.suspects, attempt.set_aside) == (1, [], {})
    attempt = die_reading(tracker, "7", 3, 40)
    assert (attempt.deaths, attempt.suspects, attempt.set_aside) == (2, [3], {})
    attempt = tracker.begin("7")
    assert (attempt.deaths, attempt.suspects, attempt.set_aside) == (3, [3], {3: 40})
    tracker.read("7", 3, 20)
    assert tracker.begin("7").set_aside == {3: 20}, "it killed earlier than before"


def test_a_death_with_rows_in_hand_is_not_the_reading():
    tracker = Tracker()
    tracker.begin("7")
    for _ in range(3):
        tracker.begin("7")
        tracker.read("7", 0, 5)
        tracker.enter("7", 4, 5)
    attempt = tracker.begin("7")
    assert (attempt.set_aside, attempt.suspects, attempt.quarantined) == ({}, [], [4])
    tracker.read("7", 0, 5)
    tracker.leave("7", {})  # and it dies as it writes
    assert tracker.begin("7").suspects == []


def test_rows_are_numbered_otherwise_behind_a_part_that_is_set_aside():
    tracker = Tracker()
    for row in (50, 50, 50):
        die(tracker, "7", row, row + 1)
    assert tracker.begin("7").quarantined == [50]
    tracker.read("7", 0, 3)
    die_reading(tracker, "7", 0, 3)
    attempt = tracker.begin("7")
    assert (attempt.set_aside, attempt.quarantined, attempt.careful) == ({0: 3}, [], []), "row 50 is another one now"


def test_a_unit_of_many_parts_that_kill_is_done():
    tracker = Tracker()
    tracker.begin("7")
    for part in range(100):
        die_reading(tracker, "7", part, 0)
        die_reading(tracker, "7", part, 0)
    assert tracker.begin("7").set_aside == dict.fromkeys(range(100), 0)
    with pytest.raises(RuntimeError, match="died 217 times on unit 7, last while it read part 3 behind its record 0"):
        for _ in range(1000):
            die_reading(tracker, "7", 3, 0)


def test_finished_unit_is_forgotten():
    tracker = Tracker()
    die(tracker, "7", 0, 50)
    tracker.begin("7")
    tracker.end("7")
    assert tracker.begin("7").careful == []


# -- ActorsConfig -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"min": 0}, "actors.min: expected a whole number >= 1, received 0"),
        ({"min": -1}, "actors.min: expected a whole number >= 1, received -1"),
        ({"min": 2, "max": 1}, "actors: expected min <= max, received min 2, max 1"),
        ({"max": 0}, "actors.max: expected a whole number >= 1 or null, received 0"),
    ],
)
def test_actors_config_is_checked(bad, message):
    with pytest.raises(ValueError, match=message):
        ActorsConfig(**bad)


def test_actors_config_that_is_right():
    assert ActorsConfig().max is None
    assert ActorsConfig(min=3, max=3).max == 3


@pytest.mark.parametrize(
    "resources, config, wanted",
    [
        ({"CPU": 8.0}, ActorsConfig(), (1, 8, 0.0)),
        ({"CPU": 8.0}, ActorsConfig(num_cpus=3), (1, 2, 0.0)),
        ({"CPU": 64.0, "GPU": 4.0}, ActorsConfig(), (1, 4, 1.0)),
        ({"CPU": 64.0, "GPU": 4.0}, ActorsConfig(num_gpus=0.25), (1, 16, 0.25)),
        ({"CPU": 64.0, "GPU": 4.0}, ActorsConfig(num_gpus=0.0, num_cpus=2), (1, 32, 0.0)),
        ({"CPU": 64.0, "GPU": 4.0}, ActorsConfig(max=2), (1, 2, 1.0)),
        ({"CPU": 1.0}, ActorsConfig(min=4), (4, 4, 0.0)),
    ],
)
def test_actors_by_the_cluster(monkeypatch, resources, config, wanted):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(pool.ray, "cluster_resources", lambda: resources)
    assert pool.resolve_actors(config) == wanted


@pytest.mark.parametrize("config", [ActorsConfig(num_cpus=9), ActorsConfig(num_gpus=1)])
def test_actors_that_this_machine_can_never_hold(monkeypatch, config):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(pool.ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(ValueError, match="this machine has 8 and 0; lower"):
        pool.resolve_actors(config)
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may grow
    assert pool.resolve_actors(config)[1] >= 1


# -- polling ----------------------------------------------------------------------------------------------------------


def test_poll_passes_items_in_order():
    assert [item for item in _poll(lambda: iter(range(100))) if item is not None] == list(range(100))
    assert [item for item in _poll(lambda: iter(())) if item is not None] == []


def test_poll_gives_none_while_nothing_comes(monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.01)
    go_on = threading.Event()

    def source():
        yield "first"
        assert go_on.wait(30)
        yield "second"

    polled = _poll(source)
    got = [next(polled)]
    while got[-1] != "first":
        got.append(next(polled))
    assert next(polled) is None and next(polled) is None
    go_on.set()
    assert [item for item in polled if item is not None] == ["second"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_poll_hands_over_errors(error):
    def source():
        yield 1
        raise error

    got = []
    with pytest.raises(type(error)) as caught:
        for item in _poll(source):
            got += [item] if item is not None else []
    assert caught.value is error and got == [1]


def test_poll_hands_over_an_error_at_the_start():
    def source():
        raise OSError("no cluster")

    with pytest.raises(OSError, match="no cluster"):
        list(_poll(source))


def test_unit_caller_unwraps_and_wraps():
    class Doubler:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, unit):
            return {"made": unit["value"] * self.factor}

    caller = _UnitCaller(Doubler, {"factor": 2})
    made = caller({"unit": [json.dumps({"value": 3}), json.dumps({"value": 4})]})
    assert [json.loads(result) for result in made["result"]] == [{"made": 6}, {"made": 8}]

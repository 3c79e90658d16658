"""Starting Ray: how often, and with what. Real starts are in the integration tests."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lidit.cli import _last_cause
from lidit.runtime import cluster

pytestmark = pytest.mark.unit


class Starts:
    """In the place of the module `ray`: its `init` fails as often as it is told to."""

    def __init__(self, failures: int, words: str):
        self.failures, self.words = failures, words
        self.options: list[dict[str, Any]] = []
        self.shutdowns = 0

    def init(self, **options: Any) -> None:
        self.options.append(options)
        if len(self.options) <= self.failures:
            raise Exception(self.words)

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        self.shutdowns += 1


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Starts:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Starts(*request.param)


SLOW = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize("starts", [(2, SLOW)], indirect=True)
def test_a_node_that_is_slow_to_start_is_started_again(starts: Starts, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.start_ray(starts, num_cpus=3)
    assert len(starts.options) == 3 and starts.shutdowns == 2
    assert starts.options[-1]["num_cpus"] == 3 and starts.options[-1]["log_to_driver"] is True
    assert "try 2 of 3: is the machine busy?" in capsys.readouterr().err


@pytest.mark.parametrize("starts", [(9, SLOW)], indirect=True)
def test_a_node_that_never_starts_is_said_after_three_tries(starts: Starts) -> None:
    with pytest.raises(RuntimeError, match="3 times: this machine is too busy"):
        cluster.start_ray(starts)
    assert len(starts.options) == 3


@pytest.mark.parametrize("starts", [(1, "No such option")], indirect=True)
def test_other_errors_are_raised_at_once(starts: Starts) -> None:
    with pytest.raises(Exception, match="No such option"):
        cluster.start_ray(starts)
    assert len(starts.options) == 1


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
def test_a_cluster_that_is_there_is_joined(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cluster.start_ray(starts, log_to_driver=False, num_cpus=3)
    assert [set(options) for options in starts.options] == [{"log_to_driver", "logging_level"}]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own, and a umask that lets everyone read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
def test_the_token_is_its_owners_alone(starts: Starts, home: Path) -> None:
    cluster.start_ray(starts)
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600 and stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64 and [file.name for file in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
def test_a_token_that_is_there_is_kept_and_closed_to_others(starts: Starts, home: Path) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("made by Ray")
    cluster.start_ray(starts)
    assert token.read_text() == "made by Ray" and stat.S_IMODE(token.stat().st_mode) == 0o600


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
def test_no_token_where_it_is_turned_off(starts: Starts, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster.start_ray(starts)
    assert not (home / ".ray").exists()


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
@pytest.mark.parametrize("variable", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_is_given_needs_no_home(starts: Starts, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("HOME", "/proc/no-such-home")
    monkeypatch.setenv(variable, "x" * 64)
    cluster.start_ray(starts)
    assert len(starts.options) == 1


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
@pytest.mark.parametrize("home_is", ["missing", "a file"])
def test_a_home_without_a_place_for_the_token(
    starts: Starts, home: Path, monkeypatch: pytest.MonkeyPatch, home_is: str
) -> None:
    (home / "file").touch()
    monkeypatch.setenv("HOME", {"missing": "/proc/no-such-home", "a file": str(home / "file")}[home_is])
    with pytest.raises(
        RuntimeError, match=r"token in ~/\.ray/auth_token, and there: .*Set HOME .*RAY_AUTH_TOKEN_PATH"
    ) as found:
        cluster.start_ray(starts)
    assert _last_cause(found.value) == str(found.value), "what the command line shows"
    assert starts.options == []


@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
def test_a_token_that_cannot_be_closed_to_others_is_used(
    starts: Starts, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("made by Ray")

    def read_only(*args: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "chmod", read_only)
    cluster.start_ray(starts)
    assert len(starts.options) == 1


LONG = "validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long/ray/session/sockets/raylet"


@pytest.mark.parametrize("starts", [(1, LONG)], indirect=True)
def test_a_long_temporary_folder(starts: Starts) -> None:
    with pytest.raises(RuntimeError, match="set RAY_TMPDIR to a folder with a short name") as found:
        cluster.start_ray(starts)
    assert _last_cause(found.value) == str(found.value), "what the command line shows"


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/tmp/ray"), OSError(30, "Read-only", "/x")]
)
@pytest.mark.parametrize("starts", [(0, "")], indirect=True)
def test_a_temporary_folder_of_somebody_else(starts: Starts, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def init(**options: Any) -> None:
        raise error

    monkeypatch.setattr(starts, "init", init)
    with pytest.raises(RuntimeError, match="Set RAY_TMPDIR to a folder") as found:
        cluster.start_ray(starts)
    assert _last_cause(found.value) == str(found.value), "what the command line shows"


@pytest.mark.parametrize("error", [None, RuntimeError("no node")])
def test_only_the_line_of_the_log_level_is_kept_from_the_user(capfd, error):
    """Also what C++ writes, and what is said before a failure."""
    with contextlib.suppress(RuntimeError), cluster._stderr_without("log level"):
        os.write(2, "Set ray log level to 3\nthe disk is full: größer\n".encode())
        if error is not None:
            raise error
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "the disk is full: größer\nafter\n"


def test_only_that_line_is_kept_from_what_workers_say():
    said = []
    handlers = {"ray_print_logs": None}
    printing = SimpleNamespace(remove_handler=handlers.pop, add_handler=handlers.__setitem__)
    private = SimpleNamespace(
        ray_logging=SimpleNamespace(global_worker_stdstream_dispatcher=printing),
        worker=SimpleNamespace(print_to_stdstream=lambda data, ignore_prefix: said.append(data["lines"])),
    )
    cluster._print_without(private, "log level")
    handlers["ray_print_logs"]({"lines": ["Set ray log level to 3"], "pid": 1})
    handlers["ray_print_logs"]({"lines": ["step 10", "the log level", "step 20"], "pid": 1})
    assert said == [["step 10", "step 20"]]

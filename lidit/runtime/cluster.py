"""Ray, started the same way by every job."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIES = 3  # of starting a local node
SOCKET_TOO_LONG = "AF_UNIX path length"  # what Ray says of a long temporary folder
LEVEL_WAS_READ = "Set ray log level from environment variable"
PRINTS_WORKERS_OUTPUT = "ray_print_logs"  # Ray's name of the handler that does
TOO_SLOW = "timed out during startup"  # what Ray says when its node did not come up within 30 s, a limit of its own


def start_ray(ray: Any, log_to_driver: bool = True, **local: Any) -> None:
    """Joins the cluster that RAY_ADDRESS names (as under `ray job submit`), or starts a local one for this process.

    A busy machine may need longer for its local node than Ray waits; then it is started again, `TRIES` times in all.

    Args:
        ray: the module; this package does not depend on it.
        log_to_driver: show what the workers print.
        local: further options of `ray.init` for a local cluster.

    Raises:
        RuntimeError: the local node did not come up, or has no place for its token, sockets or logs; says which variable helps.
    """
    # Ray starts its processes by fork and exec, which is safe; Lance warns of any fork.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # the command line would show colors as escapes
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own processes warn at every start
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        _init(ray, **options)
        return
    is_given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not is_given:
        _make_token()
    options |= {"include_dashboard": False, "object_store_memory": 256 << 20, **local}
    for number in range(1, TRIES + 1):
        try:
            _init(ray, **options)
            return
        except Exception as error:  # Ray raises no class of its own
            ray.shutdown()
            if (what := _without_place(error)) is not None:
                raise RuntimeError(what) from None  # it has all of the error's own words
            if TOO_SLOW not in str(error):
                raise
            print(
                f"Ray's node did not start within 30 s, try {number} of {TRIES}: is the machine busy?", file=sys.stderr
            )
    raise RuntimeError(
        f"Ray's node did not start within 30 s, {TRIES} times: this machine is too busy. Stop other work, or set RAY_ADDRESS "
        f"to a running cluster"
    )


def _init(ray: Any, **options: Any) -> None:
    """Calls `ray.init`; Ray's processes do not say that they have read `RAY_BACKEND_LOG_LEVEL`, neither here nor later."""
    with _stderr_without(LEVEL_WAS_READ):
        ray.init(**options)
    if options["log_to_driver"]:
        with contextlib.suppress(AttributeError):  # a Ray that prints in another way says it
            _print_without(ray._private, LEVEL_WAS_READ)


def _print_without(private: Any, words: str) -> None:
    """Has lines with these words left out of what Ray prints of its workers' output, for which it has no public hook."""
    printing = private.ray_logging.global_worker_stdstream_dispatcher

    def show(data: dict[str, Any]) -> None:
        lines = [line for line in data["lines"] if words not in line]
        if lines:
            private.worker.print_to_stdstream({**data, "lines": lines}, False)

    printing.remove_handler(PRINTS_WORKERS_OUTPUT)
    printing.add_handler(PRINTS_WORKERS_OUTPUT, show)


@contextlib.contextmanager
def _stderr_without(words: str) -> Iterator[None]:
    """Holds back what is written to stderr meanwhile, by C++ too, and writes it afterwards, but for lines with these words."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if words.encode() not in line:
                    sys.stderr.write(line.decode(errors="replace"))


def _without_place(error: Exception) -> str | None:
    """Returns what to say where Ray found no place for its sockets and logs; None of any other error."""
    base = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if SOCKET_TOO_LONG in str(error):
        return (
            f"Ray keeps its sockets below {base!r}, and the path of a socket has 107 bytes at most: set RAY_TMPDIR to a folder "
            f"with a short name, such as /tmp"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"Ray keeps its sockets and logs below {base!r}, and there: {error}. Set RAY_TMPDIR to a folder with a short name "
            f"that this user can write to"
        )
    return None


def _make_token() -> None:
    """The token of local clusters, readable by its owner alone: one that Ray makes may be read by everyone.

    Raises:
        RuntimeError: the home folder has no place for it.
    """
    try:
        _make_token_at(Path.home() / ".ray" / "auth_token")
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home at all
        raise RuntimeError(
            f"Ray keeps a token in ~/.ray/auth_token, and there: {error}. Set HOME to a folder that this user can write to, or "
            f"RAY_AUTH_TOKEN_PATH to a file with a secret of your own"
        ) from None


def _make_token_at(path: Path) -> None:
    beside = path.with_name(f".auth_token-{secrets.token_hex(8)}")
    if path.exists():
        with contextlib.suppress(OSError):  # on a read-only disk it stays as it is
            path.chmod(0o600)
        path.open().close()  # may this user read it?
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        try:
            os.link(beside, path)
        except FileExistsError:  # of a job that started at the same time
            pass
        except OSError:  # some network disks have no links
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)

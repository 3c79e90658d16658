"""Ray, started the same way by every job."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import warnings
from pathlib import Path
from typing import Any

TRIES = 3  # of starting a local node
TOO_SLOW = "timed out during startup"  # what Ray says when its node did not come up within 30 s, a limit of its own


def start_ray(ray: Any, log_to_driver: bool = True, **local: Any) -> None:
    """Joins the cluster that RAY_ADDRESS names (as under `ray job submit`), or starts a local one for this process.

    A busy machine may need longer for its local node than Ray waits; then it is started again, `TRIES` times in all.

    Args:
        ray: the module; this package does not depend on it.
        log_to_driver: show what the workers print.
        local: further options of `ray.init` for a local cluster.

    Raises:
        RuntimeError: the local node did not come up.
    """
    # Ray starts its processes by fork and exec, which is safe; Lance warns of any fork.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_COLOR_PREFIX", "0"
    )  # colours are control characters, which the command line shows as text
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own processes warn at every start
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        _make_token()
    options |= {"include_dashboard": False, "object_store_memory": 256 << 20, **local}
    for number in range(1, TRIES + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises no class of its own
            ray.shutdown()
            if TOO_SLOW not in str(error):
                raise
            print(
                f"Ray's node did not start within 30 s, try {number} of {TRIES}: is the machine busy?", file=sys.stderr
            )
    raise RuntimeError(
        f"Ray's node did not start within 30 s, {TRIES} times: this machine is too busy. Stop other work, or set RAY_ADDRESS "
        f"to a running cluster"
    )


def _make_token() -> None:
    """The token of local clusters, readable by its owner alone: one that Ray makes may be read by everyone."""
    path = Path.home() / ".ray" / "auth_token"
    beside = path.with_name(f".auth_token-{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):  # no place to write to: Ray says so
        if path.exists():
            path.chmod(0o600)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # of a job that started at the same time
                os.link(beside, path)
        finally:
            beside.unlink(missing_ok=True)

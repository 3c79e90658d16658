"""Ray, started the same way by every job."""

from __future__ import annotations

import logging
import os
import sys
import warnings
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
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own processes warn at every start
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
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

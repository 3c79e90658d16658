"""Runs one command as a job on a Ray cluster, and ends with it: what a scheduler starts, so that a job has one driver at most.

    python infra/submit.py --address http://head:8265 --name preprocess-29401 -- python -m lidit.cli preprocess --config ...

`ray job submit` sends a driver to the head and looks on: ended early, it leaves the driver running, and started again it starts
a second one. Here the job's id is made from `--name`, which a scheduler gives to all tries of one run:

- **A try that finds the job running** follows it, and starts nothing.
- **A try that finds it over** (failed, stopped) starts it once more, under the next number.
- **SIGTERM** (deadline, eviction, `kubectl delete`) stops the driver and waits until it has ended.

The job's log goes to stdout. Exit status: 0 if the job succeeded, 1 if it failed or was stopped, 143 after SIGTERM, 2 for wrong
flags. RAY_AUTH_MODE and RAY_AUTH_TOKEN are read as by `ray job submit`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from lidit.runtime.uris import check_uri

POLL_SECONDS = 2.0
STOP_SECONDS = 60.0  # the driver has 3 s after Ray's SIGTERM; the rest is for a busy head
TERMINATED = 128 + signal.SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Submits or follows the job. Returns its exit status as the module says; wrong flags end the process with 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        for number, word in enumerate([args.address, *args.command]):
            check_uri(word, f"word {number} of the command" if number else "--address")
    except ValueError as error:  # the cluster's dashboard shows commands
        parser.error(str(error))
    from ray.job_submission import JobSubmissionClient

    return asyncio.run(run(JobSubmissionClient(args.address), args.name, shlex.join(args.command)))


async def run(client: Any, name: str, entrypoint: str) -> int:
    """Follows the running job of this name, or starts the next one; stops it at SIGTERM. Returns the exit status."""
    job, status = newest(client, name)
    if status is None or status.is_terminal():
        job = client.submit_job(entrypoint=entrypoint, submission_id=next_id(name, job))
        _say(f"started {job}")
    else:
        _say(f"{job} is {status}: following it, nothing is started")
    following = asyncio.ensure_future(_follow(client, job))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, following.cancel)
    try:
        status = await following
    except asyncio.CancelledError:
        _say(f"SIGTERM: stopping {job}")
        await _stop(client, job)
        return TERMINATED
    _say(f"{job}: {status}")
    return 0 if status == "SUCCEEDED" else 1


def newest(client: Any, name: str) -> tuple[str, Any]:
    """Id and status of the last try of this name; an empty id and None if there was none."""
    tries = {job.submission_id: job.status for job in client.list_jobs() if try_number(job.submission_id, name)}
    job = max(tries, key=lambda each: try_number(each, name), default="")
    return job, tries.get(job)


def next_id(name: str, last: str) -> str:
    """The id of the try after `last` (empty: of the first one). Ray refuses an id that is there: two cannot start at once."""
    return f"{name}-try{try_number(last, name) + 1}"


def try_number(job: str | None, name: str) -> int:
    """The number of this try, 0 for jobs of other names."""
    found = re.fullmatch(re.escape(name) + r"-try(\d+)", job or "")
    return int(found[1]) if found else 0


async def _follow(client: Any, job: str) -> Any:
    """Prints the log until the job is over. A lost log is no end: the status decides."""
    try:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)
    except RuntimeError as error:
        _say(f"the log broke off ({error}); the job goes on, `ray job logs {job}` has it")
    while not (status := client.get_job_status(job)).is_terminal():
        await asyncio.sleep(POLL_SECONDS)
    return status


async def _stop(client: Any, job: str) -> None:
    client.stop_job(job)
    limit = time.monotonic() + STOP_SECONDS
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > limit:
            _say(f"{job} did not end in {STOP_SECONDS:g} s: `ray job stop {job}` from elsewhere")
            return
        await asyncio.sleep(0.5)
    _say(f"{job} is stopped")


def _say(text: str) -> None:
    print(f"submit: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "infra/submit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", required=True, help="The head's jobs port, http://HOST:8265.")
    parser.add_argument("--name", required=True, help="The same for all tries of one run, another for every run.")
    parser.add_argument("command", nargs="+", help="After `--`: what the head runs.")
    return parser


if __name__ == "__main__":
    sys.exit(main())

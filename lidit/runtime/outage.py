"""Recognizes errors of storage that is away for a while, and outlasts them: one table for the whole project.

A bucket that cannot be reached is no answer: nothing may be deleted, doubled or given up because of it. Who asks storage
for something waits until it answers (`outlast`); who beats in a thread goes on beating.
"""

from __future__ import annotations

import errno
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

AWAY_SECONDS = 600.0  # of storage that does not answer, before a job gives up; what is committed is kept
LONGEST_PAUSE = 5.0  # seconds between two tries
QUIET_SECONDS = 10.0  # of waiting before it is told

Result = TypeVar("Result")

AWAY_ERRNO = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ESTALE, errno.EAGAIN, errno.EBUSY,
}  # fmt: skip
AWAY_CLASSES = {  # by name, since most of these packages are not imported here; a subclass counts
    "ConnectionError", "TimeoutError", "FSTimeoutError",
    "HTTPClientError", "EndpointConnectionError", "ConnectTimeoutError", "ConnectionClosedError",  # botocore
    "ResponseStreamingError", "IncompleteReadError", "CredentialRetrievalError",
    "ClientConnectionError", "ClientPayloadError", "ServerTimeoutError", "ServerDisconnectedError",  # aiohttp
    "IncompleteRead", "RemoteDisconnected",  # http.client
}  # fmt: skip
AWAY_STATUS = {408, 429, 500, 502, 503, 504}  # of HTTP
AWAY_CODES = {
    "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling",
    "ThrottlingException", "TooManyRequests", "503", "500", "502", "504",
}  # fmt: skip
AWAY_WORDS = re.compile(  # of Lance, whose errors are told apart by their text alone
    r"error sending request|client error \(Connect\)|connection (refused|reset|closed|error)|tcp connect error|dns error"
    r"|(operation|request|connect\w*|read) timed? ?out|broken pipe|incomplete message|error decoding response body"
    r"|SlowDown|ServiceUnavailable|InternalError|(status|code|error:?) ?(408|429|500|502|503|504)\b"
    r"|50[0234] (Internal|Bad|Service|Gateway)",
    re.IGNORECASE,
)
LANCE_WORDS = re.compile(
    r"LanceError|Generic \w+ error|object_store|Encountered internal error|Invalid user input: .*S3"
)


def make_lance_patient() -> None:
    """Has Lance try each request of this process again for as long as `outlast` would, where the user has not said otherwise.

    By default it gives up after some seconds. To be called before a table on an object store is opened.
    """
    os.environ.setdefault("OBJECT_STORE_CLIENT_MAX_RETRIES", "100")
    os.environ.setdefault("OBJECT_STORE_CLIENT_RETRY_TIMEOUT", f"{AWAY_SECONDS:.0f}")


def is_away(error: BaseException) -> bool:
    """Tells whether an error says that storage does not answer now, and not that something is missing, refused or damaged."""
    return any(_is_away(one) for one in _chain(error))


def outlast(act: Callable[[], Result], what: str, seconds: float | None = None) -> Result:
    """Does something that may be done twice, and again for as long as storage is away.

    Args:
        act: asks storage for something.
        what: it does, for the message while waiting: `reading lease-00000007`.
        seconds: how long it waits at most; default: `AWAY_SECONDS`.

    Raises:
        Exception: what `act` raises, where that is no outage (`is_away`) or the outage is too long.
    """
    limit = AWAY_SECONDS if seconds is None else seconds
    begun, told, pause = time.monotonic(), False, 0.1
    while True:
        try:
            return act()
        except Exception as error:
            waited = time.monotonic() - begun
            if not is_away(error) or waited >= limit:
                raise
            if waited > QUIET_SECONDS and not told:
                told = True
                print(
                    f"storage is away ({type(error).__name__}): {what} waits for it, {limit:.0f} s at most",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(LONGEST_PAUSE, 2 * pause)


# -- parts ------------------------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was raised from; Ray keeps the worker's own error as `cause`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        cause = getattr(error, "cause", None)
        error = cause if isinstance(cause, BaseException) else error.__cause__


def _is_away(error: BaseException) -> bool:
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return False
    if isinstance(error, OSError) and error.errno in AWAY_ERRNO:
        return True
    if any(base.__name__ in AWAY_CLASSES for base in type(error).__mro__):
        return True
    response = getattr(error, "response", None)  # botocore's ClientError
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in AWAY_STATUS or response.get("Error", {}).get("Code") in AWAY_CODES
    if getattr(error, "status", None) in AWAY_STATUS:  # aiohttp's ClientResponseError
        return True
    text = str(error)
    return bool(LANCE_WORDS.search(text) and AWAY_WORDS.search(text))

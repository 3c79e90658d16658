"""What counts as storage being away, and waiting for it."""

from __future__ import annotations

import errno
from typing import Any

import botocore.exceptions
import pytest

from lidit.runtime import outage
from lidit.runtime.outage import is_away, outlast

pytestmark = pytest.mark.unit

LANCE = (
    "LanceError(IO): Generic S3 error: Error performing GET http://127.0.0.1:1/b/t.lance in 589ms, after 3 retries, "
    "max_retries: 3, retry_timeout: 180s  - {}, lance-io/src/object_reader.rs:335:56"
)


def client_error(code: str, status: int) -> Exception:
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(response, "GetObject")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(),
        TimeoutError(),
        OSError(errno.EHOSTUNREACH, "no route"),
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"),
        client_error("SlowDown", 503),
        caused(OSError(errno.EIO, "internal"), client_error("InternalError", 500)),
        OSError(LANCE.format("HTTP error: error sending request")),
        ValueError(LANCE.format("Server returned non-2xx status code: 503 Service Unavailable")),
    ],
    ids=repr,
)
def test_away(error: Exception) -> None:
    assert is_away(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("x"),
        PermissionError("expired"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        client_error("AccessDenied", 403),
        client_error("NoSuchKey", 404),
        client_error("PreconditionFailed", 412),
        ValueError("connection refused is what the caption says"),
        OSError(LANCE.format("Server returned non-2xx status code: 409 Conflict: ConditionalRequestConflict")),
        OSError(LANCE.format("Server returned non-2xx status code: 400 Bad Request: ExpiredToken")),
        ValueError(LANCE.format("Not found")),
    ],
    ids=repr,
)
def test_an_answer_is_no_outage(error: Exception) -> None:
    assert not is_away(error)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it slept, instead of sleeping."""
    slept: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(outage.time, "sleep", sleep)
    monkeypatch.setattr(outage.time, "monotonic", lambda: now[0])
    return slept


def test_waits_until_storage_is_back(calls: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Any] = [ConnectionRefusedError()] * 30 + ["content"]

    def act() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert outlast(act, "reading a file") == "content" and len(calls) == 30 and max(calls) <= outage.LONGEST_PAUSE
    said = "storage is away (ConnectionRefusedError): reading a file waits for it, 600 s at most\n"
    assert capsys.readouterr().err == said, "once"


def test_not_for_ever_and_not_for_an_answer(calls: list[float]) -> None:
    def refused() -> None:
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        outlast(refused, "reading a file", 60.0)
    assert 50 < sum(calls) < 70
    del calls[:]
    with pytest.raises(ZeroDivisionError):
        outlast(lambda: 1 // 0, "dividing")
    assert not calls

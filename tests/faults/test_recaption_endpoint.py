"""An endpoint that is down, slow, overloaded, broken or wrong: bounded tries, then a row error or a stop that can be resumed.

Faults come from a small proxy in front of `transformers serve` with the demo's VLM.
"""

from __future__ import annotations

import dataclasses
import itertools
import pickle
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipelines import ingest, recaption
from pipelines.captioning.openai_engine import EndpointCaptioner, EndpointConfig
from pipelines.captioning.request import INSTRUCTION, CaptionAnswer, CaptionRequest
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.unit_pass import CommitConfig
from pipelines.engine.worker import Unavailable
from pipelines.ingest import IngestConfig
from pipelines.recaption import RecaptionConfig

pytestmark = [pytest.mark.faults, pytest.mark.slow]
ONE = ActorsConfig(min=1, max=1, num_gpus=0)
SECRET = "sk-planted-fedcba9876543210"
GARBAGE = {
    "no json": (200, "text/html", b"<html>It works!</html>"),
    "cut json": (200, "application/json", b'{"choices": [{"mess'),
    "other json": (200, "application/json", b'{"hello": "world"}'),
    "no choices": (200, "application/json", b'{"choices": [], "usage": null}'),
    "null": (200, "application/json", b"null"),
}
Fault = Callable[["Handler"], bool]
"""Answers a request in the server's place and returns True, or returns False: let it pass."""


class Handler(BaseHTTPRequestHandler):
    """Forwards to the server behind, unless the proxy's next fault says otherwise."""

    server: Proxy

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["content-length"]))
        self.server.seen.append((time.monotonic(), self.body, self.headers.get("authorization", "")))
        fault = self.server.next_fault()
        if fault is None or not fault(self):
            self.forward()

    def do_GET(self) -> None:
        if self.server.broken_models is not None:
            self.reply(self.server.broken_models, "application/json", b"{}")
        else:
            self.reply(200, "application/json", b'{"object": "list", "data": []}')

    def forward(self) -> None:
        request = urllib.request.Request(
            self.server.behind + self.path.removeprefix("/v1"), self.body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            self.reply(answer.status, answer.headers["content-type"], answer.read())

    def reply(self, status: int, kind: str, body: bytes, **headers: str) -> bool:
        self.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        return True

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


class Proxy(ThreadingHTTPServer):
    """`faults`: what happens to the next requests, in order; `always`: to all after those."""

    daemon_threads = True

    def __init__(self, behind: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.seen = behind, []
        self.faults: list[Fault | None] = []
        self.always: Fault | None = None
        self.broken_models: int | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_fault(self) -> Fault | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, *arguments: Any) -> None:
        """A client that gave up waiting is what some of the tests are about."""


def status(code: int, **headers: str) -> Fault:
    return lambda handler: handler.reply(code, "application/json", b'{"error": {"message": "no such luck"}}', **headers)


def garbage(name: str) -> Fault:
    return lambda handler: handler.reply(*GARBAGE[name])


def reset(handler: Handler) -> bool:
    """Hangs up without a word."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def hang(handler: Handler) -> bool:
    """Answers when nobody waits any more."""
    time.sleep(1.5)
    return True


@pytest.fixture
def proxy(vlm_server: Any) -> Iterator[Proxy]:
    made = Proxy(vlm_server.url)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def config(proxy: Proxy, vlm_server: Any, monkeypatch: pytest.MonkeyPatch) -> EndpointConfig:
    monkeypatch.setenv("LIDIT_TEST_KEY", SECRET)
    return EndpointConfig(proxy.url, vlm_server.model, key_variable="LIDIT_TEST_KEY", concurrency=2, tries=3)


@pytest.fixture(scope="module")
def scene() -> bytes:
    from demo.world.scenes import example

    return example(7, 64, 64)["image_bytes"]


def ask(config: EndpointConfig, *images: bytes) -> tuple[list[CaptionAnswer], EndpointCaptioner]:
    engine = EndpointCaptioner(config, 96, 512)
    return engine([CaptionRequest(image, INSTRUCTION, seed=3) for image in images]), engine


def good(answer: CaptionAnswer) -> bool:
    return answer.error is None and answer.text.endswith(".") and answer.tokens > 5 and not answer.cut_off


def test_an_answer_and_what_was_sent_for_it(config: EndpointConfig, proxy: Proxy, scene: bytes) -> None:
    (answer,), engine = ask(config, scene)
    assert good(answer) and engine.counts["tokens"] == answer.tokens and not engine.counts["endpoint_retries"]
    ((_, body, key),) = proxy.seen
    assert key == f"Bearer {SECRET}" and b'"seed":3' in body.replace(b" ", b"") and SECRET.encode() not in body
    with pytest.raises(TypeError, match="holds a key"):
        pickle.dumps(engine)


def test_cut_off_at_the_limit(config: EndpointConfig, scene: bytes) -> None:
    (answer,) = EndpointCaptioner(config, 4, 512)([CaptionRequest(scene, INSTRUCTION)])
    assert answer.cut_off and answer.tokens == 4


@pytest.mark.parametrize(
    "faults",
    [
        [status(500), status(503)],
        [status(429), status(408)],
        [reset, reset],
        *([garbage(name), garbage(name)] for name in GARBAGE),
    ],
    ids=["5xx", "overloaded", "reset", *GARBAGE],
)
def test_what_passes_is_tried_again(config: EndpointConfig, proxy: Proxy, scene: bytes, faults: list[Fault]) -> None:
    proxy.faults = list(faults)
    (answer,), engine = ask(config, scene)
    assert good(answer) and engine.counts["endpoint_retries"] == 2 and len(proxy.seen) == 3


def test_a_slow_server_runs_into_the_timeout(config: EndpointConfig, proxy: Proxy, scene: bytes) -> None:
    (warm,), _ = ask(config, scene)
    proxy.faults, proxy.seen[:] = [hang], []
    began = time.monotonic()
    (answer,), engine = ask(dataclasses.replace(config, timeout_seconds=1.0, tries=10), scene)
    assert answer == warm and engine.counts["endpoint_retries"] >= 1 and time.monotonic() - began >= 1.0


def test_pauses_grow_and_the_server_may_name_one(config: EndpointConfig, proxy: Proxy, scene: bytes) -> None:
    proxy.faults = [status(500), status(500), status(500), status(429, retry_after="0.05")]
    (answer,), _ = ask(dataclasses.replace(config, tries=5), scene)
    assert good(answer)
    times = [at for at, _, _ in proxy.seen]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses[0] >= 0.3 and pauses[1] >= 0.7 and pauses[2] >= 1.5 and 0.05 <= pauses[3] < 3.0


def test_a_long_pause_that_the_server_asks_for_is_bounded(
    config: EndpointConfig, proxy: Proxy, scene: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client alone would not try again after an hour."""
    monkeypatch.setattr("pipelines.captioning.openai_engine.LONGEST_PAUSE", 0.5)
    proxy.faults = [status(429, retry_after="3600")]
    (answer,), engine = ask(config, scene)
    assert good(answer) and engine.counts["endpoint_retries"] == 1
    assert 0.5 <= proxy.seen[1][0] - proxy.seen[0][0] < 10


def test_a_request_that_always_fails_on_a_server_that_lives_is_its_own_error(
    config: EndpointConfig, proxy: Proxy, scene: bytes
) -> None:
    from demo.world.scenes import example

    poison = example(8, 64, 64)["image_bytes"]
    import base64

    mark = base64.b64encode(poison)[:200]
    proxy.always = lambda handler: mark in handler.body and handler.reply(500, "text/plain", b"cuda error")
    answers, _ = ask(config, scene, poison)
    assert good(answers[0]) and "failed 3 times: HTTP 500" in (answers[1].error or "")
    for code in (400, 413, 422):
        proxy.always, proxy.seen[:] = status(code), []
        (answer,), _ = ask(config, scene)
        assert f"the endpoint refuses it: HTTP {code}" in (answer.error or "") and len(proxy.seen) == 1, "tried once"


@pytest.mark.parametrize(
    ("code", "advice"), [(401, "the key"), (403, "the key"), (404, "endpoint.url and endpoint.model")]
)
def test_wrong_key_or_address_stops_at_once(
    config: EndpointConfig, proxy: Proxy, scene: bytes, code: int, advice: str
) -> None:
    proxy.always = lambda handler: handler.reply(
        code, "application/json", b'{"error": {"message": "bad key ' + SECRET.encode() + b'"}}'
    )
    with pytest.raises(Unavailable, match=f"HTTP {code}.*look at {advice}") as raised:
        ask(config, *[scene] * 6)
    assert SECRET not in str(raised.value) and "***" in str(raised.value)
    assert len(proxy.seen) <= 2 * config.concurrency


def test_a_gateway_whose_server_is_gone_is_down(config: EndpointConfig, proxy: Proxy, scene: bytes) -> None:
    proxy.always, proxy.broken_models = status(503), 503
    with pytest.raises(Unavailable, match="no answer in 3 tries: HTTP 503"):
        ask(config, scene)


def test_a_damaged_image_is_never_sent(config: EndpointConfig, proxy: Proxy, scene: bytes) -> None:
    (answer,), _ = ask(config, scene[:60])
    assert answer.error and proxy.seen == []


def captioned(world: Any) -> int:
    """Rows whose caption is committed."""
    dataset = world.table
    return dataset.count_rows("caption_status IS NOT NULL") if "caption_status" in dataset.schema.names else 0


def test_the_server_goes_down_in_the_middle_and_the_job_resumes(
    world: Any, config: EndpointConfig, proxy: Proxy, ray_here: Any
) -> None:
    """Nothing is marked as failed: what is missing is done when the server is up again."""
    ingest.main(IngestConfig("scenes:12", str(world.store), 3, actors=ONE))
    job = RecaptionConfig(
        store=str(world.store), engine="openai", endpoint=config, max_new_tokens=96, retries=0, blank_share=0.0,
        actors=ONE, commit=CommitConfig(1, 0.0),
    )  # fmt: skip
    proxy.always, proxy.broken_models = lambda handler: captioned(world) > 0 and reset(handler), 503
    with pytest.raises(Exception, match="gave no answer in 3 tries"):
        recaption.main(job)
    done = captioned(world)
    assert done in (3, 6, 9) and all(row["recaption_error"] is None for row in world.rows().values())
    proxy.always = proxy.broken_models = None
    summary = recaption.main(job)
    assert (summary.ok, summary.rows, summary.errors) == (True, 12 - done, 0)
    assert all(row["caption_status"] is not None for row in world.rows().values())
    assert world.orphans() == set()


def test_the_command_line_says_what_happened(world: Any, vlm_server: Any) -> None:
    """Nobody listens at all: exit status 1, the reason, nothing stored."""
    world.run("ingest", "--store", world.store, "--source", "scenes:3")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    flags = ["--engine", "openai", "--endpoint.url", url, "--endpoint.model", "any", "--endpoint.tries", 2]
    result = world.run("recaption", "--store", world.store, *flags, expect=1)
    assert "gave no answer in 2 tries" in result.stderr and "run the same command again" in result.stderr
    assert result.stdout == "" and all(row["caption_status"] is None for row in world.rows().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "localhost:8000"}, "expected http"),
        ({"url": f"http://user:{SECRET}@host/v1"}, "expected no credentials"),
        ({"url": f"http://host/v1?key={SECRET}"}, "expected no credentials"),
        ({"concurrency": 0}, "endpoint.concurrency: expected a whole number >= 1, received 0"),
    ],
)
def test_wrong_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        EndpointConfig(**change)
    assert SECRET not in str(raised.value)


def test_no_model_is_named() -> None:
    with pytest.raises(ValueError, match=r"endpoint.model: expected the model's name"):
        EndpointCaptioner(EndpointConfig(), 10, 512)

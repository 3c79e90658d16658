"""`EndpointCaptioner`: captions from any server that speaks the OpenAI protocol (vLLM, SGLang, `transformers serve`, ...).

Requests go out from a bounded number of threads. The `openai` client retries what may pass (no connection, a timeout, 408,
409, 429, 5xx, an answer that is not of the protocol) with exponential backoff and jitter, or after the server's `Retry-After`.
When a request has used up its tries, the server is asked for its list of models:

- it answers: the server lives, so this request is a row error (too many of those stop the job, as everywhere);
- it does not: `Unavailable` stops the job. What is committed is kept; the same command goes on.

A request that the server refuses as such (400, 413, 422) is a row error at once; a wrong key, address or model (401, 403,
404) stops the job at once.

The key comes from the environment of the process that sends, and is kept in the HTTP client alone: not in the config, not
in a pickle, and it is struck out of every message.
"""

from __future__ import annotations

import base64
import importlib
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lidit.images.pixels import ImageError
from lidit.runtime.fields import Config, PositiveFloat, PositiveInt
from lidit.runtime.uris import shown
from pipelines.captioning.image import sendable
from pipelines.captioning.request import CaptionAnswer, CaptionRequest, conversation
from pipelines.engine.worker import Unavailable

NO_KEY = "none"  # sent where the environment has no key: servers of one's own mostly want none
SEED_BITS = 31  # what every server takes
PASSES = {408, 409, 429}  # and 5xx: the client has tried again
FATAL = {401: "the key", 403: "the key", 404: "endpoint.url and endpoint.model"}  # status -> what to look at
LONGEST_PAUSE = 60.0  # seconds between two tries, whatever the server asks for
GATEWAY = {502, 503, 504}  # what stands in front of the server says that it is not there


@dataclass(frozen=True)
class EndpointConfig(Config):
    """A server of the OpenAI protocol, and how patient its clients are."""

    url: str = "http://127.0.0.1:8000/v1"
    """Its base URL, up to and with `/v1`. No credentials in it: the key comes from the environment."""
    model: str = ""
    """The model's name at the server; part of the fingerprint."""
    revision: str | None = None
    """Version of what is served under that name, in your words (a commit hash, a date): part of the fingerprint, not sent."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, on every node. Unset there: no key is sent."""
    concurrency: PositiveInt = 16
    """Requests in flight at once, per actor."""
    timeout_seconds: PositiveFloat = 120.0
    """Longest wait for an answer."""
    tries: PositiveInt = 8
    """Tries of a request before it counts as failed; by default they span about half a minute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        address, _, query = self.url.partition("?")
        if query or shown(self.url) != self.url:
            raise ValueError(
                f"endpoint.url: expected no credentials in it, received some ({shown(address)}); put the key into the "
                f"environment variable {self.key_variable}"
            )
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint.url: expected http(s)://HOST[:PORT]/v1, received {self.url!r}")


class EndpointCaptioner:
    """Captions images through a server of the OpenAI protocol: the engine `openai`.

    Args:
        config: the server.
        max_new_tokens: longest answer, in tokens.
        image_side: larger images are brought to this longer side, in pixels, before they are sent.

    Raises:
        ValueError: no model is named; the package `openai` is not installed.
    """

    def __init__(self, config: EndpointConfig, max_new_tokens: int, image_side: int):
        if not config.model:
            raise ValueError("endpoint.model: expected the model's name at the server (`GET /v1/models` lists them)")
        try:
            import openai
        except ImportError as error:
            raise ValueError("engine openai: expected the package `openai`: pip install 'lidit[openai]'") from error
        self.config, self.max_new_tokens, self.image_side = config, max_new_tokens, image_side
        self.counts: Counter[str] = Counter()
        self._openai = openai
        self._key = os.environ.get(config.key_variable, "").strip()
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=self._key or NO_KEY,
            timeout=config.timeout_seconds,
            max_retries=config.tries - 1,
            http_client=openai.DefaultHttpxClient(event_hooks={"response": [_check_answer]}),
        )
        self._lock = threading.Lock()
        self._over: Unavailable | None = None  # why no request is sent any more

    def __reduce__(self) -> Any:
        raise TypeError("an EndpointCaptioner holds a key and is not to be pickled: make one where it is needed")

    def load(self) -> None:
        """Nothing to do here: the server has loaded its model."""

    def __call__(self, requests: list[CaptionRequest]) -> list[CaptionAnswer]:
        """The answers, in the order of the requests.

        Raises:
            Unavailable: the server cannot be reached, or refuses everything.
        """
        self._over = None
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            answers = list(pool.map(self._answer, requests))
        self.counts["tokens"] += sum(answer.tokens for answer in answers)
        return answers

    def _answer(self, request: CaptionRequest) -> CaptionAnswer:
        """One request, with the client's retries."""
        if self._over is not None:
            raise self._over
        try:
            data, mime = sendable(request.image, self.image_side, request.blank)
        except ImageError as error:
            return CaptionAnswer(error=str(error))
        body = self._body(request, f"data:{mime};base64,{base64.b64encode(data).decode()}")
        try:
            response = self._client.chat.completions.with_raw_response.create(**body)
            self._count_retries(response.retries_taken)
            return _read(response.http_response)
        except self._openai.APIStatusError as error:
            failure = f"HTTP {error.status_code}, {str(error.message)[:200]}"
            if error.status_code in FATAL:
                advice = f"look at {FATAL[error.status_code]}"
                raise self._unavailable(f"the endpoint {self.config.url} refuses: {failure}; {advice}") from None
            if error.status_code not in PASSES and error.status_code < 500:
                return CaptionAnswer(error=self._clean(f"the endpoint refuses it: {failure}"))
        except self._openai.APIError as error:  # no connection, a timeout, an answer that is none of the protocol
            failure = f"{type(error).__name__}: {error.__cause__ or error}"
        self._count_retries(self.config.tries - 1)
        if self._lives():
            return CaptionAnswer(error=self._clean(f"the endpoint failed {self.config.tries} times: {failure}"))
        raise self._unavailable(
            f"the endpoint {self.config.url} gave no answer in {self.config.tries} tries: {failure}. What is committed is "
            f"kept; run the same command again when it is up"
        )

    def _unavailable(self, reason: str) -> Unavailable:
        self._over = Unavailable(self._clean(reason))
        return self._over

    def _count_retries(self, retries: int) -> None:
        with self._lock:
            self.counts["endpoint_retries"] += retries

    def _lives(self) -> bool:
        """Tells whether a server answers at all, and not a gateway in its place."""
        try:
            self._client.with_options(max_retries=0).models.list()
        except self._openai.APIStatusError as error:
            return error.status_code not in GATEWAY
        except self._openai.APIError:
            return False
        return True

    def _body(self, request: CaptionRequest, image_url: str) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "messages": conversation(request.prompt, {"type": "image_url", "image_url": {"url": image_url}}),
            "max_tokens": self.max_new_tokens,
            "temperature": request.temperature,
            "seed": request.seed & ((1 << SEED_BITS) - 1),
        }

    def _clean(self, text: str) -> str:
        """The text without the key and other secrets, should a server or a library have put them there."""
        return shown(text.replace(self._key, "***") if self._key else text)


def _check_answer(response: Any) -> None:
    """Hook of the HTTP client: an answer that is not of the protocol raises, so that it is retried as a lost connection is.

    A `Retry-After` is bounded: `openai` gives a request up at once where it is asked to wait for more than two minutes.
    """
    asked = response.headers.get("retry-after", "")
    if asked.isdecimal() and float(asked) > LONGEST_PAUSE:
        response.headers["retry-after"] = str(LONGEST_PAUSE)
    if response.request.method == "POST" and response.is_success:
        response.read()
        _read(response)


def _read(response: Any) -> CaptionAnswer:
    """HTTP response of a chat completion -> its answer. Raises `RequestError` of its library where it is none."""
    try:
        completion = response.json()
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        text, cut_off = choice["message"].get("content"), choice.get("finish_reason") == "length"
        return CaptionAnswer((text or "").strip(), int(usage.get("completion_tokens") or 0), cut_off)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"an answer that is not of the protocol ({type(error).__name__}): {response.text[:120]!r}"
        library = importlib.import_module(
            type(response).__module__.partition(".")[0]
        )  # httpx, or httpx2 since openai 3
        raise library.RequestError(reason, request=response.request) from None

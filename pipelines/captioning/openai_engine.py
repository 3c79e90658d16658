"""`EndpointCaptioner`: captions from any server that speaks the OpenAI protocol (vLLM, SGLang, `transformers serve`, ...).

Requests go out from a bounded number of threads. What may pass (no connection, a timeout, 408, 409, 425, 429, 5xx, an answer
that is not of the protocol) is tried again after a pause that doubles each time and has a random part, or that the server
asked for. When a request has used up its tries, the server is asked for its list of models:

- it answers: the server lives, so this request is a row error (too many of those stop the job, as everywhere);
- it does not: `Unavailable` stops the job. What is committed is kept; the same command goes on.

A request that the server refuses as such (400, 413, 422) is a row error at once; a wrong key, address or model (401, 403,
404) stops the job at once.

The key comes from the environment of the process that sends, and is kept in the HTTP client alone: not in the config, not
in a pickle, and it is struck out of every message.
"""

from __future__ import annotations

import base64
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lidit.images.pixels import ImageError
from lidit.runtime.uris import shown
from pipelines.captioning.image import sendable
from pipelines.captioning.request import CaptionAnswer, CaptionRequest, conversation
from pipelines.engine.worker import Unavailable

NO_KEY = "none"  # sent where the environment has no key: servers of one's own mostly want none
SEED_BITS = 31  # what every server takes
PASSES = {408, 409, 425, 429}  # and 5xx: worth another try
FATAL = {401: "the key", 403: "the key", 404: "endpoint.url and endpoint.model"}  # status -> what to look at
GATEWAY = {502, 503, 504}  # what stands in front of the server says that it is not there
LONGEST_PAUSE = 60.0  # seconds between two tries


@dataclass(frozen=True)
class EndpointConfig:
    """A server of the OpenAI protocol, and how it is treated."""

    url: str = "http://127.0.0.1:8000/v1"
    """Its base URL, up to and with `/v1`. No credentials in it: the key comes from the environment."""
    model: str = ""
    """The model's name at the server; part of the fingerprint."""
    revision: str | None = None
    """What the server serves under that name, in your words (a commit hash, a date): part of the fingerprint, not sent."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, on every node. Unset there: no key is sent."""
    concurrency: int = 16
    """Requests in flight at once, per actor."""
    timeout_seconds: float = 120.0
    """Longest wait for an answer."""
    tries: int = 6
    """Of a request at most, before it counts as failed."""
    first_pause_seconds: float = 1.0
    """Pause before the second try, drawn between half and all of it; it doubles with every further one, up to a minute."""

    def __post_init__(self) -> None:
        address, _, query = self.url.partition("?")
        if query or shown(self.url) != self.url:
            raise ValueError(
                f"endpoint.url: expected no credentials in it, received some ({shown(address)}); put the key into the "
                f"environment variable {self.key_variable}"
            )
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"endpoint.url: expected http(s)://HOST[:PORT]/v1, received {self.url!r}")
        if self.concurrency < 1 or self.tries < 1 or self.timeout_seconds <= 0 or self.first_pause_seconds < 0:
            raise ValueError(f"endpoint: expected concurrency and tries >= 1 and seconds above 0, received {self}")


class EndpointCaptioner:
    """The engine `openai`.

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
            base_url=config.url, api_key=self._key or NO_KEY, timeout=config.timeout_seconds, max_retries=0
        )
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __reduce__(self) -> Any:
        raise TypeError("an EndpointCaptioner holds a key and is not to be pickled: make one where it is needed")

    def load(self) -> None:
        """Nothing to do here: the server has loaded its model."""

    def __call__(self, requests: list[CaptionRequest]) -> list[CaptionAnswer]:
        """The answers, in the order of the requests.

        Raises:
            Unavailable: the server cannot be reached, or refuses everything.
        """
        self._stop.clear()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = [pool.submit(self._answer, request) for request in requests]
            try:
                answers = [future.result() for future in futures]
            except BaseException:
                self._stop.set()  # those that pause wake up and end
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.counts["tokens"] += sum(answer.tokens for answer in answers)
        return answers

    def _answer(self, request: CaptionRequest) -> CaptionAnswer:
        """One request, tried again as long as that may help."""
        try:
            data, mime = sendable(request.image, self.image_side, request.blank)
        except ImageError as error:
            return CaptionAnswer(error=str(error))
        body = self._body(request, f"data:{mime};base64,{base64.b64encode(data).decode()}")
        for attempt in range(self.config.tries):
            failure, pause = "", None
            try:
                return self._read(self._client.chat.completions.with_raw_response.create(**body))
            except _NoAnswer as error:
                failure = str(error)
            except self._openai.APIStatusError as error:
                if error.status_code in FATAL:
                    raise Unavailable(self._message(error, f"look at {FATAL[error.status_code]}")) from None
                if error.status_code not in PASSES and error.status_code < 500:
                    return CaptionAnswer(error=self._clean(f"the endpoint refuses it: {_status(error)}"))
                failure, pause = _status(error), _asked_pause(error)
            except self._openai.APIConnectionError as error:  # timeouts among them
                failure = f"{type(error).__name__}: {error.__cause__ or error}"
            except self._openai.APIError as error:  # an answer that is none of the protocol
                failure = f"{type(error).__name__}: {error}"
            with self._lock:
                self.counts["endpoint_retries"] += 1
            if attempt + 1 < self.config.tries and self._stop.wait(self._pause(attempt) if pause is None else pause):
                raise Unavailable("stopped with the others")
        if self._lives():
            return CaptionAnswer(error=self._clean(f"the endpoint failed {self.config.tries} times: {failure}"))
        raise Unavailable(
            self._clean(
                f"the endpoint {self.config.url} gave no answer in {self.config.tries} tries: {failure}. What is committed is "
                f"kept; run the same command again when it is up"
            )
        )

    def _lives(self) -> bool:
        """Whether a server answers at all, and not a gateway in its place."""
        try:
            self._client.models.list()
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

    def _read(self, response: Any) -> CaptionAnswer:
        """The protocol's answer; raises _NoAnswer where it is none."""
        try:
            completion = response.parse()
            choice = completion.choices[0]
            text, finish = choice.message.content, choice.finish_reason
            tokens = completion.usage.completion_tokens if completion.usage else 0
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            begin = response.text[:120] if hasattr(response, "text") else ""
            raise _NoAnswer(f"an answer that is not of the protocol ({type(error).__name__}): {begin!r}") from None
        if text is not None and not isinstance(text, str):
            raise _NoAnswer(f"a message that is no text: {text!r:.120}")
        return CaptionAnswer((text or "").strip(), int(tokens or 0), finish == "length")

    def _pause(self, attempt: int) -> float:
        longest = min(LONGEST_PAUSE, self.config.first_pause_seconds * 2**attempt)
        return random.uniform(longest / 2, longest)  # not all at the same moment

    def _message(self, error: Any, advice: str) -> str:
        return self._clean(f"the endpoint {self.config.url} refuses: {_status(error)}; {advice}")

    def _clean(self, text: str) -> str:
        """The text without the key and other secrets, should a server or a library have put them there."""
        return shown(text.replace(self._key, "***") if self._key else text)


class _NoAnswer(Exception):
    """The server sent something else than an answer."""


def _status(error: Any) -> str:
    return f"HTTP {error.status_code}, {str(error.message)[:200]}"


def _asked_pause(error: Any) -> float | None:
    """Seconds that the server asks to wait (`Retry-After`), None where it does not say."""
    try:
        return min(LONGEST_PAUSE, max(0.0, float(error.response.headers["retry-after"])))
    except (KeyError, ValueError):
        return None

"""A proxy before an S3 server that does what object stores do on a bad day. Fixture `s3_proxy`.

`rule(request)` says of every request what becomes of it; the first line of the request is all it needs to know.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STALL_SECONDS = 10.0
CODES = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation is in progress."),
    "precondition": (412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """What is known of a request before it is passed on."""

    method: str
    path: str  # with its query
    conditional: bool  # If-None-Match or If-Match

    @property
    def is_part(self) -> bool:
        """Whether it is a part of a multipart upload."""
        return self.method == "PUT" and "partNumber=" in self.path

    @property
    def is_commit(self) -> bool:
        """Whether it would make a new version of a Lance table."""
        return self.method == "PUT" and "/_versions/" in self.path and self.path.partition("?")[0].endswith(".manifest")


Rule = Callable[[Request], str]


class S3Proxy:
    """Listens on loopback. `rule` gives `pass` or one of:

    - `slow_down`, `conflict`, `precondition`, `expired`: that answer, the request is not passed on;
    - `reset`: the connection is reset in the middle of the request's body;
    - `stall`: passed on after ten seconds;
    - `lose_answer`: passed on, and the connection closed without an answer.
    """

    def __init__(self, port: int):
        self.rule: Rule = lambda request: "pass"
        self.seen: Counter[str] = Counter()  # what became of requests
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True  # the client has given up

            def log_message(self, *arguments: Any) -> None:
                pass

            def do(self) -> None:
                proxy._handle(self, port)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self, rule: Rule) -> None:
        """Begins anew with another rule."""
        with self._lock:
            self.rule, self.seen = rule, Counter()

    def stop(self) -> None:
        """Ends it."""
        self.server.shutdown()
        self.server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler, port: int) -> None:
        headers = handler.headers
        request = Request(handler.command, handler.path, "If-None-Match" in headers or "If-Match" in headers)
        with self._lock:
            action = self.rule(request)
            self.seen[action] += 1
        length = int(headers.get("Content-Length", 0))
        if action == "reset":
            handler.rfile.read(length // 2)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        body = handler.rfile.read(length)
        if action in CODES:
            _refuse(handler, *CODES[action])
            return
        if action == "stall":
            time.sleep(STALL_SECONDS)
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            upstream.request(handler.command, handler.path, body, dict(headers))
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        if action == "lose_answer":
            handler.close_connection = True
            return
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                handler.send_header(name, value)
        size = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(content))
        handler.send_header("Content-Length", size or "0")
        handler.end_headers()
        handler.wfile.write(content)


def _refuse(handler: BaseHTTPRequestHandler, status: int, code: str, message: str) -> None:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    )
    handler.send_response(status)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)

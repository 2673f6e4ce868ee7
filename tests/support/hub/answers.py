"""Requests and answers of the loopback Hub, its HTTP server, and rules that make requests fail."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """An answer. ``cut`` closes the connection after that many bytes of the body, ``drop`` before any byte."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    drop: bool = False

    def having(self, headers: dict[str, str]) -> Answer:
        return replace(self, headers={**self.headers, **headers})


@dataclass
class Request:
    """A request; ``sent`` is the size of the body that was sent back."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    storage: bool = False
    sent: int = 0

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def slice(self, data: bytes) -> Answer:
        """Answer with a file's bytes, or the requested range of them."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if not match:
            return Answer(200, data, {"Accept-Ranges": "bytes"})
        start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        return Answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def yes(body: Any) -> Answer:
    """Return an answer in JSON."""
    return Answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


def no(status: int, message: str, code: str | None = None, **body: str) -> Answer:
    """Return a refusal with the Hub's headers."""
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    if code is not None:
        headers["X-Error-Code"] = code
    return Answer(status, json.dumps({"error": message, **body}).encode(), headers)


Rule = Callable[[Request, Callable[[], Answer]], Answer | None]


def when(pattern: str, change: Callable[[Callable[[], Answer]], Answer], times: int | None = None) -> Rule:
    """Return a rule for requests whose "METHOD path" matches a pattern, the first ``times`` of them or all.

    ``change`` gets a function that does what the request asks, and returns the answer.
    """
    count = 0
    lock = threading.Lock()

    def rule(request: Request, go: Callable[[], Answer]) -> Answer | None:
        nonlocal count
        with lock:
            if not re.search(pattern, f"{request.method} {request.path}") or (times is not None and count >= times):
                return None
            count += 1
        return change(go)

    return rule


def says(status: int, message: str = "", code: str | None = None, **headers: str) -> Callable[..., Answer]:
    """Refuse without doing what is asked."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda go: no(status, message, code).having(named)


def drops(go: Callable[[], Answer]) -> Answer:
    """Close the connection without doing what is asked."""
    return Answer(0, b"", drop=True)


def loses(go: Callable[[], Answer]) -> Answer:
    """Do what is asked, and close the connection without an answer."""
    go()
    return Answer(0, b"", drop=True)


def cuts(size: int) -> Callable[..., Answer]:
    """Close the connection in the middle of the body."""
    return lambda go: replace(go(), cut=size)


def shortens(size: int) -> Callable[..., Answer]:
    """Send only the first bytes, with a matching Content-Length."""
    return lambda go: (lambda a: replace(a, body=a.body[:size]))(go())


def spoils(go: Callable[[], Answer]) -> Answer:
    """Flip a bit of the last byte of the body."""
    answer = go()
    return replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))


class Listener:
    """A threaded HTTP server on a free port of 127.0.0.1.

    Args:
        serve: Answers a request.
        patience: Returns how many bytes of an upload are read before the connection is closed; None for all.
    """

    def __init__(self, serve: Callable[[Request], Answer], patience: Callable[[], int | None] = lambda: None) -> None:
        handler = type("Handler", (_Handler,), {"serve": staticmethod(serve), "patience": staticmethod(patience)})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    serve: Callable[[Request], Answer]
    patience: Callable[[], int | None]

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        patience = type(self).patience() if self.command == "PUT" else None
        if patience is not None and patience < size:
            self.rfile.read(patience)
            self._close()
            return
        body = self.rfile.read(size) if size else self._chunks()
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        answer = type(self).serve(request)
        if answer.drop:
            self._close()
            return
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            sent = answer.body if answer.cut is None else answer.body[: answer.cut]
            request.sent = len(sent)
            with suppress(ConnectionError):  # the client closed the connection early
                self.wfile.write(sent)
            if answer.cut is not None:
                self._close()

    def _chunks(self) -> bytes:
        data = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while count := int(self.rfile.readline(), 16):
                data += self.rfile.read(count)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def _close(self) -> None:
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def log_message(self, format: str, *arguments: object) -> None:
        pass

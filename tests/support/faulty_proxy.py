"""An HTTP proxy in front of a real server, which does to requests what networks and busy servers do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import requests

Fault = Literal["503", "403", "quota", "drop", "lost", "truncate", "slow"]
"""drop: no answer, and the server never hears of it; lost: no answer, though the server has done it; truncate: half of
the answer's body; slow: an answer after `SLOW_S`; the others: that answer, the request not passed on."""
Faults = Callable[[str, str, int], Fault | None]
"""(method, path, how often this very request has come) → what goes wrong with it."""

SLOW_S = 0.3
_ANSWERS = {
    "503": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "403": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "quota": (403, b"<Error><Code>QuotaExceeded</Code><Message>Quota exceeded</Message></Error>"),
}


class Weather:
    """Faults that begin and end while others run: for all requests, or for those of some methods and paths."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._methods: Collection[str] = ()
        self._path = ""
        self.num_struck = 0
        """How many requests it has spoilt."""

    def turn_bad(self, fault: Fault, *, methods: Collection[str] = (), path: str = "") -> None:
        """From now on; `methods`: all if empty; `path`: what the path holds."""
        with self._lock:
            self._fault, self._methods, self._path = fault, methods, path

    def clear_up(self) -> None:
        """Nothing goes wrong from now on."""
        with self._lock:
            self._fault = None

    def __call__(self, method: str, path: str, attempt: int) -> Fault | None:
        with self._lock:
            if self._fault is None or (self._methods and method not in self._methods) or self._path not in path:
                return None
            self.num_struck += 1
            return self._fault


class FaultyProxy:
    """Passes requests on to `target_url`, but for what `faults` says. The Host header is passed on as it came, since
    S3's signature covers it.
    """

    def __init__(self, target_url: str, faults: Faults, *, port: int = 0) -> None:
        attempts: dict[tuple[str, str], int] = {}
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    attempt = attempts[self.command, self.path] = attempts.get((self.command, self.path), 0) + 1
                fault = faults(self.command, self.path, attempt)
                if fault == "drop":
                    self.close_connection = True
                    return
                if fault in _ANSWERS:
                    status, text = _ANSWERS[fault]
                    self.answer(status, {}, text)
                    return
                if fault == "slow":
                    time.sleep(SLOW_S)
                url, headers = target_url + self.path, dict(self.headers)
                answer = requests.request(self.command, url, data=body, headers=headers, timeout=30, stream=True)
                data = answer.raw.read(decode_content=False)
                if fault == "lost":
                    self.close_connection = True
                    return
                hop = ("connection", "transfer-encoding")
                headers = {key: value for key, value in answer.headers.items() if key.lower() not in hop}
                self.answer(answer.status_code, headers, data, cut=fault == "truncate" and len(data) > 1)

            def answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = self.close_connection or cut

            do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = forward

            def log_message(self, *_: object) -> None:
                return

        self._handler, self._port = Handler, port
        self._listener: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.listen()

    @property
    def url(self) -> str:
        """Where it listens, also after a pause."""
        return f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Begins, or begins again on the same port."""
        self._listener = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._listener.daemon_threads = True
        self._port = self._listener.server_address[1]
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def refuse_connections(self) -> None:
        """Nobody listens any more: the kernel refuses. Connections that there are stay open."""
        if self._listener is not None and self._thread is not None:
            self._listener.shutdown()
            self._thread.join()
            self._listener.server_close()
            self._listener = None


@contextmanager
def faulty_proxy(target_url: str, faults: Faults) -> Iterator[FaultyProxy]:
    """A proxy for as long as the block lasts."""
    proxy = FaultyProxy(target_url, faults)
    try:
        yield proxy
    finally:
        proxy.refuse_connections()

"""A proxy between stager and a server, which makes the network and the server fail as it is told."""

from __future__ import annotations

import http.client
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import BinaryIO

_SLOW_BYTES = 64 << 10


class Fault(Enum):
    """What goes wrong with a request."""

    RESET = auto()  # the connection is reset before the server sees anything
    RESET_IN_BODY = auto()  # the same, in the middle of what is sent
    LOSE_ANSWER = auto()  # the server does it, and the answer is lost
    SLOW = auto()  # the body arrives in small pieces
    HOLD = auto()  # it waits until somebody lets it go


@dataclass
class Rule:
    """A fault, or a status that is answered instead of asking the server."""

    method: str
    path: re.Pattern[str]
    what: Fault | int
    times: int
    after: int
    reached: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def matches(self, method: str, path: str) -> bool:
        if method != self.method or self.path.search(path) is None or self.times <= 0:
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        return True


class Proxy:
    """Forwards requests to a port of this host.

    Attributes:
        seen: method and path of each request, in the order in which they came.
        drops: names of headers, in lower case, that are not passed on.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self._is_down = threading.Event()
        self.seen: list[tuple[str, str]] = []
        self.drops: tuple[str, ...] = ()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def when(self, method: str, path: str, what: Fault | int, times: int = 1, after: int = 0) -> Rule:
        """Let ``what`` happen to the next ``times`` requests whose path matches, once ``after`` of them have passed."""
        rule = Rule(method, re.compile(path), what, times, after)
        with self._lock:
            self._rules.append(rule)
        return rule

    def forget(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._rules.clear()

    def go_down(self) -> None:
        """Reset every connection, as long as :meth:`come_back` was not called."""
        self._is_down.set()

    def come_back(self) -> None:
        self._is_down.clear()

    def count(self, method: str, path: str = "") -> int:
        with self._lock:
            return sum(one == method and re.search(path, of) is not None for one, of in self.seen)

    def close(self) -> None:
        for rule in self._rules:
            rule.go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # joins the threads of requests

    def fault_for(self, method: str, path: str) -> Rule | None:
        with self._lock:
            self.seen.append((method, path))
            return next((rule for rule in self._rules if rule.matches(method, path)), None)

    def handle(self, connection: socket.socket) -> None:
        """Read one request, and answer it."""
        stream = connection.makefile("rb")
        line = stream.readline()
        if not line or self._is_down.is_set():
            return _reset(connection)
        method, path, _ = line.decode().split(" ", 2)
        headers = http.client.parse_headers(stream)
        rule = self.fault_for(method, path)
        what = None if rule is None else rule.what
        length = int(headers.get("Content-Length", "0"))
        if rule is not None:
            rule.reached.set()
            if what is Fault.HOLD:
                rule.go_on.wait()
        if what is Fault.RESET:
            return _reset(connection)
        if what is Fault.RESET_IN_BODY:
            stream.read(length // 2)
            return _reset(connection)
        if headers.get("Expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = _read(stream, length, slowly=what is Fault.SLOW)
        if isinstance(what, int):
            connection.sendall(b"HTTP/1.1 %d Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % what)
            return None
        answer = self._ask(method, path, headers, body)
        if what is Fault.LOSE_ANSWER or self._is_down.is_set():
            return _reset(connection)
        connection.sendall(answer)
        return None

    def _ask(self, method: str, path: str, headers: http.client.HTTPMessage, body: bytes) -> bytes:
        asked = http.client.HTTPConnection("127.0.0.1", self._target, timeout=120)
        try:
            asked.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in ("connection", "expect", *self.drops):
                    asked.putheader(name, value)
            asked.endheaders(body)
            found = asked.getresponse()
            data = found.read()
        finally:
            asked.close()
        kept = [(name, value) for name, value in found.getheaders() if name.lower() not in _HOP]
        length = found.getheader("Content-Length") if method == "HEAD" else str(len(data))
        kept += [("Content-Length", length or "0"), ("Connection", "close")]
        head = f"HTTP/1.1 {found.status} {found.reason}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in kept)
        return head.encode() + b"\r\n" + data


_HOP = ("connection", "transfer-encoding", "content-length", "keep-alive")


def _read(stream: BinaryIO, length: int, *, slowly: bool) -> bytes:
    if not slowly:
        return bytes(stream.read(length))
    pieces = []
    while length:
        pieces.append(stream.read(min(_SLOW_BYTES, length)))
        length -= len(pieces[-1])
        threading.Event().wait(0.001)
    return b"".join(pieces)


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that is killed breaks its connections."""


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with suppress(ConnectionError, http.client.HTTPException):
            self.server.proxy.handle(self.request)


@contextmanager
def proxied(port: int) -> Iterator[Proxy]:
    """A proxy before the server at ``port``."""
    proxy = Proxy(port)
    try:
        yield proxy
    finally:
        proxy.close()

"""A small HTTP/1.1 server for tests, in threads of this process, that remembers what it was asked.

A *site* answers requests; a *fault* (see ``faults``) stands before it and may have the answer go
wrong.  What goes over the wire is in the hands of the Response: it can be late, slow, cut off, or
lack its length.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from types import TracebackType
from typing import TypeAlias
from urllib.parse import parse_qs, urlsplit

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_HEAD = 64 << 10
PIECE = 64 << 10  # bytes sent at once
BIG_PIECE = 1 << 20  # the same where speed is what counts
TLS_HANDSHAKE = 22  # the first byte of one
LINGER_NOT = struct.pack("ii", 1, 0)  # closing such a socket resets the connection


@dataclass
class Request:
    """A request, and what became of it."""

    method: str
    target: str  # as sent: a path with its query, or a whole URL if we are a proxy
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    connection: int = 0  # a number for each
    status: int = 0
    sent: int = 0  # bytes of the body; counted first, so that who has them finds them counted

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query)

    @property
    def range(self) -> tuple[int, int | None] | None:
        """(first byte, one past the last); (-n, None) for the last n."""
        unit, _, wanted = self.headers.get("range", "").partition("=")
        first, dash, last = wanted.partition("-")
        if unit != "bytes" or not dash or "," in wanted:
            return None
        if not first:
            return -int(last), None
        return int(first), int(last) + 1 if last else None

    def without(self, *names: str) -> Request:
        """The same without some headers."""
        return replace(self, headers={k: v for k, v in self.headers.items() if k not in names})


@dataclass
class Response:
    """An answer and how it is sent."""

    status: int = 200  # 0: nothing is sent at all
    headers: dict[str, str] = field(default_factory=dict)
    body: Buffer = b""
    delay: float = 0.0  # seconds before it begins
    rate: float | None = None  # bytes a second
    cut: int | None = None  # only so many bytes of the body are sent, then the connection ends …
    reset: bool = False  # … with a reset rather than in peace
    length: bool = True  # whether Content-Length is said; else the end of the connection is the end


Site: TypeAlias = Callable[[Request], Response]
Fault: TypeAlias = Callable[[Request, Site], Response]


def anything(_: Request) -> bool:
    return True


def ranged(request: Request) -> bool:
    """Requests for part of something: data, rather than manifests and the like."""
    return request.range is not None


@dataclass
class _Plan:
    """When a fault strikes."""

    fault: Fault
    when: Callable[[Request], bool]
    skip: int
    times: int | None
    seconds: float | None  # it lasts so long from when it first strikes
    since: float | None = None

    def strikes(self, request: Request) -> bool:
        if self.times == 0 or not self.when(request):
            return False
        if self.skip:
            self.skip -= 1
            return False
        now = time.monotonic()
        if self.seconds is not None:
            self.since = self.since or now
            if now > self.since + self.seconds:
                return False
        if self.times is not None:
            self.times -= 1
        return True


class Throttle:
    """Bytes a second for all connections together."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    def take(self, count: int) -> float:
        """Seconds to wait before so many bytes may go."""
        with self._lock:
            now = time.monotonic()
            at = max(now, self._free_at)
            self._free_at = at + count / self._rate
        return at - now


class Server:
    """A site on a port of 127.0.0.1, from construction until ``stop`` (or the end of a ``with``)."""

    def __init__(
        self,
        site: Site,
        *,
        tls: ssl.SSLContext | None = None,
        rate: float | None = None,
        port: int = 0,
    ) -> None:
        self.site = site
        self.requests: list[Request] = []
        self.connections = 0
        self.busiest = 0  # the most requests that were being answered at a time
        self._busy = 0
        self._tls = tls
        self._throttle = Throttle(rate) if rate else None
        self._plans: list[_Plan] = []
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port: int = self._socket.getsockname()[1]
        self._start(self._accept)

    @property
    def authority(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.authority}"

    # what tests ask for and about ---------------------------------------------------------

    def inject(
        self,
        fault: Fault,
        *,
        when: Callable[[Request], bool] = ranged,
        skip: int = 0,
        times: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Have a fault strike the requests that ``when`` chooses: not the first ``skip`` of them,
        then so many ``times``, or for so many ``seconds``."""
        with self._lock:
            self._plans.append(_Plan(fault, when, skip, times, seconds))

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._plans.clear()

    def forget(self) -> None:
        """Count from here."""
        with self._lock:
            self.requests = []

    @property
    def sent(self) -> int:
        """Bytes of bodies."""
        return sum(request.sent for request in self.requests)

    def of(self, path: str) -> list[Request]:
        """The requests whose path contains something."""
        return [request for request in self.requests if path in request.path]

    # serving ------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all connections, and refuse new ones.  Idempotent."""
        self._stopping.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            connections = list(self._open.values())
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                number = self.connections
                self._open[number] = connection
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            self._start(self._serve, number, connection)

    def _serve(self, number: int, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                connection.settimeout(10)  # of the handshake; somebody may connect and say nothing
                connection = self._tls.wrap_socket(connection, server_side=True)
                connection.settimeout(None)
            with self._lock:
                self._open[number] = connection
            pending = b""
            while not self._stopping.is_set():
                request, pending = _receive(connection, number, pending)
                if request is None or not self._answer(connection, request):
                    return
        except (OSError, ValueError):
            pass  # the client has gone, or does not speak HTTP
        finally:
            with self._lock:
                self._open.pop(number, None)
            connection.close()

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        """Whether the connection can be used again."""
        with self._lock:
            self.requests.append(request)
            struck = next((plan for plan in self._plans if plan.strikes(request)), None)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            if struck is None:
                response = self.site(request)
            else:
                response = struck.fault(request, self.site)
            return self._send(connection, request, response)
        finally:
            with self._lock:
                self._busy -= 1

    def _send(self, connection: socket.socket, request: Request, response: Response) -> bool:
        if response.delay and self._stopping.wait(response.delay):
            return False
        request.status = response.status
        if response.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        if not response.status:
            return False
        headers = dict(response.headers)
        if response.length:
            headers.setdefault("Content-Length", str(len(response.body)))
        keep = (
            response.length
            and response.cut is None
            and request.headers.get("connection", "").lower() != "close"
        )
        if not keep:
            headers["Connection"] = "close"
        reason = HTTPStatus(response.status).phrase
        lines = [f"HTTP/1.1 {response.status} {reason}", *(f"{k}: {v}" for k, v in headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        body = memoryview(b"" if request.method == "HEAD" else response.body)
        if response.cut is not None:
            body = body[: response.cut]
        if response.rate is None and self._throttle is None:
            # in one write where it is small: two would cost the client a second wake-up
            if len(body) <= PIECE:
                request.sent = len(body)
                connection.sendall(head + body)
            else:
                connection.sendall(head)
                for at in range(0, len(body), BIG_PIECE):
                    part = body[at : at + BIG_PIECE]
                    request.sent += len(part)
                    connection.sendall(part)
        else:
            connection.sendall(head)
            self._send_slowly(connection, request, body, response.rate)
        return keep

    def _send_slowly(
        self, connection: socket.socket, request: Request, body: memoryview, rate: float | None
    ) -> None:
        piece = PIECE if rate is None else max(1, min(PIECE, int(rate / 10)))
        for at in range(0, len(body), piece):
            part = body[at : at + piece]
            pause = self._throttle.take(len(part)) if self._throttle else 0.0
            pause += len(part) / rate if rate else 0.0
            if pause and self._stopping.wait(pause):
                raise ConnectionAbortedError
            request.sent += len(part)
            connection.sendall(part)


def _receive(
    connection: socket.socket, number: int, pending: bytes
) -> tuple[Request | None, bytes]:
    """The next request, and what came after it; None at the end of the connection."""
    while b"\r\n\r\n" not in pending:
        got = connection.recv(PIECE)
        if not got or len(pending) > MAX_HEAD:
            return None, b""
        pending += got
        if pending[0] == TLS_HANDSHAKE:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            return None, b""
    head, _, rest = pending.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", 0))
    while len(rest) < length:
        got = connection.recv(1 << 20)
        if not got:
            return None, b""
        rest += got
    return Request(method, target, headers, rest[:length], number), rest[length:]


def no_such_page(_: Request) -> Response:
    """A site with nothing in it."""
    return Response(404, body=b"no such page\n")


# --- serving bytes ----------------------------------------------------------------------------


@dataclass
class Content:
    """Bytes that can be asked for in ranges, and what is said about their version."""

    data: Buffer
    etag: str | None = '"first"'
    modified: str | None = None
    kind: str = "application/octet-stream"
    ranges: bool = True

    def __call__(self, request: Request) -> Response:
        """As a site with one page."""
        if request.method not in ("GET", "HEAD"):
            return Response(405)
        headers = {"Content-Type": self.kind}
        if self.etag:
            headers["ETag"] = self.etag
        if self.modified:
            headers["Last-Modified"] = self.modified
        if self.ranges:
            headers["Accept-Ranges"] = "bytes"
        if request.headers.get("if-match", self.etag or "*") not in (self.etag, "*"):
            return Response(412, headers)
        if request.headers.get("if-none-match") in (self.etag, "*") and self.etag:
            return Response(304, headers)
        wanted = request.range if self.ranges else None
        if wanted is not None and "if-range" in request.headers:
            unchanged = request.headers["if-range"] in (self.etag, self.modified)
            wanted = wanted if unchanged else None
        if wanted is None:
            return Response(200, headers, self.data)
        size = len(self.data)
        first, end = wanted
        if first < 0:
            first, end = max(0, size + first), size
        end = size if end is None else min(end, size)
        if first >= end:
            return Response(416, headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        return Response(206, headers, memoryview(self.data)[first:end])


class Pages:
    """A site of pages by path."""

    def __init__(self, pages: dict[str, Site] | None = None) -> None:
        self.pages = pages or {}

    def __call__(self, request: Request) -> Response:
        return self.pages.get(request.path, no_such_page)(request)

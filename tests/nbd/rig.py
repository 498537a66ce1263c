"""A server in a thread of the tests' process, and sources that misbehave."""

from __future__ import annotations

import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import trio
from pyerofs_nbd.server import listen
from pyerofs_nbd.server.exports import Export, Server

from pyerofs.errors import SourceError
from pyerofs.sources import MemorySource
from pyerofs.sources.base import AsyncSource, Buffer
from pyerofs.sources.local.threaded import ThreadedSource
from tests.nbd.client import PATIENCE, Client

T = TypeVar("T")

SIZE = 300_000
DATA = bytes(n * n % 251 for n in range(SIZE))


def memory(data: bytes = DATA) -> AsyncSource:
    """A source that has all at hand."""
    return ThreadedSource(MemorySource(data))


class Slow(MemorySource):
    """Has everything from ``border`` on at hand; the rest comes when ``go`` is set, or fails when
    ``broken`` is."""

    def __init__(self, data: bytes = DATA, border: int = SIZE) -> None:
        super().__init__(data, name="slow")
        self.border = border
        self.go = threading.Event()
        self.broken = False
        self.asked = 0
        self.hints: list[tuple[int, int]] = []

    def peek(self, offset: int, length: int) -> Buffer | None:
        return super().peek(offset, length) if offset >= self.border else None

    def read_at(self, offset: int, length: int) -> Buffer:
        self.asked += 1
        assert self.go.wait(PATIENCE)
        if self.broken:
            raise SourceError(f"{self.name}: read at {offset}: out of order")
        return super().read_at(offset, length)

    def will_need(self, offset: int, length: int) -> None:
        self.hints.append((offset, length))


class Rig(AbstractContextManager["Rig"]):
    """Runs a server for the length of a ``with`` block."""

    def __init__(self, *exports: Export | AsyncSource, **options: Any) -> None:
        named = [
            e if isinstance(e, Export) else Export(f"e{n}" if n else "", e)
            for n, e in enumerate(exports)
        ]
        self.exports = named
        self.server = Server(named, **options)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._clients: list[Client] = []

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(trio.sleep_forever)
            self._ready.set()

    def __enter__(self) -> Rig:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            client.sock.close()
        if not self._thread.is_alive():
            return
        self.call(self._stop)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    async def _stop(self) -> None:
        self._nursery.cancel_scope.cancel()

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Run something in the server's thread."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def begin(self, function: Callable[..., Awaitable[object]], *arguments: Any) -> Outcome:
        """Start something there."""
        outcome = Outcome()

        async def run() -> None:
            try:
                outcome.value = await function(*arguments)
            finally:
                outcome.done.set()

        trio.from_thread.run_sync(self._nursery.start_soon, run, trio_token=self._token)
        return outcome

    def connect(self) -> Client:
        """A client, before its handshake."""
        ours, theirs = socket.socketpair()
        self.begin(self.server.serve_client, theirs)
        client = Client(ours)
        self._clients.append(client)
        return client

    def started(self, name: str = "", **how: bool) -> Client:
        """A client, after its handshake."""
        client = self.connect()
        client.start(name, **how)
        return client

    def listen(self, *listeners: listen.Listener, **how: int) -> None:
        """Serve whoever connects."""

        async def run() -> None:
            await listen.serve(self.server, listeners, **how)

        self.begin(run)


class Outcome:
    """What became of something that was begun."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: Any = None

    def wait(self) -> Any:
        assert self.done.wait(PATIENCE)
        return self.value

"""Asynchronous sources for threads: one background thread runs trio for all of them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias, TypeVar, TypeVarTuple

import trio

from pyerofs.errors import SourceError
from pyerofs.sources.base import AsyncSource, Buffer, Verifiable
from pyerofs.sources.spec import SourceSpec

# opens sources; what they run in the background goes into the nursery, which is cancelled before they
# are closed
Opener: TypeAlias = Callable[[trio.Nursery], Awaitable[list[AsyncSource]]]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Portal:
    """A thread that runs an event loop."""

    def __init__(self) -> None:
        started: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=trio.run, args=(self._main, started), name="pyerofs-sources", daemon=True
        )
        self._thread.start()
        started.get()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; after a fork it does not."""
        return self._thread.is_alive()

    async def _main(self, started: queue.SimpleQueue[None]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            started.put(None)
            await trio.sleep_forever()

    def run(self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Run an async function in the portal's thread, and wait for its result."""
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have a function called in the portal's thread; does not wait."""
        self._token.run_sync_soon(function)


_portal: Portal | None = None
_lock = threading.Lock()


def portal() -> Portal:
    """The portal of this process, started when first needed and never stopped: its thread is idle."""
    global _portal
    with _lock:
        if _portal is None or not _portal.alive:
            _portal = Portal()
        return _portal


class Session:
    """The sources of one image, for as long as any of them is open."""

    def __init__(self, opener: Opener) -> None:
        """Raises SourceError."""
        self.portal = portal()
        self._opener = opener
        self._stop = trio.Event()
        self._open = 0
        self.sources = self.portal.run(self._start)
        self._open = len(self.sources)

    async def _start(self) -> list[AsyncSource]:
        sources: list[AsyncSource] = await self.portal.nursery.start(self._hold)
        return sources

    async def _hold(self, task_status: trio.TaskStatus[list[AsyncSource]]) -> None:
        sources: list[AsyncSource] = []
        failed: SourceError | None = None
        try:
            async with trio.open_nursery() as nursery:
                try:
                    sources = await self._opener(nursery)
                    task_status.started(sources)
                    await self._stop.wait()
                except SourceError as e:
                    failed = e  # raised below, where the nursery does not make a group of it
                nursery.cancel_scope.cancel()
            if failed is not None:
                raise failed
        finally:
            with trio.CancelScope(shield=True):
                for source in sources:
                    await source.aclose()

    def release(self) -> None:
        """One of the sources is no longer needed."""
        self._open -= 1
        if not self._open:
            self.portal.call_soon(self._stop.set)


class BlockingSource:
    """A Source over an AsyncSource that lives in the portal.  Also a VerifiableSource: where there is
    nothing to verify it by, it is never whole, and ``verify`` does nothing."""

    def __init__(self, inner: AsyncSource, session: Session) -> None:
        self.name = inner.name
        self.size = inner.size
        self._inner = inner
        self._session: Session | None = session

    @property
    def backing(self) -> tuple[int, int] | None:
        return self._inner.backing

    @property
    def pinned(self) -> SourceSpec | None:
        """See ``AsyncSource.pinned``."""
        return self._inner.pinned

    def peek(self, offset: int, length: int) -> Buffer | None:
        return None if self._session is None else self._inner.peek(offset, length)

    def read_at(self, offset: int, length: int) -> Buffer:
        session = self._session
        if session is None:
            raise SourceError(f"{self.name}: is closed")
        found = self._inner.peek(offset, length)
        if found is not None:
            return found
        return session.portal.run(self._inner.read_at, offset, length)

    def will_need(self, offset: int, length: int) -> None:
        """See ``AsyncSource.will_need``."""
        if self._session is not None:
            self._session.portal.call_soon(partial(self._inner.will_need, offset, length))

    def status(self) -> dict[str, Any]:
        """What is cached and what went over the network; see ``AsyncSource.status``."""
        return self._inner.status()

    @property
    def _digested(self) -> Verifiable | None:
        return self._inner.verifiable

    @property
    def verified(self) -> bool:
        return self._digested is not None and self._digested.verified

    @property
    def whole(self) -> bool:
        return self._digested is not None and self._digested.whole

    def verify(self) -> None:
        if self._digested is not None and self._session is not None:
            self._session.portal.run(self._digested.verify)

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.release()


def open_blocking(opener: Opener) -> list[BlockingSource]:
    """What ``opener`` opens in the portal, for threads.  Raises SourceError."""
    session = Session(opener)
    return [BlockingSource(source, session) for source in session.sources]

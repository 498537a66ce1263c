"""A remote blob read through its cache: missing segments are fetched, once each, in large ranges.

Each missing segment is fetched by a *flight*, a single flight that any number of readers wait for.
Neighbouring segments share a request.  Requests run in the background, so a reader that is cancelled
leaves its flights to other readers.

Fetched bytes are claimed, not verified (``store.py``).  Once all of them are on disk, the digest is
checked in the background (``verifier.py``).  ``verify`` fetches the missing ones and waits for that.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.base import (
    SEGMENT,
    SEGMENT_BITS,
    AsyncSource,
    Buffer,
    Source,
    Verifiable,
    check_range,
    within,
)
from pyerofs.sources.cache.ahead import WINDOW, ReadAhead
from pyerofs.sources.cache.blobstore import BlobStore
from pyerofs.sources.cache.store import segments_of
from pyerofs.sources.cache.verifier import Verifier
from pyerofs.sources.local.threaded import ThreadedSource
from pyerofs.sources.net.transport import Pace, Traffic
from pyerofs.sources.spec import SourceSpec

log = logging.getLogger("pyerofs")

RANGE = 8  # segments of one request at most; a reader waits for its own segment only
REQUESTS = 6  # at the same time
BACKGROUND = 2  # tasks that fetch hinted ranges, for which no reader waits yet
BACKGROUND_RANGE = 4  # segments of their requests: what a reader may have to share the line with
HINTS = 256  # hinted ranges in the queue at most
WRITES = 8  # segments being written to the disk at the same time
PATIENCE = 15.0  # seconds that another process may take for a segment before we fetch it ourselves
REREADS = 3  # attempts to read a segment whose checksum is wrong or that was evicted


class Remote(Protocol):
    """The server's side of a blob."""

    name: str
    size: int
    ranged: bool

    @property
    def traffic(self) -> Traffic:
        """Counters of requests, bytes and retries."""

    def stream(self, start: int, end: int, pace: Pace) -> AsyncGenerator[tuple[int, bytes], None]:
        """See ``HttpBlob.stream``."""

    async def aclose(self) -> None:
        """Close the connections."""


class Flight:
    """A segment that is being fetched, and then stored."""

    __slots__ = ("data", "done", "error", "stored")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.stored = trio.Event()
        self.data: Buffer | None = None
        self.error: SourceError | None = None


class CachedSource(AsyncSource):
    """An AsyncSource over a Remote and the store for it; owns both."""

    def __init__(
        self,
        remote: Remote,
        store: BlobStore,
        nursery: trio.Nursery,
        *,
        timeout: float,
        rate: int | None = None,
        pinned: SourceSpec | None = None,
    ) -> None:
        """``timeout`` bounds each read, in seconds; ``rate`` what is fetched in the background, in
        bytes a second."""
        self.name = remote.name
        self.size = remote.size
        self._remote = remote
        self._store = store
        self._whole = ThreadedSource(store)
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._timeout = timeout
        self._rate = rate
        self._pinned = pinned
        self._count = segments_of(remote.size)
        self._flights: dict[int, Flight] = {}
        self._requests = trio.CapacityLimiter(REQUESTS)
        self._writes = trio.CapacityLimiter(WRITES)
        self._later: deque[tuple[int, int]] = deque()  # hinted (first, last) segments
        self._workers = 0  # background tasks that run now
        self._urgent = 0  # requests under way that readers wait for
        self._quiet = trio.Event()
        self._ahead = ReadAhead(self._count)
        self._verifier = Verifier(store, nursery)
        self._verifier.start()

    # the AsyncSource ---------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> Buffer | None:
        """May be called from any thread."""
        if not within(self.size, offset, length):
            return None
        if offset >= self._ahead.trigger:
            self._token.run_sync_soon(self._crossed, offset >> SEGMENT_BITS, idempotent=True)
        found = self._store.peek(offset, length)
        if found is not None:
            self._ahead.peeked(offset + length)
        return found

    @property
    def blocking(self) -> Source | None:
        """The cache's file, once the blob is complete in it."""
        return self._whole.blocking if self._store.complete else None

    @property
    def quick(self) -> bool:
        return self._whole.quick

    @property
    def backing(self) -> tuple[int, int] | None:
        return self._store.backing

    @property
    def pinned(self) -> SourceSpec | None:
        return self._pinned

    @property
    def verifiable(self) -> Verifiable | None:
        return self if self.digest is not None else None

    @property
    def digest(self) -> str | None:
        """The digest that all bytes together must have; None where none is known."""
        return self._store.digest

    @property
    def verified(self) -> bool:
        """Whether the digest of all bytes was checked."""
        return self._store.verified

    def will_need(self, offset: int, length: int) -> None:
        if length <= 0 or not within(self.size, offset, length) or self._store.complete:
            return
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        near = min(last, first + WINDOW)  # checking all of a large range would take too long
        if len(self._later) < HINTS and (near < last or self._absent(first, near)):
            self._later.append((first, last))
            if self._workers < BACKGROUND:
                self._workers += 1
                self._nursery.start_soon(self._fetch_later)

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        if not length:
            return b""
        with trio.move_on_after(self._timeout):
            return await self._read(offset, length)
        raise self._too_late(offset)

    async def _read(self, offset: int, length: int) -> Buffer:
        if self._store.error is not None:
            raise self._store.error
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        self._start(self._absent(first, last), urgent=True)
        self._fetch_ahead(self._ahead.read(offset, length))
        if self._store.complete:
            try:
                return await self._whole.read_at(offset, length)
            except IntegrityError:
                pass  # no longer complete: the damaged segments are fetched again below
        if all(n not in self._flights for n in range(first, last + 1)):
            found = await trio.to_thread.run_sync(self._store.read, offset, length)
            if found is not None:
                return found
        parts = []
        for number in range(first, last + 1):
            data = await self._segment(number)
            start = number << SEGMENT_BITS
            parts.append(memoryview(data)[max(offset - start, 0) : offset + length - start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def aclose(self) -> None:
        """Close the connections and the store.  The nursery must have been cancelled."""
        await self._remote.aclose()
        self._store.close()

    def status(self) -> dict[str, Any]:
        """What is cached and verified, and what went over the network."""
        traffic = self._remote.traffic
        return {
            "name": self.name,
            "size": self.size,
            "cached": min(self._store.present() << SEGMENT_BITS, self.size),
            "complete": self._store.complete,
            "verified": self._store.verified,
            "requests": traffic.requests,
            "fetched": traffic.received,
            "retries": traffic.retries,
        }

    async def forget(self, offset: int, length: int) -> bool:
        """Drop the segments of a range, which were found to be wrong.  True if fetching them again may
        bring other bytes."""
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS

        def forget() -> bool:
            again = [self._store.forget(number) for number in range(first, last + 1)]
            return any(again)

        return await trio.to_thread.run_sync(forget)

    # segments ----------------------------------------------------------------------------

    def seed(self, data: bytes) -> None:
        """Store the blob's first segment if ``data``, its first bytes, holds all of it."""
        if len(data) >= min(SEGMENT, self.size) and self._absent(0, 0):
            with self._store.claimed(0, 0) as ours:
                if ours:
                    self._store.put(0, data[:SEGMENT])

    def _absent(self, first: int, last: int) -> list[int]:
        """Which of the segments ``first`` to ``last`` are neither stored nor being fetched."""
        found = self._store.missing(first, min(last, self._count - 1))
        return [n for n in found if n not in self._flights]

    def _crossed(self, number: int) -> None:
        """Half of what was fetched ahead is used up."""
        self._fetch_ahead(self._ahead.crossed(number))

    def _fetch_ahead(self, numbers: range) -> None:
        """Fetch, or check, what a sequential reader will need next."""
        if numbers:
            first, last = numbers[0], numbers[-1]
            self._start(self._absent(first, last), urgent=True)
            if self._store.unchecked(first, last):
                self._nursery.start_soon(self._check, first, last)

    async def _check(self, first: int, last: int) -> None:
        """Check stored segments before a reader gets to them."""
        try:
            await trio.to_thread.run_sync(self._store.check, first, last)
        except OSError:
            pass  # the reader of that segment meets the same error

    def _start(self, numbers: Sequence[int], *, urgent: bool) -> list[Flight]:
        """Start flights for segments; neighbours share a request."""
        if not numbers:
            return []
        limit = RANGE
        if not self._remote.ranged:  # the server sends the whole blob, whatever range is asked for
            numbers, limit = self._absent(0, self._count - 1), self._count
        started = []
        for first, last in rows(numbers, limit):
            for number in range(first, last + 1):
                flight = self._flights[number] = Flight()
                started.append(flight)
            self._nursery.start_soon(self._fetch, first, last, urgent)
        return started

    async def _segment(self, number: int) -> Buffer:
        """One segment, from the store or fetched.  Raises SourceError."""
        offset, length = self._store.extent(number)
        for _ in range(REREADS):
            flight = self._flights.get(number)
            if self._store.error is not None:
                raise self._store.error
            if flight is None:
                data = await trio.to_thread.run_sync(self._store.read, offset, length)
                if data is not None:
                    return data
                self._start(self._absent(number, number), urgent=True)
                flight = self._flights.get(number)
            if flight is not None:
                await flight.done.wait()
                if flight.error is not None:
                    raise flight.error
                if flight.data is not None:
                    return flight.data
        raise SourceError(f"{self.name}: what was fetched at {offset} can't be kept")

    def _too_late(self, offset: int) -> SourceError:
        return SourceError(
            f"{self.name}: bytes at {offset} did not come within {self._timeout:g} seconds"
        )

    # fetching ----------------------------------------------------------------------------

    async def _fetch_later(self) -> None:
        """Fetch hinted ranges while no reader waits for the network."""
        try:
            while self._later:
                first, last = self._later.popleft()
                while first <= last and first < self._count:
                    await self._lull()
                    started = trio.current_time()
                    row = self._absent(first, min(last, first + BACKGROUND_RANGE - 1))
                    for flight in self._start(row, urgent=False):
                        await flight.done.wait()
                        if flight.error is not None:
                            return  # a reader of that segment meets the same error
                    if row and self._rate:
                        await trio.sleep_until(started + (len(row) << SEGMENT_BITS) / self._rate)
                    first += BACKGROUND_RANGE
        finally:
            self._workers -= 1

    async def _lull(self) -> None:
        """Wait until no reader waits for the network."""
        while self._urgent:
            self._quiet = trio.Event()
            await self._quiet.wait()

    async def _fetch(self, first: int, last: int, urgent: bool) -> None:
        """Fetch neighbouring segments, whose flights have been started, and end these flights."""
        pace = Pace(self._timeout)
        error: SourceError | None = None
        self._urgent += urgent
        try:
            with pace.scope:
                async with self._requests:
                    await self._fetch_claimed(first, last, pace)
            if pace.scope.cancelled_caught:
                error = self._too_late(first << SEGMENT_BITS)
        except SourceError as e:
            error = e
        except OSError as e:
            error = SourceError(f"{self.name}: the cache can't be used: {e.strerror}")
        except Exception as e:  # an internal error must not end the mount
            log.exception("%s: unexpected", self.name)
            error = SourceError(f"{self.name}: unexpected {type(e).__name__}")
        finally:
            self._urgent -= urgent
            if not self._urgent:
                self._quiet.set()
            for number in range(first, last + 1):
                flight = self._flights.get(number)
                if flight is not None and flight.data is None:
                    self._land(number, error)

    def _land(self, number: int, error: SourceError | None = None) -> None:
        """End a flight; without an error, its readers look into the store again."""
        flight = self._flights.pop(number)
        flight.error = error
        flight.done.set()
        flight.stored.set()

    async def _fetch_claimed(self, first: int, last: int, pace: Pace) -> None:
        """Fetch what is missing.  While another process holds the lock on these segments, wait for it
        to store them, for PATIENCE seconds at most."""
        delay = 0.01
        patience = trio.current_time() + PATIENCE
        while True:
            with self._store.claimed(first, last) as ours:
                missing = self._store.missing(first, last)
                for number in range(first, last + 1):
                    flight = self._flights.get(number)
                    if number not in missing and flight is not None and flight.data is None:
                        self._land(number)  # another process has stored it meanwhile
                if not missing:
                    return
                if ours or trio.current_time() > patience:
                    for start, end in rows(missing, self._count):
                        await self._receive(start, end, pace)
                    for number in missing:  # keep the lock until the segments are stored
                        flight = self._flights.get(number)
                        if flight is not None and flight.data is not None:
                            await flight.stored.wait()
                    return
            await trio.sleep(delay)
            delay = min(delay * 1.5, 0.2)

    async def _receive(self, first: int, last: int, pace: Pace) -> None:
        """Cut a response into segments, and end their flights.

        A range has to arrive before the pace's deadline.  The whole blob, from a server without ranges,
        has to make progress instead."""
        start, end = first << SEGMENT_BITS, min((last + 1) << SEGMENT_BITS, self.size)
        number, buffer = -1, bytearray()
        stream = self._remote.stream(start, end, pace)
        async with aclosing(stream) as chunks:
            async for offset, chunk in chunks:
                if not self._remote.ranged:
                    pace.advance(len(chunk))
                if offset != (number << SEGMENT_BITS) + len(buffer):
                    # the first piece; or a server without ranges starts again
                    number, buffer = offset >> SEGMENT_BITS, bytearray()
                    if offset & (SEGMENT - 1):
                        raise SourceError(f"{self.name}: its bytes come in no order")
                buffer += chunk
                while buffer:
                    full = min(SEGMENT, self.size - (number << SEGMENT_BITS))
                    if len(buffer) < full:
                        break
                    whole, buffer = buffer, buffer[full:]
                    del whole[full:]
                    await self._arrived(number, whole)
                    number += 1

    async def _arrived(self, number: int, data: bytearray) -> None:
        flight = self._flights.get(number)
        if flight is None:
            if not self._absent(number, number):
                return  # already stored: a server without ranges sends it again
            flight = self._flights[number] = Flight()
        if flight.data is not None:
            return  # already fetched, by another request to such a server
        if (
            self._store.verified
        ):  # memory has dropped it: it must be what it was before anybody sees it
            await trio.to_thread.run_sync(self._store.put, number, data)
        flight.data = data
        flight.done.set()
        await self._writes.acquire_on_behalf_of(flight)
        self._nursery.start_soon(self._keep_soon, number, flight)

    async def _keep_soon(self, number: int, flight: Flight) -> None:
        assert flight.data is not None
        try:
            await trio.to_thread.run_sync(self._store.put, number, flight.data)
        except IntegrityError as e:
            log.info("%s", e)  # all that read from now on are told
            await trio.to_thread.run_sync(self._store.condemn, e)
        finally:
            self._writes.release_on_behalf_of(flight)
            flight.stored.set()
            if self._flights.get(number) is flight:
                del self._flights[number]
        self._verifier.start()

    # what the digest says -------------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """Whether all of it has been fetched."""
        return not self._store.missing(0, self._count - 1)

    async def verify(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Fetch what is missing, and check the digest over a whole pass.  ``progress``: as for Access.

        Raises IntegrityError where it is wrong, SourceError where bytes can't be had.  There must be a
        digest."""
        for number in range(self._count):
            if self.verified:
                return
            if not self._store.has(number):
                await self._read_segment(number)
            if progress is not None:
                progress(self.name, min((number + 1) << SEGMENT_BITS, self.size), self.size)
        await self._landed()
        await self._verifier.finish(self._read_segment, self._landed)

    async def _read_segment(self, number: int) -> Buffer:
        return await self.read_at(*self._store.extent(number))

    async def _landed(self) -> None:
        """Wait until what has been asked for is stored, or was not to be had."""
        for flight in [*self._flights.values()]:
            await flight.stored.wait()


def rows(numbers: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, last) of neighbours, at most ``limit`` of them together."""
    first = last = -2
    for number in numbers:
        if number != last + 1 or number - first >= limit:
            if first >= 0:
                yield first, last
            first = number
        last = number
    if first >= 0:
        yield first, last

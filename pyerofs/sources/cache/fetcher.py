"""Fetches missing segments of a blob, each once however many readers wait for it (single flight).

Adjacent segments share a request.  Requests run in background tasks, so when a reader is cancelled,
its flights continue for other readers.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Protocol

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.base import SEGMENT, SEGMENT_BITS, Buffer
from pyerofs.sources.cache.blobfiles import segments_of
from pyerofs.sources.cache.blobstore import BlobStore
from pyerofs.sources.net.transport import Pace, Traffic

log = logging.getLogger("pyerofs")

RANGE = 8  # segments of one request at most; a reader waits for its own segment only
REQUESTS = 6  # at the same time
WRITES = 8  # segments being written to disk at the same time
PATIENCE = 15.0  # seconds to wait for another process's fetch of a segment, before fetching it too


class Remote(Protocol):
    """A blob on its server."""

    name: str
    size: int  # bytes
    ranged: bool  # the server can send a range of the blob

    @property
    def traffic(self) -> Traffic:
        """Counters of requests, bytes and retries."""

    def stream(self, start: int, end: int, pace: Pace) -> AsyncGenerator[tuple[int, bytes], None]:
        """See ``HttpBlob.stream``."""

    async def aclose(self) -> None:
        """Close the connections."""


class Flight:
    """One fetch of a segment.  ``done`` is set with ``data`` or an error, ``stored`` after storing."""

    __slots__ = ("data", "done", "error", "stored")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.stored = trio.Event()
        self.data: Buffer | None = None
        self.error: SourceError | None = None


class Fetcher:
    """Fetches segments and puts them into the store."""

    def __init__(
        self,
        remote: Remote,
        store: BlobStore,
        nursery: trio.Nursery,
        timeout: float,
        stored: Callable[[], None],
    ) -> None:
        """``timeout``: seconds that a request may take.  ``stored`` is called after each segment."""
        self._name = remote.name
        self._size = remote.size
        self._remote = remote
        self._store = store
        self._nursery = nursery
        self._timeout = timeout
        self._stored = stored
        self._count = segments_of(remote.size)
        self._flights: dict[int, Flight] = {}
        self._requests = trio.CapacityLimiter(REQUESTS)
        self._writes = trio.CapacityLimiter(WRITES)
        self._urgent = 0  # requests under way that readers wait for
        self._quiet = trio.Event()

    def flight(self, number: int) -> Flight | None:
        """The flight of a segment; None unless the segment is being fetched or stored."""
        return self._flights.get(number)

    def absent(self, first: int, last: int) -> list[int]:
        """The segments from ``first`` to ``last`` that are neither stored nor being fetched."""
        missing = self._store.missing(first, min(last, self._count - 1))
        return [n for n in missing if n not in self._flights]

    def start(self, numbers: Sequence[int], *, urgent: bool) -> list[Flight]:
        """Start flights for segments, which are returned; adjacent segments share a request.  All
        missing segments are fetched if the server has no ranges.  ``urgent``: a reader waits."""
        if not numbers:
            return []
        limit = RANGE
        if not self._remote.ranged:  # the server sends the whole blob, whatever range is asked for
            numbers, limit = self.absent(0, self._count - 1), self._count
        started = []
        for first, last in rows(numbers, limit):
            for number in range(first, last + 1):
                flight = self._flights[number] = Flight()
                started.append(flight)
            self._nursery.start_soon(self._fetch, first, last, urgent)
        return started

    def too_late(self, offset: int) -> SourceError:
        return SourceError(
            f"{self._name}: no data at offset {offset} within {self._timeout:g} seconds (--timeout)"
        )

    async def lull(self) -> None:
        """Wait until no reader waits for the network."""
        while self._urgent:
            self._quiet = trio.Event()
            await self._quiet.wait()

    async def landed(self) -> None:
        """Wait until each segment that is being fetched is stored or has failed."""
        for flight in [*self._flights.values()]:
            await flight.stored.wait()

    # one request -----------------------------------------------------------------------------

    async def _fetch(self, first: int, last: int, urgent: bool) -> None:
        """Fetch adjacent segments, whose flights were started, and end these flights."""
        pace = Pace(self._timeout)
        error: SourceError | None = None
        self._urgent += urgent
        try:
            with pace.scope:
                async with self._requests:
                    await self._fetch_claimed(first, last, pace)
            if pace.scope.cancelled_caught:
                error = self.too_late(first << SEGMENT_BITS)
        except SourceError as e:
            error = e
        except OSError as e:
            error = SourceError(f"{self._name}: the cache can't be used: {e.strerror}")
        except Exception as e:  # an internal error must not end the mount
            log.exception("%s: internal error", self._name)
            error = SourceError(f"{self._name}: internal error ({type(e).__name__}), see the log")
        finally:
            self._urgent -= urgent
            if not self._urgent:
                self._quiet.set()
            for number in range(first, last + 1):
                flight = self._flights.get(number)
                if flight is not None and flight.data is None:
                    self._land(number, error)

    def _land(self, number: int, error: SourceError | None = None) -> None:
        """End a flight.  Without an error, its readers look into the store again."""
        flight = self._flights.pop(number)
        flight.error = error
        flight.done.set()
        flight.stored.set()

    async def _fetch_claimed(self, first: int, last: int, pace: Pace) -> None:
        """Fetch those of the segments that are missing.  While another process has locked some of them,
        wait until it has stored them, but not longer than PATIENCE seconds."""
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

        A range must arrive before the pace's deadline.  While a whole blob arrives, from a server
        without ranges, the pace moves its deadline on."""
        start, end = first << SEGMENT_BITS, min((last + 1) << SEGMENT_BITS, self._size)
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
                        raise SourceError(
                            f"{self._name}: the server's bytes are out of order at offset {offset}"
                        )
                buffer += chunk
                while buffer:
                    full = min(SEGMENT, self._size - (number << SEGMENT_BITS))
                    if len(buffer) < full:
                        break
                    whole, buffer = buffer, buffer[full:]
                    del whole[full:]
                    await self._arrived(number, whole)
                    number += 1

    async def _arrived(self, number: int, data: bytearray) -> None:
        flight = self._flights.get(number)
        if flight is None:
            if not self.absent(number, number):
                return  # already stored: a server without ranges sends it again
            flight = self._flights[number] = Flight()
        if flight.data is not None:
            return  # already fetched, by another request to such a server
        if self._store.verified:  # memory has dropped the segment: check it before readers get it
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
            log.info("%s", e)  # every later read raises this error
            await trio.to_thread.run_sync(self._store.condemn, e)
        finally:
            self._writes.release_on_behalf_of(flight)
            flight.stored.set()
            if self._flights.get(number) is flight:
                del self._flights[number]
        self._stored()


def rows(numbers: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ascending numbers as (first, last) of runs of adjacent ones, at most ``limit`` in a run."""
    first = last = -2
    for number in numbers:
        if number != last + 1 or number - first >= limit:
            if first >= 0:
                yield first, last
            first = number
        last = number
    if first >= 0:
        yield first, last

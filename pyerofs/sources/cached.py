"""A remote blob read through a store: what is not there is fetched, once, in large ranges.

Readers ask for bytes; what is missing becomes *flights*, one for each segment, that any number of
readers wait for.  Neighbouring segments share a request.  Requests run in the background, so a reader
that gives up leaves the flight to the others.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import trio

from pyerofs.errors import IntegrityError, SourceError
from pyerofs.sources.base import Buffer, Source, check_range, within
from pyerofs.sources.spec import SourceSpec
from pyerofs.sources.store import (
    BAD,
    COMPLETE,
    FILLING,
    SEGMENT,
    SEGMENT_BITS,
    DiskStore,
    MemoryStore,
    Store,
    segments_of,
)
from pyerofs.sources.threaded import ThreadedSource
from pyerofs.sources.transport import Traffic

log = logging.getLogger("pyerofs")

RANGE = 8  # segments of one request at most; a reader waits for its own segment only
WINDOW = 16  # segments fetched ahead of a sequential reader at most
REQUESTS = 6  # at the same time
BACKGROUND = 2  # workers that fetch what nobody waits for yet
BACKGROUND_RANGE = 4  # segments of their requests: what a reader may have to share the line with
HINTS = 256  # ranges that are remembered as needed soon
WRITES = 8  # segments on their way to the disk
GROWTH = 64  # segments after which the cache's limit is looked at again
PATIENCE = 15.0  # seconds that another process may take for a segment before we fetch it ourselves
REREADS = 3  # of a segment that is not what was stored
NEAR = 16 << 10  # bytes that a sequential reader may leave out
NEVER = 1 << 63


class Remote(Protocol):
    """Where a blob is fetched from."""

    name: str
    size: int
    ranged: bool

    @property
    def traffic(self) -> Traffic:
        """What went over the network."""

    def stream(
        self, start: int, end: int, deadline: float
    ) -> AsyncGenerator[tuple[int, bytes], None]:
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


class CachedSource:
    """An AsyncSource over a Remote and the Store for it; owns both.

    ``digest``: what all bytes together must be; verified once, when everything is there."""

    def __init__(
        self,
        remote: Remote,
        store: Store,
        nursery: trio.Nursery,
        *,
        timeout: float,
        rate: int | None = None,
        digest: str | None = None,
        pinned: SourceSpec | None = None,
        on_growth: Callable[[], object] = lambda: None,
    ) -> None:
        """``rate`` bounds what is fetched in the background, in bytes a second.  ``on_growth`` is
        called, in a thread, when a good deal was stored: time to evict."""
        self.name = remote.name
        self.size = remote.size
        self._remote = remote
        self._store = store
        self._disk = store if isinstance(store, DiskStore) else None
        self._overflow: MemoryStore | None = None  # what the disk has no room for
        self._whole = None if self._disk is None else ThreadedSource(_Stored(self.name, self._disk))
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._timeout = timeout
        self._rate = rate
        self.pinned = pinned
        self._digest = digest
        self._on_growth = on_growth
        self._count = segments_of(remote.size)
        self._flights: dict[int, Flight] = {}
        self._requests = trio.CapacityLimiter(REQUESTS)
        self._writes = trio.CapacityLimiter(WRITES)
        self._later: deque[tuple[int, int]] = deque()  # rows that will be needed
        self._workers = 0
        self._urgent = 0  # requests that readers wait for
        self._quiet = trio.Event()
        self._window = 1  # segments fetched ahead
        self._end = -NEAR - 1  # of what was read last
        self._ahead = 0  # the segment up to which they have been asked for
        self._trigger = NEVER  # reading beyond this offset, a sequential reader needs the next ones
        self._verifying = False
        self._grown = 0
        self._check_whole()

    # the AsyncSource ---------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> Buffer | None:
        """May be called from any thread."""
        if not within(self.size, offset, length):
            return None
        if offset >= self._trigger:
            self._token.run_sync_soon(self._crossed, offset >> SEGMENT_BITS, idempotent=True)
        found = self._store.peek(offset, length)
        if found is not None:
            self._end = offset + length
        return found

    @property
    def blocking(self) -> Source | None:
        """Once everything is there, the cache's file; reading it costs what any file does."""
        whole = self._whole
        return whole.blocking if whole is not None and self._store.complete else None

    @property
    def quick(self) -> bool:
        return self._whole is not None and self._whole.quick

    @property
    def backing(self) -> tuple[int, int] | None:
        return None if self._disk is None else self._disk.backing

    def will_need(self, offset: int, length: int) -> None:
        if length <= 0 or not within(self.size, offset, length) or self._store.complete:
            return
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        if len(self._later) < HINTS and self._absent(first, last):
            self._later.append((first, last))
            if self._workers < BACKGROUND:
                self._workers += 1
                self._nursery.start_soon(self._fetch_later)

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        if not length:
            return b""
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        self._start(self._absent(first, last), urgent=True)
        if abs(offset - self._end) <= NEAR:
            self._read_on(last)
        else:
            self._trigger = NEVER
        self._end = offset + length
        if self._whole is not None and self._store.complete:
            try:
                return await self._whole.read_at(offset, length)
            except IntegrityError:
                pass  # no longer complete: what is spoiled is fetched again
        if all(n not in self._flights for n in range(first, last + 1)):
            found = await trio.to_thread.run_sync(self._stored, offset, length)
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
        """Numbers for people: what there is, and what went over the network."""
        traffic = self._remote.traffic
        return {
            "name": self.name,
            "size": self.size,
            "cached": min(self._store.present() << SEGMENT_BITS, self.size),
            "complete": self._store.complete,
            "requests": traffic.requests,
            "fetched": traffic.received,
            "retries": traffic.retries,
        }

    async def forget(self, offset: int, length: int) -> bool:
        """Drop what is stored of a range: it was found to be wrong, and is to be fetched again."""
        for number in range(offset >> SEGMENT_BITS, (offset + length - 1 >> SEGMENT_BITS) + 1):
            self._store.forget(number)
            if self._overflow is not None:
                self._overflow.forget(number)
        await trio.lowlevel.checkpoint()
        return True

    # segments ----------------------------------------------------------------------------

    def seed(self, data: bytes) -> None:
        """Store the beginning of the blob, which came with an answer, as far as it makes segments."""
        if len(data) >= min(SEGMENT, self.size) and self._absent(0, 0):
            self._keep(0, data[:SEGMENT])

    def _absent(self, first: int, last: int) -> list[int]:
        """Segments that are neither stored nor on their way."""
        found = self._store.missing(first, min(last, self._count - 1))
        if self._overflow is not None:
            found = [n for n in found if self._overflow.missing(n, n)]
        return [n for n in found if n not in self._flights]

    def _crossed(self, number: int) -> None:
        """What was fetched ahead is half used up; unless it was just a read far away."""
        if number < self._ahead:
            self._read_on(number)
        else:
            self._trigger = NEVER

    def _read_on(self, number: int) -> None:
        """A reader that goes forward has come to this segment: fetch on ahead of it."""
        if not self._ahead - self._window <= number <= self._ahead:
            self._ahead, self._window = number + 1, 1
        elif number < self._ahead - self._window // 2:
            return
        self._window = min(2 * self._window, WINDOW)
        start = max(self._ahead, number + 1)
        self._ahead = min(number + 1 + self._window, self._count)
        if start < self._ahead:
            self._start(self._absent(start, self._ahead - 1), urgent=True)
            if self._disk is not None and (row := self._disk.unchecked(start, self._ahead - 1)):
                self._nursery.start_soon(self._check, self._disk, row)
        half = max(self._ahead - self._window // 2, number + 1)
        self._trigger = half << SEGMENT_BITS if self._ahead < self._count else NEVER

    async def _check(self, disk: DiskStore, row: list[int]) -> None:
        """Check stored segments before a reader gets to them."""
        try:
            await trio.to_thread.run_sync(disk.check, row)
        except OSError:
            pass  # the reader will see it

    def _start(self, numbers: Sequence[int], *, urgent: bool) -> list[Flight]:
        """Start fetching segments, neighbours together."""
        if not numbers:
            return []
        limit = RANGE
        if not self._remote.ranged:  # they all come, whatever we ask for
            numbers, limit = self._absent(0, self._count - 1), self._count
        started = []
        for first, last in rows(numbers, limit):
            for number in range(first, last + 1):
                flight = self._flights[number] = Flight()
                started.append(flight)
            self._nursery.start_soon(self._fetch, first, last, urgent)
        return started

    async def _segment(self, number: int) -> Buffer:
        """A whole segment, from wherever it is.  Raises SourceError."""
        offset = number << SEGMENT_BITS
        for _ in range(REREADS):
            flight = self._flights.get(number)
            if flight is None:
                length = min(SEGMENT, self.size - offset)
                data = await trio.to_thread.run_sync(self._stored, offset, length)
                if data is not None:
                    return data
                if self._disk is not None and self._disk.state == BAD:
                    raise IntegrityError(f"{self.name}: is not what its digest says")
                self._start(self._absent(number, number), urgent=True)
                flight = self._flights.get(number)
            if flight is not None:
                with trio.move_on_after(self._timeout) as patience:
                    await flight.done.wait()
                if patience.cancelled_caught:
                    raise self._too_late(offset)
                if flight.error is not None:
                    raise flight.error
                if flight.data is not None:
                    return flight.data
        raise SourceError(f"{self.name}: what was fetched at {offset} can't be kept")

    def _too_late(self, offset: int) -> SourceError:
        return SourceError(
            f"{self.name}: bytes at {offset} did not come within {self._timeout:g} seconds"
        )

    def _stored(self, offset: int, length: int) -> Buffer | None:
        try:
            data = self._store.read(offset, length)
        except OSError as e:
            log.warning("%s: the cache can't be read: %s", self.name, e.strerror)
            data = None
        if data is None and self._overflow is not None:
            data = self._overflow.read(offset, length)
        return data

    # fetching ----------------------------------------------------------------------------

    async def _fetch_later(self) -> None:
        """Fetch what will be needed, when no reader waits for something else."""
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
                            return  # whoever reads there will see it
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
        """Fetch a row of segments for which there are flights."""
        start = trio.current_time()
        # one long download of everything is bounded by its readers' deadlines only
        deadline = start + self._timeout if self._remote.ranged else float("inf")
        error: SourceError | None = None
        self._urgent += urgent
        try:
            with trio.fail_at(deadline):
                async with self._requests:
                    await self._fetch_claimed(first, last, deadline)
        except SourceError as e:
            error = e
        except trio.TooSlowError:
            error = self._too_late(first << SEGMENT_BITS)
        except OSError as e:
            error = SourceError(f"{self.name}: the cache can't be used: {e.strerror}")
        except Exception as e:  # a mistake of ours must not end the mount
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

    async def _fetch_claimed(self, first: int, last: int, deadline: float) -> None:
        """Fetch, unless another process is doing so: then wait until it has."""
        disk = self._disk
        if disk is None:
            await self._receive(first, last, deadline)
            return
        delay = 0.01
        patience = trio.current_time() + PATIENCE
        while True:
            with disk.claimed(first, last) as ours:
                missing = disk.missing(first, last)
                for number in range(first, last + 1):
                    flight = self._flights.get(number)
                    if number not in missing and flight is not None and flight.data is None:
                        self._land(number)  # another process has stored it meanwhile
                if not missing:
                    return
                if ours or trio.current_time() > patience:
                    for start, end in rows(missing, self._count):
                        await self._receive(start, end, deadline)
                    for number in missing:  # until it is stored, others had better not fetch it
                        flight = self._flights.get(number)
                        if flight is not None and flight.data is not None:
                            await flight.stored.wait()
                    return
            await trio.sleep(delay)
            delay = min(delay * 1.5, 0.2)

    async def _receive(self, first: int, last: int, deadline: float) -> None:
        """Make segments of what comes over the network."""
        start, end = first << SEGMENT_BITS, min((last + 1) << SEGMENT_BITS, self.size)
        number, buffer = -1, bytearray()
        async with aclosing(self._remote.stream(start, end, deadline)) as chunks:
            async for offset, chunk in chunks:
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
                return  # a server without ranges sends what we have, too
            flight = self._flights[number] = Flight()
        if flight.data is not None:
            return  # and does so for each request
        flight.data = data
        flight.done.set()
        await self._writes.acquire_on_behalf_of(flight)
        self._nursery.start_soon(self._keep_soon, number, flight)

    async def _keep_soon(self, number: int, flight: Flight) -> None:
        assert flight.data is not None
        try:
            await trio.to_thread.run_sync(self._keep, number, flight.data)
        finally:
            self._writes.release_on_behalf_of(flight)
            flight.stored.set()
            if self._flights.get(number) is flight:
                del self._flights[number]
        self._grown += 1
        try:
            if self._grown >= GROWTH:
                self._grown = 0
                await trio.to_thread.run_sync(self._on_growth)
            self._check_whole()
        except (OSError, SourceError) as e:
            log.warning("%s: the cache can't be looked after: %s", self.name, e)

    def _keep(self, number: int, data: Buffer) -> None:
        if self._overflow is None:
            try:
                self._store.put(number, data)
                return
            except OSError as e:
                log.warning(
                    "%s: the cache has no room (%s); going on without it", self.name, e.strerror
                )
                self._overflow = MemoryStore(self.size)
        self._overflow.put(number, data)

    # when everything is there --------------------------------------------------------------

    def _check_whole(self) -> None:
        """Verify the digest once nothing is missing any more."""
        disk = self._disk
        if disk is None or self._verifying or disk.state != FILLING:
            return
        if disk.present() == disk.count:
            self._verifying = True
            self._nursery.start_soon(self._verify_whole, disk)

    async def _verify_whole(self, disk: DiskStore) -> None:
        try:
            right = await trio.to_thread.run_sync(
                whole_matches, disk.path, self.size, self._digest, abandon_on_cancel=True
            )
        except (SourceError, OSError) as e:
            log.warning("%s: the cache can't be read: %s", self.name, e)
            return
        finally:
            self._verifying = False
        if right:
            disk.set_state(COMPLETE)
            log.info("%s: complete, and verified", self.name)
        elif right is not None:
            log.error("%s: is not what its digest says; discarded", self.name)
            disk.discard()


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


def whole_matches(path: str, size: int, digest: str | None) -> bool | None:
    """Whether the segments of a blob in the cache have a digest together (True where there is none to
    have); None if one of them is missing or spoiled.  What is right is on the disk afterwards.
    Blocks for as long as it takes to read everything."""
    algorithm, _, wanted = (digest or "sha256:").partition(":")
    found = hashlib.new(algorithm)
    store = DiskStore(path, size, {})  # of its own: the caller may close its one meanwhile
    try:
        for number in range(store.count):
            data = store.segment(number)
            if data is None:
                return None
            if digest is not None:
                found.update(data)
        store.sync()
        return digest is None or found.hexdigest() == wanted
    finally:
        store.close()


class _Stored:
    """A complete blob for worker threads."""

    def __init__(self, name: str, store: DiskStore) -> None:
        self.name = name
        self.size = store.size
        self.peek = store.peek
        self.backing = None
        self._store = store

    def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        data = self._store.read(offset, length)
        if data is None:
            raise IntegrityError(f"{self.name}: what the cache holds at {offset} is spoiled")
        return data

    def close(self) -> None:
        pass

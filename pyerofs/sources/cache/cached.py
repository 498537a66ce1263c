"""A remote blob read through its cache: missing segments are fetched once, in large ranges.

Fetched bytes are claimed, not verified (``store``).  Once the whole blob is on disk, its digest is
checked in the background (``verifier``).  ``verify`` fetches the missing segments and waits for that
check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

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
from pyerofs.sources.cache.background import Background
from pyerofs.sources.cache.blobfiles import segments_of
from pyerofs.sources.cache.blobstore import BlobStore
from pyerofs.sources.cache.fetcher import Fetcher, Remote
from pyerofs.sources.cache.verifier import Verifier
from pyerofs.sources.local.threaded import ThreadedSource
from pyerofs.sources.spec import SourceSpec

log = logging.getLogger("pyerofs")

REREADS = 3  # attempts to read a segment whose checksum is wrong or that was evicted


class CachedSource(AsyncSource):
    """An AsyncSource over a Remote and the store of its blob.  Owns both."""

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
        """``timeout`` bounds each read, in seconds; ``rate`` each task that fetches in the background,
        in bytes a second.  ``pinned``: the spec that names these bytes by digest."""
        self.name = remote.name
        self.size = remote.size
        self._remote = remote
        self._store = store
        self._whole = ThreadedSource(store)
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._timeout = timeout
        self._pinned = pinned
        self._count = segments_of(remote.size)
        self._ahead = ReadAhead(self._count)
        self._verifier = Verifier(store, nursery)
        self._fetcher = Fetcher(remote, store, nursery, timeout, self._verifier.start)
        self._background = Background(self._fetcher, nursery, rate)
        self._verifier.start()

    # the AsyncSource ---------------------------------------------------------------------

    def peek(self, offset: int, length: int) -> Buffer | None:
        """May be called from any thread."""
        if not within(self.size, offset, length):
            return None
        if offset >= self._ahead.trigger:
            self._token.run_sync_soon(self._crossed, offset >> SEGMENT_BITS, idempotent=True)
        data = self._store.peek(offset, length)
        if data is not None:
            self._ahead.peeked(offset + length)
        return data

    @property
    def blocking(self) -> Source | None:
        """The cache's file, once the whole blob is in it."""
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
        """The digest that the whole blob must have; None if none is known."""
        return self._store.digest

    @property
    def verified(self) -> bool:
        """Whether a whole pass found that the blob matches its digest."""
        return self._store.verified

    def will_need(self, offset: int, length: int) -> None:
        if length <= 0 or not within(self.size, offset, length) or self._store.complete:
            return
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        near = min(last, first + WINDOW)  # checking all of a large range would take too long
        if self._background.is_full:
            return
        if near < last or self._fetcher.absent(first, near):
            self._background.add(first, last)

    async def read_at(self, offset: int, length: int) -> Buffer:
        check_range(self.name, self.size, offset, length)
        if not length:
            return b""
        with trio.move_on_after(self._timeout):
            return await self._read(offset, length)
        raise self._fetcher.too_late(offset)

    async def _read(self, offset: int, length: int) -> Buffer:
        if self._store.error is not None:
            raise self._store.error
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS
        self._fetcher.start(self._fetcher.absent(first, last), urgent=True)
        self._fetch_ahead(self._ahead.read(offset, length))
        if self._store.complete:
            try:
                return await self._whole.read_at(offset, length)
            except IntegrityError:
                pass  # damaged segments are fetched again below
        if not any(map(self._fetcher.flight, range(first, last + 1))):
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
        """What is cached and verified, and how much was requested and received."""
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
        """Drop the segments of a range whose bytes were found wrong.  True if fetching them again may
        bring other bytes."""
        first, last = offset >> SEGMENT_BITS, offset + length - 1 >> SEGMENT_BITS

        def forget() -> bool:
            again = [self._store.forget(number) for number in range(first, last + 1)]
            return any(again)

        return await trio.to_thread.run_sync(forget)

    # segments ----------------------------------------------------------------------------

    def seed(self, data: bytes) -> None:
        """Store the first segment if ``data``, the blob's first bytes, has all of it.  Blocks."""
        if len(data) >= min(SEGMENT, self.size) and self._fetcher.absent(0, 0):
            with self._store.claimed(0, 0) as ours:
                if ours:
                    self._store.put(0, data[:SEGMENT])

    def _crossed(self, number: int) -> None:
        """Fetch ahead, since a reader has used half of the segments that were fetched ahead."""
        self._fetch_ahead(self._ahead.crossed(number))

    def _fetch_ahead(self, numbers: range) -> None:
        """Fetch and check the segments that a sequential reader will need next."""
        if numbers:
            first, last = numbers[0], numbers[-1]
            self._fetcher.start(self._fetcher.absent(first, last), urgent=True)
            if self._store.unchecked(first, last):
                self._nursery.start_soon(self._check, first, last)

    async def _check(self, first: int, last: int) -> None:
        """Check stored segments before a reader gets to them."""
        try:
            await trio.to_thread.run_sync(self._store.check, first, last)
        except OSError:
            pass  # the reader of that segment meets the same error

    async def _segment(self, number: int) -> Buffer:
        """One segment, from the store or fetched.  Raises SourceError."""
        offset, length = self._store.extent(number)
        for _ in range(REREADS):
            flight = self._fetcher.flight(number)
            if self._store.error is not None:
                raise self._store.error
            if flight is None:
                data = await trio.to_thread.run_sync(self._store.read, offset, length)
                if data is not None:
                    return data
                self._fetcher.start(self._fetcher.absent(number, number), urgent=True)
                flight = self._fetcher.flight(number)
            if flight is not None:
                await flight.done.wait()
                if flight.error is not None:
                    raise flight.error
                if flight.data is not None:
                    return flight.data
        raise SourceError(
            f"{self.name}: the data fetched at offset {offset} can't be read back from the cache"
        )

    # verifying ---------------------------------------------------------------------------

    @property
    def whole(self) -> bool:
        """Whether every segment is stored."""
        return not self._store.missing(0, self._count - 1)

    async def verify(self, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Fetch the missing segments, and check the digest in a whole pass.  ``progress``: as in
        ``Access``.  The blob must have a digest.

        Raises IntegrityError if the blob does not match it, SourceError if bytes can't be fetched."""
        for number in range(self._count):
            if self.verified:
                return
            if not self._store.has(number):
                await self._read_segment(number)
            if progress is not None:
                progress(self.name, min((number + 1) << SEGMENT_BITS, self.size), self.size)
        await self._fetcher.landed()
        await self._verifier.finish(self._read_segment, self._fetcher.landed)

    async def _read_segment(self, number: int) -> Buffer:
        return await self.read_at(*self._store.extent(number))

"""Fetches hinted ranges of a blob while no reader waits for the network."""

from __future__ import annotations

from collections import deque

import trio

from pyerofs.sources.base import SEGMENT_BITS
from pyerofs.sources.cache.fetcher import Fetcher

TASKS = 2  # tasks that fetch hinted ranges
RANGE = 4  # segments of one of their requests: few, since a reader may have to share the bandwidth
HINTS = 256  # hinted ranges in the queue at most


class Background:
    """The queue of hinted ranges, and the tasks that fetch them."""

    def __init__(self, fetcher: Fetcher, nursery: trio.Nursery, rate: int | None) -> None:
        """``rate`` bounds each task, in bytes a second; None: no bound."""
        self._fetcher = fetcher
        self._nursery = nursery
        self._rate = rate
        self._ranges: deque[tuple[int, int]] = deque()
        self._tasks = 0

    @property
    def is_full(self) -> bool:
        """Whether ``add`` drops what it is given."""
        return len(self._ranges) >= HINTS

    def add(self, first: int, last: int) -> None:
        """Have the segments ``first`` to ``last``, which must exist, fetched.  Drops the hint if the
        queue is full."""
        if self.is_full:
            return
        self._ranges.append((first, last))
        if self._tasks < TASKS:
            self._tasks += 1
            self._nursery.start_soon(self._fetch)

    async def _fetch(self) -> None:
        try:
            while self._ranges:
                first, last = self._ranges.popleft()
                for start in range(first, last + 1, RANGE):
                    if not await self._fetch_range(start, min(last, start + RANGE - 1)):
                        return
        finally:
            self._tasks -= 1

    async def _fetch_range(self, first: int, last: int) -> bool:
        """Fetch part of a hinted range.  False if that failed; a reader will get the error."""
        await self._fetcher.lull()
        started = trio.current_time()
        numbers = self._fetcher.absent(first, last)
        for flight in self._fetcher.start(numbers, urgent=False):
            await flight.done.wait()
            if flight.error is not None:
                return False
        if numbers and self._rate:
            await trio.sleep_until(started + (len(numbers) << SEGMENT_BITS) / self._rate)
        return True

"""A blocking source as an AsyncSource: cached bytes at once, other reads in worker threads."""

from __future__ import annotations

import time

import trio

from pyerofs.sources.base import QUICK_NS, AsyncSource, Buffer, Source, hint

MAX_THREADS = 16  # disks profit from a queue; more threads would only cost memory


class ThreadedSource(AsyncSource):
    """An AsyncSource over a Source, which it owns."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.size = source.size
        self._source = source
        self._timed = _Timed(source)
        self._limiter = trio.CapacityLimiter(MAX_THREADS)

    def peek(self, offset: int, length: int) -> Buffer | None:
        return self._source.peek(offset, length)

    async def read_at(self, offset: int, length: int) -> Buffer:
        """Read in a worker thread.  When cancelled, the thread is left to finish on its own."""
        return await trio.to_thread.run_sync(
            self._timed.read_at, offset, length, abandon_on_cancel=True, limiter=self._limiter
        )

    def will_need(self, offset: int, length: int) -> None:
        hint(self._source, offset, length)

    @property
    def blocking(self) -> Source:
        return self._timed

    @property
    def backing(self) -> tuple[int, int] | None:
        return self._source.backing

    @property
    def quick(self) -> bool:
        return self._timed.latency < QUICK_NS

    async def aclose(self) -> None:
        """Close the source.  Not a checkpoint."""
        self._source.close()


class _Timed:
    """A source that measures the latency of its reads."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.size = source.size
        self.peek = source.peek
        self.close = source.close
        self.backing = source.backing
        self.latency = 10.0 * QUICK_NS  # a moving average; slow until proven otherwise
        self._source = source

    def read_at(self, offset: int, length: int) -> Buffer:
        start = time.perf_counter_ns()
        found = self._source.read_at(offset, length)
        taken = time.perf_counter_ns() - start
        if taken > self.latency:
            self.latency = taken  # one slow read makes the source count as slow again
        else:
            self.latency += (taken - self.latency) / 4
        return found

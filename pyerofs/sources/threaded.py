"""A blocking source seen from trio: what is in memory at once, the rest in worker threads."""

from __future__ import annotations

import trio

from pyerofs.sources.base import Buffer, Source

MAX_THREADS = 16  # disks like a queue; more would only cost memory


class ThreadedSource:
    """An AsyncSource over a Source, which it owns."""

    def __init__(self, source: Source) -> None:
        self.blocking: Source | None = source
        self._source = source
        self._limiter = trio.CapacityLimiter(MAX_THREADS)
        self.name = source.name
        self.size = source.size
        self.peek = source.peek

    async def read_at(self, offset: int, length: int) -> Buffer:
        """Read in a worker thread.  When cancelled, the thread is left to finish on its own."""
        return await trio.to_thread.run_sync(
            self._source.read_at, offset, length, abandon_on_cancel=True, limiter=self._limiter
        )

    async def aclose(self) -> None:
        """Close the source.  Not a checkpoint."""
        self._source.close()
